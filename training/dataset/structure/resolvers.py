"""Imports to paths: the names that a repository's files go by, and each language's way to spell them.

A missed edge costs context, never correctness; an import that leads out of the repository is no edge.
"""

from __future__ import annotations

import bisect
import posixpath
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from training.dataset.structure.textual import Import

MAX_EDGES_PER_IMPORT = 8      # files that one import of a package (Go, C#, `*`) may bring in
MAX_NEAR = 64                 # files of one name that are weighed, those next to the importer in path order


class Facts(Protocol):
    """What edges need of a file."""

    @property
    def path(self) -> str:
        """Relative to the repository, with `/`."""

    @property
    def language(self) -> str:
        """As `sources.languages` names it."""

    @property
    def kind(self) -> str:
        """code, docs or config."""

    @property
    def structure_imports(self) -> tuple[Import, ...]:
        """`Structure.imports`."""

    @property
    def defines(self) -> tuple[str, ...]:
        """`Structure.defines`."""

    @property
    def package(self) -> str:
        """`Structure.package`."""


def distance(left: str, right: str) -> int:
    """Steps between two files through their folders.

    >>> distance("a/b/x.py", "a/b/y.py"), distance("a/b/x.py", "a/c/y.py")
    (0, 2)
    """
    one, two = left.split("/")[:-1], right.split("/")[:-1]
    shared = 0
    for ours, theirs in zip(one, two, strict=False):
        if ours != theirs:
            break
        shared += 1
    return len(one) + len(two) - 2 * shared


