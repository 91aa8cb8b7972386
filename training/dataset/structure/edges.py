"""Which files of a repository depend on which: import statements resolved to paths within it.

Python is read with its own parser; other languages by their import lines. An import that leads out of the
repository is no edge. Edges are best effort: a missed one costs context, never correctness.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from training.dataset.sources.repository import SourceFile

MAX_EDGES_PER_IMPORT = 8      # files a single package import (Go, C#) may bring in
Edges = dict[str, tuple[str, ...]]


def import_edges(sources: Sequence[SourceFile], root_name: str) -> Edges:
    """Path -> the paths it imports, in the order of its import statements.

    `root_name`: the repository folder's own name, which is the package's name when it holds `__init__.py`.
    """
    index = _Index(sources, root_name)
    edges: Edges = {}
    for source in sources:
        finder = _FINDERS.get(source.language)
        found = finder(source, index) if finder else ()
        edges[source.path] = tuple(dict.fromkeys(path for path in found if path != source.path))
    return edges


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


class _Index:
    """The repository's paths by the names that imports use."""

    def __init__(self, sources: Sequence[SourceFile], root_name: str):
        self.paths = {source.path for source in sources}
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        self.by_base: dict[str, list[str]] = defaultdict(list)
        self.by_folder: dict[str, list[SourceFile]] = defaultdict(list)
        for source in sources:
            base = posixpath.basename(source.path)
            self.by_base[base].append(source.path)
            self.by_stem[posixpath.splitext(base)[0]].append(source.path)
            self.by_folder[posixpath.dirname(source.path)].append(source)
        self.modules = self._python_modules(root_name)
        self.namespaces = self._namespaces(sources)
        self.go_module = next((found.group(1) for source in sources if source.path == "go.mod"
                               and (found := re.search(r"^module\s+(\S+)", source.text, re.MULTILINE))), "")

    def _python_modules(self, root_name: str) -> dict[str, str]:
        """Dotted name -> path, from the package root (no `__init__.py` there) and from the top."""
        modules: dict[str, str] = {}
        packages = {posixpath.dirname(path) for path in self.paths
                    if posixpath.basename(path) == "__init__.py"}
        for path in sorted(self.paths):
            if not path.endswith((".py", ".pyi")):
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

    def module(self, name: str, folder: str) -> str:
        """The path of a dotted module imported from `folder`, or an empty string.

        A standard module's name means that module, unless the file lies at the top or beside the importer.
        """
        path = self.modules.get(name, "")
        if path and name.split(".")[0] in sys.stdlib_module_names:
            stem = posixpath.splitext(path)[0].removesuffix("/__init__")
            tail = name.replace(".", "/")
            if stem.endswith("/" + tail) and stem[:-len(tail) - 1] != folder:
                return ""
        return path

    @staticmethod
    def _namespaces(sources: Sequence[SourceFile]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for source in sources:
            if source.language == "csharp":
                for name in re.findall(r"^[ \t]*namespace\s+([\w.]+)", source.text, re.MULTILINE):
                    found[name].append(source.path)
        return found

    def first(self, candidates: Iterable[str]) -> list[str]:
        """The first candidate path that exists, as a list of one or none."""
        return next(([path] for path in map(posixpath.normpath, candidates) if path in self.paths), [])

    def ending(self, tail: str, near: str) -> list[str]:
        """The path nearest to `near` that is `tail` or ends with `/tail`."""
        found = [path for path in self.by_base.get(posixpath.basename(tail), ())
                 if path == tail or path.endswith("/" + tail)]
        return sorted(found, key=lambda path: (distance(path, near), path))[:1]


def _python(source: SourceFile, index: _Index) -> Iterator[str]:
    folder = posixpath.dirname(source.path)
    for level, module, names in python_imports(source.text):
        if level:
            base = folder
            for _ in range(level - 1):
                base = posixpath.dirname(base)
            stem = "/".join(filter(None, [base, *module.split(".")])) if module else base
            found = [path for name in names
                     for path in index.first([f"{stem}/{name}.py".lstrip("/"),
                                              f"{stem}/{name}/__init__.py".lstrip("/")])]
            yield from found
            if len(found) < len(names) or not names:
                yield from index.first([f"{stem}.py", f"{stem}/__init__.py".lstrip("/")])
        else:
            yield from _python_absolute(module, names, folder, index)


def _python_absolute(module: str, names: Sequence[str], folder: str, index: _Index) -> Iterator[str]:
    found = [path for name in names if (path := index.module(f"{module}.{name}", folder))]
    yield from found
    if len(found) < len(names) or not names:
        parts = module.split(".")
        for length in range(len(parts), 0, -1):
            if path := index.module(".".join(parts[:length]), folder):
                # `import a.b.c` where only the top-level `a` is known proves nothing about a file.
                if length == len(parts) or length > 1:
                    yield path
                return


def parse_python(text: str) -> ast.Module | None:
    """The syntax tree, or None when this Python cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_PYTHON_LINE = re.compile(r"^[ \t]*(?:from\s+(\.*)([\w.]*)\s+import\s+([^\n#]*)|import\s+([\w.]+))",
                          re.MULTILINE)


def python_imports(text: str) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(level, module, names) of every import statement; by lines where the parser refuses the file.

    >>> list(python_imports("import a.b\\nfrom ..c import d, e"))
    [(0, 'a.b', ()), (2, 'c', ('d', 'e'))]
    """
    tree = parse_python(text)
    if tree is None:
        for dots, module, names, plain in _PYTHON_LINE.findall(text):
            yield (0, plain, ()) if plain else (len(dots), module, tuple(re.findall(r"\w+", names)))
        return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(alias.name for alias in node.names)
        else:   # only statements hold imports: expressions are not entered
            for field in ("finalbody", "orelse", "handlers", "cases", "body"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    stack.extend(reversed(inner))


_JS = re.compile(r"""(?:\bfrom\s*|\bimport\s*\(?\s*|\brequire\s*\(\s*)["']([^"'\n]+)["']""")
_JS_ENDINGS = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", ".vue", ".svelte", ".json",
               "/index.ts", "/index.tsx", "/index.js", "/index.jsx")


def _javascript(source: SourceFile, index: _Index) -> Iterator[str]:
    for target in _JS.findall(source.text):
        if target.startswith("."):
            stem = posixpath.join(posixpath.dirname(source.path), target)
            yield from index.first(stem + ending for ending in _JS_ENDINGS)
            if stem.endswith((".js", ".mjs")):      # TypeScript names the compiled file
                yield from index.first(stem.rpartition(".")[0] + ending for ending in (".ts", ".tsx", ".mts"))


_JVM = re.compile(r"^[ \t]*import\s+(?:static\s+)?([\w.]+)", re.MULTILINE)


def _jvm(source: SourceFile, index: _Index) -> Iterator[str]:
    for name in _JVM.findall(source.text):
        parts = name.split(".")
        for length in (len(parts), len(parts) - 1):       # the class, or a member of it
            tail = "/".join(parts[:length])
            found = [path for extension in (".java", ".kt", ".scala", ".groovy") if length > 1
                     for path in index.ending(tail + extension, source.path)]
            if found:
                yield from found
                break


_GO_BLOCK = re.compile(r'^import\s*\(([^()]*)\)|^import\s+(?:[\w.]+\s+)?("[^"\n]+")', re.MULTILINE)


def _go(source: SourceFile, index: _Index) -> Iterator[str]:
    for block, single in _GO_BLOCK.findall(source.text):
        for target in re.findall(r'"([^"\n]+)"', block or single):
            if index.go_module and (target + "/").startswith(index.go_module + "/"):
                folder = target[len(index.go_module):].strip("/")
                files = [item.path for item in index.by_folder.get(folder, ())
                         if item.language == "go" and not item.path.endswith("_test.go")]
                yield from files[:MAX_EDGES_PER_IMPORT]


_RUST = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?\s+)?(?:(mod)\s+(\w+)\s*;"
                   r"|use\s+((?:crate|super|self)(?:::\w+)+))",
                   re.MULTILINE)


