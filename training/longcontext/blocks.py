"""Which keys a chunk of queries sees, as blocks that need no mask.

Three kinds are enough for causal attention, sliding windows and packed documents:

    full      every query sees every key
    causal    square; query i sees keys 0..i
    window    square; query i sees keys i..n-1 (the far edge of a sliding window). Reversing queries and keys
              turns it into a causal block, so any causal kernel computes it.

A mask would cost c x p values and rule out the fastest kernels. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Queries per piece along a sliding window's edges. Half the keys of an edge block are wasted work, so pieces
# are small beside the window.
WINDOW_PIECE = 1024


class Block(NamedTuple):
    """Queries [q0, q1) and keys [k0, k1), both counted from the start of the sequence."""

    kind: str
    q0: int
    q1: int
    k0: int
    k1: int


def blocks(start: int, stop: int, *, documents: Sequence[int] = (0,), window: int = 0,
           page: int = 0) -> list[Block]:
    """Blocks that cover what queries [start, stop) see, each pair once; own keys first, then backwards.

    `documents`: positions where a document begins, ascending, the first 0. `window`: keys a query sees
    including its own; 0 for all. `page`: full blocks are cut at multiples of it; 0 for no cuts.

    >>> blocks(4, 6)
    [Block(kind='causal', q0=4, q1=6, k0=4, k1=6), Block(kind='full', q0=4, q1=6, k0=0, k1=4)]
    >>> blocks(4, 6, documents=(0, 5))[1:]
    [Block(kind='full', q0=4, q1=5, k0=0, k1=4), Block(kind='causal', q0=5, q1=6, k0=5, k1=6)]
    >>> [b.kind for b in blocks(4, 6, window=2)]
    ['causal', 'window']
    """
    found: list[Block] = []
    for q0, q1, first in _segments(start, stop, documents):
        if window and q1 - first > window:
            found += _windowed(q0, q1, first, window, page)
        else:
            found.append(Block("causal", q0, q1, q0, q1))
            found += _full(q0, q1, first, q0, page)
    return [block for block in found if block.q1 > block.q0 and block.k1 > block.k0]


def _segments(start: int, stop: int, documents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(q0, q1, first key) of each document's part of [start, stop)."""
    ends = [*documents[1:], stop]
    for begin, end in zip(documents, ends, strict=True):
        q0, q1 = max(begin, start), min(end, stop)
        if q0 < q1:
            yield q0, q1, begin


def _full(q0: int, q1: int, k0: int, k1: int, page: int) -> list[Block]:
    """Full blocks over keys [k0, k1), nearest page first."""
    if not page:
        return [Block("full", q0, q1, k0, k1)]
    edges = [k0, *range((k0 // page + 1) * page, k1, page), k1]
    return [Block("full", q0, q1, a, b) for a, b in zip(edges[-2::-1], edges[:0:-1], strict=True)]


def _windowed(q0: int, q1: int, first: int, window: int, page: int) -> Iterator[Block]:
    """Pieces no longer than the window: own causal block, the full middle, the window's far edge."""
    piece = min(window, WINDOW_PIECE)
    for a in range(q0, q1, piece):
        b = min(a + piece, q1)
        n = b - a
        yield Block("causal", a, b, a, b)
        yield from _full(a, b, max(first, b - window), a, page)
        # Row i of the piece sees keys from a - window + 1 + i on; those before b - window are the far edge.
        edge = a - window + 1
        cut = min(max(first - edge, 0), n)  # rows whose window still begins before the document
        yield Block("full", a, a + cut, first, b - window)
        yield Block("window", a + cut, b - 1, edge + cut, b - window)
