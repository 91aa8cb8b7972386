"""Spans of held-out files for a model to complete: one to three whole lines each, with text on both sides.

A span is a whole node of the file's syntax where a structure is known, else any lines.
"""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from training.dataset.documents import header_text
from training.dataset.sources.repository import SourceFile
from training.dataset.structure.edges import parse_python

MAX_SPANS = 64
MAX_SPANS_PER_FILE = 8
PREFIX_BYTES = 2_000
SUFFIX_BYTES = 2_000
MIN_PREFIX_BYTES = 60
MAX_MIDDLE_LINES = 3
MIN_MIDDLE_CHARACTERS = 8
# What may stand between a node's end and the end of its line: a separator, a comment.
_REST = re.compile(rb"[ \t\r\n]*[,;]?[ \t\r\n]*((#|//|--|/\*|;)[^\n]*\n?)?")
_SAYS_LITTLE = ('"', "'", "`", "#", "//", "/*", "*", "--", "<!--")

Span = dict[str, Any]


class Nodes(Protocol):
    """What is asked of a file's structure: `spans` (N, 2), byte spans [start, end) of whole nodes."""

    @property
    def spans(self) -> np.ndarray:
        """(N, 2)."""


def completion_spans(held_out: Iterable[SourceFile], structures: Mapping[str, Nodes],
                     seed: int) -> list[Span]:
    """At most 64 spans, in turn from the files; of more than 64 code files, 64 are drawn.

    Keys: path, language, prefix, middle, suffix (text that follows one another in the file), header (the line
    that named the file in training), kind ("node": the middle is a whole node; "lines"), parses (Python:
    prefix + middle + suffix is a program; None for other languages). `structures`: by path, of those files
    that have one. The files come in any order and are held one at a time.
    """
    kept: list[tuple[float, str, list[Span]]] = []  # those drawn highest, the lowest of them first
    for source in held_out:
        draw = random.Random(f"{seed}\0{source.path}").random()
        full = len(kept) == MAX_SPANS
        if source.kind != "code" or (full and draw < kept[0][0]):
            continue
        if spans := _spans_of(source, structures.get(source.path), seed):
            (heapq.heappushpop if full else heapq.heappush)(kept, (draw, source.path, spans))
    per_file = [spans for _, _, spans in sorted(kept, key=lambda item: item[1])]
    turns = [spans[turn] for turn in range(MAX_SPANS_PER_FILE) for spans in per_file if turn < len(spans)]
    return turns[:MAX_SPANS]


def _spans_of(source: SourceFile, nodes: Nodes | None, seed: int) -> list[Span]:
    rng = random.Random(f"{seed}\0spans\0{source.path}")
    text = _Lines(source.text)
    found = _node_spans(source, text, nodes, rng) if nodes is not None and len(nodes.spans) else []
    return found or _line_spans(source, text, rng)


class _Lines:
    """A text's bytes, and where its lines begin: line i is [bounds[i], bounds[i + 1])."""

    def __init__(self, text: str):
        self.data = text.encode("utf-8")
        ends = np.flatnonzero(np.frombuffer(self.data, dtype=np.uint8) == ord("\n")) + 1
        self.bounds = np.unique(np.concatenate([[0], ends, [len(self.data)]])).astype(np.int64)
        self.count = len(self.bounds) - 1

    def text(self, first: int, last: int) -> str:
        """Lines [first, last), with the newline of each."""
        return self.data[self.bounds[first]:self.bounds[last]].decode("utf-8")

    def prefix(self, line: int) -> str:
        """As many whole lines as fit before a line; of a longer single line, its end."""
        start = int(np.searchsorted(self.bounds, self.bounds[line] - PREFIX_BYTES))
        if start < line or not line:
            return self.text(start, line)
        return self.data[:self.bounds[line]][-PREFIX_BYTES:].decode("utf-8", errors="ignore")

    def suffix(self, line: int) -> str:
        """As many whole lines as fit from a line on; of a longer single line, its beginning."""
        end = int(np.searchsorted(self.bounds, self.bounds[line] + SUFFIX_BYTES, side="right")) - 1
        if end > line or line == self.count:
            return self.text(line, end)
        return self.data[self.bounds[line]:][:SUFFIX_BYTES].decode("utf-8", errors="ignore")


