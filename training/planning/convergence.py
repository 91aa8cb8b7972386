"""How the loss of a run will fall: an exponential decay, fitted with an interval and refitted as it grows.

L(t) = floor + (start - floor) exp(-t / tau), t in target tokens trained on. One time constant is a
simplification: measured curves go on falling where it has levelled off (Kaplan et al., arXiv:2001.08361, fit
power laws). So an interval also holds the curves a - b log(1 + t / tau) that fit as well, which never level
off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.records import ModelShape, Range

LEAST_POINTS = 8                 # three constants, and enough left over for their scatter
MOST_POINTS = 400                # more are averaged by neighbours, so a refit takes milliseconds
GRID = 64                        # time constants tried at once, spaced evenly in their logarithm
ZOOMS = 2                        # times the grid is laid again, closer around those that fit
NEAR = 1.5                       # of the least error: what a closer grid still covers
LEAST_GAIN = 0.01
# The embedded model from scratch, trained with Muon: share of the first loss that is left after so many
# target tokens, the mean of one run each on NetworkX and SymPy (benchmarks/results/recipe-2026-11-21.json);
# linear in the logarithm between its points. Beyond the last one none is taken to be gained.
EMBEDDED_LEFT = ((0.0, 1.0), (13_700.0, 0.95), (27_200.0, 0.79), (40_800.0, 0.745), (54_400.0, 0.70),
                 (68_000.0, 0.67), (95_300.0, 0.64), (127_000.0, 0.614))
EMBEDDED_OFF = 0.15
# LoRA on a base that knows the language: assumed, not measured. A loss on code between 0.5 and 2 nats a token
# at first, and between nothing and a third of it gained.
BASE_START = (0.5, 1.0, 2.0)
BASE_LEFT = (0.67, 0.85, 1.0)
# A rate that falls to its end lowers the loss further than the curve before it shows: a run of the embedded
# model under the cosine schedule was expected at 6.04 (5.94-6.13) at half and ended at 5.48. So the low end
# is lowered by this share of itself for the part of the run that is still to come.
SCHEDULE_DROP = 0.2
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Decay:
    """A fitted curve, read by `expected` and `between`; `points` went into it, `noise` is their scatter."""

    floor: float
    start: float
    tau_tokens: float
    noise: float
    points: int
    _curves: _Curves

    def expected(self, tokens: float) -> float:
        """The loss after so many target tokens."""
        return self.floor + (self.start - self.floor) * math.exp(-tokens / self.tau_tokens)

    def between(self, tokens: float) -> tuple[float, float]:
        """The 95 % interval of the expected loss there (of the curve, not of one step's scatter)."""
        return self._curves.between(tokens)


@dataclass(frozen=True)
class _Curves:
    """Curves c + a f(t / tau), for each tau the best c and a: what an interval is read from.

    `taus`, `falling` (G,): the time constant, and whether f is exp(-x) or -log(1 + x); `errors` (G,) sums of
    squares; `solutions` (G, 2) c and a; `inverses` (G, 2, 2) of the normal equations; `limit`: the largest
    sum of squares within the interval.
    """

    taus: Floats
    falling: NDArray[np.bool_]
    errors: Floats
    solutions: Floats
    inverses: Floats
    limit: float = 0.0

    def between(self, tokens: float) -> tuple[float, float]:
        """Profile likelihood: every value that some curve within the limit takes at `tokens`."""
        design = _design(np.array([tokens]), self.taus, self.falling)[:, 0]
        values = np.sum(design * self.solutions, axis=1)
        leverage = np.einsum("gi,gij,gj->g", design, self.inverses, design)
        inside = (self.errors <= self.limit) & (self.solutions[:, 1] >= 0)
        inside = inside if inside.any() else self.errors <= self.limit
        half = np.sqrt(np.maximum(self.limit - self.errors, 0.0) * np.maximum(leverage, 0.0))
        return float(np.min((values - half)[inside])), float(np.max((values + half)[inside]))


def _design(tokens: Floats, taus: Floats, falling: NDArray[np.bool_]) -> Floats:
    """(G, N, 2): ones, and each curve's shape at each point."""
    scaled = tokens[None] / taus[:, None]
    shape = np.where(falling[:, None], np.exp(-scaled), -np.log1p(scaled))
    return np.stack([np.ones_like(shape), shape], axis=2)


def fit(points: Sequence[tuple[float, float]]) -> Decay | None:
    """The decay through (tokens, loss) points, ascending in tokens; None with fewer than eight.

    For each time constant floor and amplitude follow by linear least squares (variable projection, Golub and
    Pereyra 1973); the constant with the least error is taken. The interval holds every curve whose sum of
    squares is below (1 + t^2 / (n - 3)) times the decay's (an F test of one constraint), n cut down where the
    residuals follow one another; so logarithmic curves widen it only where they fit as well.
    """
    data = _thinned(np.array([(x, y) for x, y in points if math.isfinite(y)], dtype=float).reshape(-1, 2))
    if len(data) < LEAST_POINTS or np.ptp(data[:, 0]) <= 0:
        return None
    tokens, losses = data[:, 0], data[:, 1]
    span = float(np.ptp(tokens))
    curves = _solved(tokens, losses, np.geomspace(span / len(tokens), 20 * span, GRID), True)
    for _ in range(ZOOMS):
        curves = _solved(tokens, losses, _around(curves), True)
    best = int(np.argmin(curves.errors))
    tau, (floor, amplitude) = float(curves.taus[best]), (float(value) for value in curves.solutions[best])
    residuals = losses - floor - amplitude * np.exp(-tokens / tau)
    free = max(1.0, _independent(residuals) - 3)
    least = max(float(curves.errors[best]), 1e-12)
    slow = _solved(tokens, losses, np.geomspace(span / len(tokens), 20 * span, GRID), False)
    return Decay(floor=floor, start=floor + amplitude, tau_tokens=tau, points=len(points),
                 noise=math.sqrt(least / max(1, len(tokens) - 3)),
                 _curves=_joined(curves, slow, least * (1 + student(free) ** 2 / free)))


def _around(curves: _Curves) -> Floats:
    """A finer grid over the constants whose error is near the least."""
    near = np.flatnonzero(curves.errors <= NEAR * max(float(curves.errors.min()), 1e-12))
    last = len(curves.taus) - 1
    return np.geomspace(curves.taus[max(0, near[0] - 1)], curves.taus[min(last, near[-1] + 1)], GRID)


def _joined(a: _Curves, b: _Curves, limit: float) -> _Curves:
    """Both families as one."""
    def both(name: str) -> Any:
        return np.concatenate([getattr(a, name), getattr(b, name)])
    return _Curves(both("taus"), both("falling"), both("errors"), both("solutions"), both("inverses"), limit)


def _solved(tokens: Floats, losses: Floats, taus: Floats, exponential: bool) -> _Curves:
    """The best constants for each time constant, by the normal equations."""
    falling = np.full(len(taus), exponential)
    design = _design(tokens, taus, falling)
    inverses = np.linalg.pinv(np.einsum("gni,gnj->gij", design, design), hermitian=True)
    solutions = np.einsum("gij,gnj,n->gi", inverses, design, losses)
    errors = np.sum((np.einsum("gni,gi->gn", design, solutions) - losses[None]) ** 2, axis=1)
    return _Curves(taus, falling, errors, solutions, inverses)


def _independent(residuals: Floats) -> float:
    """How many independent points residuals are worth, from their first autocorrelation (AR(1))."""
    power = float(residuals @ residuals)
    follow = float(residuals[1:] @ residuals[:-1]) / power if power > 0 else 0.0
    follow = min(max(follow, 0.0), 0.95)
    return len(residuals) * (1 - follow) / (1 + follow)


def student(free: float) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal one (Fisher and Cornish 1960).

    >>> round(student(5), 2), round(student(30), 3)
    (2.57, 2.042)
    """
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / free + second / free**2 + third / free**3


def _thinned(data: Floats) -> Floats:
    """At most 400 rows, each the mean of neighbours."""
    if len(data) <= MOST_POINTS:
        return data
    return np.stack([part.mean(axis=0) for part in np.array_split(data, MOST_POINTS)])


def at_end(points: Sequence[tuple[float, float]], tokens: float, epoch_tokens: float = 0.0) -> Range | None:
    """The loss expected when `tokens` are trained on, from the curve so far; None while too few points are
    there. `epoch_tokens`: target tokens of an epoch (0: unknown), for the epochs that are recommended."""
    decay = fit(points)
    if decay is None:
        return None
    low, high = decay.between(tokens)
    low *= 1 - SCHEDULE_DROP * max(0.0, 1 - points[-1][0] / tokens) if tokens > 0 else 1.0
    return Range(low=max(0.0, low), expected=max(0.0, decay.expected(tokens)), high=high, source="measured",
                 why=f"exponential decay through {decay.points:,} steps, 95 % interval"
                     f"{_epochs(decay, epoch_tokens)}")


def _epochs(decay: Decay, epoch_tokens: float) -> str:
    if epoch_tokens <= 0:
        return ""
    count, why = recommended_epochs(decay, epoch_tokens)
    return f"; {count} epoch{'s' if count != 1 else ''} recommended: {why}"


def before(shape: ModelShape, embedded: bool, start_loss: float | None, tokens: float) -> Range:
    """The training loss at the end of a run that has no curve yet: wide, and it says where it comes from.

    `start_loss`: the first loss if it is known; an untrained model's is the logarithm of its vocabulary.
    """
    if embedded:
        start = math.log(shape.vocab) if start_loss is None else start_loss
        left = _left(tokens)
        return Range(low=start * left * (1 - EMBEDDED_OFF), expected=start * left,
                     high=min(start, start * left * (1 + EMBEDDED_OFF)), source="derived",
                     why=f"one measured run of the embedded model: {left:.0%} of the first loss left after "
                         f"{tokens:,.0f} target tokens")
    low, middle, high = BASE_START if start_loss is None else (start_loss,) * 3
    return Range(low=low * BASE_LEFT[0], expected=middle * BASE_LEFT[1], high=high * BASE_LEFT[2],
                 source="derived", why="assumed, not measured: what code costs a base, less up to a third")


def _left(tokens: float) -> float:
    """Share of the first loss left, between the measured points linear in log(1 + tokens)."""
    at, left = zip(*EMBEDDED_LEFT, strict=True)
    return float(np.interp(math.log1p(max(0.0, tokens)), np.log1p(at), left))


def recommended_epochs(decay: Decay, tokens_per_epoch: float, most: int = 100) -> tuple[int, str]:
    """How many epochs are worth it: those before the first that gains less than 1 % of the loss, and why."""
    for epoch in range(1, most + 1):
        earlier, later = (decay.expected(tokens_per_epoch * number) for number in (epoch - 1, epoch))
        gain = (earlier - later) / earlier if earlier > 0 else 0.0
        if gain < LEAST_GAIN:
            return max(1, epoch - 1), (f"epoch {epoch} would lower the loss by {max(0.0, gain):.1%}, less "
                                       f"than {LEAST_GAIN:.0%}")
    return most, f"each of {most} epochs still lowers the loss by {LEAST_GAIN:.0%} or more"
