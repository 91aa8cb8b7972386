"""What varies between epochs: middles to fill in, and where long files are cut.

Fill in the middle (arXiv 2207.14255): part of a target's text is moved behind what follows it.

psm           prefix-sentinel P  suffix-sentinel S  middle-sentinel M  end
spm           prefix-sentinel suffix-sentinel S  middle-sentinel P M  end
suffix-first  suffix-sentinel S  prefix-sentinel P  middle-sentinel M  end

P, M and S are token spans of the stored file, so each of its tokens is still trained exactly once. Middles
are whole syntax nodes in 80 % (where they are known; arXiv 2506.00204), whole lines in 10 %, anything in
10 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from training.dataset.documents import (
    FIRST_MOVES,
    INFILL,
    INFILL_ALWAYS,
    LAST_MOVES,
    TRAINED,
    Segment,
)

EXTRA_TOKENS = 4              # three sentinels and an end mark
MIN_TOKENS = 12               # shorter targets stay as they are
NODE_SHARE, LINES_SHARE = 0.8, 0.1
MAX_MIDDLE_LINES = 8


class Source(Protocol):
    """The array that places are of."""

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Stored ids from a place on."""

    def line_ends(self, start: int, length: int) -> np.ndarray:
        """Whether each of these tokens ends a line."""

    def spans(self, start: int, end: int) -> np.ndarray:
        """Whole syntax nodes within [start, end), int64 (N, 2)."""


@dataclass(frozen=True, kw_only=True)
class Varying:
    """How windows vary. `fim`: ids of the prefix, suffix and middle sentinels, or empty. `fim_rate`: of the
    targets that may be infilled. `move_tokens`: how far a cut moves. `order`: psm, psm+spm (half of the
    middles each) or suffix-first, as configs/models.yaml has it of the base.
    """

    eos_id: int
    fim: Mapping[str, int] = field(default_factory=dict)
    fim_rate: float = 0.0
    move_tokens: int = 0
    order: str = "psm"


def draws(key: str) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1) that depend on the text alone, on every platform and version.

    >>> [round(number, 3) for number in draws("a")]
    [0.792, 0.304, 0.447, 0.732]
    """
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u8")
    one, two, three, four = (float(int(word) >> 11) / (1 << 53) for word in words)
    return one, two, three, four


def nearest(rows: Sequence[Segment], limit: int) -> list[Segment]:
    """The window with only the last `limit` tokens of context before the first target's own text."""
    first = next((index for index, row in enumerate(rows) if row.trained), len(rows))
    own = first - (rows[first].lead if first < len(rows) else 0)
    kept: list[Segment] = []
    room = limit
    for row in reversed(rows[:own]):
        taken = min(room, row.length)
        if taken:
            kept.append(row._replace(start=row.start + row.length - taken, length=taken))
        room -= taken
    return [*reversed(kept), *rows[own:]]


def varied(rows: Sequence[Segment], how: Varying, source: Source, key: str) -> list[Segment]:
    """The segments of a window in one epoch; `key` names seed and epoch."""
    out: list[Segment] = []
    for row in rows:
        if not row.flags & (INFILL | FIRST_MOVES | LAST_MOVES):
            out.append(row)
            continue
        lead = [out.pop() for _ in range(row.lead)][::-1]
        target, lead = _moved(row, lead, how, source, key)
        chance, choice, place, order = draws(f"{key}\0{row.start}")
        wanted = row.flags & INFILL_ALWAYS or (row.flags & INFILL and chance < how.fim_rate)
        if wanted and how.fim and target.length >= MIN_TOKENS:
            out += _infilled(target, lead, how, source, (choice, place, order))
        else:
            out += [*lead, target]
    return [segment for segment in out if segment.length]


def _moved(row: Segment, lead: list[Segment], how: Varying, source: Source,
           key: str) -> tuple[Segment, list[Segment]]:
    """The target with its ends moved back to earlier line breaks, and its own preceding text so much shorter.

    Both windows at a cut draw from the same place, so that what one gives up the other takes."""
    first, last = row.start, row.start + row.length
    if row.flags & LAST_MOVES:
        last -= _step_back(last, how.move_tokens, source, key)
    if row.flags & FIRST_MOVES:
        back = _step_back(first, how.move_tokens, source, key)
        first -= back
        lead = [*lead[:-1], lead[-1]._replace(length=lead[-1].length - back)]
    return Segment(first, last - first, TRAINED), lead


def _step_back(place: int, most: int, source: Source, key: str) -> int:
    """Tokens from a cut back to the line break that this epoch draws; 0 where there is none."""
    breaks = np.flatnonzero(source.line_ends(place - most, most - 1))
    choices = [most - 1 - int(found) for found in breaks]
    drawn = int(draws(f"{key}\0cut\0{place}")[0] * (len(choices) + 1))
    return choices[drawn] if drawn < len(choices) else 0


def _infilled(target: Segment, lead: Sequence[Segment], how: Varying, source: Source,
              drawn: tuple[float, float, float]) -> list[Segment]:
    """A target with its lead, its middle moved. A file's own end mark closes the middle where the target
    holds it; else the stored mark does, trained too."""
    end = target.start + target.length
    own_end = int(source.tokens(end - 1, 1)[0]) == how.eos_id
    text_end = end - own_end
    first, last = choose_middle(target.start, text_end, source, drawn)
    before, middle, after = (Segment(a, b - a, TRAINED)
                             for a, b in ((target.start, first), (first, last), (last, text_end)))
    closing = Segment(text_end, 1, TRAINED) if own_end else Segment(-1 - how.eos_id, 1, TRAINED)
    prefix, suffix, fill = (Segment(-1 - how.fim[name], 1) for name in ("prefix", "suffix", "middle"))
    if how.order == "suffix-first":
        return [suffix, after, prefix, *lead, before, fill, middle, closing]
    if how.order == "psm+spm" and drawn[2] < 0.5:
        return [prefix, suffix, after, fill, *lead, before, middle, closing]
    return [prefix, *lead, before, suffix, after, fill, middle, closing]


def choose_middle(first: int, last: int, source: Source,
                  drawn: tuple[float, float, float]) -> tuple[int, int]:
    """The middle's places within the text [first, last): never empty, never all of it."""
    choice, where, how_far = drawn
    nodes = source.spans(first, last)
    nodes = nodes[(nodes[:, 0] > first) | (nodes[:, 1] < last)] if choice < NODE_SHARE else nodes[:0]
    if len(nodes):
        start, end = nodes[int(where * len(nodes))]
        return int(start), int(end)
    breaks = np.flatnonzero(source.line_ends(first, last - first - 1))
    cuts = [first, *(first + 1 + int(place) for place in breaks), last]
    if len(cuts) > 3 and choice < NODE_SHARE + LINES_SHARE:
        index = 1 + int(where * (len(cuts) - 2))
        return cuts[index], cuts[min(len(cuts) - 1, index + 1 + int(how_far * MAX_MIDDLE_LINES))]
    start = first + int(where * (last - first - 1))
    return start, start + 1 + int(how_far * (last - start - 1))
