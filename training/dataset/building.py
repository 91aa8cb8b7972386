"""All windows of a dataset: train, held out, and those of the context curve, written as they are made."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.curve import MOST_TOKENS as CURVE_TOKENS
from training.dataset import windows
from training.dataset.composer import Composer, Coverage, Library, Window, block
from training.dataset.documents import INFILL_ALWAYS, TRAINED, Document, Part, Segment, merged
from training.dataset.windows import COMMIT, CROSS, FIM, REPLAY, WHOLE, Layout
from training.dataset.writing import IndexWriter

CURVE_ITEMS = 64              # the trainer reads as many of them as evaluation.context_targets says
MIN_CURVE_TARGET = 16
SENTINELS = 3                 # tokens that a middle to fill in adds, besides an end mark


@dataclass(kw_only=True)
class Kind:
    """Windows of one kind: how many, their tokens, and how many of these are targets."""

    windows: int = 0
    tokens: int = 0
    target_tokens: int = 0


@dataclass(kw_only=True)
class Counts:
    """What was written of one split."""

    kinds: dict[str, Kind] = field(default_factory=lambda: defaultdict(Kind))
    rejected_windows: int = 0
    rejected_tokens: int = 0

    @property
    def windows(self) -> int:
        """Windows of all kinds."""
        return sum(kind.windows for kind in self.kinds.values())

    @property
    def targets(self) -> int:
        """Target tokens of all kinds in one epoch."""
        return sum(kind.target_tokens for kind in self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Documents of each kind of source. Where one file is cut in two, both sides hold its path."""

    train: Sequence[Document]
    held_out: Sequence[Document]
    commits: Sequence[Document] = ()
    replay: Sequence[Document] = ()


