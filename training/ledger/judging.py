"""From the figures of both arms to a verdict: relative changes, their intervals, and what counts.

A figure's change is the mean over the pairs of (on - off) / off, with Student's interval of 95 %. It counts
when the interval holds no 0 and the mean is at least `NOTICEABLE`; else it is no difference. An optimization
whose counting figures all got better helped, all worse hurt, some of both is mixed.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[float, float]]

NOTICEABLE = {"memory_bytes": 0.02, "tokens_per_s": 0.05, "loss": 0.005, "loss_at_time": 0.005,
              "disk_bytes": 0.02}
BETTER = {"memory_bytes": -1, "tokens_per_s": 1, "loss": -1, "loss_at_time": -1, "disk_bytes": -1}
# Student's t, 97.5 %, by degrees of freedom; Fisher and Yates, table III.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
HELPED, HURT, MIXED, SAME = "helped", "hurt", "mixed", "no difference"
ABSENT, FAILED = "not applicable here", "failed"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one run measured. Peak memory of a process and disk in bytes, median target tokens/s after
    warm-up, held-out loss in nats at the end; `seconds` of training steps; `curve`: (seconds, loss)."""

    memory_bytes: float
    tokens_per_s: float
    loss: float
    disk_bytes: float = 0.0
    seconds: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure's relative change with its interval; `verdict`: better, worse or no difference."""

    mean: float
    low: float
    high: float
    verdict: str


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of Student's 95 % interval; of one value it is unbounded.

    >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3])]
    [0.2, -0.048, 0.448]
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, -math.inf, math.inf
    half = T[min(count - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - half, mean + half


def loss_at(curve: Curve, seconds: float) -> float:
    """The held-out loss at a time, between the two evaluations around it; before the first and after the
    last theirs.

    >>> loss_at([(0.0, 8.0), (10.0, 6.0), (20.0, 5.0)], 15.0)
    5.5
    """
    times = [time for time, _ in curve]
    index = bisect_right(times, seconds)
    if index == 0 or index == len(curve):
        return curve[min(index, len(curve) - 1)][1]
    (before_s, before), (after_s, after) = curve[index - 1], curve[index]
    return before + (after - before) * (seconds - before_s) / (after_s - before_s)


def at_equal_time(on: Arm, off: Arm) -> tuple[float, float]:
    """Both held-out losses at the time when the faster of the two ended: (on, off)."""
    seconds = min(on.seconds, off.seconds)
    return loss_at(on.curve, seconds), loss_at(off.curve, seconds)


def changes(on: Sequence[Arm], off: Sequence[Arm], claimed: Collection[str] = ()) -> dict[str, Change]:
    """The change of each figure that both arms have. Of what an optimization claims to change, `quality` adds
    the loss at equal time and `disk` the checkpoints, which for others are a by-product."""
    pairs = list(zip(on, off, strict=True))
    plain = ["memory_bytes", "tokens_per_s", "loss", *(["disk_bytes"] if "disk" in claimed else [])]
    found = {name: [(getattr(a, name), getattr(b, name)) for a, b in pairs] for name in plain}
    if "quality" in claimed and all(len(arm.curve) > 2 for pair in pairs for arm in pair):
        found["loss_at_time"] = [at_equal_time(a, b) for a, b in pairs]
    return {name: _change(name, found[name]) for name in NOTICEABLE
            if name in found and all(math.isfinite(a) and math.isfinite(b) and b for a, b in found[name])}


def _change(name: str, pairs: Sequence[tuple[float, float]]) -> Change:
    mean, low, high = interval([a / b - 1 for a, b in pairs])
    counts = (low > 0 or high < 0) and abs(mean) >= NOTICEABLE[name]
    judged = SAME if not counts else "better" if mean * BETTER[name] > 0 else "worse"
    return Change(mean=mean, low=low, high=high, verdict=judged)


def verdict(found: Mapping[str, Change]) -> str:
    """helped, hurt, mixed or no difference, by the rule at the top of this file."""
    seen = {change.verdict for change in found.values()} - {SAME}
    if len(seen) == 2:
        return MIXED
    return HELPED if "better" in seen else HURT if seen else SAME
