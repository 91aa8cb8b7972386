"""Attention kernels and their merge against softmax attention written out in float64."""

from itertools import pairwise

import pytest
import torch
from families import refresh

from training.longcontext import kernels
from training.longcontext.kernels import FLASH_CPU, candidates, choose, plain

ROUNDING = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 3e-2}
CAP = 1.3


def heads(n, g, queries, keys, dtype, size=8):
    """q, k, v, dout with a margin around them, so that a kernel which ignores strides is found out."""
    refresh()
    shapes = [(2, n, queries, size), (2, g, keys, size), (2, g, keys, size), (2, n, queries, size)]
    return [torch.randn(b, c, s + 3, d + 2, dtype=torch.float64).to(dtype)[:, :, 1:-2, 1:-1] * 1.5
            for b, c, s, d in shapes]


def seen(kind, queries, keys):
    """(C, P), true where a query sees a key."""
    every = torch.ones(queries, keys, dtype=torch.bool)
    return {"full": every, "causal": every.tril(), "window": every.triu()}[kind]


def reference(q, k, v, visible, scale, softcap=None):
    """Output, log-sum-exp; differentiable, float64."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def close(found, expected, dtype):
    assert found.shape == expected.shape
    size = max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected).abs().max()) <= ROUNDING[dtype] * size


KERNELS = {"flash": (FLASH_CPU, None), "plain": (plain(), None), "soft-capped": (plain(CAP), CAP)}


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["full", "causal", "window"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_block_and_its_gradients(name, kind, groups, dtype, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(kernels, "MATH_BYTES", 2048)
    kernel, softcap = KERNELS[name]
    keys = 11
    q, k, v, dout = heads(4, groups, 7 if kind == "full" else keys, keys, dtype)
    wide = [t.double().clone().requires_grad_() for t in (q, k, v)]
    out, lse = reference(*wide, seen(kind, q.shape[2], keys), 0.3, softcap)
    expected = torch.autograd.grad(out, wide, dout.double())
    found, found_lse = kernels.forward(kernel, q, k, v, kind, 0.3)
    close(found, out, dtype)
    close(found_lse, lse, dtype)
    for grad, wanted in zip(kernels.backward(kernel, dout, q, k, v, found, found_lse, kind, 0.3), expected,
                            strict=True):
        close(grad, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_merge_to_the_whole_row_and_share_its_gradient(name, dtype):
    """Three pages of keys of unequal sizes, and the causal block: out, lse, dq, dk, dv of the whole."""
    kernel, softcap = KERNELS[name]
    queries, edges = 6, [0, 1, 6, 11]
    q, k, v, dout = heads(4, 2, queries, edges[-1] + queries, dtype)
    visible = torch.ones(queries, k.shape[2], dtype=torch.bool).tril(edges[-1])
    wide = [t.double().clone().requires_grad_() for t in (q, k, v)]
    out, lse = reference(*wide, visible, 0.3, softcap)
    expected = torch.autograd.grad(out, wide, dout.double())

    parts = [("causal", slice(edges[-1], None)), *(("full", slice(a, b)) for a, b in pairwise(edges))]
    own = parts[0][1]
    merged = [t.clone() for t in kernels.forward(kernel, q, k[:, :, own], v[:, :, own], "causal", 0.3)]
    for kind, part in parts[1:]:
        kernels.merge(*merged, *kernels.forward(kernel, q, k[:, :, part], v[:, :, part], kind, 0.3))
    close(merged[0], out, dtype)
    close(merged[1], lse, dtype)

    dq, dk, dv = torch.zeros_like(wide[0]), torch.zeros_like(wide[1]), torch.zeros_like(wide[2])
    for kind, part in parts:
        shares = kernels.backward(kernel, dout, q, k[:, :, part], v[:, :, part], *merged, kind, 0.3)
        dq += shares[0]
        dk[:, :, part] += shares[1]
        dv[:, :, part] += shares[2]
    for found, wanted in zip((dq, dk, dv), expected, strict=True):
        close(found, wanted, dtype)


@pytest.mark.parametrize("far", [-500.0, -80.0, 0.0, 80.0, 500.0])
def test_merging_takes_scores_of_any_size(far):
    """exp(500) is no float32: the merge works on differences."""
    refresh()
    out, other = torch.randn(2, 1, 1, 4, 8)
    lse, more = torch.randn(2, 1, 1, 4) + torch.tensor([0.0, far]).reshape(2, 1, 1, 1)
    total = torch.logaddexp(lse.double(), more.double())
    wanted = (out.double() * (lse.double() - total).exp()[..., None]
              + other.double() * (more.double() - total).exp()[..., None])
    kernels.merge(out, lse, other, more)
    assert torch.allclose(out.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(lse.double(), total, rtol=1e-5)


def test_a_block_that_weighs_nothing_changes_nothing():
    out, lse = torch.randn(1, 1, 4, 8), torch.zeros(1, 1, 4)
    before = out.clone()
    kernels.merge(out, lse, torch.full_like(out, 3.0), torch.full_like(lse, -torch.inf))
    assert torch.equal(out, before)
    assert torch.equal(lse, torch.zeros(1, 1, 4))


@pytest.mark.parametrize(("device", "dtype", "capability", "size", "name"), [
    ("cpu", torch.float32, None, 64, "flash (CPU)"), ("cpu", torch.bfloat16, None, 64, "flash (CPU)"),
    ("cpu", torch.float64, None, 64, "flash (CPU)"), ("cpu", torch.float16, None, 64, "plain"),
    ("cuda", torch.float16, (7, 5), 64, "memory-efficient"),
    ("cuda", torch.float32, (9, 0), 64, "memory-efficient"),
    ("cuda", torch.bfloat16, (8, 0), 128, "flash"), ("cuda", torch.bfloat16, (8, 9), 256, "flash"),
    ("cuda", torch.bfloat16, (9, 0), 128, "cuDNN"), ("cuda", torch.bfloat16, (9, 0), 256, "flash"),
    ("cuda", torch.bfloat16, (9, 0), 512, "memory-efficient"), ("cuda", torch.float64, (9, 0), 64, "plain")])
def test_the_table_of_kernels(device, dtype, capability, size, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = candidates(torch.device(device), dtype, size)
    assert found[0].name == name
    assert device == "cpu" or found[-1].name == "plain"
    assert choose(torch.device(device), dtype, size, softcap=30.0).name == "plain"
