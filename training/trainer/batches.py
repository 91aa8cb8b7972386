"""Which windows an update trains on: pure functions of (step, rank), so that a resume needs no sampler state.

Shapes: B windows of a micro-batch, S tokens of its longest window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


class Store(Protocol):
    """What the loop reads of `dataset.store.WindowStore`."""

    pad_id: int
    digest: str

    def count(self, split: str) -> int:
        """Windows of a split."""

    def window(self, split: str, index: int, seed: int = 0, epoch: int = 0,
               context_limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), each (S,) int64, labels unshifted with -100 for no loss. `context_limit`: tokens
        kept before the first target's own text."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The train windows' order in an epoch."""

    def written_to(self) -> str:
        """The first file that was written to since it was opened, or ""."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How windows are dealt: `windows` an epoch, `micro` at once on each of `ranks`, `accumulation` times.

    `ring`: neighbouring processes that share their windows and count as one of `ranks`.
    """

    windows: int
    micro: int
    accumulation: int
    ranks: int
    ring: int = 1

    @property
    def per_update(self) -> int:
        """Windows of one update over all ranks."""
        return self.micro * self.accumulation * self.ranks

    @property
    def updates_per_epoch(self) -> int:
        """The last update of an epoch may be shorter."""
        return math.ceil(self.windows / self.per_update)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Stages of growing context in the first `share` of the first epoch, each twice the one before.

    `ahead`: updates that the course is before the data, since stages ended early (`pacing.levelled`); below 0
    after windows were passed over (`guard`).
    """

    stages: int = 1
    share: float = 0.0
    context_tokens: int = 0
    target_tokens: int = 0
    ahead: int = 0

    def context_limit(self, epoch: int, position: int, windows: int) -> int | None:
        """Tokens of context that a window keeps at this place of an epoch; None: all.

        >>> course = Curriculum(stages=3, share=0.5, context_tokens=4096, target_tokens=512)
        >>> [course.context_limit(0, place, 100) for place in (0, 24, 25, 49, 50)]
        [512, 512, 1536, 1536, None]
        """
        stage = self.stage(epoch, position, windows)
        if stage == self.stages - 1:
            return None
        return max(0, (self.context_tokens >> (self.stages - 1 - stage)) - self.target_tokens)

    def stage(self, epoch: int, position: int, windows: int) -> int:
        """The stage of a place: 0 for the shortest context, `stages` - 1 for all of it."""
        done = position / windows
        if epoch or self.stages < 2 or done >= self.share:
            return self.stages - 1
        return int(done / self.share * (self.stages - 1))

    def stage_of(self, step: int, layout: Layout) -> int:
        """The stage of update `step`, counted as the data is."""
        epoch, part = place(step + self.ahead, layout)
        return self.stage(epoch, part.start, layout.windows)

    def limit_of(self, step: int, layout: Layout) -> int | None:
        """`context_limit` of update `step`, counted as the data is."""
        epoch, part = place(step + self.ahead, layout)
        return self.context_limit(epoch, part.start, layout.windows)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ids and labels (B, S). No mask: causal attention never sees padding on the right."""

    ids: Tensor
    labels: Tensor


def planned_steps(config: Any, layout: Layout) -> int:
    """Updates of the whole run: by epochs, or fewer by training.max_steps."""
    by_epochs = int(config["training.epochs"]) * layout.updates_per_epoch
    return min(by_epochs, config["training.max_steps"] or by_epochs)


def place(step: int, layout: Layout) -> tuple[int, slice]:
    """The epoch of update `step` (0-based) and its slice of the epoch's order.

    >>> place(4, Layout(windows=10, micro=1, accumulation=2, ranks=2))
    (1, slice(4, 8, None))
    """
    epoch, index = divmod(step, layout.updates_per_epoch)
    return epoch, slice(index * layout.per_update, min((index + 1) * layout.per_update, layout.windows))


def deal(windows: Sequence[int] | np.ndarray, layout: Layout, rank: int) -> list[list[int]]:
    """One rank's micro-batches; every rank has equally many, so some may be empty.

    >>> deal([7, 8, 9], Layout(windows=3, micro=1, accumulation=2, ranks=2), rank=1)
    [[8], []]
    """
    mine = [int(window) for window in windows[rank::layout.ranks]]
    rounds = math.ceil(len(windows) / (layout.micro * layout.ranks))
    return [mine[i * layout.micro:(i + 1) * layout.micro] for i in range(rounds)]


def targets_of(labels: np.ndarray) -> int:
    """Label tokens that a loss counts: the first position predicts nothing."""
    return int((labels[1:] != IGNORED).sum())


def read_update(store: Store, step: int, layout: Layout, rank: int, seed: int,
                curriculum: Curriculum = Curriculum()) -> tuple[list[Batch], int]:
    """A rank's micro-batches of update `step` on the CPU, and their target tokens.

    A rank's windows are put together by length, which needs less padding and leaves the update's mean as it
    is. The target tokens of a ring's windows are told by its first process alone.
    """
    rank, member = divmod(rank, layout.ring)
    epoch, part = place(step, layout)
    dealt = deal(store.order(seed, epoch)[part], layout, rank)
    limit = curriculum.limit_of(step, layout)
    windows = [store.window("train", index, seed, epoch, limit) for batch in dealt for index in batch]
    windows.sort(key=lambda pair: len(pair[0]))
    batches, start = [], 0
    for indices in dealt:
        batches.append(collate(windows[start:start + len(indices)] or [_blank(store)], store.pad_id))
        start += len(indices)
    return batches, 0 if member else sum(targets_of(labels) for _, labels in windows)


def _blank(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Stands in where a rank has no window left: forward and backward must still be run together."""
    return np.full(2, store.pad_id, dtype=np.int64), np.full(2, IGNORED, dtype=np.int64)


def collate(windows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int) -> Batch:
    """Windows as one batch, padded on the right to the longest."""
    lengths = [len(ids) for ids, _ in windows]
    shape = (len(windows), max(lengths))
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for row, (window_ids, window_labels) in enumerate(windows):
        ids[row, :lengths[row]], labels[row, :lengths[row]] = window_ids, window_labels
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))