def nearest(paths: Sequence[str], near: str, most: int) -> list[str]:
    """At most `most` of ascending `paths` by distance to `near`; its neighbours in order are weighed."""
    place = bisect.bisect(paths, near)
    beside = paths[max(0, place - MAX_NEAR // 2):place + MAX_NEAR // 2]
    return sorted(beside, key=lambda path: (distance(path, near), path))[:most]


class Index:
    """The repository's paths by the names that imports use."""

    def __init__(self, facts: Sequence[Facts], root_name: str):
        self.facts = sorted(facts, key=lambda item: item.path)
        self.paths = {item.path for item in facts}
        self._tails: dict[str, list[str]] = defaultdict(list)
        self.folders: dict[str, list[Facts]] = defaultdict(list)
        self.packages: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.qualified: dict[tuple[str, str], str] = {}
        self.manifests: dict[str, dict[str, str]] = defaultdict(dict)
        for item in self.facts:
            self._add(item)
        self.modules = _python_modules(sorted(self.paths), root_name)

    def _add(self, item: Facts) -> None:
        folder, base = posixpath.split(item.path)
        self._tails[base].append(item.path)
        if folder:
            self._tails["/".join(item.path.split("/")[-2:])].append(item.path)
        self.folders[folder].append(item)
        if base in ("go.mod", "Cargo.toml", "package.json"):
            if item.package:
                self.manifests[base].setdefault(item.package, folder)
        elif item.package:
            family = FAMILIES.get(item.language, item.language)
            self.packages[family, item.package].append(item.path)
            separator = "\\" if family == "php" else "."
            for name in item.defines:
                self.qualified.setdefault((family, f"{item.package}{separator}{name}"), item.path)

    def module(self, name: str, folder: str) -> str:
        """The path of a dotted Python module imported from `folder`, or an empty string.

        A standard module's name means that module, unless the file lies at the top or beside the importer.
        """
        path = self.modules.get(name, "")
        if path and name.split(".")[0] in sys.stdlib_module_names:
            stem = posixpath.splitext(path)[0].removesuffix("/__init__")
            tail = name.replace(".", "/")
            if stem.endswith("/" + tail) and stem[:-len(tail) - 1] != folder:
                return ""
        return path

    def first(self, candidates: Iterable[str]) -> list[str]:
        """The first candidate path that exists, as a list of one or none."""
        return next(([path] for path in map(posixpath.normpath, candidates) if path in self.paths), [])

    def ending(self, tail: str, near: str) -> list[str]:
        """The path nearest to `near` that is `tail` or ends with `/tail`, as a list of one or none."""
        tail = posixpath.normpath(tail)
        while tail.startswith("../"):
            tail = tail[3:]
        found = self._tails.get("/".join(tail.split("/")[-2:]), [])
        if tail.count("/") > 1:
            found = [path for path in found if path == tail or path.endswith("/" + tail)]
        return nearest(found, near, 1)


def _python_modules(paths: Sequence[str], root_name: str) -> dict[str, str]:
    """Dotted name -> path, from the package root (no `__init__.py` there) and from the top."""
    modules: dict[str, str] = {}
    packages = {posixpath.dirname(path) for path in paths if posixpath.basename(path) == "__init__.py"}
    for path in paths:
        if not path.endswith((".py", ".pyi", ".pyx", ".pxd")):
            continue
        name = posixpath.splitext(path)[0].removesuffix("/__init__")
        name = "" if name == "__init__" else name
        top = posixpath.dirname(path)
        while top in packages and top:
            top = posixpath.dirname(top)
        if "" in packages and not top:
            modules.setdefault(".".join(filter(None, [root_name, *name.split("/")])), path)
        for local in (name[len(top) + 1:] if top else name, name):
            if local:
                modules.setdefault(local.replace("/", "."), path)
    return modules


Resolver = Callable[[Facts, Import, Index], Iterator[str]]


def _python(source: Facts, item: Import, index: Index) -> Iterator[str]:
    folder = posixpath.dirname(source.path)
    if not item.level:
        yield from _python_absolute(item.module, item.names, folder, index)
        return
    base = folder
    for _ in range(item.level - 1):
        base = posixpath.dirname(base)
    stem = "/".join(filter(None, [base, *item.module.split(".")])) if item.module else base
    found = [path for name in item.names
             for path in index.first(f"{stem}/{name}{ending}".lstrip("/")
                                     for ending in (".py", "/__init__.py", ".pyx"))]
    yield from found
    if len(found) < len(item.names) or not item.names:
        yield from index.first(f"{stem}{ending}".lstrip("/") for ending in (".py", "/__init__.py", ".pyx"))


def _python_absolute(module: str, names: Sequence[str], folder: str, index: Index) -> Iterator[str]:
    found = [path for name in names if (path := index.module(f"{module}.{name}", folder))]
    yield from found
    if len(found) == len(names) and names:
        return
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if path := index.module(".".join(parts[:length]), folder):
            # `import a.b.c` where only the top-level `a` is known proves nothing about a file.
            if length == len(parts) or length > 1:
                yield path
            return


_SCRIPT_ENDINGS = ("", ".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".vue", ".svelte",
                   ".json", "/index.ts", "/index.tsx", "/index.js", "/index.jsx", "/index.mjs")
_COMPILED = (".js", ".jsx", ".mjs", ".cjs")


def _script(source: Facts, item: Import, index: Index) -> Iterator[str]:
    if item.module.startswith("."):
        yield from _script_file(posixpath.join(posixpath.dirname(source.path), item.module), index)
    elif item.module.startswith(("@/", "~/")):        # the usual aliases of `src`
        yield from _script_file("src/" + item.module[2:], index)
    else:
        parts = item.module.split("/")
        length = 2 if item.module.startswith("@") else 1
        folder = index.manifests["package.json"].get("/".join(parts[:length]))
        if folder is not None:
            rest = "/".join(parts[length:])
            for place in (("src", rest), ("", rest)) if rest else (("src", "index"), ("", "index")):
                found = list(_script_file(posixpath.join(folder, *place), index))
                yield from found
                if found:
                    break


def _script_file(stem: str, index: Index) -> Iterator[str]:
    found = index.first(stem + ending for ending in _SCRIPT_ENDINGS)
    if not found and stem.endswith(_COMPILED):      # TypeScript names the compiled file
        found = index.first(stem.rpartition(".")[0] + ending for ending in (".ts", ".tsx", ".mts", ".cts"))
    yield from found


_JVM_ENDINGS = (".java", ".kt", ".scala", ".groovy")


def _jvm(source: Facts, item: Import, index: Index) -> Iterator[str]:
    if "*" in item.names and (found := index.packages.get(("jvm", item.module))):
        yield from nearest(found, source.path, MAX_EDGES_PER_IMPORT)
        return
    parts = item.module.split(".")
    for length in range(len(parts), max(1, len(parts) - 3), -1):       # the class, or a member of it
        if path := index.qualified.get(("jvm", ".".join(parts[:length]))):
            yield path
            return
        tail = "/".join(parts[:length])
        if hits := [path for ending in _JVM_ENDINGS for path in index.ending(tail + ending, source.path)]:
            yield from hits
            return


def _go(source: Facts, item: Import, index: Index) -> Iterator[str]:
    parts = item.module.split("/")
    for length in range(len(parts), 0, -1):
        place = index.manifests["go.mod"].get("/".join(parts[:length]))
        if place is not None:
            folder = "/".join(filter(None, [place, *parts[length:]]))
            files = [entry.path for entry in index.folders.get(folder, ())
                     if entry.language == "go" and not entry.path.endswith("_test.go")]
            yield from files[:MAX_EDGES_PER_IMPORT]
            return


def _rust(source: Facts, item: Import, index: Index) -> Iterator[str]:
    folder, stem = posixpath.dirname(source.path), posixpath.splitext(posixpath.basename(source.path))[0]
    own = folder if stem in ("mod", "lib", "main") else posixpath.join(folder, stem)
    if item.kind == "mod":
        yield from index.first([posixpath.join(own, f"{item.module}.rs"),
                                posixpath.join(own, item.module, "mod.rs")])
        return
    head, *names = item.module.split("::")
    if head == "crate":
        base: str | None = _crate(source.path)
    elif head in ("self", "super"):
        base = own if head == "self" else posixpath.dirname(own)
        while base and names and names[0] == "super":
            base, names = posixpath.dirname(base), names[1:]
    else:
        base = _other_crate(head, index)
        if base is None:        # a sibling module, named without `self`
            base, names = own, [head, *names]
            yield from _rust_module(base, names, index)
            return
        names = names or ["lib"]
    if base is not None:
        found = list(_rust_module(base, names, index))
        root = ("lib.rs", "main.rs", "mod.rs") if head != "self" else ()
        yield from found or index.first(posixpath.join(base, name) for name in root)


def _crate(path: str) -> str:
    parts = path.split("/")
    if "src" not in parts:
        return posixpath.dirname(path)
    return "/".join(parts[:len(parts) - parts[::-1].index("src")])


def _other_crate(name: str, index: Index) -> str | None:
    manifests = index.manifests["Cargo.toml"]
    folder = manifests.get(name, manifests.get(name.replace("_", "-")))
    return None if folder is None else posixpath.join(folder, "src")


def _rust_module(base: str, names: Sequence[str], index: Index) -> Iterator[str]:
    for length in range(min(len(names), 16), 0, -1):
        tail = posixpath.join(base, *names[:length])
        if found := index.first([f"{tail}.rs", f"{tail}/mod.rs"]):
            yield from found
            return



def _csharp(source: Facts, item: Import, index: Index) -> Iterator[str]:
    if path := index.qualified.get(("csharp", item.module)):      # `using static`, or an alias of a type
        yield path
    yield from nearest(index.packages.get(("csharp", item.module), ()), source.path, MAX_EDGES_PER_IMPORT)


def _ruby(source: Facts, item: Import, index: Index) -> Iterator[str]:
    target = item.module.removesuffix(".rb") + ".rb"
    if item.level:
        yield from index.first([posixpath.join(posixpath.dirname(source.path), target)])
    else:
        yield from index.first([f"lib/{target}", target]) or index.ending(f"lib/{target}", source.path)


def _php(source: Facts, item: Import, index: Index) -> Iterator[str]:
    if item.kind == "use":
        path = index.qualified.get(("php", item.module))
        yield from [path] if path else index.ending(item.module.replace("\\", "/") + ".php", source.path)[:1]
    else:
        yield from _beside(source, item, index)


def _beside(source: Facts, item: Import, index: Index) -> Iterator[str]:
    near = index.first([posixpath.join(posixpath.dirname(source.path), item.module)])
    yield from near or index.ending(item.module, source.path)


FAMILIES = dict.fromkeys(("java", "kotlin", "scala", "groovy"), "jvm")
RESOLVERS: dict[str, Resolver] = {
    **dict.fromkeys(("python", "cython", "notebook"), _python),
    **dict.fromkeys(("javascript", "typescript", "vue", "svelte"), _script),
    **dict.fromkeys(FAMILIES, _jvm),
    **dict.fromkeys(("c", "cpp", "cuda", "objective-c"), _beside),
    "go": _go, "rust": _rust, "csharp": _csharp, "ruby": _ruby, "php": _php, "shell": _beside,
}
