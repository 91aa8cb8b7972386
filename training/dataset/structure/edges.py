"""Which files of a repository depend on which: imports resolved to paths within it, and their order."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence

from training.dataset.structure.pairing import pairs
from training.dataset.structure.resolvers import RESOLVERS, Facts, Index, distance

__all__ = ["Edges", "Facts", "distance", "import_edges", "pairs", "parse_python", "topological"]

Edges = dict[str, tuple[str, ...]]


def import_edges(facts: Sequence[Facts], root_name: str) -> Edges:
    """Path -> the paths it imports, in the order of its imports.

    `root_name`: the repository folder's own name, which is the package's name when it holds `__init__.py`.
    """
    index = Index(facts, root_name)
    edges: Edges = {}
    for source in facts:
        resolve = RESOLVERS.get(source.language)
        found = dict.fromkeys(path for item in source.structure_imports if resolve and item.kind != "mention"
                              for path in resolve(source, item, index) if path != source.path)
        edges[source.path] = tuple(found)
    return edges


def topological(edges: Edges) -> dict[str, int]:
    """A rank per path in which, cycles aside, dependencies come before what imports them."""
    rank: dict[str, int] = {}
    entered: set[str] = set()
    for start in sorted(edges):
        stack: list[tuple[str, Iterator[str]]] = []
        if start not in entered:
            entered.add(start)
            stack.append((start, iter(edges[start])))
        while stack:
            path, rest = stack[-1]
            following = next((item for item in rest if item not in entered and item in edges), None)
            if following is None:
                rank[path] = len(rank)
                stack.pop()
            else:
                entered.add(following)
                stack.append((following, iter(edges[following])))
    return rank


def parse_python(text: str) -> ast.Module | None:
    """The syntax tree, or None when this Python cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
