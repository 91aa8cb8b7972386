"""Fill in the middle: part of a target's text is moved behind what follows it (arXiv 2207.14255).

PSM  prefix-sentinel P  suffix-sentinel S  middle-sentinel M  end
SPM  prefix-sentinel suffix-sentinel S  middle-sentinel P M  end

P, M and S are token spans of the stored file, so each of its tokens is still trained exactly once. Middles
are whole statements in 80 % (where the parser knows them), whole lines in 10 %, anything in 10 %.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from training.dataset.documents import Document, Marks, Part, Segment
from training.dataset.structure.syntax import statements

EXTRA_TOKENS = 4              # three sentinels and an end mark
MIN_TOKENS = 12               # shorter targets stay as they are
STATEMENT_SHARE, LINES_SHARE = 0.8, 0.1


def statement_spans(text: str, token_bytes: np.ndarray) -> list[tuple[int, int]]:
    """Python statements as token spans of the body.

    `token_bytes` (S,): bytes of each token's text. Empty when they do not add up to the text.
    """
    edges = np.concatenate([[0], np.cumsum(token_bytes, dtype=np.int64)])
    if edges[-1] != len(text.encode("utf-8")):
        return []
    spans = []
    for item in statements(text):
        # Blanks before a statement and its line break often share a token with it: those tokens belong to it.
        first = int(np.searchsorted(edges, item.start, side="right")) - 1
        spans.append((first, int(np.searchsorted(edges, item.end, side="left"))))
    return spans


def choose_middle(rng: random.Random, first: int, last: int, spans: Sequence[tuple[int, int]],
                  line_ends: np.ndarray) -> tuple[int, int]:
    """The middle's token span within the target [first, last): never empty, never the whole target.

    `line_ends`: body places after which a line ends, ascending.
    """
    draw = rng.random()
    inside = [span for span in spans if first <= span[0] and span[1] <= last and span != (first, last)]
    if inside and draw < STATEMENT_SHARE:
        return rng.choice(inside)
    low, high = np.searchsorted(line_ends, [first, last - 1])
    cuts = [first, *(int(place) + 1 for place in line_ends[low:high]), last]
    if len(cuts) > 3 and draw < STATEMENT_SHARE + LINES_SHARE:
        index = rng.randrange(1, len(cuts) - 1)
        return cuts[index], cuts[min(len(cuts) - 1, index + rng.randint(1, 8))]
    middle = sorted(rng.sample(range(first, last), 2))
    return middle[0], middle[1]


def segments(document: Document, part: Part, lead: Sequence[Segment], marks: Marks) -> list[Segment]:
    """A target with its lead (header and preceding text, untrained), left to right or with its middle moved.

    A body's own end mark closes the middle where the target holds it; else the stored mark does, trained too.
    """
    base = document.body_start
    if part.infill is None:
        return [*lead, Segment(base + part.first, part.last - part.first, True)]
    middle_first, middle_last, spm = part.infill
    before = Segment(base + part.first, middle_first - part.first, True)
    middle = Segment(base + middle_first, middle_last - middle_first, True)
    own_end = document.ended and part.last == document.body
    text_last = part.last - own_end
    after = Segment(base + middle_last, text_last - middle_last, True)
    end = Segment(base + text_last, 1, True) if own_end else Segment(marks.eos, 1, True)
    prefix, suffix, fill = marks.sentinels()
    if spm:
        return [prefix, suffix, after, fill, *lead, before, middle, end]
    return [prefix, *lead, before, suffix, after, fill, middle, end]
