"""What the windows need of a file's structure: its statements, and its skeleton (signatures without bodies).

Python is read with its own parser, other languages line by line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from training.dataset.structure.edges import parse_python

MAX_SKELETON_SHARE = 0.6     # a skeleton longer than this share of its file saves too little
_DEFINITION = re.compile(
    r"^[ \t]{0,8}(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|unsafe"
    r"|inline|virtual|override|extern|const|pub(?:\([^)]*\))?|open|sealed|data|partial|suspend|constexpr)\s+)*"
    r"(?:def|class|struct|enum|interface|trait|impl|func|fn|fun|function|module|namespace|type|typedef"
    r"|template|record|object|protocol|extension|sub|proc|macro_rules!|#define|package)\b.*$"
    r"|^(?:[\w:<>,*&\[\]]{1,80}[ \t]{1,8}){1,8}[\w:~]{1,80}\([^;\n]{0,300}\)[^;\n]{0,80}\{[ \t]*$",
    re.MULTILINE)


@dataclass(frozen=True)
class Statement:
    """One statement: byte span of its text (UTF-8), 0-based first and last line. `depth` 0: top level."""

    start: int
    end: int
    first_line: int
    last_line: int
    depth: int


def statements(text: str) -> list[Statement]:
    """Every Python statement of a text, outer before inner; empty where the parser refuses it."""
    tree = parse_python(text)
    if tree is None:
        return []
    starts = _line_starts(text)
    return [Statement(starts[node.lineno - 1] + node.col_offset, starts[end_line - 1] + end_column,
                      _first_line(node) - 1, end_line - 1, depth)
            for node, depth in _walk(tree, 0)
            if (end_line := node.end_lineno) is not None and (end_column := node.end_col_offset) is not None]


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", None)
    return min([node.lineno, *(item.lineno for item in decorators or ())])


def _walk(node: ast.AST, depth: int) -> Iterator[tuple[ast.stmt, int]]:
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, field, None)
        for child in inner if isinstance(inner, list) else ():
            if isinstance(child, ast.stmt):
                yield child, depth
            yield from _walk(child, depth + 1)


def _line_starts(text: str) -> list[int]:
    """Byte offset of each line, as Python's parser counts lines (form feeds end none)."""
    starts = [0]
    for line in text.encode("utf-8").split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def skeleton(text: str, language: str) -> str:
    """Signatures, class heads and first docstring lines; empty when hardly shorter than the text."""
    if language == "python":
        tree = parse_python(text)
        lines = text.split("\n")
        kept = "\n".join(_python_skeleton(tree, lines)) if tree else ""
    else:
        kept = "\n".join(match.group(0).rstrip() for match in _DEFINITION.finditer(text))
    return kept + "\n" if kept and len(kept) <= MAX_SKELETON_SHARE * len(text) else ""


def _python_skeleton(node: ast.AST, lines: list[str]) -> Iterator[str]:
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            head_end = max(child.lineno, _first_line(child.body[0]) - 1)
            yield from lines[child.lineno - 1:head_end]
            if (document := ast.get_docstring(child, clean=True)) and head_end > child.lineno - 1:
                indent = " " * (child.col_offset + 4)
                yield f'{indent}"""{document.split(chr(10), 1)[0].strip()}"""'
            if isinstance(child, ast.ClassDef):
                yield from _python_skeleton(child, lines)
        elif isinstance(node, ast.Module) and isinstance(child, ast.If | ast.Try):
            yield from _python_skeleton(child, lines)
