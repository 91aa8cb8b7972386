"""What cannot be trained on is told in one line, before any work."""

import re

import pytest
import torch
from families import assert_equal, gradients, make, plain, streamed, tokens
from torch import nn
from transformers import LlamaModel

from training.longcontext import StreamedStep, StreamError, StreamPolicy, Unsupported

POLICY = StreamPolicy(chunk_tokens=8, loss_tokens=5)


@pytest.fixture(scope="module")
def model():
    return make("Llama")


@pytest.fixture
def idle(model, monkeypatch):
    """A step of which no layer may run."""
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", lambda *_, **__: pytest.fail("a layer ran"))
    return StreamedStep(model, POLICY)


def told(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


IDS = torch.arange(3, 24)[None]
BATCHES = {
    "empty": ((IDS[:, :0], IDS[:, :0]), "input_ids is (1, 0); a sequence needs two tokens at least."),
    "no rows": ((IDS[:0], IDS[:0]), "input_ids is (0, 21); a sequence needs two tokens at least."),
    "one token": ((IDS[:, :1], IDS[:, :1]), "input_ids is (1, 1); a sequence needs two tokens at least."),
    "one dimension": ((IDS[0], IDS[0]), "input_ids is (21,) and labels (21,); both must be (B, S)."),
    "shapes": ((IDS, IDS[:, 1:]), "input_ids is (1, 21) and labels (1, 20); both must be (B, S)."),
    "rows": ((IDS, IDS.repeat(2, 1)), "input_ids is (1, 21) and labels (2, 21); both must be (B, S)."),
    "no labels": ((IDS, torch.full_like(IDS, -100)),
                  "No label is left to train on: all are -100, or only the first position has one."),
    "first label": ((IDS, torch.where(IDS == 3, 3, -100)),
                    "No label is left to train on: all are -100, or only the first position has one."),
    "large id": ((IDS * 7, IDS), "input_ids has the token 161; the vocabulary has 131."),
    "negative id": ((IDS - 4, IDS), "input_ids has the token -1; the vocabulary has 131."),
    "large label": ((IDS, IDS * 7), "labels has the token 161; the vocabulary has 131."),
    "negative label": ((IDS, IDS - 5), "labels has the token -2; the vocabulary has 131."),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_that_cannot_be_trained_on(idle, case):
    (ids, labels), message = BATCHES[case]
    told(StreamError, message, lambda: idle(ids, labels))


def _mask(*zeros):
    mask = torch.ones_like(IDS)
    mask[:, list(zeros)] = 0
    return mask


MASKS = {
    "left": (_mask(0, 1), IDS, Unsupported, "padding on the left or in the middle; put it on the right"),
    "middle": (_mask(10), IDS, Unsupported, "padding on the left or in the middle; put it on the right"),
    "labels": (_mask(19, 20), IDS, StreamError, "Padding has labels; set them to -100."),
    "shape": (_mask()[:, 1:], IDS, StreamError, "attention_mask is (1, 20) and input_ids (1, 21)."),
    "four dimensions": (torch.ones(1, 1, 21, 21), IDS, StreamError,
                        "attention_mask is (1, 1, 21, 21) and input_ids (1, 21)."),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_would_not_be_honoured(idle, case):
    mask, labels, error, message = MASKS[case]
    told(error, message, lambda: idle(IDS, labels, attention_mask=mask))
    told(error, message, lambda: idle(IDS, labels, attention_mask=mask.bool()))


def test_an_unknown_reduction(idle):
    told(StreamError, "reduction is 'none'; it must be mean or sum.",
         lambda: idle(IDS, IDS, reduction="none"))


POLICIES = {
    "chunk": ({"chunk_tokens": 0}, "chunk_tokens is 0; it must be a whole number of at least 1."),
    "fraction": ({"loss_tokens": 1.5}, "loss_tokens is 1.5; it must be a whole number of at least 1."),
    "true": ({"keep_every": True}, "keep_every is True; it must be a whole number of at least 1."),
    "below": ({"page_tokens": -1}, "page_tokens is -1; it must be a whole number of at least 0."),
    "inputs": ({"inputs": "tape"}, "inputs is 'tape'; it must be one of device, pinned, pageable, disk."),
    "pages": ({"pages": "disk"}, "pages is 'disk'; it must be one of device, pinned, pageable."),
    "encoding": ({"encoding": "int2"}, "encoding is 'int2'; it must be one of exact, int8, int4."),
    "all at once": ({"chunk_tokens": -3, "keys": "drop"},
                    "chunk_tokens is -3; it must be a whole number of at least 1. "
                    "keys is 'drop'; it must be one of recompute, keep."),
}


@pytest.mark.parametrize("case", POLICIES)
def test_policies_that_make_no_sense(case):
    choices, message = POLICIES[case]
    told(StreamError, message, lambda: StreamPolicy(**choices))


def test_more_layers_between_kept_inputs_than_there_are(model):
    told(StreamError, "keep_every is 4 and the model has 3 layers.",
         lambda: StreamedStep(model, StreamPolicy(keep_every=4)))


def test_modules_that_are_no_causal_language_models(model):
    told(Unsupported, "Linear is not a Transformers causal language model",
         lambda: StreamedStep(nn.Linear(2, 2)))
    told(Unsupported, "LlamaModel has no language-modelling head",
         lambda: StreamedStep(LlamaModel(model.config)))


EARLIER = "This loss belongs to an earlier step: call backward() before the next step, once."


@pytest.mark.parametrize("wanted", ["", "layers.2.", "lm_head"], ids=["all", "one layer", "head"])
def test_a_loss_goes_backward_once(wanted):
    model = make("Llama", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted in name)
    loss = StreamedStep(model, POLICY)(IDS, IDS)
    loss.backward(retain_graph=True)
    told(StreamError, EARLIER, loss.backward)


def test_a_second_step_ends_the_first_ones_graph_and_works_itself(model):
    step = StreamedStep(model, POLICY)
    first, second = step(IDS, IDS), step(IDS.flip(1), IDS.flip(1))
    told(StreamError, EARLIER, first.backward)
    model.zero_grad(set_to_none=True)
    second.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = plain(model, IDS.flip(1), IDS.flip(1))
    assert_equal(expected._replace(grads=found), expected)


def test_a_loss_of_nothing_sums_to_zero_with_no_gradient(model):
    nothing = torch.full_like(IDS, -100)
    step = StreamedStep(model, POLICY)
    found = gradients(model, lambda: step(IDS, nothing, reduction="sum"))
    assert float(found.loss) == 0
    assert not any(bool(grad.any()) for grad in found.grads.values() if grad is not None)


def test_the_step_works_after_every_refusal(model):
    step = StreamedStep(model, POLICY)
    for (ids, labels), _ in BATCHES.values():
        with pytest.raises(StreamError):
            step(ids, labels)
    ids, labels = tokens(2, 21)
    assert_equal(gradients(model, lambda: step(ids, labels)), plain(model, ids, labels))


def test_messages_are_one_line():
    texts = [message for _, message in (*BATCHES.values(), *POLICIES.values())]
    assert not any(re.search(r"\n", text) for text in texts)


def test_right_padding_changes_nothing(model):
    ids, labels = tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[0, 20:] = mask[1, 27:] = 0
    labels[mask == 0] = -100
    expected = plain(model, ids, labels, attention_mask=mask)
    assert_equal(streamed(model, POLICY, ids, labels, attention_mask=mask), expected)
    other = torch.where(mask == 0, torch.randint_like(ids, 3, 131), ids)
    assert_equal(streamed(model, POLICY, other, labels, attention_mask=mask.bool()), expected)
