"""Spans of held-out files for a model to complete: one to three whole lines each, with text on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from training.dataset.documents import header_text
from training.dataset.structure.edges import parse_python
from training.dataset.sources.repository import SourceFile
from training.dataset.structure.syntax import Statement, statements

MAX_SPANS = 64
MAX_SPANS_PER_FILE = 8
PREFIX_CHARACTERS = 2_000
SUFFIX_CHARACTERS = 2_000
MIN_PREFIX_CHARACTERS = 60
MAX_MIDDLE_LINES = 3
MIN_MIDDLE_CHARACTERS = 8

Span = dict[str, Any]


def completion_spans(held_out: Sequence[SourceFile], seed: int) -> list[Span]:
    """At most 64 spans, in turn from each code file.

    Keys: path, language, prefix, middle, suffix (text that follows one another in the file), header (the line
    that named the file in training), parses (Python: prefix + middle + suffix is a program; None for other
    languages).
    """
    per_file = []
    for source in sorted(held_out, key=lambda item: item.path):
        if source.kind == "code":
            rng = random.Random(f"{seed}\0{source.path}")
            spans = _python_spans(source, rng) if source.language == "python" else []
            per_file.append(spans or _line_spans(source, rng))
    turns = [spans[turn] for turn in range(MAX_SPANS_PER_FILE) for spans in per_file if turn < len(spans)]
    return turns[:MAX_SPANS]


def _span(source: SourceFile, prefix: str, middle: str, suffix: str, parses: bool | None) -> Span:
    return {"path": source.path, "language": source.language, "header": header_text(source.path),
            "prefix": prefix,
            "middle": middle, "suffix": suffix, "parses": parses}


def _python_spans(source: SourceFile, rng: random.Random) -> list[Span]:
    """Inner statements of top-level ones that are short enough to be given whole."""
    lines = source.text.split("\n")
    found = statements(source.text)
    tops = [item for item in found if item.depth == 0]
    inner = [item for item in found if item.depth and _middle(lines, item)]
    rng.shuffle(inner)
    spans: list[Span] = []
    for item in inner:
        place = next((index for index, top in enumerate(tops)
                      if top.first_line <= item.first_line and item.last_line <= top.last_line), None)
        if place is None or len(spans) == MAX_SPANS_PER_FILE:
            continue
        if (span := _whole_span(source, lines, tops, place, item)) is not None:
            spans.append(span)
    return spans


def _middle(lines: Sequence[str], item: Statement) -> str:
    """The whole lines of a statement when there are one to three and they say something; else nothing."""
    if item.last_line - item.first_line >= MAX_MIDDLE_LINES:
        return ""
    text = "\n".join(lines[item.first_line:item.last_line + 1])
    letters = text.strip()
    return text if len(letters) >= MIN_MIDDLE_CHARACTERS and letters[0] not in "\"'#" else ""


def _whole_span(source: SourceFile, lines: Sequence[str], tops: Sequence[Statement], place: int,
                item: Statement) -> Span | None:
    """Prefix from a top-level statement's start, suffix to the enclosing one's end; None if too long."""
    start = tops[place].first_line
    suffix = "\n".join(["", *lines[item.last_line + 1:tops[place].last_line + 1], ""])
    if len("\n".join(lines[start:item.first_line])) > PREFIX_CHARACTERS or len(suffix) > SUFFIX_CHARACTERS:
        return None
    for earlier in reversed(tops[:place]):
        if len("\n".join(lines[earlier.first_line:item.first_line])) >= PREFIX_CHARACTERS:
            break
        start = earlier.first_line
    prefix = "".join(f"{line}\n" for line in lines[start:item.first_line])
    middle = "\n".join(lines[item.first_line:item.last_line + 1])
    if len(prefix) < MIN_PREFIX_CHARACTERS:
        return None
    return _span(source, prefix, middle, suffix, parse_python(prefix + middle + suffix) is not None)


def _line_spans(source: SourceFile, rng: random.Random) -> list[Span]:
    """Runs of one to three lines, the first of which is not blank."""
    lines = source.text.split("\n")
    places = [index for index, line in enumerate(lines) if index
              and len(line.strip()) >= MIN_MIDDLE_CHARACTERS]
    rng.shuffle(places)
    spans = []
    for place in sorted(places[:MAX_SPANS_PER_FILE]):
        last = min(place + rng.randint(1, MAX_MIDDLE_LINES), len(lines))
        middle = "\n".join(lines[place:last]).rstrip()
        prefix = "".join(f"{line}\n" for line in lines[:place])[-PREFIX_CHARACTERS:]
        suffix = "\n".join(["", *lines[last:]])[:SUFFIX_CHARACTERS]
        parses = False if source.language == "python" else None
        spans.append(_span(source, prefix, middle, suffix, parses))
    return spans
