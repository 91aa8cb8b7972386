"""Where things live and what is kept: no choice changes a bit, but for the lossy ones, which are measured."""

from functools import partial
from itertools import product

import pytest
import torch
from families import assert_equal, assert_same, gradients, make, plain, streamed, tokens
from torch import nn

from training.longcontext import StreamedStep, StreamPolicy

CHUNK = {"chunk_tokens": 8, "page_tokens": 5, "loss_tokens": 6}
SAME = {
    "inputs": [{"inputs": place} for place in ("pinned", "pageable", "disk")],
    "keep_every": [{"keep_every": k} for k in (2, 3, 4, 5)],
    "pages": [{"pages": place} for place in ("pinned", "pageable")],
    "kept": [{"attention": "keep"}, {"keys": "keep"}, {"attention": "keep", "keys": "keep"}],
    "weights": [{"weights": "streamed"}],
    "together": [{"inputs": "disk", "keep_every": 2, "pages": "pageable", "attention": "keep",
                  "keys": "keep"},
                 {"inputs": "pageable", "keep_every": 5, "pages": "pinned", "weights": "streamed"},
                 {"inputs": "disk", "keep_every": 3, "attention": "keep"},
                 {"inputs": "pinned", "keep_every": 2, "keys": "keep", "weights": "streamed"}],
}
CHOICES = [choice for choices in SAME.values() for choice in choices]


@pytest.fixture(scope="module")
def cases():
    """A model of each kind of mask with its default gradients, in float32 as in training."""
    found = {}
    for family, frozen in (("Llama", False), ("Gemma3", True), ("Qwen3Moe", True)):
        model = make(family, torch.float32, num_hidden_layers=5,
                     **({"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
                        if family == "Gemma3" else {}))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or "proj" not in name or "q_proj" in name)
        ids, labels = tokens(2, 21)
        found[family] = model, ids, labels, streamed(model, StreamPolicy(**CHUNK), ids, labels)
    return found


@pytest.mark.parametrize(("family", "choice"), [
    *product(("Llama", "Gemma3"), CHOICES), *product(("Qwen3Moe",), SAME["together"])], ids=str)
def test_every_choice_gives_the_same_bits(cases, family, choice, tmp_path):
    model, ids, labels, expected = cases[family]
    step = StreamedStep(model, StreamPolicy(**CHUNK, **choice, directory=str(tmp_path)))
    for _ in range(2):  # the second step finds buffers, pages and ranges of the first
        assert_same(gradients(model, partial(step, ids, labels)), expected)
    if step._machine.weights is not None:
        step._machine.weights.restore()


def test_the_default_itself_equals_eager(cases):
    for model, ids, labels, expected in cases.values():
        assert_equal(expected, plain(model, ids, labels))


@pytest.mark.parametrize("choice", [{"mlp_tokens": 1}, {"mlp_tokens": 3}, {"mlp_tokens": 50},
                                    {"loss_tokens": 1}, {"loss_tokens": 1000}], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2", "Mixtral"])
def test_tiles_change_rounding_alone(family, choice):
    model = make(family)
    ids, labels = tokens(2, 29)
    found = streamed(model, StreamPolicy(chunk_tokens=8, **choice), ids, labels)
    assert_equal(found, plain(model, ids, labels))


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_keys_and_values_get_all_their_gradients_at_every_chunk_and_page_size(family):
    model = make(family, num_hidden_layers=2)
    length = 9
    ids, labels = tokens(1, length)
    expected = plain(model, ids, labels)
    for chunk in range(1, length + 2):
        for page, place in ((0, "device"), (2, "pageable"), (chunk + 1, "device")):
            policy = StreamPolicy(chunk_tokens=chunk, page_tokens=page, pages=place)
            assert_equal(streamed(model, policy, ids, labels), expected)


def cosine(found, expected):
    """Of all gradients together."""
    a, b = (torch.cat([g.flatten().double() for g in one.grads.values()]) for one in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))


# Measured with these weights: int8 0.99999, int4 0.998. Larger weights amplify the error at every layer.
@pytest.mark.parametrize(("encoding", "least", "most"), [("int8", 0.999, 1 - 1e-9), ("int4", 0.99, 0.9999)])
@pytest.mark.parametrize("inputs", ["device", "pageable", "disk"])
@pytest.mark.parametrize("keep_every", [1, 2])
def test_lossy_encodings_keep_the_gradients_direction(encoding, least, most, inputs, keep_every, tmp_path):
    model = make("Llama", torch.float32, hidden_size=80, num_hidden_layers=4, head_dim=20)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    ids, labels = tokens(2, 37)
    exact = streamed(model, StreamPolicy(chunk_tokens=8), ids, labels)
    policy = StreamPolicy(chunk_tokens=8, encoding=encoding, inputs=inputs, keep_every=keep_every,
                          directory=str(tmp_path))
    assert not policy.exact
    found = streamed(model, policy, ids, labels)
    assert torch.equal(found.loss, exact.loss)
    print(f"cosine {cosine(found, exact):.6f}")
    assert least <= cosine(found, exact) <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lossy_encodings_take_other_types(dtype):
    model = make("Llama", dtype, num_hidden_layers=2)
    ids, labels = tokens(1, 11)
    found = streamed(model, StreamPolicy(chunk_tokens=4, encoding="int8"), ids, labels)
    exact = streamed(model, StreamPolicy(chunk_tokens=4), ids, labels)
    assert cosine(found, exact) > 0.999


def test_streamed_weights_lie_on_the_host_and_trained_ones_do_not():
    model = make("Llama", torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, labels = tokens(1, 20)
    step = StreamedStep(model, StreamPolicy(chunk_tokens=8, weights="streamed"))
    frozen = sum(p.numel() * 4 for layer in model.model.layers for p in layer.parameters()
                 if not p.requires_grad)
    step(ids, labels).backward()
    assert step._machine.weights.bytes_streamed == 2 * frozen  # once forward, once backward
    step._machine.weights.restore()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
