"""The context of one target: repository head, far files, near files, dependencies, then the file's own text.

Nearest last. docs/dataset.md has the share of a file's direct dependencies that lie within N tokens of it
this way and in single orders of the whole repository.
"""

from __future__ import annotations

import bisect
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.dataset.documents import INFILL, Document, LineEnds, Part, Segment, merged
from training.dataset.infill import EXTRA_TOKENS
from training.dataset.structure.edges import distance

MIN_PIECE_TOKENS = 48         # a shorter rest of the window is not worth a head of a file
MIN_NEIGHBOURS = 16           # files looked at on either side in path order, at the least
TOKENS_A_NEIGHBOUR = 64       # a window of n tokens looks at n / 64 of them: far files serve as skeletons
AMPLE_SHARE = 32              # a far file comes whole when it takes at most this part of the room left
RANKINGS_KEPT = 64
HEAD_SHARE = 16               # the repository's head takes at most 1/16 of the window
COVERAGE_TOKENS = (1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
Edges = Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Segments of one training sample.

    `dependencies`: for each direct dependency of the files that begin in it as targets, the tokens from the
    dependency's first one to the target, or None when neither its text nor its skeleton is in the window.
    """

    segments: tuple[Segment, ...]
    dependencies: tuple[int | None, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the window."""
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class Library:
    """The documents that may serve as context, and what is known of them.

    `edges`: direct dependencies, `pairs`: tests and docs beside code, best first. `words` (D, 32) uint32:
    lowest hashes of identifiers, by document; 0 fills up. `head`: (start, length) of the repository's own
    lines. `line_ends`: reads the array that documents lie in.
    """

    documents: Sequence[Document]
    edges: Edges
    pairs: Edges
    words: np.ndarray
    line_ends: LineEnds
    head: tuple[int, int] = (0, 0)


class Composer:
    """Puts related text before targets."""

    def __init__(self, library: Library, context_tokens: int):
        order = sorted(range(len(library.documents)), key=lambda index: library.documents[index].path)
        self.documents = [library.documents[index] for index in order]
        self.paths = [document.path for document in self.documents]
        self.place = {path: index for index, path in enumerate(self.paths)}
        self.words = library.words[order]
        self.library, self.context_tokens = library, context_tokens
        self.importers: dict[str, list[str]] = defaultdict(list)
        for path, targets in library.edges.items():
            for target in targets:
                self.importers[target].append(path)
        self._neighbours = max(MIN_NEIGHBOURS, context_tokens // TOKENS_A_NEIGHBOUR)
        self._ranked: dict[str, list[tuple[Document, bool]]] = {}
        self._filled: tuple[object, tuple[list[Segment], dict[str, int]]] = (None, ([], {}))

    def compose(self, documents: Sequence[Document], parts: Sequence[Part]) -> Window:
        """One window that ends in `parts` (of `documents`); at most `context_tokens` long.

        Only the first part may begin inside its file; its preceding text then comes right before it.
        """
        budget, before = self.budget(documents, parts), parts[0].first
        related, starts = self.related([documents[part.document] for part in parts],
                                       budget - min(before, budget // 2))
        taken = min(before, budget - sum(segment.length for segment in related))
        tail = block(documents[parts[0].document], parts[0], taken)
        for part in parts[1:]:
            tail += block(documents[part.document], part)
        # Distances count from the target's first token, so header and preceding text lie between.
        offset = documents[parts[0].document].header + taken
        found = tuple(None if starts.get(path) is None else starts[path] + offset
                      for part in parts if not part.first
                      for path in self.dependencies(documents[part.document].path))
        return Window(segments=tuple(merged([*related, *tail])), dependencies=found)

    def budget(self, documents: Sequence[Document], parts: Sequence[Part]) -> int:
        """Tokens of the window that are left for context and preceding text."""
        return self.context_tokens - sum(size_of(documents[part.document], part) for part in parts)

    def dependencies(self, path: str) -> list[str]:
        """Direct dependencies that the library holds."""
        return [target for target in self.library.edges.get(path, ()) if target in self.place]

    def related(self, targets: Sequence[Document], budget: int) -> tuple[list[Segment], dict[str, int]]:
        """Related text within `budget`, far to near, and how far before its end each file begins."""
        key = (tuple(target.path for target in targets), budget)
        if self._filled[0] != key:
            self._filled = (key, self._fill(targets, budget))
        return self._filled[1]

    def _fill(self, targets: Sequence[Document], budget: int) -> tuple[list[Segment], dict[str, int]]:
        chosen: list[Segment] = []
        starts: dict[str, int] = {}
        excluded = {target.path for target in targets if self._holds(target)}
        head_tokens = min(self.library.head[1], self.context_tokens // HEAD_SHARE, budget)
        room = budget - head_tokens
        waiting = self._least_sizes(targets)
        used, open_tokens = 0, sum(waiting.values())
        for document, whole in self._candidates(targets):
            if room - used < MIN_PIECE_TOKENS:
                break
            if document.path in excluded:
                continue
            excluded.add(document.path)
            open_tokens -= waiting.get(document.path, 0)
            pieces, complete = self._pieces(document, whole, room - used, min(open_tokens, room // 2),
                                            document.path == targets[-1].path)
            chosen += reversed(pieces)
            used += sum(piece.length for piece in pieces)
            if complete:
                starts[document.path] = used
        head = [self.beginning(self.library.head[0], head_tokens)] if head_tokens else []
        return [*head, *reversed(chosen)], starts

    def _least_sizes(self, targets: Sequence[Document]) -> dict[str, int]:
        """Direct dependency -> the fewest tokens in which it can stand in a window."""
        found = {path: self.documents[self.place[path]] for target in targets
                 for path in self.dependencies(target.path)}
        return {path: document.header + document.skeleton[1] if document.skeleton[1] else document.length
                for path, document in found.items()}

    def _holds(self, target: Document) -> bool:
        index = self.place.get(target.path)
        return index is not None and self.documents[index] is target

    def _pieces(self, document: Document, whole: bool, room: int, reserved: int,
                continued: bool) -> tuple[list[Segment], bool]:
        """A file as context: all of it where that leaves half the room and what is `reserved` for direct
        dependencies still to come, else its skeleton, else its beginning.

        `continued`: the target goes on where this text ends, so its end is what matters. The second value
        tells whether the file is there whole or as a skeleton.
        """
        if continued:
            taken = min(document.body, room)
            end = document.body_start + document.body
            return [Segment(end - taken, taken)], taken == document.body
        share = max(room // 2, MIN_PIECE_TOKENS)
        ample = min(share, room - reserved) if whole else room // AMPLE_SHARE
        if document.length <= ample:
            return [Segment(document.start, document.length)], True
        skeleton_start, skeleton_length = document.skeleton
        if skeleton_length and document.header + skeleton_length <= share:
            return [Segment(document.start, document.header),
                    Segment(skeleton_start, skeleton_length)], True
        return ([self.beginning(document.start, share)] if whole else []), False

    def beginning(self, start: int, limit: int) -> Segment:
        """At most `limit` tokens from `start`, up to the end of a line where there is one."""
        breaks = np.flatnonzero(self.library.line_ends(start, limit))
        return Segment(start, int(breaks[-1]) + 1 if len(breaks) else limit)

    def _candidates(self, targets: Sequence[Document]) -> Iterator[tuple[Document, bool]]:
        """(file, whether its text is worth its tokens) from near to far, for all targets in turn."""
        last = targets[-1]
        if last.path in self.place and not self._holds(last):
            yield self.documents[self.place[last.path]], True
        ranked = [self.ranking(target.path) for target in reversed(targets)]
        for rank in range(max(map(len, ranked))):
            yield from (items[rank] for items in ranked if rank < len(items))

    def ranking(self, path: str) -> list[tuple[Document, bool]]:
        """Files that may stand before a target, nearest first, and whether their text is worth its tokens."""
        if path not in self._ranked:
            if len(self._ranked) >= RANKINGS_KEPT:
                self._ranked.clear()
            self._ranked[path] = list(self._rank(path))
        return self._ranked[path]

    def _rank(self, path: str) -> Iterator[tuple[Document, bool]]:
        """Dependencies, tests and docs, folder, second-degree dependencies and importers, then distance."""
        direct = self.dependencies(path)
        second = [target for middle in direct for target in self.dependencies(middle)]
        importers = [item for item in self.importers.get(path, ()) if item in self.place]
        around = self._around(path)
        paired = [item for item in self.library.pairs.get(path, ()) if item in self.place]
        folder = [item for item in around if posixpath.dirname(item) == posixpath.dirname(path)]
        seen = {path}
        for names, whole in ((direct, True), (paired, True), (folder, True), (second + importers, True),
                             (around, False)):
            for name in self._nearest_first(set(names) - seen, path):
                seen.add(name)
                yield self.documents[self.place[name]], whole

    def _nearest_first(self, names: set[str], path: str) -> list[str]:
        """By steps through folders, then by identifiers shared, then by name."""
        ordered = sorted(names)
        if len(ordered) < 2:
            return ordered
        shared = self._shared(ordered, path)
        keys = {name: (distance(name, path), -likeness, name)
                for name, likeness in zip(ordered, shared, strict=True)}
        return sorted(ordered, key=keys.__getitem__)

    def _shared(self, names: Sequence[str], path: str) -> list[int]:
        """Identifiers of the sketches that each file shares with `path`; 0 where that one is not here."""
        index = self.place.get(path)
        if index is None:
            return [0] * len(names)
        rows = self.words[[self.place[name] for name in names]]
        own = self.words[index]
        return [int(count) for count in np.isin(rows, own[own > 0]).sum(axis=1)]

    def _around(self, path: str) -> list[str]:
        place = bisect.bisect_left(self.paths, path)
        return self.paths[max(0, place - self._neighbours):place + self._neighbours]


def size_of(document: Document, part: Part) -> int:
    """Tokens that a part takes at most: header, text, and sentinels where a middle may be filled in."""
    return document.header + part.last - part.first + (EXTRA_TOKENS if part.flags & INFILL else 0)


def block(document: Document, part: Part, taken: int = 0) -> list[Segment]:
    """A target with its lead: header and the `taken` tokens before it."""
    lead = [Segment(document.start, document.header)]
    if taken:
        lead.append(Segment(document.body_start + part.first - taken, taken))
    return [*lead, Segment(document.body_start + part.first, part.last - part.first, part.flags, len(lead))]


class Coverage:
    """Counts direct dependencies by their distance to the target."""

    def __init__(self, context_tokens: int):
        self.lengths = [*(length for length in COVERAGE_TOKENS if length < context_tokens), context_tokens]
        self.total = 0
        self._within: Counter[int] = Counter()

    def add(self, window: Window) -> None:
        """Count one window's dependencies."""
        self.total += len(window.dependencies)
        for found in window.dependencies:
            if found is not None:
                self._within.update(length for length in self.lengths if found <= length)

    def shares(self) -> dict[str, float]:
        """Context -> share of direct dependencies that begin within that many tokens before the target."""
        return {str(length): round(self._within[length] / self.total, 4)
                for length in self.lengths} if self.total else {}
