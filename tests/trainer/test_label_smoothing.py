"""Label smoothing in the chunked and the streamed loss, against torch's own on all logits at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_loss import batch, gradients, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_fakes import FakeStore, TinyModel, config_of, tiny_loss, training_of

from training.longcontext import StreamPolicy
from training.longcontext.step import StreamedStep
from training.trainer import loss as subject
from training.trainer import streaming
from training.trainer.evaluation import Scorer
from training.trainer.journal import read_lines

SHARE = 0.15


def whole(model, ids, labels, share=SHARE):
    """Summed loss by F.cross_entropy on the logits of all positions."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", label_smoothing=share)


def assert_equal(model, found, expected, close=1e-5):
    torch.testing.assert_close(found, expected, rtol=close, atol=0)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.norm(got[name] - wanted[name]) <= close * torch.norm(wanted[name]), name


def test_the_reference_is_the_papers_mixture_of_target_and_uniform():
    """Section 7: q'(k) = (1 - e) [k = y] + e / V."""
    logits, labels = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 3, 8, 3, 1])
    mixture = (1 - SHARE) * F.one_hot(labels, 9) + SHARE / 9
    expected = -(mixture * logits.log_softmax(1)).sum()
    torch.testing.assert_close(subject._summed(logits, labels, SHARE), expected)


@pytest.mark.parametrize("chunk", [0, 4, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_chunked_loss_and_its_gradients_equal_torchs_on_all_logits(family, chunk):
    more = {"llama": {"tie_word_embeddings": True}, "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
            "granite": {"logits_scaling": 4.0}}[family]
    model = tiny(family, **more)
    ids, labels = batch()
    found, tokens = subject.causal_loss(model, ids, labels, None, chunk, smoothing=SHARE)
    assert tokens == int((labels[:, 1:] != -100).sum())
    assert_equal(model, found, whole(model, ids, labels))
    plain = subject.causal_loss(model, ids, labels, None, chunk)[0]
    assert float(found.detach()) != pytest.approx(float(plain.detach()), rel=5e-5)


def test_the_path_for_partitioned_weights_and_the_one_without_gradients_smooth_too():
    model = tiny("llama")
    ids, labels = batch()
    expected = whole(model, ids, labels)
    with torch.no_grad():
        torch.testing.assert_close(
            subject.causal_loss(model, ids, labels, None, 4, smoothing=SHARE)[0], expected.detach())
    model.lm_head.weight.ds_id = 1  # how ZeRO-3 marks a parameter
    assert_equal(model, subject.causal_loss(model, ids, labels, None, 4, smoothing=SHARE)[0], expected)


def test_a_family_whose_logits_are_made_at_once_is_smoothed_too(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(subject, "verify_chunked", lambda model: False)
    ids, labels = batch()
    found, _ = subject.causal_loss(model, ids, labels, None, 4, smoothing=SHARE)
    assert_equal(model, found, whole(model, ids, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_streamed_loss_and_its_gradients_equal_torchs_on_all_logits(dtype):
    model = tiny("qwen2").to(dtype).eval()
    ids, labels = batch(length=29)
    step = StreamedStep(model, StreamPolicy(chunk_tokens=8, loss_tokens=3))
    found = step(ids, labels, reduction="sum", smoothing=SHARE)
    assert_equal(model, found, whole(model, ids, labels), 1e-5 if dtype == torch.float32 else 1e-12)
    with torch.no_grad():
        again = step(ids, labels, smoothing=SHARE)
    torch.testing.assert_close(again, found.detach() / int((labels[:, 1:] != -100).sum()))


def test_float16_takes_the_smoothed_loss_through_the_head_in_the_backward_pass():
    """There the value and the gradient are made in two passes."""
    model = tiny("llama").half().eval()
    exact = tiny("llama").eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    ids, labels = batch()
    found = StreamedStep(model, StreamPolicy(chunk_tokens=8, loss_tokens=3))(
        ids, labels, reduction="sum", smoothing=SHARE)
    expected = whole(exact, ids, labels)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
    wanted, got = gradients(exact, expected), gradients(model, found)
    for name, gradient in got.items():
        assert torch.norm(gradient.float() - wanted[name]) <= 0.02 * torch.norm(wanted[name]), name


def test_the_streamed_loss_function_takes_the_loops_keyword(tmp_path):
    model = tiny("qwen2").eval()
    ids, labels = batch()
    config = config_of(stream__chunk_tokens=8, training__loss_chunk_tokens=3)
    loss = streaming.StreamedLoss(model, config, tmp_path, torch.device("cpu"))
    found, _ = loss(model, ids, labels, None, 3, smoothing=SHARE)
    torch.testing.assert_close(found, whole(model, ids, labels), rtol=1e-5, atol=0)
    plain, _ = loss(model, ids, labels, None, 3)
    torch.testing.assert_close(plain, whole(model, ids, labels, 0.0), rtol=1e-5, atol=0)


class Sizes(TorchDispatchMode):
    """Elements of all tensors of at least `least` that are alive at once, at the most."""

    def __init__(self, least):
        super().__init__()
        self.least, self.largest = least, 0
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.least:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.largest = max(self.largest, storage.nbytes() // 4)
        self.live = {key: ref for key, ref in self.live.items() if not ref.expired()}
        self.most = max(self.most, len(self.live))
        return out


@pytest.mark.parametrize("share", [0.0, SHARE])
def test_smoothing_keeps_no_more_than_one_chunk_of_logits(share):
    """64 positions in chunks of 8: one tensor of 8 x V more at once than without it, none of 64 x V."""
    head = torch.nn.Linear(4, 1000, bias=False)
    head.requires_grad_(False)
    hidden, labels = torch.randn(64, 4, requires_grad=True), torch.randint(1000, (64,))
    part = type("Head", (), {"layer": head, "__call__": lambda self, x: head(x)})()
    with Sizes(8 * 1000) as sizes:
        subject._chunked(hidden, labels, part, 8, share).backward()
    assert sizes.largest == 8 * 1000
    assert sizes.most == (4 if share else 3)


def test_the_loop_smooths_what_it_trains_on_and_nothing_without_the_key(tmp_path):
    seen = []

    def loss(model, ids, labels, mask, chunk, **more):
        seen.append(more)
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        return summed * (1 + more.get("smoothing", 0.0)), tokens

    logged = []
    for share in (0.0, SHARE):
        config = config_of(training__max_steps=1, training__label_smoothing=share)
        training_of(tmp_path / str(share), config, loss=loss, model=TinyModel(dropout=0.0)).train()
        logged.append(read_lines(tmp_path / str(share) / "metrics.jsonl")[0]["loss"])
    assert seen == [{}, {}, {"smoothing": SHARE}, {"smoothing": SHARE}]
    assert logged[1] == pytest.approx(logged[0] * (1 + SHARE))


def test_an_evaluation_is_plain_cross_entropy_whatever_the_training_smooths():
    model = tiny("llama").eval()
    ids, labels = (part.numpy() for part in batch(rows=1))
    scorer = Scorer(model, FakeStore(), torch.device("cpu"), subject.causal_loss, 4)
    with torch.no_grad():
        summed, tokens = scorer.score(ids[0], np.asarray(labels[0]))
        expected = whole(model, torch.from_numpy(ids), torch.from_numpy(labels), 0.0)
    assert (summed, tokens) == (pytest.approx(float(expected), rel=1e-5), 11)
