"""Files as tokens in one long array, and the pieces that windows are made of.

Each file lies in the array as header (`# path: ...`), then body (its text, and the end mark where the text
ends with the file).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TRAINED, INFILL_DRAWN, INFILL_ALWAYS, FIRST_MOVES, LAST_MOVES = 1, 2, 4, 8, 16
INFILL = INFILL_DRAWN | INFILL_ALWAYS
LineEnds = Callable[[int, int], np.ndarray]     # (start, length) -> bool (length,)


class Segment(NamedTuple):
    """`length` tokens of the array from `start`.

    `flags`: TRAINED for targets; what may vary between epochs: whether a middle is filled in (drawn by the
    dataset's rate, or always) and whether the target's first and last place move. `lead`: so many segments
    before it are the target's own header and preceding text.
    """

    start: int
    length: int
    flags: int = 0
    lead: int = 0

    @property
    def trained(self) -> bool:
        """Whether these tokens are targets."""
        return bool(self.flags & TRAINED)


class Part(NamedTuple):
    """A target: body tokens [first, last) of a document; `flags` as in `Segment`."""

    document: int
    first: int
    last: int
    flags: int = TRAINED


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One file in the array: header at `start`, then body. `skeleton`: (start, length) or (0, 0).

    `ended`: the body's last token is the end mark. `byte`: where in the file its text begins.
    """

    path: str
    language: str
    kind: str
    start: int
    header: int
    body: int
    ended: bool = True
    skeleton: tuple[int, int] = (0, 0)
    byte: int = 0

    @property
    def body_start(self) -> int:
        """Place of the first body token."""
        return self.start + self.header

    @property
    def length(self) -> int:
        """Header and body, tokens."""
        return self.header + self.body


def header_text(path: str) -> str:
    """The line that tells the model which file follows.

    >>> header_text("a/b.py")
    '# path: a/b.py\\n'
    """
    return f"# path: {path}\n"


def cut(start: int, total: int, limit: int, line_ends: LineEnds) -> list[tuple[int, int]]:
    """Spans of at most `limit` tokens that cover [0, total) in order, cut after a line break in the last
    quarter where one is. `start`: place of the body in the array that `line_ends` reads.

    >>> ends = np.array([0, 0, 0, 0, 0, 0, 1, 0, 0, 0], bool)
    >>> cut(0, 10, 8, lambda start, length: ends[start:start + length])
    [(0, 7), (7, 10)]
    """
    if limit < 1:
        raise ValueError(f"a piece holds {limit} tokens; the least is 1")
    spans, first = [], 0
    while first < total:
        last = min(first + limit, total)
        if last < total:
            earliest = last - limit // 4
            breaks = np.flatnonzero(line_ends(start + earliest, last - earliest))
            last = earliest + int(breaks[-1]) + 1 if len(breaks) else last
        spans.append((first, last))
        first = last
    return spans


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """The same context with neighbours joined and empty segments left out; targets and their leads stay."""
    out: list[Segment] = []
    kept = 0         # of the last segments in `segments`, those that belong to a target
    owned = [False] * len(segments)
    for index in range(len(segments) - 1, -1, -1):
        if segments[index].flags:
            owned[index], kept = True, segments[index].lead
        elif kept:
            owned[index], kept = True, kept - 1
    open_end = False
    for segment, own in zip(segments, owned, strict=True):
        if not segment.length and not own:
            continue
        previous = out[-1] if out else None
        if not own and open_end and previous and previous.start + previous.length == segment.start:
            out[-1] = Segment(previous.start, previous.length + segment.length)
        else:
            out.append(segment)
        open_end = not own
    return out
