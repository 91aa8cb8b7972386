"""Which parameters train: adapters, part of the layers, quantized bases, and dropout that is replayed."""

import pytest
import torch
from families import assert_equal, gradients, make, plain, scattered, streamed, tokens
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from training.longcontext import StreamedStep, StreamPolicy, Unsupported
from training.longcontext.passes import Run

POLICY = StreamPolicy(chunk_tokens=8, loss_tokens=5)
LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(family="Llama", dropout=0.0, **changes):
    """A model with random adapters; PEFT starts one of their two factors at 0."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=LINEAR, **changes)
    model = get_peft_model(make(family), config).double().train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def only(model, *wanted):
    """Freeze all but the parameters whose name holds one of `wanted`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in wanted))
    return model


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Qwen3"])
def test_adapters_get_eagers_gradients_and_the_base_gets_none(family):
    model = adapted(family)
    ids, labels = tokens(2, 29)
    found = streamed(model, POLICY, ids, labels)
    assert_equal(found, plain(model, ids, labels))
    assert len(found.grads) == 2 * len(LINEAR) * 3
    assert all("lora_" in name and grad is not None for name, grad in found.grads.items())


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"},
                                     {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
                         ids=str)
def test_variants_of_adapters(changes):
    model = adapted(**changes)
    ids, labels = tokens(2, 29)
    assert_equal(streamed(model, POLICY, ids, labels), plain(model, ids, labels))


TRAINED = [("lm_head",), ("embed_tokens",), ("model.norm",), ("embed_tokens", "lm_head"), ("layers.2.",),
           ("layers.1.mlp",), ("layers.0.self_attn.q_proj",), ("layers.2.self_attn.v_proj", "lm_head"),
           ("layers.0.", "layers.2."), ("norm",), ("layers",)]


@pytest.mark.parametrize("wanted", TRAINED, ids="+".join)
@pytest.mark.parametrize("keep_every", [1, 2])
def test_any_part_of_the_model_may_be_what_trains(wanted, keep_every):
    model = only(make("Llama", tie_word_embeddings=False), *wanted)
    ids, labels = tokens(2, 29)
    policy = StreamPolicy(chunk_tokens=8, loss_tokens=5, keep_every=keep_every)
    found = streamed(model, policy, ids, labels)
    assert_equal(found, plain(model, ids, labels))
    assert all(grad is not None for grad in found.grads.values())


def test_layers_below_the_lowest_trained_one_are_not_visited_again(monkeypatch):
    visited = []
    through = Run.backward_layer
    monkeypatch.setattr(Run, "backward_layer", lambda run, layer, *others:
                        visited.append(layer) or through(run, layer, *others))
    model = only(make("Llama", num_hidden_layers=5, tie_word_embeddings=False), "layers.3.", "layers.4.")
    ids, labels = tokens(1, 21)
    assert_equal(streamed(model, POLICY, ids, labels), plain(model, ids, labels))
    assert visited == [4, 3]


def test_hooks_fire_once_for_each_parameter_and_step():
    model = make("Llama", tie_word_embeddings=True)
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    ids, labels = tokens(1, 21)
    streamed(model, POLICY, ids, labels)
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


def slope(model, step, ids, labels, seed):
    """The gradient's length, and the loss's central difference along it, on the same masks.

    Along a random direction the fp32 norms and rotations inside the model hide the slope.
    """
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss():
        torch.manual_seed(seed)
        return step(ids, labels)

    gradients(model, loss)
    model.zero_grad(set_to_none=True)
    loss().backward()
    found = sum(float(p.grad.square().sum()) for p in trained) ** 0.5
    directions = [p.grad / found for p in trained]
    values, size = [], 1e-4
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter += sign * size * direction
            values.append(float(loss()))
            for parameter, direction in zip(trained, directions, strict=True):
                parameter -= sign * size * direction
    return found, (values[0] - values[1]) / (2 * size)


DROPPED = {
    "adapter": lambda: adapted(dropout=0.4),
    "every dropout of GPT-2": lambda: make("GPT2", resid_pdrop=0.3, embd_pdrop=0.3),
    "residuals of Starcoder 2": lambda: make("Starcoder2", residual_dropout=0.3, embedding_dropout=0.3),
}


@pytest.mark.parametrize("policy", [{}, {"keep_every": 2}, {"attention": "keep", "keys": "keep"},
                                    {"mlp_tokens": 3}, {"inputs": "disk", "pages": "pageable"}], ids=str)
@pytest.mark.parametrize("model", DROPPED.values(), ids=DROPPED)
def test_dropout_is_replayed_at_every_visit(model, policy):
    """The gradient is the slope of the loss that the same masks give; masks drawn anew would have another.
    """
    made = model()
    ids, labels = tokens(2, 29)
    step = StreamedStep(made, StreamPolicy(chunk_tokens=8, **policy))
    found, expected = slope(made, step, ids, labels, seed=11)
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)


def test_dropout_masks_differ_between_steps_chunks_and_layers():
    model = adapted(dropout=0.4)
    masks = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *call: masks.append(tuple((call[-1] == 0).view(-1).tolist())))
    ids, labels = tokens(1, 24)
    step = StreamedStep(model, POLICY)
    with torch.no_grad():
        step(ids, labels)
        first, count = set(masks), len(masks)
        step(ids, labels)
    assert len(first) == count
    assert not first & set(masks[count:])


def test_dropout_leaves_the_random_state_as_one_draw_would():
    model = adapted(dropout=0.4)
    ids, labels = tokens(1, 24)
    torch.manual_seed(5)
    torch.randint(1 << 62, ())
    expected = torch.rand(())
    torch.manual_seed(5)
    streamed(model, POLICY, ids, labels)
    assert torch.equal(torch.rand(()), expected)


def quantized(model):
    """Linear layers of the decoder in NF4, dequantized to float32."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for home in (layer.self_attn, layer.mlp):
            for name, linear in list(home.named_children()):
                if isinstance(linear, nn.Linear):
                    new = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                                     compute_dtype=torch.float32)
                    new.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(home, name, new.to("cpu"))
    return model


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_adapters_on_a_base_of_four_bits(weights):
    model = quantized(make("Llama", dtype=torch.float32, attention_bias=False, mlp_bias=False, hidden_size=64,
                           intermediate_size=64, head_dim=16))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    ids, labels = tokens(2, 29)
    expected = plain(model, ids, labels)
    found = streamed(model, StreamPolicy(chunk_tokens=8, weights=weights), ids, labels)
    assert_equal(found, expected)


def test_prompt_learning_is_refused():
    model = get_peft_model(make("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(Unsupported, match=r"^prompt learning puts tokens in front of every sequence$"):
        StreamedStep(model, POLICY)


def test_all_kinds_of_norm_and_bias_train():
    model = only(scattered(make("Llama")), "bias", "norm")
    ids, labels = tokens(2, 21)
    assert_equal(streamed(model, POLICY, ids, labels), plain(model, ids, labels))
