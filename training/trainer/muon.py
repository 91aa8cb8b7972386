"""Muon for matrices inside decoder layers, AdamW for everything else, as one optimizer.

torch.optim.Muon (2.13) orthogonalizes in bfloat16 whatever the device, and a CPU without bf16 units
multiplies that far slower than float32 (`elite_train.py profile` shows both rates). Here the type follows the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Quintic Newton-Schulz of Keller Jordan (kellerjordan.github.io/posts/muon, 2024): steepest at zero, leaves
# singular values between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# An update's root mean square is brought to AdamW's usual one, so that both kinds share one learning rate
# (Liu et al. 2025, arXiv:2502.16982, section 2.2).
ADAM_RMS = 0.2
TINY = 1e-7
# Matrices of one shape are orthogonalized together, up to so many numbers: 42 of a model of width 128 took
# 146 ms one by one on 2 cores and 38 ms so, of width 256 567 ms and 312 ms (2026-11).
TOGETHER = 1 << 20


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V^T of each (N, A, B) = U S V^T, approximately, by Newton-Schulz; bfloat16 on a GPU, float32 on a
    CPU."""
    work = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = work.shape[1] > work.shape[2]
    work = work.mT if tall else work
    work = work / work.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = torch.bmm(work, work.mT)
        work = torch.baddbmm(work, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    return (work.mT if tall else work).to(matrices.dtype)


def together(a: int, b: int, count: int) -> int:
    """How many of `count` matrices (a, b) are orthogonalized at once.

    >>> together(256, 256, 24), together(2048, 8192, 24)
    (16, 1)
    """
    return min(count, max(1, TOGETHER // (a * b)))


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalized where a group says `orthogonal`, AdamW elsewhere.

    `groups`: parameter groups with `orthogonal` and `weight_decay`. State: `momentum` of a matrix; `exp_avg`,
    `exp_avg_sq` and `step` of the rest. Raises ValueError for an orthogonal parameter that is no matrix.
    Source: Jordan et al. 2024, and arXiv:2502.16982, algorithm 1.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum,
                                  "weight_decay": 0.0, "orthogonal": False})
        for group in self.param_groups:
            wrong = [p.shape for p in group["params"] if group["orthogonal"] and p.ndim != 2]
            if wrong:
                raise ValueError(f"only matrices are orthogonalized, not shape {tuple(wrong[0])}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if not group["orthogonal"]:
                    _adam(parameter, self.state[parameter], group)
            for alike in _batches(moved if group["orthogonal"] else []):
                self._orthogonal(alike, group)

    def _orthogonal(self, alike: Sequence[Tensor], group: dict[str, Any]) -> None:
        """One update of matrices of one shape."""
        directions = [self._direction(parameter, group["momentum"]) for parameter in alike]
        stacked = torch.stack(directions)
        del directions
        found = orthogonalized(stacked)
        size = ADAM_RMS * math.sqrt(max(alike[0].shape))
        for parameter, direction in zip(alike, found, strict=True):
            parameter.add_(direction, alpha=-group["lr"] * size)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's, after the gradient was added to the momentum."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, state["momentum"], momentum)


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, type and device, as many at once as `together` says, in order."""
    alike: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for found in alike.values():
        size = together(found[0].shape[0], found[0].shape[1], len(found))
        yield from (found[start:start + size] for start in range(0, len(found), size))


def _adam(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state |= {"step": 0} | {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    gradient: Any = parameter.grad
    first, second = group["betas"]
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    bias, spread = 1 - first ** state["step"], 1 - second ** state["step"]
    root = (state["exp_avg_sq"] / spread).sqrt_().add_(group["eps"])
    parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / bias)
