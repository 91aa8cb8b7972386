"""The micro-batch by binary search over real steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from training.records import GIB, Choice, TrialStep

GAIN = 1.05     # a size is worth its memory when it makes this many times the half size's tokens a second
SPILL = 1.1     # a size whose memory, drawn on from those tried, is this far over the room is not tried
LARGEST = 64

TryStep = Callable[[int], TrialStep]


@dataclass(frozen=True, kw_only=True)
class BatchFit:
    """What a search found. `choices`: training.micro_batch and training.accumulation, or nothing when not
    even the planned size fits; `why` says it then. `steps`: every step taken, in order."""

    choices: dict[str, Choice]
    steps: tuple[TrialStep, ...]
    why: str


class BatchSearch:
    """Sizes tried once each. A step fits when it has no error and its peak is within `room_bytes`."""

    def __init__(self, try_step: TryStep, room_bytes: int):
        self._try_step, self._room_bytes = try_step, room_bytes
        self.steps: dict[int, TrialStep] = {}

    def largest(self, most: int) -> int:
        """The largest power of two up to `most` that fits and beats its half by GAIN; 0 when 1 does not fit.

        Binary search over the exponent: memory grows with the size and the gain of doubling shrinks, so
        whether a size is worth taking is true up to some size and false from there on.
        """
        if not self.fits(1):
            return 0
        if most < 2 or not self._worth(2):  # two sizes also draw the line that guards larger ones
            return 1
        low, high = 1, most.bit_length() - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._worth(1 << middle):
                low = middle
            else:
                high = middle - 1
        return 1 << low

    def fits(self, size: int) -> bool:
        """Whether a step of this size is within the room; a hopeless one is not taken."""
        if size not in self.steps and self._expected_bytes(size) > SPILL * self._room_bytes:
            return False
        step = self._step(size)
        return not step.error and step.peak_bytes <= self._room_bytes

    def _worth(self, size: int) -> bool:
        # The half first: it is the safer step, and what it took tells whether to take the other.
        return (self.fits(size // 2) and self.fits(size)
                and tokens_per_s(self._step(size)) >= GAIN * tokens_per_s(self._step(size // 2)))

    def _step(self, size: int) -> TrialStep:
        if size not in self.steps:
            self.steps[size] = self._try_step(size)
        return self.steps[size]

    def _expected_bytes(self, size: int) -> float:
        """Memory is linear in the size, so two smaller steps draw the line; 0 without two."""
        known = sorted((step.micro_batch, step.peak_bytes) for step in self.steps.values()
                       if not step.error and step.micro_batch < size)
        if len(known) < 2:
            return 0.0
        (first, low), (last, high) = known[0], known[-1]
        return high + (high - low) / (last - first) * (size - last)

    def reason(self, size: int) -> str:
        """Why this size and not its double."""
        taken, room = self.steps[size], self._room_bytes
        had = f"a step of {size} took {taken.peak_bytes / GIB:.2f} of {room / GIB:.2f} GiB"
        if half := self.steps.get(size // 2):
            had += f" and made {_ratio(taken, half)} times the tokens/s of {size // 2}"
        if double := self.steps.get(2 * size):
            if double.error or double.peak_bytes > room:
                return f"{had}; {2 * size} does not fit"
            return f"{had}; {2 * size} makes {_ratio(double, taken)} times its tokens/s"
        expected = self._expected_bytes(2 * size)
        return had + f"; {2 * size} would take {expected / GIB:.2f}" * (expected > SPILL * room)


def _ratio(more: TrialStep, less: TrialStep) -> str:
    return f"{tokens_per_s(more) / tokens_per_s(less):.2f}"


def tokens_per_s(step: TrialStep) -> float:
    """Tokens of a micro-batch over the median of its seconds."""
    return step.micro_batch * step.context_tokens / median(step.seconds)


def divisible(planned: int) -> int:
    """The largest power of two that divides the windows of a device in an update, at most LARGEST.

    >>> divisible(8), divisible(12), divisible(7)
    (8, 4, 1)
    """
    return min(LARGEST, planned & -planned)


def search(try_step: TryStep, values: Mapping[str, Any], room_bytes: int) -> BatchFit:
    """The micro-batch for a configuration, by real steps; the windows of an update stay what was planned.

    `try_step` runs an update's forward and backward with so many windows at once; its record has an error, or
    a peak over `room_bytes`, when that does not fit.
    """
    planned = int(values["training.micro_batch"]) * int(values["training.accumulation"])
    found = BatchSearch(try_step, room_bytes)
    size = found.largest(divisible(planned))
    steps = tuple(found.steps.values())
    if not size:
        first = found.steps[1]
        why = first.error or f"it took {first.peak_bytes / GIB:.2f} of {room_bytes / GIB:.2f} GiB"
        return BatchFit(choices={}, steps=steps, why=f"one window at a time does not fit: {why}")
    why = found.reason(size)
    rest = planned // size
    return BatchFit(steps=steps, why=why, choices={
        "training.micro_batch": Choice(size, "measured", why),
        "training.accumulation": Choice(rest, "measured", f"{planned} windows of a device in an update, as "
                                                          f"planned, {size} at a time")})
