"""Muon for matrices inside decoder layers, AdamW for everything else, as one optimizer.

torch.optim.Muon (2.13) orthogonalizes in bfloat16 whatever the device, and a CPU without bf16 units
multiplies that far slower than float32 (`elite_train.py profile` shows both rates). Here the type follows the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of (A, B) = U S V^T, approximately, by Newton-Schulz; bfloat16 on a GPU, float32 on a CPU."""
    work = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = work.shape[0] > work.shape[1]
    work = work.T if tall else work
    work = work / work.norm().clamp(min=TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = work @ work.T
        work = torch.addmm(work, torch.addmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    return (work.T if tall else work).to(matrix.dtype)


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = _orthogonal if group["orthogonal"] else _adam
                    update(parameter, self.state[parameter], group)


def _orthogonal(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    gradient: Any = parameter.grad
    state["momentum"].lerp_(gradient, 1 - group["momentum"])
    direction = orthogonalized(torch.lerp(gradient, state["momentum"], group["momentum"]))  # Nesterov's
    size = ADAM_RMS * math.sqrt(max(parameter.shape))
    parameter.add_(direction, alpha=-group["lr"] * size)


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
