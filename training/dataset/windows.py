"""All windows of a split: which kind each target is, where files are cut, and what shares a window.

cross-file   each target of at most target_tokens stands at the end of a window of context composed for it
fim          pieces of code files side by side, each with a middle to fill in; every token a target
whole        whole files side by side, dependencies first; every token a target
commit, replay   the same for patches and for a second corpus

Where targets fill the window (target_tokens >= context_tokens) there is nothing to compose and cross-file
targets become whole ones. Either way every body token of the split's documents is a target exactly once an
epoch.
"""

from __future__ import annotations

import bisect
import hashlib
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.dataset.composer import Composer, Edges, Window, block, size_of
from training.dataset.documents import (
    FIRST_MOVES,
    INFILL,
    INFILL_ALWAYS,
    INFILL_DRAWN,
    LAST_MOVES,
    TRAINED,
    Document,
    LineEnds,
    Part,
    merged,
)
from training.dataset.documents import cut as cut_body
from training.dataset.infill import EXTRA_TOKENS, MIN_TOKENS
from training.dataset.packing import pack_related
from training.dataset.structure.edges import topological

MIN_INFILL_CONTEXT = 64      # below it the sentinels would take more than a twentieth of the window
MOVE_SHARE, MOST_MOVED_TOKENS = 8, 64     # a cut moves by at most an eighth of the target
LOOKED_AT = 8                # groups tried for a part, the fullest that hold it first
CROSS, FIM, WHOLE, COMMIT, REPLAY = "cross-file", "fim", "whole", "commit", "replay"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides the shape of windows. `sentinels`: whether the base knows how to fill in a middle.
    `shared`: whether targets of several files may stand in one window (dataset.packing).
    """

    context_tokens: int
    target_tokens: int
    seed: int
    sentinels: bool = False
    fim_share: float = 0.0
    whole_share: float = 0.0
    fim_rate: float = 0.0
    varied: bool = True          # false: every epoch is the same
    shared: bool = True

    @property
    def packed(self) -> bool:
        """Whether targets fill whole windows."""
        return self.target_tokens >= self.context_tokens

    @property
    def infills(self) -> bool:
        """Whether any target may be made fill-in-the-middle."""
        return (self.varied and self.sentinels and (self.fim_share > 0 or self.fim_rate > 0)
                and self.context_tokens >= MIN_INFILL_CONTEXT and self.target_tokens > MIN_TOKENS)

    @property
    def move_tokens(self) -> int:
        """How far a cut between two composed targets of a file may move; 0: cuts stay."""
        fixed = self.packed or not self.varied
        return 0 if fixed else min(self.target_tokens // MOVE_SHARE, MOST_MOVED_TOKENS)


def kinds(documents: Sequence[Document], related: Edges, layout: Layout) -> list[str]:
    """The kind of each document's targets, so that the shares of tokens come out.

    Files that nothing else in the repository explains go into fim and whole windows first: composed context
    is spent where it says most.
    """
    total = sum(document.body for document in documents)
    fim_room = layout.fim_share * total if layout.infills else 0.0
    whole_room = total if layout.packed else layout.whole_share * total
    found = [CROSS] * len(documents)
    turns = sorted(range(len(documents)), key=lambda item: _turn(documents[item], related, layout.seed))
    for index in turns:
        document = documents[index]
        if document.kind == "code" and document.body <= 1.5 * fim_room:
            found[index] = FIM
            fim_room -= document.body
        elif layout.packed or document.body <= 1.5 * whole_room:
            found[index] = WHOLE
            whole_room -= document.body
    return found


def _turn(document: Document, related: Edges, seed: int) -> tuple[bool, bytes]:
    drawn = hashlib.sha256(f"{seed}\0kind\0{document.path}".encode()).digest()
    return bool(related.get(document.path)), drawn


def composed_parts(documents: Sequence[Document], chosen: Sequence[int], layout: Layout,
                   line_ends: LineEnds) -> list[Part]:
    """Targets of composed windows: at most target_tokens each."""
    parts: list[Part] = []
    for index in chosen:
        document = documents[index]
        drawn = INFILL_DRAWN if layout.infills and layout.fim_rate and document.kind == "code" else 0
        extra = EXTRA_TOKENS if drawn else 0
        # An infilled target trains an end mark more than its own tokens; a moved cut lengthens a target.
        limit = min(layout.context_tokens - document.header - extra, layout.target_tokens - bool(drawn))
        spans = cut_body(document.body_start, document.body, max(1, limit - layout.move_tokens), line_ends)
        parts += [Part(index, *span, TRAINED | drawn) for span in spans]
    return parts


def dense_parts(documents: Sequence[Document], chosen: Sequence[int], layout: Layout, line_ends: LineEnds,
                infill: bool = False) -> list[Part]:
    """Targets that fill windows side by side: whole files where they fit."""
    parts: list[Part] = []
    for index in chosen:
        document = documents[index]
        # An infilled piece trains an end mark and takes three sentinels.
        limit = layout.context_tokens - document.header - (EXTRA_TOKENS if infill else 0)
        flags = TRAINED | (INFILL_ALWAYS if infill else 0)
        parts += [Part(index, first, last, flags)
                  for first, last in cut_body(document.body_start, document.body, limit, line_ends)]
    return parts


def packed_windows(documents: Sequence[Document], parts: Sequence[Part], edges: Edges,
                   layout: Layout) -> Iterator[Window]:
    """Parts of one folder side by side, dependencies before what imports them; where windows are not shared,
    each part in one by itself."""
    rank = topological({path: tuple(targets) for path, targets in edges.items()})

    def order(item: int) -> tuple[int, str, int]:
        document = documents[parts[item].document]
        return rank.get(document.path, len(rank)), document.path, parts[item].first

    sizes = [size_of(documents[part.document], part) for part in parts]
    groups = [posixpath.dirname(documents[part.document].path) for part in parts]
    packed = (pack_related(sizes, groups, layout.context_tokens) if layout.shared
              else [[item] for item in range(len(parts))])
    bins = [sorted(chosen, key=order) for chosen in packed]
    known = {documents[part.document].path for part in parts}
    for chosen in sorted(bins, key=lambda chosen: order(chosen[0])):
        yield _side_by_side(documents, [parts[item] for item in chosen], edges, known)


def _side_by_side(documents: Sequence[Document], parts: Sequence[Part], edges: Edges,
                  known: set[str]) -> Window:
    segments = []
    starts: dict[str, int] = {}
    distances: list[int | None] = []
    position = 0
    for part in parts:
        document = documents[part.document]
        for path in (target for target in edges.get(document.path, ()) if target in known and not part.first):
            distances.append(position - starts[path] if path in starts else None)
        if part.last - part.first == document.body:
            starts[document.path] = position
        segments += block(document, part)
        position += size_of(document, part)
    return Window(segments=tuple(merged(segments)), dependencies=tuple(distances))


def composed_windows(documents: Sequence[Document], parts: Sequence[Part], composer: Composer,
                     layout: Layout) -> Iterator[Window]:
    """Windows whose targets are a later part of one file, beginnings of files of one folder, or both."""
    for group in with_moves(documents, target_groups(documents, parts, layout), layout):
        yield composer.compose(documents, group)


@dataclass(slots=True)
class Group:
    """Targets of one window: `room` is left of its target tokens, `space` of the whole window."""

    parts: list[Part]
    room: int
    space: int

    def holds(self, size: int, space: int) -> bool:
        """Whether a target of that size fits."""
        return size <= self.room and space <= self.space

    def take(self, parts: Sequence[Part], size: int, space: int) -> None:
        """Add targets."""
        self.parts += parts
        self.room -= size
        self.space -= space


def target_groups(documents: Sequence[Document], parts: Sequence[Part], layout: Layout) -> list[list[Part]]:
    """Parts that form one window's target. Best fit within a folder, then groups that are hardly filled
    together: a window costs its whole length, however few of its tokens are targets.

    At most one part of a group begins inside its file; it comes first, where its preceding text can stand.
    Where windows are not shared, each part is a group.
    """
    if not layout.shared:
        return [[part] for part in sorted(parts)]
    folders: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        folders[posixpath.dirname(documents[part.document].path)].append(part)
    groups: list[Group] = []
    for _, members in sorted(folders.items()):
        groups += _grouped(documents, members, layout)
    begun = [group for group in groups if group.parts[0].first]
    whole = _together([group for group in groups if not group.parts[0].first], layout)
    return sorted((group.parts for group in (*begun, *whole)), key=lambda found: found[0][:2])


def _most(layout: Layout) -> int:
    return max(1, layout.target_tokens - layout.move_tokens)


def _grouped(documents: Sequence[Document], parts: Sequence[Part], layout: Layout) -> list[Group]:
    """Best fit, largest first; a part that begins inside its file opens a group of its own."""
    groups: list[Group] = []
    rooms: list[tuple[int, int]] = []      # (room, place in groups), ascending
    for part in sorted(parts, key=lambda part: (not part.first, part.first - part.last)):
        space = size_of(documents[part.document], part)
        # Headers are no targets but count: a group of many small files shall not outgrow its window.
        size = space - (EXTRA_TOKENS - 1 if part.flags & INFILL else 0)
        least = bisect.bisect_left(rooms, (size, -1)) if not part.first else len(rooms)
        fitting = [place for place in range(least, min(least + LOOKED_AT, len(rooms)))
                   if groups[rooms[place][1]].holds(size, space)]
        if fitting:
            _, which = rooms.pop(fitting[0])
            groups[which].take([part], size, space)
        else:
            groups.append(Group([part], _most(layout) - size, layout.context_tokens - space))
            which = len(groups) - 1
        bisect.insort(rooms, (groups[which].room, which))
    return groups


def _together(groups: Sequence[Group], layout: Layout) -> list[Group]:
    """Groups of whole files from neighbouring folders put together while they fit."""
    out: list[Group] = []
    for group in groups:
        size, space = _most(layout) - group.room, layout.context_tokens - group.space
        if out and out[-1].holds(size, space):
            out[-1].take(group.parts, size, space)
        else:
            out.append(group)
    return out


def with_moves(documents: Sequence[Document], groups: Sequence[list[Part]],
               layout: Layout) -> list[list[Part]]:
    """The groups with the cuts marked that can move: enough of the file's text before each stands in its
    window, and the part before it is long enough."""
    move = layout.move_tokens
    lengths = {(part.document, part.last): part.last - part.first for group in groups for part in group}
    moving = set()
    for group in groups if move else ():
        first, space = group[0], sum(size_of(documents[part.document], part) for part in group)
        before = min(first.first, (layout.context_tokens - space) // 2)
        cut = (first.document, first.first)
        if first.first and min(before, lengths[cut]) > 2 * move:
            moving.add(cut)
    return [[part._replace(flags=part.flags
                           | (FIRST_MOVES if (part.document, part.first) in moving else 0)
                           | (LAST_MOVES if (part.document, part.last) in moving else 0))
             for part in group] for group in groups]


def by_kind(found: Sequence[str]) -> dict[str, list[int]]:
    """Kind -> places in the list, ascending."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(found):
        places[kind].append(index)
    return dict(places)
