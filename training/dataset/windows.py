"""All windows of a split, in one of two regimes.

packed    targets fill the window (target_tokens >= context_tokens): pieces of related files side by side
composed  each target of at most target_tokens stands at the end of a window of context made for it

Either way every body token of the split's documents is a target exactly once.
"""

from __future__ import annotations

import posixpath
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.dataset import infill
from training.dataset.composer import Composer, Window
from training.dataset.documents import Document, Marks, Part, Segment, cut, merged
from training.dataset.structure.edges import Edges, topological
from training.dataset.packing import pack_related

MIN_INFILL_CONTEXT = 64      # below it the sentinels would take more than a twentieth of the window


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides the shape of windows. `fim_share` is 0 where the base knows no sentinels."""

    context_tokens: int
    target_tokens: int
    fim_share: float
    seed: int
    marks: Marks

    @property
    def packed(self) -> bool:
        """Whether targets fill whole windows."""
        return self.target_tokens >= self.context_tokens

    @property
    def infills(self) -> bool:
        """Whether any target may be made fill-in-the-middle."""
        return (self.fim_share > 0 and self.marks.middle is not None
                and self.context_tokens >= MIN_INFILL_CONTEXT and self.target_tokens > infill.MIN_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What slicing needs of a document's body. `ends_line`, `token_bytes` (S,) cover its body tokens."""

    text: str
    ends_line: np.ndarray
    token_bytes: np.ndarray


def slices(documents: Sequence[Document], texts: Sequence[Text], layout: Layout) -> list[Part]:
    """Every document's body cut into targets, some of them with a middle to fill in."""
    parts: list[Part] = []
    extra = infill.EXTRA_TOKENS if layout.infills else 0
    for index, (document, text) in enumerate(zip(documents, texts, strict=True)):
        # An infilled target trains one end mark more than its own tokens.
        limit = min(layout.context_tokens - document.header - extra, layout.target_tokens - bool(extra))
        spans = [Part(index, first, last) for first, last in cut(text.ends_line, limit)]
        parts += _with_infill(document, text, spans,
                              layout) if layout.infills and document.kind == "code" else spans
    return parts


def _with_infill(document: Document, text: Text, parts: Sequence[Part], layout: Layout) -> list[Part]:
    chosen: dict[int, random.Random] = {}
    for place, part in enumerate(parts):
        rng = random.Random(f"{layout.seed}\0infill\0{document.path}\0{part.first}")
        if part.last - part.first >= infill.MIN_TOKENS and rng.random() < layout.fim_share:
            chosen[place] = rng
    if not chosen:
        return list(parts)
    spans = infill.statement_spans(text.text, text.token_bytes) if document.language == "python" else []
    line_ends = np.flatnonzero(text.ends_line)
    out = list(parts)
    for place, rng in chosen.items():
        part = parts[place]
        text_last = min(part.last, len(text.token_bytes))
        first, last = infill.choose_middle(rng, part.first, text_last, spans, line_ends)
        out[place] = part._replace(infill=(first, last, rng.random() < 0.5))
    return out


def packed_windows(documents: Sequence[Document], parts: Sequence[Part], edges: Edges,
                   layout: Layout) -> list[Window]:
    """Parts of one folder side by side, dependencies before what imports them."""
    rank = topological(edges)

    def order(item: int) -> tuple[int, str, int]:
        document = documents[parts[item].document]
        return rank.get(document.path, len(rank)), document.path, parts[item].first

    sizes = [_size(documents, part) for part in parts]
    groups = [posixpath.dirname(documents[part.document].path) for part in parts]
    bins = [sorted(chosen, key=order) for chosen in pack_related(sizes, groups, layout.context_tokens)]
    known = {document.path for document in documents}
    return [_side_by_side(documents, [parts[item] for item in chosen], edges, layout, known)
            for chosen in sorted(bins, key=lambda chosen: order(chosen[0]))]


def _size(documents: Sequence[Document], part: Part) -> int:
    return documents[part.document].header + part.last - part.first + (infill.EXTRA_TOKENS if part.infill
                                                                       else 0)


def _side_by_side(documents: Sequence[Document], parts: Sequence[Part], edges: Edges, layout: Layout,
                  known: set[str]) -> Window:
    segments: list[Segment] = []
    starts: dict[str, int] = {}
    distances: list[int | None] = []
    position = 0
    for part in parts:
        document = documents[part.document]
        for path in (target for target in edges.get(document.path, ()) if target in known):
            distances.append(position - starts[path] if path in starts else None)
        if part.last - part.first == document.body:
            starts[document.path] = position
        lead = [Segment(document.start, document.header, False)]
        segments += infill.segments(document, part, lead, layout.marks)
        position += _size(documents, part)
    return Window(segments=tuple(merged(segments)), dependencies=tuple(distances))


def composed_windows(documents: Sequence[Document], parts: Sequence[Part], composer: Composer,
                     layout: Layout) -> list[Window]:
    """One window a target; small whole files of one folder share one."""
    return [composer.compose(documents, group) for group in target_groups(documents, parts, layout)]


def target_groups(documents: Sequence[Document], parts: Sequence[Part], layout: Layout) -> list[list[Part]]:
    """Parts that form one window's target: one, or whole small files of one folder."""
    groups: list[list[Part]] = []
    folder, size = "", 0
    for part in parts:
        document = documents[part.document]
        part_size = _size(documents, part)
        small = part.last - part.first == document.body and 2 * part_size <= layout.target_tokens
        here = posixpath.dirname(document.path)
        if small and groups and size and here == folder and size + part_size <= layout.target_tokens:
            groups[-1].append(part)
            size += part_size
        else:
            groups.append([part])
            folder, size = here, part_size if small else 0
    return groups
