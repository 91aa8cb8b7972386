"""What recomputing less or more costs: closed forms against the schedule that runs, and the best choice
against all of them."""

import pytest

from training.planning import activations, griewank, timing
from training.shapes import shape_from_config
from training.trainer.recompute import Group, schedule

SHAPE = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 256, "vocab_size": 500, "max_position_embeddings": 512}
VALUES = {"lora.enabled": True, "lora.rank": 8, "lora.targets": [], "training.checkpointing": True,
          "dataset.context_tokens": 512, "dataset.target_tokens": 512, "dataset.fim_share": 0.0,
          "dataset.whole_share": 0.0, "dataset.commit_share": 0.0, "dataset.replay": ""}


def simulated(groups, kept_layers, an_input, a_layer):
    """Forward computations beside the first, and most bytes held, of a backward pass carried out in steps.
    `a_layer`: activations of one layer with its input."""
    most = [len(groups) * an_input + kept_layers * a_layer]
    computed = [0]

    def back(group, before):
        computed[0] += sum(part.layers for part in group.parts) + 1
        most[0] = max(most[0], (before + len(group.parts)) * an_input + a_layer)
        for index, part in reversed(list(enumerate(group.parts))):
            back(part, before + index)
    for index, group in reversed(list(enumerate(groups))):
        back(group, index)
    return computed[0], most[0]


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 10, 17, 24])
def test_the_closed_forms_are_the_schedules_figures(layers):
    for slots in range(1, layers + 1):
        computed, held = simulated(schedule(layers, slots), 0, 1, 1)
        assert griewank.forwards(layers, slots) == computed
        assert griewank.inputs(layers, slots) == held


@pytest.mark.parametrize(("layers", "an_input", "a_layer"), [(1, 4, 9), (5, 4, 40), (8, 4, 5), (12, 1, 16)])
def test_the_best_choice_is_that_of_trying_them_all(layers, an_input, a_layer):
    ways = [((), layers)] + [((Group(1),) * (layers - kept), kept) for kept in range(layers)]
    ways += [(schedule(layers, slots), 0) for slots in range(1, layers)]
    costs = [simulated(groups, kept, an_input, a_layer) for groups, kept in ways]
    for room in range(layers * a_layer + 2):
        found = griewank.best(layers, an_input, a_layer, room)
        fitting = [cost for cost in costs if cost[1] <= room]
        assert (found and (found.forwards, found.held_bytes)) == min(fitting, default=None)


def test_a_hundred_layers_in_eight_inputs_run_two_and_a_half_times():
    assert [griewank.forwards(100, slots) for slots in (100, 20, 8)] == [100, 180, 248]


def test_the_plan_names_what_is_held():
    shape = shape_from_config({"model_type": "llama", **SHAPE})
    whole = {**VALUES, "model.dtype": "float32", "training.micro_batch": 2, "deepspeed.stage": 0}
    state = 2 * 512 * 128 * 4
    every = activations.moments(shape, whole)
    fewer = activations.moments(shape, {**whole, "training.kept_inputs": 2})
    assert every["loss"][0] - fewer["loss"][0] == 4 * state
    assert every["mlp"][0] - fewer["mlp"][0] == 3 * state        # 3 alive with the layer's own
    more = activations.moments(shape, {**whole, "training.kept_layers": 3})
    none = activations.moments(shape, {**whole, "training.checkpointing": False})
    assert more["loss"][0] == every["loss"][0] / 2 + none["loss"][0] / 2
    all_ = activations.moments(shape, {**whole, "training.kept_layers": 6})
    assert all_ == none


def counted(kept_layers, kept_inputs, lora):
    """Operations that PyTorch counts in a step, and the planned ones."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.trainer.recompute import select
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    shape = shape_from_config({"model_type": "llama", **SHAPE})
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=sorted({x.name for x in shape.linears})))
    select(model.train(), kept_layers, kept_inputs)
    ids = torch.randint(0, 500, (1, 512))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    return sum(counts.values()) - attention, timing.window_flops(shape, {
        **VALUES, "lora.enabled": lora, "training.kept_layers": kept_layers,
        "training.kept_inputs": kept_inputs})


@pytest.mark.parametrize(("kept", "lora"), [((0, 0), False), ((0, 2), False), ((0, 1), True), ((3, 0), True)])
def test_linear_operations_of_recomputed_layers_are_what_pytorch_counts(kept, lora):
    measured, planned = counted(*kept, lora)
    assert planned.linear == pytest.approx(measured, rel=0.05)


def test_kept_layers_save_their_share_of_the_recomputation():
    shape = shape_from_config({"model_type": "llama", **SHAPE})
    flops = {kept: timing.window_flops(shape, {**VALUES, "training.kept_layers": kept}) for kept in (0, 3, 6)}
    off = timing.window_flops(shape, {**VALUES, "training.checkpointing": False})
    assert flops[6] == off
    assert flops[0].linear - flops[3].linear == pytest.approx(flops[3].linear - off.linear)
    assert flops[0].attention / off.attention == pytest.approx(4.5 / 3.5)
