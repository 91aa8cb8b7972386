"""A check of composed context that needs no model: does it help a compressor more than other context does?

Bits per byte of a held-out file's second half under LZMA, given its first half and 64 KB of other text
before.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from training.curve import interval

MAX_FILES = 24
CONTEXT_BYTES = 64 << 10
HALF_BYTES = 32 << 10             # the halves' text nearest to the cut
# Bytes given to LZMA in all, whole files beyond it are left out: at 3 to 4 MB of code a CPU second, 2 s.
BUDGET_BYTES = 6_500_000
LEAST_DICTIONARY_BYTES = 1 << 16
NO_CONTEXT = "none"
Item = tuple[bytes, bytes, Mapping[str, bytes]]  # first half, second half, context by kind


def selftest(items: Iterable[Item], seed: int) -> dict[str, Any]:
    """What the text of each kind of context is worth to a compressor; {} without an item.

    Items are read in their order, at most 24 and at most 6.5 MB for LZMA; each has the same kinds of context,
    of which the last 64 KB count. Keys: files, bytes (of second halves), context_bytes (mean by kind),
    bits_per_byte (by kind, with `none`), gain (bits per byte below `none`, by kind: [mean, low, high], the
    bounds None with one file), xz and gzip (bits per byte of the halves together and alone).
    """
    sizes: list[dict[str, int]] = []
    spent = 0
    for first, second, contexts in items:
        halves = first[-HALF_BYTES:], second[:HALF_BYTES]
        kept = {NO_CONTEXT: b"", **{kind: text[-CONTEXT_BYTES:] for kind, text in contexts.items()}}
        cost = sum(2 * (len(text) + len(halves[0])) + len(halves[1]) for text in kept.values())
        if len(sizes) == MAX_FILES or (sizes and spent + cost > BUDGET_BYTES):
            break
        if halves[1]:
            spent += cost
            sizes.append(_measured(halves, kept))
    return _summary(sizes, seed) if sizes else {}


def _measured(halves: tuple[bytes, bytes], contexts: Mapping[str, bytes]) -> dict[str, int]:
    """Compressed bytes of the second half by kind of context, and of both halves alone."""
    first, second = halves
    found = {kind: lzma_bytes(text + first + second) - lzma_bytes(text + first)
             for kind, text in contexts.items()}
    return found | {"bytes": len(second), "both": len(first + second), "xz": lzma_bytes(first + second),
                    "gzip": deflate_bytes(first + second),
                    **{f"context {kind}": len(text) for kind, text in contexts.items()}}


def lzma_bytes(data: bytes) -> int:
    """Bytes of xz -9e's stream without its container; the dictionary holds all of the data."""
    dictionary = max(LEAST_DICTIONARY_BYTES, 1 << (len(data) - 1).bit_length() if data else 0)
    how = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=how))


def deflate_bytes(data: bytes) -> int:
    """Bytes of gzip -9's stream without its container."""
    state = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return len(state.compress(data) + state.flush())


def _summary(sizes: list[dict[str, int]], seed: int) -> dict[str, Any]:
    kinds = [name.removeprefix("context ") for name in sizes[0] if name.startswith("context ")]
    columns = {name: np.array([float(item[name]) for item in sizes]) for name in sizes[0]}
    units, both = columns["bytes"], columns["both"].sum()

    def gain(kind: str) -> list[float | None]:
        saved = 8 * (columns[NO_CONTEXT] - columns[kind])
        low, high = interval(saved, units, [str(place) for place in range(len(sizes))], seed) or (None, None)
        return [number if number is None else round(number, 4)
                for number in (float(saved.sum() / units.sum()), low, high)]

    return {"files": len(sizes), "bytes": int(units.sum()),
            "context_bytes": {kind: round(float(columns[f"context {kind}"].mean())) for kind in kinds},
            "bits_per_byte": {kind: round(float(8 * columns[kind].sum() / units.sum()), 4) for kind in kinds},
            "gain": {kind: gain(kind) for kind in kinds if kind != NO_CONTEXT},
            "xz": round(float(8 * columns["xz"].sum() / both), 4),
            "gzip": round(float(8 * columns["gzip"].sum() / both), 4)}
