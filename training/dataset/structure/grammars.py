"""tree-sitter grammars: one wheel per language, loaded at first use, and the queries asked of their trees.

Neither a parse nor a query of tree-sitter 0.26.1 can be bounded from within: 12 kB of `a=>` keep the grammars
of C and Java busy for 17 s in one step that asks no progress callback; that of a query crashes the process; a
query's time grows with the square of the depth (79 s at 32,767) and of a run of unnamed siblings (8.9 s at
100,000). So longer texts are parsed by another process (`worker`), which the kernel ends.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import resources
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Query, QueryCursor, Tree

MAX_DEPTH = 400               # nodes below are not asked


class Grammar(NamedTuple):
    """A wheel's module, its function, and the query file that its nodes answer."""

    module: str
    function: str
    query: str


# A file is read by the first grammar that finds no error, else by the first.
GRAMMARS: dict[str, tuple[Grammar, ...]] = {
    "python": (Grammar("tree_sitter_python", "language", "python"),),
    "javascript": (Grammar("tree_sitter_javascript", "language", "javascript"),),
    "typescript": (Grammar("tree_sitter_typescript", "language_typescript", "typescript"),
                   Grammar("tree_sitter_typescript", "language_tsx", "typescript")),
    "java": (Grammar("tree_sitter_java", "language", "java"),),
    "go": (Grammar("tree_sitter_go", "language", "go"),),
    "rust": (Grammar("tree_sitter_rust", "language", "rust"),),
    "c": (Grammar("tree_sitter_c", "language", "c"), Grammar("tree_sitter_cpp", "language", "cpp")),
    "cpp": (Grammar("tree_sitter_cpp", "language", "cpp"),),
    "csharp": (Grammar("tree_sitter_c_sharp", "language", "csharp"),),
    "ruby": (Grammar("tree_sitter_ruby", "language", "ruby"),),
    "php": (Grammar("tree_sitter_php", "language_php", "php"),),
    "shell": (Grammar("tree_sitter_bash", "language", "shell"),),
}
GRAMMARS |= {"notebook": GRAMMARS["python"], "starlark": GRAMMARS["python"], "cuda": GRAMMARS["cpp"]}


class Parsed(NamedTuple):
    """What a query found in a text: one dictionary of captured nodes per match, and the broken ranges."""

    matches: list[dict[str, list[Node]]]
    broken: list[tuple[int, int]]
    tree: Tree


def parse(data: bytes, language: str) -> Parsed | None:
    """The query's matches in a text (UTF-8); None where no grammar is at hand."""
    best: tuple[Tree, Grammar] | None = None
    for grammar in GRAMMARS.get(language, ()):
        tree = _tree(data, grammar)
        if tree is not None and (best is None or not tree.root_node.has_error):
            best = tree, grammar
        if tree is not None and not tree.root_node.has_error:
            break
    return _asked(*best) if best else None


def _tree(data: bytes, grammar: Grammar) -> Tree | None:
    if (language := _language(grammar.module, grammar.function)) is None:
        return None
    tree: Tree = _library().Parser(language).parse(data)
    return tree


def _asked(tree: Tree, grammar: Grammar) -> Parsed:
    root = tree.root_node
    matches = [captures for _, captures in _cursor(grammar).matches(root)]
    broken: list[tuple[int, int]] = []
    if root.has_error:
        found = _cursor(grammar, errors=True).captures(root)
        broken = sorted(node.byte_range for node in found.get("error", ()))
    return Parsed(matches, broken, tree)


def _cursor(grammar: Grammar, errors: bool = False) -> QueryCursor:
    cursor: QueryCursor = _library().QueryCursor(_query(grammar, errors))
    cursor.set_max_start_depth(MAX_DEPTH)
    return cursor


@cache
def _language(module: str, function: str) -> Language | None:
    """None where the wheel is not installed or does not fit the library."""
    try:
        found: Language = _library().Language(getattr(importlib.import_module(module), function)())
    except (ImportError, AttributeError, ValueError):
        return None
    return found


@cache
def _query(grammar: Grammar, errors: bool) -> Query:
    language = _language(grammar.module, grammar.function)
    assert language is not None
    file = resources.files("training.dataset.structure") / "queries" / f"{grammar.query}.scm"
    asked = "(ERROR) @error (MISSING) @error" if errors else file.read_text(encoding="utf-8")
    query: Query = _library().Query(language, asked)
    return query


@cache
def _library() -> ModuleType:
    return importlib.import_module("tree_sitter")
