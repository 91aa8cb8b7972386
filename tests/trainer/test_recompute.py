"""Which activations are kept: the schedule against its theory, gradients to the bit, bytes as predicted."""

import heapq
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measured_steps import live_bytes
from training.errors import UsageError
from training.settings import Config
from training.trainer import recompute
from training.trainer.imports import quick_imports
from training.trainer.loading import load
from training.trainer.loss import causal_lm, causal_loss, verify_chunked
from training.trainer.recompute import Group, schedule

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
         "vocab_size": 64, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 0,
         "eos_token_id": 0, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "attention_dropout": 0.1, "rotary_dim": 8}
LAYERS, CPU = 7, torch.device("cpu")


def make(family="llama", layers=LAYERS, **more):
    with quick_imports():
        from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, "num_hidden_layers": layers, **more})
    return AutoModelForCausalLM.from_config(config).train()


def adapted(**more):
    from peft import LoraConfig, get_peft_model
    model = make(**more).requires_grad_(False)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"],
                                            init_lora_weights=False))


def per_layer(model):
    """The reference: Transformers' own recomputation of each layer."""
    inner = causal_lm(model)
    inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    inner.disable_input_require_grads()
    return model


def batch(tokens=48, rows=2):
    ids = torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :tokens - 8] = -100
    return ids, labels


