"""Attention kernels that return their log-sum-exp and have a backward of their own, in a table by device.

Shapes: B batch, N query heads, G key heads (N a multiple of G), C queries, P keys, D head dimension.
`forward(q, k, v, causal, scale)`  (B, N, C, D), (B, G, P, D) x 2 -> out (B, N, C, D), lse (B, N, C)
`backward(dout, q, k, v, out, lse, causal, scale)` -> dq, dk, dv shaped like q, k, v
Causal blocks are square. `out` and `lse` may be those of the whole row: the backward then gives this block's
exact share, since a probability is exp(score - lse) whatever other keys went into lse.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
aten: Any = torch.ops.aten

# Scores that the plain kernel holds at once; larger blocks are worked off in pieces of queries.
MATH_BYTES = 64 << 20
# A kernel is compared with the plain one on a block of so many tokens before it is used; 16-bit results
# differ by about 1 % of the largest.
PROBE_TOKENS = 96
PROBE_TOLERANCE = 0.04


class Kernel(NamedTuple):
    """One implementation. `grouped`: takes fewer key heads than query heads."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grouped: bool = False


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _cpu_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                  scale: float) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    return found


def _nothing(q: Tensor) -> Tensor:
    """The random state of a kernel without dropout: never read."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    size = q.shape[-1]
    found = aten._scaled_dot_product_flash_attention(*_wide(8, q, k, v), 0.0, causal, False, scale=scale)
    return found[0][..., :size], found[1][..., :q.shape[2]]


def _flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    size, none = q.shape[-1], _nothing(q)
    wide = _wide(8, dout, q, k, v, out)
    found = aten._scaled_dot_product_flash_attention_backward(
        *wide, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none[:0], scale=scale)
    return tuple(grad[..., :size] for grad in found)


def _wide(multiple: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Head dimensions padded with zeros to what the kernel takes: scores and outputs stay the same."""
    missing = -tensors[0].shape[-1] % multiple
    return tuple(torch.nn.functional.pad(t, (0, missing)) for t in tensors) if missing else tensors


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return found[0], found[1].reshape(q.shape[:3])


def _cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros((), dtype=torch.int64, device=q.device)
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_cudnn_attention_backward(
        dout.contiguous(), q, k, v, out, lse.unsqueeze(-1).contiguous(), none, none, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale)
    return found


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return found[0], found[1][..., :q.shape[2]]


def _efficient_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                        scale: float) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel reads log-sum-exps in rows of a multiple of 32; +inf makes the missing rows' weights 0.
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    none = torch.zeros((), dtype=torch.int64, device=q.device)
    found = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, padded, none, none, 0.0, [True, True, True, False], causal, scale=scale)
    return found[0], found[1], found[2]


