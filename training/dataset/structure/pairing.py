"""Code with its documents and tests: pairs by name, by a test's imports, by a document's mentions."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from training.dataset.structure.resolvers import Facts, Index, nearest

MAX_PAIRS = 8
MAX_IMPORTERS = 32            # a file that more tests import than this is a helper of theirs
MIN_NAME = 4                  # characters of a definition's name that a document may be paired by
NAMED, PATH, MODULE, DEFINITION, TESTED = 4.0, 3.0, 2.0, 1.0, 2.0      # how much each sign of a pair counts
_TEST_STEM = re.compile(r"(?:test_(?P<a>.+)|(?P<b>.+?)[._-](?:tests?|spec)|(?P<c>.+?)(?:Tests?|Spec|IT)"
                        r"|Test(?P<d>[A-Z].*))$")
_TEST_FOLDERS = frozenset({"test", "tests", "spec", "specs", "__tests__", "testing"})


def pairs(facts: Sequence[Facts], edges: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Path -> at most 8 paths, best first: of tests and documents code, of code tests and documents."""
    index = Index(facts, "")
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    tests = {item.path: stem for item in facts if item.kind == "code"
             and (stem := tested_stem(item.path)) is not None}
    for found in (_by_name(facts, tests), _by_import(tests, edges), _by_mention(facts, tests, index)):
        for one, other, score in found:
            if one != other:
                scores[one][other] = scores[one].get(other, 0) + score
                scores[other][one] = scores[other].get(one, 0) + score
    return {item.path: _best(scores.get(item.path, {})) for item in facts}


def _best(scores: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(sorted(scores, key=lambda path: (-scores[path], path))[:MAX_PAIRS])


def tested_stem(path: str) -> str | None:
    """The name of what a test tests, None for a path that is no test's; "" where only its folder says so.

    >>> tested_stem("tests/test_x.py"), tested_stem("a/FooTest.java"), tested_stem("src/b.spec.ts")
    ('x', 'Foo', 'b')
    >>> tested_stem("src/latest.py"), tested_stem("tests/helpers.py")
    (None, '')
    """
    *folders, base = path.split("/")
    if found := _TEST_STEM.match(posixpath.splitext(base)[0]):
        return next(name for name in found.groups() if name)
    return "" if _TEST_FOLDERS.intersection(folders) else None


def _plain(stem: str) -> str:
    return re.sub(r"[-_.]", "", stem).lower()


def _by_name(facts: Sequence[Facts], tests: Mapping[str, str]) -> Iterator[tuple[str, str, float]]:
    """Tests and documents with the code files of their name, nearest first."""
    named: dict[str, list[str]] = defaultdict(list)
    for item in sorted(facts, key=lambda item: item.path):
        if item.kind == "code" and item.path not in tests:
            named[_plain(_stem(item.path))].append(item.path)
    for item in facts:
        stem = tests.get(item.path) or (_stem(item.path) if item.kind == "docs" else "")
        same = nearest(named.get(_plain(stem), ()), item.path, 3) if stem else []
        for place, path in enumerate(same):
            suffix = posixpath.splitext(path)[1] == posixpath.splitext(item.path)[1]
            yield item.path, path, NAMED - place - (0 if suffix else 1.5)


def _stem(path: str) -> str:
    base = posixpath.basename(path)
    stem = base.split(".")[0] or base
    return posixpath.basename(posixpath.dirname(path)) if stem in ("__init__", "index", "mod") else stem


def _by_import(tests: Mapping[str, str],
               edges: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, float]]:
    """Tests with the code they import: the less, the fewer tests and imports there are."""
    importers: dict[str, int] = defaultdict(int)
    for test in tests:
        for path in edges.get(test, ()):
            importers[path] += 1
    for test in tests:
        found = [path for path in edges.get(test, ())
                 if path not in tests and importers[path] <= MAX_IMPORTERS]
        for path in found:
            yield test, path, TESTED / (1 + 0.1 * len(found)) / importers[path] ** 0.5


def _by_mention(facts: Sequence[Facts], tests: Mapping[str, str],
                index: Index) -> Iterator[tuple[str, str, float]]:
    """Documents with the code whose path, module or only definition they name."""
    definitions = _definitions(facts, tests)
    code = {item.path for item in facts if item.kind == "code"}
    for item in facts:
        for mention in item.structure_imports:
            if mention.kind == "mention":
                path, score = _mentioned(mention.module, item.path, index, definitions)
                if path in code:
                    yield item.path, path, score


def _definitions(facts: Sequence[Facts], tests: Mapping[str, str]) -> dict[str, str]:
    """Name -> the only path outside tests that defines it; an empty path where several do."""
    found: dict[str, str] = {}
    for item in facts:
        if item.kind == "code" and item.path not in tests:
            for name in item.defines:
                if len(name) >= MIN_NAME:
                    found[name] = item.path if found.get(name, item.path) == item.path else ""
    return found


def _mentioned(name: str, near: str, index: Index, definitions: Mapping[str, str]) -> tuple[str, float]:
    if found := index.first([posixpath.join(posixpath.dirname(near), name)]) or index.ending(name, near):
        return found[0], PATH
    parts = name.replace("::", ".").split(".")
    for length in range(len(parts), 0, -1):
        if length > 1 and (path := index.modules.get(".".join(parts[:length]))):
            return path, MODULE
    return next(((path, DEFINITION) for part in (name, *reversed(parts)) if (path := definitions.get(part))),
                ("", 0.0))
