"""PyTorch's flash attention for CPUs, with causal squares taken apart.

That kernel computes up to 512 keys past the diagonal: a causal block of 1,024 ran at 47 GFLOP/s on one core
where a full one ran at 71. So a causal square becomes full blocks between its halves, the halves of these,
and so on, and small causal ones at the end. The blocks of one level have one size, so a level is one call
with more heads.

Shapes: B batch, N heads, C queries, P keys, D head dimension; `out` (B, N, C, D), `lse` (B, N, C).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten

# Halving 256 again was slower than the waste.
SMALLEST = 256


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of one block."""
    if causal and (sizes := levels(q.shape[2])):
        return _causal_forward(q, k, v, scale, sizes)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
             scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block."""
    if causal and (sizes := levels(q.shape[2])):
        return _causal_backward((dout, q, k, v, out, lse), scale, sizes)
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    return found


def levels(length: int) -> list[int]:
    """Sizes of the full blocks, or nothing when the length cannot be halved evenly down to small ones.

    >>> levels(1024), levels(768), levels(1000)
    ([512, 256], [384], [])
    """
    sizes = []
    while length % 2 == 0 and length // 2 >= SMALLEST:
        length //= 2
        sizes.append(length)
    return sizes if length < 2 * SMALLEST else []


def merge(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Merge a block's result (..., D), (...) into `out`, `lse` in place."""
    lse_b = lse_b.to(lse.dtype)
    out.lerp_(out_b.to(out.dtype), torch.sigmoid(lse_b - lse)[..., None])
    torch.logaddexp(lse, lse_b, out=lse)


def _half(t: Tensor, size: int, second: bool) -> Tensor:
    """First or second halves of all pairs of blocks, as a view: (B, N, C, ...) -> (B, N, C/2 size, size,
    ...).
    """
    return t.unflatten(2, (-1, 2, size))[:, :, :, int(second)]


def _causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, sizes: list[int]) -> tuple[Tensor, Tensor]:
    rows, keys, values = (t.unflatten(2, (-1, sizes[-1])).flatten(1, 2) for t in (q, k, v))
    out, lse = forward(rows, keys, values, True, scale)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    for size in sizes:
        rows, keys, values = (_half(t, size, second).flatten(1, 2)
                              for t, second in ((q, True), (k, False), (v, False)))
        found, sums = forward(rows, keys, values, False, scale)
        below, totals = _half(out, size, True), _half(lse, size, True)
        merge(below, totals, found.reshape(below.shape), sums.reshape(totals.shape))
    return out, lse


def _causal_backward(given: tuple[Tensor, ...], scale: float,
                     sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    seconds = (True, True, False, False, True, True)  # of dout, q, k, v, out, lse
    smallest = [t.unflatten(2, (-1, sizes[-1])).flatten(1, 2) for t in given]
    dout, q, k, v, out, lse = smallest
    sums = [grad.reshape(given[1].shape) for grad in backward(dout, q, k, v, out, lse, True, scale)]
    for size in sizes:
        dout, q, k, v, out, lse = (_half(t, size, second).flatten(1, 2)
                                   for t, second in zip(given, seconds, strict=True))
        shares = backward(dout, q, k, v, out, lse, False, scale)
        for total, share, second in zip(sums, shares, (True, False, False), strict=True):
            view = _half(total, size, second)
            view += share.reshape(view.shape)
    return sums[0], sums[1], sums[2]
