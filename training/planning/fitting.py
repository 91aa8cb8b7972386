"""A trial's measured bytes and seconds, fitted to the shape that the formulas give them.

For one policy memory is linear in what moves with the context, and a micro-batch's time is linear in its
linear-layer and attention operations (planning/timing.py, longcontext/costs.py). So two lengths give two
constants, and a third one checks them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.planning import mix, streaming, timing
from training.records import BaseModel, HardwareProfile, Memory, ModelShape, TrialStep

# Terms of a plan's memory that do not move with the context.
FIXED = ("weights", "adapter", "gradients", "optimizer", "average", "exchange", "runtime")
LEAST_GROWTH_BYTES = 16 << 20    # two peaks closer than this are not told apart from the allocator's steps
SLOPES = (0.3, 3.0)              # beyond these the formulas are not of the policy that ran
LEAST_SHARE = 0.3                # of a micro-batch's formula time, for attention's rate to be fitted apart


@dataclass(frozen=True, kw_only=True)
class Line:
    """peak = constant + slope x (moving bytes by formula); `why`: how it was found."""

    constant_bytes: float
    slope: float
    why: str

    def at(self, moving_bytes: float) -> float:
        """The peak for some moving bytes."""
        return self.constant_bytes + self.slope * moving_bytes


@dataclass(frozen=True, kw_only=True)
class Pace:
    """seconds = (fixed, linear, attention) weights x the formulas' seconds of linear layers and attention.

    `residual`: the largest relative distance from a measured length.
    """

    fixed_s: float
    linear: float
    attention: float
    residual: float
    why: str

    def at(self, parts: tuple[float, float]) -> float:
        """Seconds of a micro-batch with these formula seconds."""
        return self.fixed_s + self.linear * parts[0] + self.attention * parts[1]


def at_length(values: Mapping[str, Any], context: int, target: int) -> dict[str, Any]:
    """The same configuration for another window, all of them with as many targets."""
    return mix.uniform(values, context, target)


def moving_bytes(found: Memory) -> float:
    """What of a plan's memory grows with the window."""
    return float(sum(size for name, size in found.terms.items() if name not in FIXED))


def parts_s(shape: ModelShape, values: Mapping[str, Any], profile: HardwareProfile,
            targets: int = 0) -> tuple[float, float]:
    """Seconds of one micro-batch by the formulas: linear layers, attention. (0, 0) when no rate is known.
    `targets` of each window, 0: as many as the mix has on average."""
    linear, attention, _ = timing.rates(values, profile)
    micro = int(values["training.micro_batch"])
    if not linear:
        return 0.0, 0.0
    if streaming.streamed(values):
        found = streaming.costs_of(shape, values, targets=targets or round(mix.mean_targets(values)))
        return (sum(found.linear_flops.values()) / linear, sum(found.attention_flops.values()) / attention)
    flops = timing.window_flops(shape, values, targets)
    return micro * flops.linear / linear, micro * flops.attention / attention


def memory_line(steps: Sequence[TrialStep], moving: Sequence[float], constant_bytes: float) -> Line:
    """Through two or more small lengths, by least squares; where they cannot be told apart, with the slope
    of the formulas, and without any with their `constant_bytes` too.

    >>> steps = [TrialStep(context_tokens=s, target_tokens=s, micro_batch=1, seconds=(1.0,), update_s=0.0,
    ...                    peak_bytes=(100 + s) << 20) for s in (64, 128)]
    >>> line = memory_line(steps, [32 << 20, 64 << 20], 0.0)
    >>> round(line.slope, 6), int(line.constant_bytes) >> 20
    (2.0, 100)
    """
    peaks = np.array([step.peak_bytes for step in steps], dtype=float)
    sizes = np.array(moving, dtype=float)
    if len(peaks) > 1 and np.ptp(peaks) >= LEAST_GROWTH_BYTES and np.ptp(sizes) > 0:
        slope, constant = np.polyfit(sizes, peaks, 1)
        if SLOPES[0] <= slope <= SLOPES[1]:
            return Line(constant_bytes=float(constant), slope=float(slope),
                        why=f"{slope:.2f} times the formulas' growth between the trial's lengths")
    if len(peaks):
        return Line(constant_bytes=float(np.mean(peaks - sizes)), slope=1.0,
                    why="the formulas' growth above what the trial's short steps held")
    return Line(constant_bytes=constant_bytes, slope=1.0, why="the formulas")


def pace(seconds: Sequence[float], parts: Sequence[tuple[float, float]]) -> Pace:
    """Weights of the formulas' seconds that give the measured ones.

    A constant and one factor, or with three lengths and a large share of attention a constant and two; by
    least squares of the relative error, none negative. The constant is what does not grow with the window:
    launches, Python, unpacking NF4. Where nothing else holds one factor serves all.

    >>> found = pace([1.5, 4.0], [(1.0, 0.25), (2.0, 1.75)])
    >>> round(found.fixed_s, 6), round(found.linear, 6), round(found.attention, 6)
    (0.25, 1.0, 1.0)
    """
    measured, known = np.array(seconds, dtype=float), np.array(parts, dtype=float)
    if not len(measured) or not known.sum(axis=1).all():
        return Pace(fixed_s=0.0, linear=1.0, attention=1.0, residual=1.0, why="the formulas")
    longest = known[-1]
    apart = longest[1] >= LEAST_SHARE * longest.sum() and len(measured) > 2
    columns = known if apart else known.sum(axis=1)[:, None]
    if len(measured) > 1:
        columns = np.column_stack([np.ones(len(measured)), columns])
    weights = nonnegative(columns / measured[:, None], np.ones(len(measured)))
    fixed, *rates = weights if len(measured) > 1 else (0.0, *weights)
    if not any(rates):
        fixed, rates = 0.0, [float(measured[-1] / longest.sum())]
    linear, attention = (rates[0], rates[-1])
    residual = float(np.max(np.abs(fixed + known @ np.array([linear, attention]) - measured) / measured))
    factors = f"{linear:.2f}"
    if linear != attention:
        factors += f" (linear) and {attention:.2f} (attention)"
    return Pace(fixed_s=float(fixed), linear=float(linear), attention=float(attention), residual=residual,
                why=f"{factors} times the formulas' seconds, and {fixed:.2g} s")


def nonnegative(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Least squares with weights of 0 or more, by trying every set of columns that may be above 0: there are
    three at most.

    >>> nonnegative(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([2.0, 1.0]))
    [1.5, 0.0]
    """
    count = matrix.shape[1]
    best, least = [0.0] * count, float(target @ target)
    for mask in range(1, 1 << count):
        used = [index for index in range(count) if mask >> index & 1]
        found, *_ = np.linalg.lstsq(matrix[:, used], target, rcond=1e-9)
        if (found < 0).any():
            continue
        error = float(np.sum((matrix[:, used] @ found - target) ** 2))
        if error < least - 1e-12:
            best, least = [0.0] * count, error
            for index, value in zip(used, found, strict=True):
                best[index] = round(float(value), 12)
    return best


def median(values: Sequence[float]) -> float:
    """The median, 0 of nothing."""
    return statistics.median(values) if values else 0.0


def spread(values: Sequence[float]) -> float:
    """(max - min) / median; 0 of fewer than two.

    >>> spread([1.0, 2.0, 2.0])
    0.5
    """
    return (max(values) - min(values)) / median(values) if len(values) > 1 and median(values) else 0.0


def memory_at(base: BaseModel, values: Mapping[str, Any], context: int, target: int) -> Memory:
    """The formulas' memory of a configuration at another window."""
    return streaming.estimate(base, at_length(values, context, target))