def _rust(source: SourceFile, index: _Index) -> Iterator[str]:
    folder, stem = posixpath.dirname(source.path), posixpath.splitext(posixpath.basename(source.path))[0]
    own = folder if stem in ("mod", "lib", "main") else posixpath.join(folder, stem)
    parts = source.path.split("/")
    crate = "/".join(parts[:len(parts) - 1 - parts[::-1].index("src") + 1]) if "src" in parts else folder
    for is_module, module, use in _RUST.findall(source.text):
        if is_module:
            yield from index.first([posixpath.join(own, f"{module}.rs"),
                                    posixpath.join(own, module, "mod.rs")])
            continue
        head, *names = use.split("::")
        base = {"crate": crate, "self": own, "super": posixpath.dirname(own)}[head]
        for length in range(len(names), 0, -1):
            tail = posixpath.join(base, *names[:length])
            if found := index.first([f"{tail}.rs", f"{tail}/mod.rs"]):
                yield from found
                break


_INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)


def _c_family(source: SourceFile, index: _Index) -> Iterator[str]:
    for target in _INCLUDE.findall(source.text):
        near = index.first([posixpath.join(posixpath.dirname(source.path), target)])
        yield from near or index.ending(target, source.path)


def _csharp(source: SourceFile, index: _Index) -> Iterator[str]:
    for name in re.findall(r"^[ \t]*(?:global\s+)?using\s+(?:static\s+)?([\w.]+)\s*;", source.text,
                           re.MULTILINE):
        files = sorted(index.namespaces.get(name, ()), key=lambda path: (distance(path, source.path), path))
        yield from files[:MAX_EDGES_PER_IMPORT]


def _ruby(source: SourceFile, index: _Index) -> Iterator[str]:
    for kind, target in re.findall(r"^[ \t]*(require_relative|require)\s*\(?\s*['\"]([^'\"\n]+)['\"]",
                                   source.text,
                                   re.MULTILINE):
        if kind == "require_relative":
            yield from index.first([posixpath.join(posixpath.dirname(source.path), target + ".rb")])
        else:
            yield from index.first([f"lib/{target}.rb"])


_FINDERS: dict[str, Callable[[SourceFile, _Index], Iterator[str]]] = {
    "python": _python, "cython": _python, "notebook": _python,
    "javascript": _javascript, "typescript": _javascript, "vue": _javascript, "svelte": _javascript,
    "java": _jvm, "kotlin": _jvm, "scala": _jvm, "groovy": _jvm, "go": _go, "rust": _rust,
    "c": _c_family, "cpp": _c_family, "cuda": _c_family, "objective-c": _c_family,
    "csharp": _csharp, "ruby": _ruby,
}
