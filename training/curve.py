"""The context curve's lengths, what reading it costs, and the interval of a mean by file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KINDS = ("composed", "random", "foreign")
MOST_LENGTHS = 8
MOST_TOKENS = 65_536             # of context; more for each target costs the dataset more than it tells
SHORT_WINDOW_TOKENS = 4_096
SHORT_LENGTH, LONG_LENGTH = 64, 512   # where the curve starts, in windows up to the above and in longer ones
RESAMPLES = 1_000


def context_lengths(context_tokens: int) -> tuple[int, ...]:
    """0, powers of two, and the whole window (or 65,536): at most 8 lengths.

    >>> context_lengths(512)
    (0, 64, 128, 256, 512)
    >>> context_lengths(32_768)
    (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    >>> context_lengths(1 << 22)
    (0, 512, 1024, 2048, 8192, 16384, 32768, 65536)
    """
    most = min(context_tokens, MOST_TOKENS)
    least = SHORT_LENGTH if context_tokens <= SHORT_WINDOW_TOKENS else LONG_LENGTH
    powers = [1 << place for place in range(least.bit_length() - 1, (most - 1).bit_length())]
    wanted = MOST_LENGTHS - 2
    if len(powers) > wanted:
        powers = [powers[round(place * (len(powers) - 1) / (wanted - 1))] for place in range(wanted)]
    return 0, *powers, most


def curve_tokens(context_tokens: int, targets: int, target_tokens: int | None = None) -> int:
    """Most tokens that a run reads for its curves: two lengths before training, the whole curve after it.

    Each read is one forward pass over at most min(length + target, window) tokens; without context all kinds
    are the same text, read once. `target_tokens` None: half of the window.

    >>> curve_tokens(512, 8, 128)       # 8 x (128 + 512), then 8 x (128 + 3 x (192 + 256 + 384 + 512))
    38400
    """
    half = max(1, context_tokens // 2)
    target = half if target_tokens is None else min(half, target_tokens)
    reads = [min(length + target, context_tokens) for length in context_lengths(context_tokens)]
    return targets * (2 * target + reads[-1] + len(KINDS) * sum(reads[1:]))


def interval(sums: np.ndarray, units: np.ndarray, files: Sequence[str],
             seed: int) -> tuple[float, float] | None:
    """95 % interval of sum(sums) / sum(units) under resampling of whole files; None with a single file.

    `sums`, `units` (I,), `files` (I): the file of each item. Percentile bootstrap (Efron and Tibshirani, An
    Introduction to the Bootstrap, section 13.3), 1,000 resamples: items of one file are not independent.
    """
    names, place = np.unique(np.asarray(files), return_inverse=True)
    if len(names) < 2:
        return None
    by_file = np.stack([np.bincount(place, weights=part, minlength=len(names)) for part in (sums, units)])
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.integers(len(names), size=(RESAMPLES, len(names)))
    means = by_file[0][drawn].sum(axis=1) / by_file[1][drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