def _span(source: SourceFile, kind: str, texts: tuple[str, str, str], parses: bool | None) -> Span:
    prefix, middle, suffix = texts
    body = middle.rstrip("\r\n")
    return {"path": source.path, "language": source.language, "header": header_text(source.path),
            "prefix": prefix, "middle": body, "suffix": middle[len(body):] + suffix, "kind": kind,
            "parses": parses}


def _node_spans(source: SourceFile, text: _Lines, nodes: Nodes, rng: random.Random) -> list[Span]:
    tops = _top_lines(source.text) if source.language == "python" else []
    spans: list[Span] = []
    for first, last in _whole_nodes(text, nodes.spans, rng):
        if len(spans) == MAX_SPANS_PER_FILE:
            break
        span = (_python_span(source, text, tops, (first, last)) if source.language == "python"
                else _span(source, "node", (text.prefix(first), text.text(first, last), text.suffix(last)),
                           None))
        if span is not None and len(span["prefix"].encode()) >= MIN_PREFIX_BYTES:
            spans.append(span)
    return spans


def _whole_nodes(text: _Lines, spans: np.ndarray, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Lines [first, last) that are one node and say something, in drawn order, each once."""
    spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    spans = spans[(spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= len(text.data))]
    first = np.searchsorted(text.bounds, spans[:, 0], side="right") - 1
    last = np.searchsorted(text.bounds, spans[:, 1] - 1, side="right")
    short = np.flatnonzero(last - first <= MAX_MIDDLE_LINES).tolist()
    rng.shuffle(short)
    seen = set()
    for index in short:
        lines = int(first[index]), int(last[index])
        start, end = spans[index]
        whole = (not text.data[text.bounds[lines[0]]:start].strip()
                 and _REST.fullmatch(text.data, end, text.bounds[lines[1]]))
        if whole and lines not in seen and _says_something(text.text(*lines)):
            seen.add(lines)
            yield lines


def _says_something(middle: str) -> bool:
    letters = middle.strip()
    return len(letters) >= MIN_MIDDLE_CHARACTERS and not letters.startswith(_SAYS_LITTLE)


def _top_lines(text: str) -> list[tuple[int, int]]:
    """Lines [first, last) of each top-level Python statement; none where the parser refuses the text, or
    counts its lines in another way."""
    tree = None if "\r" in text else parse_python(text)
    return [(min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))]) - 1,
             node.end_lineno or node.lineno) for node in (tree.body if tree else ())]


def _python_span(source: SourceFile, text: _Lines, tops: list[tuple[int, int]],
                 lines: tuple[int, int]) -> Span | None:
    """Prefix from a top-level statement's start, suffix to the enclosing one's end; None if too long."""
    first, last = lines
    place = next((index for index, (top, end) in enumerate(tops) if top < first and last <= end), None)
    if place is None:
        return None
    end = tops[place][1]
    limit = text.bounds[first] - PREFIX_BYTES
    starts = [top for top, _ in tops[:place + 1] if text.bounds[top] >= limit]
    if not starts or text.bounds[end] - text.bounds[last] > SUFFIX_BYTES:
        return None
    texts = text.text(starts[0], first), text.text(first, last), text.text(last, end)
    return _span(source, "node", texts, parse_python("".join(texts)) is not None)


def _line_spans(source: SourceFile, text: _Lines, rng: random.Random) -> list[Span]:
    """Runs of one to three lines, the first of which is not blank."""
    places = [line for line in range(1, text.count)
              if len(text.text(line, line + 1).strip()) >= MIN_MIDDLE_CHARACTERS]
    rng.shuffle(places)
    spans = []
    for place in sorted(places[:MAX_SPANS_PER_FILE]):
        last = min(place + rng.randint(1, MAX_MIDDLE_LINES), text.count)
        while not text.text(last - 1, last).strip():
            last -= 1
        parses = False if source.language == "python" else None
        texts = text.prefix(place), text.text(place, last), text.suffix(last)
        spans.append(_span(source, "lines", texts, parses))
    return spans
