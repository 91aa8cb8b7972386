"""Files as tokens in one long array, and the pieces that windows are made of.

The array starts with the marks (end of text, FIM sentinels). Each file lies there as
header (`# path: ...`), then body (its text, and the end mark where the text ends with the file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.dataset.sources.repository import SourceFile
from training.dataset.tokenizer import Coder


class Segment(NamedTuple):
    """`length` tokens of the array from `start`; `trained`: they are targets."""

    start: int
    length: int
    trained: bool


class Part(NamedTuple):
    """A target: body tokens [first, last) of a document. `infill`: the middle's (first, last, spm)."""

    document: int
    first: int
    last: int
    infill: tuple[int, int, bool] | None = None


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Places of single tokens in the array: end of text and, where the base knows them, the FIM sentinels."""

    eos: int
    prefix: int | None = None
    suffix: int | None = None
    middle: int | None = None

    def sentinels(self) -> tuple[Segment, Segment, Segment]:
        """Prefix, suffix and middle sentinel as segments. Raises ValueError where the base knows none."""
        if self.prefix is None or self.suffix is None or self.middle is None:
            raise ValueError("this tokenizer has no FIM sentinels")
        return Segment(self.prefix, 1, False), Segment(self.suffix, 1, False), Segment(self.middle, 1, False)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file in the array: header at `start`, then body. `skeleton`: (start, length) or (0, 0).

    `ended`: the body's last token is the end mark.
    """

    path: str
    language: str
    kind: str
    start: int
    header: int
    body: int
    ended: bool = True
    skeleton: tuple[int, int] = (0, 0)

    @property
    def body_start(self) -> int:
        """Place of the first body token."""
        return self.start + self.header

    @property
    def length(self) -> int:
        """Header and body, tokens."""
        return self.header + self.body


class TokenPool:
    """Collects token arrays and hands out where each one lies."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self.size = 0

    def add(self, ids: Sequence[int] | np.ndarray) -> int:
        """Append ids; their place."""
        start = self.size
        self._parts.append(np.asarray(ids, dtype=np.int32))
        self.size += len(ids)
        return start

    def array(self) -> np.ndarray:
        """Everything added so far, in order (int32)."""
        return np.concatenate(self._parts) if self._parts else np.empty(0, np.int32)


def add_marks(coder: Coder, pool: TokenPool) -> Marks:
    """Store the single-token marks."""
    places = {part: pool.add([token]) for part, token in coder.fim.items()}
    return Marks(eos=pool.add([coder.eos_id]), **places)


def header_text(path: str) -> str:
    """The line that tells the model which file follows.

    >>> header_text("a/b.py")
    '# path: a/b.py\\n'
    """
    return f"# path: {path}\n"


def lay_out(coder: Coder, pool: TokenPool, sources: Sequence[SourceFile], context_tokens: int,
            ended: bool = True) -> list[Document]:
    """Encode files into the array. `ended`: an end mark closes each body; false for a file that goes on.

    A header longer than a quarter of the window is replaced by the end mark.
    """
    headers = coder.encode([header_text(source.path) for source in sources])
    bodies = coder.encode([source.text for source in sources])
    documents = []
    for source, header, body in zip(sources, headers, bodies, strict=True):
        if len(header) > max(1, context_tokens // 4) or not len(header):
            header = np.array([coder.eos_id], dtype=np.int32)
        start = pool.add(header)
        pool.add(body)
        if ended:
            pool.add([coder.eos_id])
        documents.append(Document(path=source.path, language=source.language, kind=source.kind, start=start,
                                  header=len(header), body=len(body) + ended, ended=ended))
    return documents


def cut(ends_line: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Spans of at most `limit` that cover a body in order, cut after a line break in the last quarter where
    one is.

    `ends_line` (S,): whether each token ends a line.

    >>> cut(np.array([0, 0, 0, 0, 0, 0, 1, 0, 0, 0], bool), 8)
    [(0, 7), (7, 10)]
    """
    if limit < 1:
        raise ValueError(f"a piece holds {limit} tokens; the least is 1")
    spans, first, total = [], 0, len(ends_line)
    while first < total:
        last = min(first + limit, total)
        if last < total:
            earliest = last - limit // 4
            breaks = np.flatnonzero(ends_line[earliest:last])
            last = earliest + int(breaks[-1]) + 1 if len(breaks) else last
        spans.append((first, last))
        first = last
    return spans


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """The same tokens with neighbours joined and empty segments left out."""
    out: list[Segment] = []
    for segment in segments:
        if not segment.length:
            continue
        previous = out[-1] if out else None
        follows = previous and previous.start + previous.length == segment.start
        if previous and follows and previous.trained == segment.trained:
            out[-1] = Segment(previous.start, previous.length + segment.length, segment.trained)
        else:
            out.append(segment)
    return out
