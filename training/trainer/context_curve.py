"""Loss on the same held-out targets with more and more context before them, by kind of context.

With the untrained and the trained model it gives the four arms (base, base + context, tuned, tuned + context)
without which no gain can be credited to training. Shapes: I items (targets), K kinds, L lengths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from training.curve import context_lengths, interval

Ids = np.ndarray
Score = Callable[[Ids, Ids], tuple[float, int]]  # a window's ids and labels -> summed loss, target tokens


class CurveStore(Protocol):
    """What is asked of a dataset: window 3 i + k of split `curve` has target i behind context of kind k."""

    def curve(self) -> dict[str, Any]:
        """kinds (names), items (count), paths (of each item), foreign (what that text is)."""

    def window(self, split: str, index: int, *, context_limit: int | None = None) -> tuple[Ids, Ids]:
        """ids, labels (S,); at most `context_limit` tokens before the target's own header, None: all."""

    def target_bytes(self, split: str, index: int) -> int:
        """UTF-8 bytes of the target's text."""


class Curve(NamedTuple):
    """What is read: items, names of kinds, and lengths, the first 0 and the last the whole window."""

    items: list[int]
    kinds: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def reads(self) -> int:
        """Forward passes at most: without context all kinds are the same text, read once."""
        return len(self.items) * (1 + len(self.kinds) * (len(self.lengths) - 1))


def ends(items: list[int], context_tokens: int) -> Curve:
    """No context and all of the composed one: the two arms of an untrained model."""
    return Curve(items, ("composed",), (0, context_tokens))


def whole(items: list[int], kinds: Sequence[str], context_tokens: int) -> Curve:
    """Every kind at every length."""
    return Curve(items, tuple(kinds), context_lengths(context_tokens))


class Read(NamedTuple):
    """One forward pass: summed loss, target tokens, and length of the window."""

    nats: float
    tokens: int
    window_tokens: int


def measure(store: CurveStore, curve: Curve, score: Score, seed: int,
            tell: Callable[[int], None]) -> dict[str, Any] | None:
    """`records.Quality.context_curve`; None without a target. `tell(windows read)` comes before each and may
    raise.

    Keys: items, files, target_tokens, foreign (what that text is), and rows, one a kind of context and
    length: kind, length (most tokens of context), context_tokens (mean of what was there), loss (nats a
    target token), bits_per_byte, change (of the loss against no context), low and high (its 95 % interval by
    file). A figure that is not finite is None, and so is the interval of a single file. A length at which no
    target has more context than at the one before has no row.
    """
    if not curve.items:
        return None
    about = store.curve()
    reads = _reads(store, curve, list(about["kinds"]), score, tell)
    tokens = np.array([item[0][0].tokens for item in reads], dtype=np.int64)
    if not tokens.sum():
        return None
    size_bytes = sum(store.target_bytes("curve", len(about["kinds"]) * item) for item in curve.items)
    paths = [str(about["paths"][item]) for item in curve.items]
    nats = np.array([[[read.nats for read in kind] for kind in item] for item in reads])  # (I, K, L)
    window = np.array([[[read.window_tokens for read in kind] for kind in item] for item in reads])
    context = (window - window[:, :, :1]).mean(axis=0)
    rows = [{"kind": name, "length": length, "context_tokens": round(float(context[k, place]), 1),
             **_figures(nats[:, k, place], nats[:, k, 0], tokens, size_bytes, paths, seed)}
            for k, name in enumerate(curve.kinds) for place, length in enumerate(curve.lengths)
            if not place or (window[:, :, place] > window[:, :, place - 1]).any()]
    return {"items": len(paths), "files": len(set(paths)), "target_tokens": int(tokens.sum()),
            "foreign": str(about.get("foreign", "")), "rows": rows}


def _reads(store: CurveStore, curve: Curve, kinds: list[str], score: Score,
           tell: Callable[[int], None]) -> list[list[list[Read]]]:
    """(I, K, L). Nothing is read twice: neither the bare target nor a context that has no more tokens."""
    done = itertools.count()

    def along(index: int, bare: Read | None) -> list[Read]:
        found = [bare] if bare else []
        for limit in curve.lengths[len(found):]:
            tell(next(done))
            ids, labels = store.window("curve", index, context_limit=limit)
            same = bool(found) and found[-1].window_tokens == len(ids)
            found.append(found[-1] if same else Read(*score(ids, labels), len(ids)))
        return found

    reads = []
    for item in curve.items:
        by_kind: list[list[Read]] = []
        for name in curve.kinds:
            by_kind.append(along(len(kinds) * item + kinds.index(name), by_kind[0][0] if by_kind else None))
        reads.append(by_kind)
    return reads


def _figures(nats: np.ndarray, bare: np.ndarray, tokens: np.ndarray, size_bytes: int, paths: list[str],
             seed: int) -> dict[str, float | None]:
    """Loss, bits a byte, and the change of the loss against no context with its 95 % interval by file."""
    change = nats - bare
    low, high = interval(change, tokens, paths, seed) or (math.nan, math.nan)
    figures = {"loss": nats.sum() / tokens.sum(),
               "bits_per_byte": nats.sum() / math.log(2) / max(size_bytes, 1),
               "change": change.sum() / tokens.sum(), "low": low, "high": high}
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