def plain(softcap: float | None = None) -> Kernel:
    """Matrix products in PyTorch, any device and type; scores soft-capped as Gemma 2 does when asked."""

    def scores(q: Tensor, k: Tensor, causal: bool, scale: float, first: int) -> Tensor:
        found = torch.matmul(q, k.transpose(-1, -2)).to(_sum_type(q)) * scale
        if softcap is not None:
            found = softcap * torch.tanh(found / softcap)
        if causal:
            rows = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
            found.masked_fill_(torch.arange(k.shape[2], device=q.device) > rows, -torch.inf)
        return found

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        outs, sums = [], []
        for first, piece in _pieces(q, k):
            found = scores(piece, k, causal, scale, first)
            lse = found.logsumexp(-1)
            outs.append(torch.matmul(found.sub_(lse[..., None]).exp_().to(v.dtype), v))
            sums.append(lse)
        return torch.cat(outs, 2), torch.cat(sums, 2)

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                 scale: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = _sum_type(q)
        dqs, dk, dv = [], torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for first, piece in _pieces(q, k):
            rows = slice(first, first + piece.shape[2])
            given, found = dout[:, :, rows], scores(piece, k, causal, scale, first)
            slope = 1 - (found / softcap).square() if softcap is not None else None
            weights = found.sub_(lse[:, :, rows, None]).exp_()
            dv += torch.matmul(weights.to(v.dtype).transpose(-1, -2), given)
            delta = (given.to(wide) * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
            inner = torch.matmul(given, v.transpose(-1, -2)).to(wide).sub_(delta).mul_(weights)
            if slope is not None:
                inner = torch.where(weights > 0, inner * slope, 0)
            inner = inner.mul_(scale).to(q.dtype)
            dqs.append(torch.matmul(inner, k))
            dk += torch.matmul(inner.transpose(-1, -2), piece)
        return torch.cat(dqs, 2), dk, dv

    return Kernel("plain", forward, backward)


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _pieces(q: Tensor, k: Tensor) -> list[tuple[int, Tensor]]:
    """(first row, queries) such that one piece's scores take `MATH_BYTES` at most."""
    row_bytes = q.shape[0] * q.shape[1] * k.shape[2] * _sum_type(q).itemsize
    rows = max(1, MATH_BYTES // row_bytes)
    return list(zip(range(0, q.shape[2], rows), q.split(rows, 2), strict=True))


FLASH_CPU = Kernel("flash (CPU)", _cpu_forward, _cpu_backward)
FLASH = Kernel("flash", _flash_forward, _flash_backward, grouped=True)
CUDNN = Kernel("cuDNN", _cudnn_forward, _cudnn_backward)
EFFICIENT = Kernel("memory-efficient", _efficient_forward, _efficient_backward)


def merge(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Merge a block's result (..., D), (...) into `out`, `lse` in place."""
    lse_b = lse_b.to(lse.dtype)
    out.lerp_(out_b.to(out.dtype), torch.sigmoid(lse_b - lse)[..., None])
    torch.logaddexp(lse, lse_b, out=lse)


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    """Kernels for a device, a type and a head dimension, fastest first.

    | device | types | kernel |
    |---|---|---|
    | CPU | all but fp16 | flash for CPU |
    | CUDA 9.0, 10.0 | fp16, bf16, head dimension <= 128 | cuDNN |
    | CUDA >= 8.0 | fp16, bf16, head dimension <= 256 | flash (FlashAttention 3 or 4 where torch has it) |
    | CUDA | all but fp64 | memory-efficient |
    | anything | all | plain |
    """
    if device.type == "cpu":
        return [FLASH_CPU] if dtype != torch.float16 else [plain()]
    if device.type != "cuda" or dtype == torch.float64:
        return [plain()]
    capability = torch.cuda.get_device_capability(device)
    found = [EFFICIENT, plain()]
    if dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0) and head_dim <= 256:
        found.insert(0, FLASH)
        if capability in ((9, 0), (10, 0)) and head_dim <= 128 and head_dim % 8 == 0:
            found.insert(0, CUDNN)
    return found


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None = None) -> Kernel:
    """The first candidate that gives the plain kernel's results here; soft-capped scores have only that."""
    if softcap is not None:
        return plain(softcap)
    found = candidates(device, dtype, head_dim)
    return next((kernel for kernel in found[:-1] if _works(kernel, device, dtype, head_dim)), found[-1])


def _works(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a kernel agrees with the plain one on small blocks; why not is logged."""
    generator = torch.Generator(device).manual_seed(0)
    dout, q, k, v = (torch.randn(1, heads, PROBE_TOKENS, head_dim, generator=generator,
                                 device=device).to(dtype) for heads in (4, 4, 2, 2))
    try:
        with torch.no_grad():
            for kind in ("full", "causal"):
                expected, found = (_results(each, dout, q, k, v, kind) for each in (plain(), kernel))
                for a, b in zip(expected, found, strict=True):
                    if not (a.float() - b.float()).abs().max() <= PROBE_TOLERANCE * a.float().abs().max():
                        log.warning("%s attention is not used: it is off on a %s block", kernel.name, kind)
                        return False
    except RuntimeError as error:
        log.warning("%s attention is not used: %s", kernel.name, str(error).splitlines()[0][:200])
        return False
    return True


def _results(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: str) -> tuple[Tensor, ...]:
    out, lse = forward(kernel, q, k, v, kind, q.shape[-1] ** -0.5)
    return out, lse, *backward(kernel, dout, q, k, v, out, lse, kind, q.shape[-1] ** -0.5)


def activate_newer_flash(device: torch.device) -> str:
    """Let torch use FlashAttention 4 or 3 behind its flash kernel where one is installed; its name or ''."""
    listing = getattr(torch.nn.attention, "list_flash_attention_impls", None)
    if device.type != "cuda" or listing is None:
        return ""
    wanted = {(10, 0): "FA4", (9, 0): "FA3"}.get(torch.cuda.get_device_capability(device), "")
    if wanted not in listing():
        return ""
    try:
        torch.nn.attention.activate_flash_attention_impl(wanted)
    except Exception as error:  # a missing package, or one that was built for another torch
        log.info("%s is not used: %s", wanted, str(error).splitlines()[0][:200])
        return ""
    return wanted


def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, kind: str,
            scale: float) -> tuple[Tensor, Tensor]:
    """One block of a kind of `blocks`: out (B, N, C, D) and lse (B, N, C)."""
    if kind == "full":
        out, lse = kernel.forward(_folded(q, k), k, v, False, scale)
        return _unfolded(out, q), _unfolded(lse, q)
    if kind == "window":
        q, k, v = q.flip(2), k.flip(2), v.flip(2)
    out, lse = kernel.forward(q, *_repeated(kernel, q, k, v), True, scale)
    return (out.flip(2), lse.flip(2)) if kind == "window" else (out, lse)


def backward(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
             kind: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of dq, dk, dv, given the whole row's `out` and `lse`."""
    if kind == "full":
        dq, dk, dv = kernel.backward(*(_folded(t, k) for t in (dout, q)), k, v,
                                     *(_folded(t, k) for t in (out, lse)), False, scale)
        return _unfolded(dq, q), dk, dv
    if kind == "window":
        dout, q, k, v, out, lse = (t.flip(2) for t in (dout, q, k, v, out, lse))
    dq, dk, dv = kernel.backward(dout, q, *_repeated(kernel, q, k, v), out, lse, True, scale)
    dk, dv = _gathered(dk, k), _gathered(dv, v)
    return (dq.flip(2), dk.flip(2), dv.flip(2)) if kind == "window" else (dq, dk, dv)


def _folded(t: Tensor, k: Tensor) -> Tensor:
    """Query heads that share a key head become more queries of it: (B, N, C, ...) -> (B, G, N/G C, ...).

    Every query of a full block sees every key, so their order does not matter and K/V need no copies.
    """
    return t.reshape(t.shape[0], k.shape[1], -1, *t.shape[3:]) if t.shape[1] != k.shape[1] else t


def _unfolded(t: Tensor, q: Tensor) -> Tensor:
    return t.reshape(*q.shape[:3], *t.shape[3:])


def _repeated(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K/V for every query head, for kernels that want it; a square block is a chunk at most."""
    times = q.shape[1] // k.shape[1]
    if times == 1 or kernel.grouped:
        return k, v
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


def _gathered(grad: Tensor, like: Tensor) -> Tensor:
    """Sums over the query heads of each key head, in fp32: (B, N, P, D) -> (B, G, P, D)."""
    if grad.shape[1] == like.shape[1]:
        return grad
    return grad.unflatten(1, (like.shape[1], -1)).sum(2, dtype=_sum_type(grad))


