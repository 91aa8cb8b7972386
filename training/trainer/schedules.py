"""The course of the learning rate as a function of the step, so that a resume needs no scheduler state.

Each returns the share of the highest learning rate for update `step` (0-based) of `steps`. Warm-up rises
over the first `warmup_share` of the steps and starts above 0, since an update at rate 0 is a step wasted;
the last update runs at `min_share`.
"""

from __future__ import annotations

import math

# torch.optim.lr_scheduler.OneCycleLR's default: it starts at 1/25 of the highest rate.
ONE_CYCLE_START = 1 / 25


def share(schedule: str, step: int, steps: int, warmup_share: float, min_share: float) -> float:
    """The learning rate at `step` as a share of the highest one.

    >>> [round(share("linear", step, 5, 0.2, 0.0), 3) for step in range(5)]
    [0.5, 1.0, 0.667, 0.333, 0.0]
    """
    step = min(step, steps - 1)
    if schedule == "one_cycle":
        return _one_cycle(step, steps, warmup_share, min_share)
    warmup = int(warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    if schedule == "linear":
        return 1.0 - (1.0 - min_share) * progress
    if schedule == "cosine":
        return _cosine(1.0, min_share, progress)
    raise ValueError(f"no schedule named {schedule!r}")


def _one_cycle(step: int, steps: int, warmup_share: float, min_share: float) -> float:
    """Smith & Topin, arXiv:1708.07120, as torch's OneCycleLR has it: cosine up, cosine down, two phases."""
    rise_end = warmup_share * steps - 1
    if step <= rise_end:
        return _cosine(ONE_CYCLE_START, 1.0, step / rise_end if rise_end > 0 else 1.0)
    fall = steps - 1 - max(rise_end, 0.0)
    return _cosine(1.0, min_share, (step - max(rise_end, 0.0)) / fall if fall > 0 else 0.0)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))