class Builder:
    """Makes and writes windows. `library.line_ends` reads the finished token array."""

    def __init__(self, folder: Path, sides: Sides, library: Library, layout: Layout):
        self.folder, self.sides, self.library, self.layout = folder, sides, library, layout
        self.composer = Composer(library, layout.context_tokens)
        self.coverage = Coverage(layout.context_tokens)

    def train(self) -> Counts:
        """The train split: every kind of window."""
        counts = Counts()
        with IndexWriter(self.folder, "train") as index:
            for kind, window in self._train_windows():
                _write(index, window, kind, counts)
                self.coverage.add(window)
        return counts

    def _train_windows(self) -> Iterator[tuple[str, Window]]:
        documents, layout, line_ends = self.sides.train, self.layout, self.library.line_ends
        related = {path: (*self.composer.dependencies(path), *self.library.pairs.get(path, ()))
                   for path in (document.path for document in documents)}
        places = windows.by_kind(windows.kinds(documents, related, layout))
        edges = self.library.edges
        composed = windows.composed_parts(documents, places.get(CROSS, []), layout, line_ends)
        found = windows.composed_windows(documents, composed, self.composer, layout)
        yield from ((CROSS, item) for item in found)
        fim = windows.dense_parts(documents, places.get(FIM, []), layout, line_ends, infill=True)
        yield from ((FIM, item) for item in windows.packed_windows(documents, fim, {}, layout))
        whole = windows.dense_parts(documents, places.get(WHOLE, []), layout, line_ends)
        yield from ((WHOLE, item) for item in windows.packed_windows(documents, whole, edges, layout))
        for kind, extra in ((COMMIT, self.sides.commits), (REPLAY, self.sides.replay)):
            parts = windows.dense_parts(extra, range(len(extra)), layout, line_ends)
            yield from ((kind, item) for item in windows.packed_windows(extra, parts, {}, layout))

    def held_out(self) -> Counts:
        """The held-out split, the same in every epoch: composed context from the train side, or packed. With
        dataset.packing and without it is the same, so that the losses of both can be compared."""
        documents, counts = self.sides.held_out, Counts()
        layout = dataclasses.replace(self.layout, varied=False, shared=True)
        line_ends, everything = self.library.line_ends, range(len(documents))
        if layout.packed:
            parts = windows.dense_parts(documents, everything, layout, line_ends)
            found: Iterable[Window] = windows.packed_windows(documents, parts, self.library.edges, layout)
        else:
            parts = windows.composed_parts(documents, everything, layout, line_ends)
            found = windows.composed_windows(documents, parts, self.composer, layout)
        with IndexWriter(self.folder, "held_out") as index:
            for window in found:
                _write(index, window, WHOLE if layout.packed else CROSS, counts)
        return counts

    def curve(self, foreign: Sequence[tuple[int, int]]) -> dict[str, list[object]]:
        """The context curve: the same targets after composed, random and foreign context; paths and targets.

        `foreign`: (start, length) of texts that have nothing to do with the repository.
        """
        layout, documents = self.layout, self.sides.held_out
        most = min(layout.target_tokens, max(1, layout.context_tokens // 2))
        paths: list[object] = []
        targets: list[object] = []
        with IndexWriter(self.folder, "curve") as index:
            for number in _spread(_candidates(documents), CURVE_ITEMS):
                document = documents[number]
                line_ends = self.library.line_ends
                last = windows.cut_body(document.body_start, document.body, most, line_ends)[0][1]
                part = Part(number, 0, last, TRAINED)
                room = min(self.composer.budget(documents, [part]), CURVE_TOKENS)
                if room < 1:
                    continue
                composed, _ = self.composer.related([document], room)
                for context in (composed, self._random(document, room), _filled(foreign, room)):
                    index.add([*merged(context), *block(document, part)])
                paths.append(document.path)
                targets.append(last)
        return {"paths": paths, "targets": targets}

    def _random(self, document: Document, room: int) -> list[Segment]:
        """Whole files in an order that the target's path draws, the last one cut."""
        order = sorted((_drawn(self.layout.seed, f"{document.path}\0{other.path}"), other.start, other.length)
                       for other in self.sides.train)
        return _filled([(start, length) for _, start, length in order], room)


def _drawn(seed: int, text: str) -> bytes:
    """A number that the seed draws for a text."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def _candidates(documents: Sequence[Document]) -> list[int]:
    """Held-out code files with enough text to say something."""
    return [index for index, document in enumerate(documents)
            if document.kind == "code" and document.body >= MIN_CURVE_TARGET]


def _spread(items: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` of the items, evenly spaced."""
    if wanted >= len(items):
        return list(items)
    return [items[place * len(items) // wanted] for place in range(wanted)]


def _filled(texts: Iterable[tuple[int, int]], room: int) -> list[Segment]:
    """Texts until the room is full; nearest last, so the one that is cut loses its beginning."""
    found: list[Segment] = []
    for start, length in texts:
        if not room:
            break
        taken = min(length, room)
        found.append(Segment(start + length - taken, taken))
        room -= taken
    return found[::-1]


def _write(index: IndexWriter, window: Window, kind: str, counts: Counts) -> None:
    """One window into the index, or into the count of those that train nothing: its first token predicts
    nothing, so a window of one token has no target."""
    targets = sum(segment.length for segment in window.segments if segment.trained)
    if window.length < 2 or not targets:
        counts.rejected_windows += 1
        counts.rejected_tokens += targets
        return
    index.add(window.segments, kind)
    held = counts.kinds[kind]
    held.windows += 1
    held.tokens += window.length + SENTINELS * sum(bool(row.flags & INFILL_ALWAYS) for row in window.segments)
    held.target_tokens += targets


def replay_share(sizes: Sequence[int], paths: Sequence[str], limit_tokens: float, seed: int) -> list[int]:
    """Which files of a second corpus are taken, by a seeded draw, until `limit_tokens`."""
    order = sorted(range(len(sizes)), key=lambda item: _drawn(seed, paths[item]))
    taken: list[int] = []
    size = 0
    for item in order:
        if size >= limit_tokens:
            break
        taken.append(item)
        size += sizes[item]
    return sorted(taken)


def packing_waste(kinds: Mapping[str, Kind], context_tokens: int) -> float:
    """Share of full windows' room that no token fills, over the kinds that are packed."""
    packed = [kind for name, kind in kinds.items() if name != CROSS and kind.windows]
    room = sum(kind.windows for kind in packed) * context_tokens
    return round(1 - sum(kind.tokens for kind in packed) / room, 6) if room else 0.0
