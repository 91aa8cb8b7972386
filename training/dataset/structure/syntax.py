"""What a text says about itself: imports, top-level names, package, whole nodes and skeleton, in one parse.

tree-sitter reads the languages of `grammars.GRAMMARS`, by the queries in `queries/`; lines and regular
expressions (`textual`) the rest, and what is too deep or too slow to parse. Names of captures:

    @import @include @use @require @mod @source   a module as it is written; the capture is the import's kind
    @name                                         a name taken from it, one match each
    @define  @package                             a top-level name; the text's package, namespace or module
    @signature  @body | @members  @docstring      a definition; what follows its head, hidden or by heads
    @span                                         a whole node that can be left out and written again
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from training.dataset.structure import grammars, textual, worker
from training.dataset.structure.textual import Import

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["Import", "Structure", "analyse"]

MIN_SPAN_BYTES, MAX_SPAN_BYTES = 8, 2_000     # middles: statements to blocks (arXiv 2506.00204)
BYTES_A_SPAN = 24             # a text has at most one span for so many bytes
MAX_SKELETON_SHARE = 0.6      # a skeleton longer than this share of its file saves too little
MAX_HEAD_BYTES = 600          # of a definition without a body (a struct, a type) that is shown whole
MAX_DEFINES = 1_000
MAX_OWN_BYTES = 1_024         # longer texts are parsed by the worker
_KINDS = ("import", "include", "use", "require", "require.relative", "mod", "source")

Captures = dict[str, "list[Node]"]


def _no_spans() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class Structure:
    """What one text says. `spans` int32 (N, 2): bytes [start, end) of its UTF-8, by start, longer first."""

    imports: tuple[Import, ...] = ()
    defines: tuple[str, ...] = ()
    package: str = ""
    spans: np.ndarray = field(default_factory=_no_spans)
    skeleton: str = ""


class _Head(NamedTuple):
    """A definition's bytes to show, [start, end); bytes whose definitions are not, up to `hidden_to`."""

    start: int
    end: int
    hidden_to: int
    docstring: str


def analyse(text: str, language: str) -> Structure:
    """The structure of a text; never raises, and takes seconds at most on hostile text of 1 MiB.

    >>> found = analyse("from .a import b\\nclass C(D):\\n    x = call(1, 2)\\n", "python")
    >>> found.imports, found.defines, len(found.spans)
    ((Import(level=1, module='a', names=('b',), kind='import'),), ('C',), 2)
    """
    data = text.encode("utf-8", "replace")
    if language in grammars.GRAMMARS:
        found = parsed_structure(data, language) if len(data) <= MAX_OWN_BYTES else worker.ask(data, language)
        if found is not None:
            return found
    return Structure(textual.imports(text, language), textual.defines(text, language),
                     textual.package(text, language), _no_spans(), _short(textual.skeleton(text), len(text)))


def parsed_structure(data: bytes, language: str) -> Structure | None:
    """The structure of a text (UTF-8) by its language's grammar; None where none is at hand."""
    parsed = grammars.parse(data, language)
    if parsed is None:
        return None
    spans: list[tuple[int, int]] = []
    outline: list[Captures] = []
    for match in parsed.matches:
        if nodes := match.get("span"):
            spans += [node.byte_range for node in nodes]
        else:
            outline.append(match)
    return Structure(tuple(_imports(outline, data, language)),
                     tuple(dict.fromkeys(_texts(outline, "define", data)))[:MAX_DEFINES],
                     next(_texts(outline, "package", data), ""),
                     _whole(spans, parsed.broken, len(data)),
                     _short("\n".join(_skeleton(outline, data)), len(data)))


def _short(skeleton: str, size: int) -> str:
    return skeleton + "\n" if skeleton and len(skeleton) <= MAX_SKELETON_SHARE * size else ""


def _text(node: Node, data: bytes) -> str:
    return data[node.start_byte:node.end_byte].decode("utf-8", "replace")


def _texts(outline: Iterable[Captures], capture: str, data: bytes) -> Iterator[str]:
    return (_text(node, data) for match in outline for node in match.get(capture, ()))


def _whole(spans: Sequence[tuple[int, int]], broken: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """The spans of fit length that touch no broken range, each once; evenly thinned where there are many."""
    if not spans:
        return _no_spans()
    found = np.unique(np.asarray(spans, dtype=np.int32), axis=0)
    length = found[:, 1] - found[:, 0]
    found = found[(length >= MIN_SPAN_BYTES) & (length <= MAX_SPAN_BYTES) & (length < size)]
    if broken:
        found = found[~_touched(found, np.asarray(broken, dtype=np.int32))]
    found = found[np.lexsort((-found[:, 1], found[:, 0]))]
    most = max(1, size // BYTES_A_SPAN)
    if len(found) > most:
        found = found[np.linspace(0, len(found) - 1, most).astype(np.int64)]
    return np.ascontiguousarray(found)


def _touched(spans: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """Which spans (N, 2) meet one of the ranges (M, 2), sorted by start; ends count."""
    reach = np.maximum.accumulate(broken[:, 1])       # nested ranges: the furthest end so far
    before = np.searchsorted(broken[:, 0], spans[:, 1], side="right") - 1
    touched: np.ndarray = (before >= 0) & (reach[np.maximum(before, 0)] >= spans[:, 0])
    return touched


def _imports(outline: Iterable[Captures], data: bytes, language: str) -> Iterator[Import]:
    """Imports in the order of the text; several matches of one statement, a name each, become one."""
    found: dict[int, tuple[str, str, list[str]]] = {}
    for match in outline:
        if kind := next((kind for kind in _KINDS if kind in match), ""):
            node = match[kind][0]
            _, _, names = found.setdefault(node.start_byte, (kind, _text(node, data), []))
            names += [_text(name, data) for name in match.get("name", ())]
    for _, (kind, module, names) in sorted(found.items()):
        yield from textual.read_import(kind, module, names, language)


def _skeleton(outline: Iterable[Captures], data: bytes) -> Iterator[str]:
    """Heads of definitions in order, without what lies within the bodies of others."""
    heads: dict[int, _Head] = {}
    for match in outline:
        if "signature" in match:
            head = _head(match, data)
            if head.start not in heads or head.docstring:
                heads[head.start] = head
    hidden_to = shown_to = 0
    for start, head in sorted(heads.items()):
        if start < hidden_to or start < shown_to:
            continue
        lead = data[data.rfind(b"\n", 0, start) + 1:start]
        if lead.strip() and (start - len(lead) < shown_to or len(lead) > MAX_HEAD_BYTES):
            lead = b""
        yield (lead + data[start:head.end]).decode("utf-8", "replace").rstrip()
        if head.docstring:
            blanks = lead[:len(lead) - len(lead.lstrip())].decode("utf-8", "replace")
            yield f'{blanks}    """{head.docstring}"""'
        hidden_to, shown_to = head.hidden_to, head.end


def _head(match: Captures, data: bytes) -> _Head:
    start, end = match["signature"][0].byte_range
    document = ""
    if (found := match.get("docstring")) and b"\n" in data[start:found[0].start_byte]:
        document = _text(found[0], data).strip().split("\n", 1)[0]
    if body := match.get("members"):
        return _Head(start, min(node.start_byte for node in body), start, document)
    if body := match.get("body"):
        hidden_to = max(node.end_byte for node in body)
        return _Head(start, min(node.start_byte for node in body), hidden_to, document)
    if end - start > MAX_HEAD_BYTES:
        line_end = data.find(b"\n", start, end)
        return _Head(start, line_end if line_end > 0 else start + MAX_HEAD_BYTES, end, "")
    return _Head(start, end, end, "")