def learned(model, given=None):
    """Loss and gradients; dropout draws from one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    total, _ = causal_loss(model, *(given or batch()), None, 8)
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])] == []


def forwards(groups):
    return sum(group.forwards for group in groups)


def griewank(steps, slots):
    """Forward steps beside those that tape: t = r l - C(s + r, r - 1), r the least with C(s + r, s) >= l
    (Griewank & Walther 2000, proposition 1)."""
    r = next(r for r in range(steps) if math.comb(slots + r, slots) >= steps)
    return r * steps - (math.comb(slots + r, r - 1) if r else 0)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8, 13, 20])
def test_the_schedule_takes_the_binomial_number_of_computations(layers):
    for slots in range(1, layers + 2):
        groups = schedule(layers, slots)
        assert sum(group.layers for group in groups) == layers
        assert forwards(groups) == griewank(layers + 1, min(slots, layers))   # the loss is one step more


@pytest.mark.parametrize(("layers", "slots"), [(4, 1), (4, 2), (5, 2), (6, 2), (6, 3), (7, 3)])
def test_no_order_of_moves_at_all_takes_fewer_computations(layers, slots):
    """Dijkstra over every state: inputs held, the one at hand, and how many layers are left to go back."""
    queue, seen = [(0, 0, (), layers + 1)], set()
    while queue:
        cost, *state = heapq.heappop(queue)
        at, held, left = state
        if left == 0:
            break
        if tuple(state) in seen:
            continue
        seen.add(tuple(state))
        moves = [(cost, at, tuple(h for h in held if h != one), left) for one in held]
        moves += [(cost, one, held, left) for one in held]
        if len(held) < slots and at not in held and at >= 0:
            moves.append((cost, at, tuple(sorted((*held, at))), left))
        if 0 <= at < left - 1:
            moves.append((cost + 1, at + 1, held, left))
        if at == left - 1:
            moves.append((cost, -1, held, left - 1))
        for move in moves:
            heapq.heappush(queue, move)
    assert forwards(schedule(layers, slots)) == cost


def held(groups):
    return max(before + group.inputs for before, group in enumerate(groups))


@pytest.mark.parametrize("layers", [1, 4, 9, 16])
def test_no_more_inputs_are_held_than_there_are_slots(layers):
    for slots in range(1, layers + 1):
        most = slots - (layers <= slots * (slots + 1) // 2)   # beside the one that is worked with
        assert held(schedule(layers, slots)) == most


@pytest.mark.parametrize("root", [2, 3, 4, 5])
def test_the_two_level_scheme_is_never_cheaper_in_the_same_memory(root):
    """Chen et al. 2016 (arXiv:1604.06174, section 4.1): sqrt(L) groups of sqrt(L) layers."""
    chen = (Group(root, (Group(1),) * (root - 1)),) * root
    assert (forwards(chen), held(chen)) == (2 * root ** 2 - root, 2 * root - 2)
    ours = schedule(root ** 2, 2 * root - 2)
    assert held(ours) <= held(chen)
    assert forwards(ours) < forwards(chen) or root == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("kept", [(0, 1), (0, 3), (0, 6), (2, 0)], ids=str)
def test_gradients_equal_those_of_recomputing_each_layer_to_the_bit(family, kept):
    model = make(family)
    layers = recompute.select(model, *kept)
    assert layers.forwards == forwards(schedule(LAYERS - kept[0], kept[1] or LAYERS))
    assert_same(learned(model), learned(per_layer(make(family))))


def test_an_adapter_learns_the_same_over_a_frozen_input():
    model = adapted()
    recompute.select(model, 0, 2)
    assert_same(learned(model), learned(per_layer(adapted())))


def test_hand_made_groups_are_carried_out_too():
    model = make(layers=4)
    recompute.Layers(model, (Group(2, (Group(1),)),) * 2)
    assert_same(learned(model), learned(per_layer(make(layers=4))))


@pytest.mark.parametrize("kept", [(0, 1), (0, 2), (0, 4), (0, 7), (3, 0), (7, 0)], ids=str)
def test_layers_run_as_often_as_the_schedule_says(kept):
    model, calls = make(), []
    layers = recompute.select(model, *kept)
    assert verify_chunked(model)
    for layer in layers.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    learned(model)
    assert len(calls) == LAYERS + layers.forwards
    assert layers.forwards == (0 if kept[0] == LAYERS else forwards(
        schedule(LAYERS - kept[0], kept[1] or LAYERS)))


def peak_bytes(kept):
    """Most bytes alive in a step whose gradients exist already, and those of one hidden state."""
    model, given = make(), batch(512, 1)
    recompute.select(model, *kept)

    def step():
        causal_loss(model, *given, None, 8)[0].backward()
    step()
    return live_bytes(step)[0], 512 * SIZES["hidden_size"] * 4


def test_memory_falls_by_each_input_that_is_not_held_and_rises_by_each_layer_that_is_kept():
    (every, state), (three, _), (one, _) = (peak_bytes(kept) for kept in ((0, 0), (0, 3), (0, 1)))
    assert held(schedule(LAYERS, 3)) == 3
    assert (every - three) / state == pytest.approx(6 - 3, abs=0.1)
    assert (every - one) / state == pytest.approx(6 - 1, abs=0.1)
    (two, _), (four, _) = (peak_bytes(kept) for kept in ((2, 0), (4, 0)))
    assert every < two < four
    assert (four - two) / state > 2 * 10        # a layer of this shape keeps about 17 times its input


def test_evaluation_and_generation_call_each_layer_once_and_answer_the_same():
    plain, model, calls = make().eval(), make(), []
    recompute.select(model, 0, 2)
    assert verify_chunked(model.eval())
    for layer in causal_lm(model).model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    ids, labels = batch()
    with torch.no_grad():
        assert torch.equal(causal_loss(model, ids, labels, None, 8)[0],
                           causal_loss(plain, ids, labels, None, 8)[0])
        assert len(calls) == LAYERS
        model.train()
        assert len(model(ids, use_cache=True).past_key_values) == LAYERS
        model.eval()
    written = [each.generate(ids[:1, :8], max_new_tokens=4, do_sample=False) for each in (model, plain)]
    assert torch.equal(*written)


@pytest.mark.parametrize(("kept", "message"), [
    ((8, 0), r"^training\.kept_layers is 8 and the model has 7 layers; set it to 7 at most\.$"),
    ((0, 8), r"^training\.kept_inputs is 8 and the model has 7 layers; set it to 7 at most\.$")])
def test_more_than_there_are_layers_is_refused(kept, message):
    with pytest.raises(UsageError, match=message):
        recompute.select(make(), *kept)


def test_a_decoder_that_does_more_between_its_layers_is_refused():
    model = make()
    model.model.layers[2].register_forward_hook(lambda *given: given[2] * 2)
    with pytest.raises(UsageError, match=r"^This family's decoder does more than call its layers one after "
                                         r"the other, so groups of them cannot be recomputed"):
        recompute.select(model, 0, 2)


def test_a_step_that_leaves_a_layer_out_is_refused():
    model = make()
    recompute.select(model, 0, 1)
    del causal_lm(model).model.layers[2]
    causal_lm(model).config.num_hidden_layers -= 1
    with pytest.raises(UsageError, match=r"^A decoder layer was left out of a training step"):
        learned(model)


@pytest.mark.parametrize(("kept", "note"), [
    ({"training.kept_inputs": 2}, "Recomputed: 6 forward computations of a layer beside the first 4; kept: "
                                  "2 inputs."),
    ({"training.kept_layers": 3}, "Recomputed: 1 forward computations of a layer beside the first 4; kept: "
                                  "3 layers.")])
def test_a_configuration_asks_for_it_by_its_keys(kept, note):
    config = {"embedded.hidden": 64, "embedded.mlp": 128, "dataset.context_tokens": 96,
              "dataset.target_tokens": 32, "training.checkpointing": True}
    store = SimpleNamespace(vocab_tokens=64, pad_id=0, eos_id=0)
    loaded, plain = (load(Config({**config, **more}), store, CPU) for more in (kept, {}))
    assert note in loaded.notes
    assert_same(learned(loaded.model), learned(plain.model))
