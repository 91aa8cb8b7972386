"""A text by lines and regular expressions: languages without a grammar, documents, imports' spelling."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

MAX_IMPORTS = 2_000
MAX_MENTIONS = 200
MAX_USE_LEAVES = 64           # paths that one Rust `use` may name
MAX_PATH_CHARACTERS = 1_000
_NO_CODE = frozenset(("markdown", "restructuredtext", "text", "asciidoc", "tex", "org", "yaml", "toml",
                      "json", "ini", "xml", "html", "css", "go module"))
_DOTTED = ("python", "notebook", "starlark", "cython")      # a module's leading dots are levels
_MODIFIERS = (r"(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|unsafe"
              r"|inline|virtual|override|extern|const|pub(?:\([^)]*\))?|open|sealed|data|partial|suspend"
              r"|constexpr|case|local)\s+)*")
_DEFINITION = re.compile(
    r"^[ \t]{0,8}" + _MODIFIERS +
    r"(?:def|class|struct|enum|interface|trait|impl|func|fn|fun|function|module|namespace|type|typedef"
    r"|template|record|object|protocol|extension|sub|proc|macro_rules!|#define|package)\b.*$"
    r"|^(?:[\w:<>,*&\[\]]{1,80}[ \t]{1,8}){1,8}[\w:~]{1,80}\([^;\n]{0,300}\)[^;\n]{0,80}\{[ \t]*$",
    re.MULTILINE)
_NAMED = re.compile(
    "^" + _MODIFIERS + r"(?:def|class|struct|enum|interface|trait|func|fn|fun|function|module|type|record"
    r"|object|protocol|sub|proc|val|var|let|const)\s+(\w+)", re.MULTILINE)


class Import(NamedTuple):
    """One import. `level`: folders up plus one where it is relative; `kind`: import, include, mention ..."""

    level: int
    module: str
    names: tuple[str, ...]
    kind: str


def skeleton(text: str) -> str:
    """Lines that look like heads of definitions."""
    return "\n".join(match.group(0).rstrip() for match in _DEFINITION.finditer(text))


def defines(text: str, language: str) -> tuple[str, ...]:
    """Names defined at the start of a line; none of documents and settings.

    >>> defines("fun one() {}\\n  fun inner() {}\\nsealed class Two", "kotlin")
    ('one', 'Two')
    """
    if language in _NO_CODE:
        return ()
    return tuple(dict.fromkeys(_NAMED.findall(text)))[:MAX_IMPORTS]


_PACKAGE = {
    "go module": re.compile(r"^module\s+(\S+)", re.MULTILINE),
    "toml": re.compile(r'^\[package\][^\[]{0,2000}?^name\s*=\s*"([^"\n]+)"', re.MULTILINE),
    "json": re.compile(r'\A\s*\{[^{}\[\]]{0,2000}?"name"\s*:\s*"([^"\n]+)"'),
    "csharp": re.compile(r"^[ \t]*namespace\s+([\w.]+)", re.MULTILINE),
}
_PACKAGE |= dict.fromkeys(("java", "kotlin", "scala", "groovy", "go"),
                          re.compile(r"^[ \t]*package\s+([\w.]+)", re.MULTILINE))


def package(text: str, language: str) -> str:
    """The package, namespace or module (`go.mod`, `Cargo.toml`, `package.json`) that a text declares."""
    pattern = _PACKAGE.get(language)
    found = pattern.search(text) if pattern else None
    return found.group(1) if found else ""


def imports(text: str, language: str) -> tuple[Import, ...]:
    """Imports by lines; of documents, what they mention."""
    reader = _READERS.get(language)
    found = [item for kind, module, names in (reader(text) if reader else ())
             for item in read_import(kind, module, names, language)]
    return tuple(dict.fromkeys(found))[:MAX_IMPORTS]


Written = tuple[str, str, Sequence[str]]      # kind, module as it stands in the text, names


def _python(text: str) -> Iterator[Written]:
    for module, names, plain in re.findall(
            r"^[ \t]*(?:from\s+(\.*[\w.]*)\s+import\s+([^\n#]*)|c?import\s+([\w.]+))", text, re.MULTILINE):
        yield "import", plain or module, re.findall(r"\w+", names)


def _pattern(kind: str, pattern: str) -> Callable[[str], Iterator[Written]]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: ((kind, module, ()) for module in compiled.findall(text))


def _go(text: str) -> Iterator[Written]:
    for block, single in re.findall(r'^import\s*\(([^()]*)\)|^import\s+(?:[\w.]+\s+)?("[^"\n]+")', text,
                                    re.MULTILINE):
        for target in re.findall(r'"([^"\n]+)"', block or single):
            yield "import", target, ()


def _rust(text: str) -> Iterator[Written]:
    for module, use in re.findall(r"^[ \t]*(?:pub(?:\([^)\n]*\))?[ \t]+)?"
                                  r"(?:mod[ \t]+(\w+)[ \t]*;|use[ \t]+([^;]{1,2000});)", text, re.MULTILINE):
        yield ("mod", module, ()) if module else ("use", use, ())


def _ruby(text: str) -> Iterator[Written]:
    for relative, target in re.findall(r"^[ \t]*require(_relative)?\s*\(?\s*['\"]([^'\"\n]+)['\"]", text,
                                       re.MULTILINE):
        yield "require.relative" if relative else "require", target, ()


def _mentions(text: str) -> Iterator[Written]:
    """Paths, dotted names and what stands between back-ticks."""
    found = re.findall(r"`{1,2}([^`\s]{3,120})`"
                       r"|(?<![\w./-])((?:\.{1,2}/){0,4}(?:[\w-]{1,60}[./]){1,12}[\w-]{1,60})", text)
    named = dict.fromkeys((ticked or plain).strip("()~").removesuffix("()") for ticked, plain in found)
    for name in list(named)[:MAX_MENTIONS]:
        yield "mention", name, ()


_script = _pattern("import", r"""(?:\bfrom\s*|\bimport\s*\(?\s*|\brequire\s*\(\s*)["']([^"'\n]+)["']""")
_jvm = _pattern("import", r"^[ \t]*import\s+(?:static\s+)?([\w.]+)")
_included = _pattern("include", r'^[ \t]*#[ \t]*(?:include|import)[ \t]*(["<][^">\n]+[">])')
_READERS: dict[str, Callable[[str], Iterator[Written]]] = {
    **dict.fromkeys(("python", "cython", "notebook"), _python),
    **dict.fromkeys(("javascript", "typescript", "vue", "svelte"), _script),
    **dict.fromkeys(("java", "kotlin", "scala", "groovy"), _jvm),
    **dict.fromkeys(("c", "cpp", "cuda", "objective-c"), _included),
    "go": _go, "rust": _rust, "ruby": _ruby,
    "csharp": _pattern("import", r"^[ \t]*(?:global\s+)?using\s+(?:static\s+)?([\w.]+)\s*;"),
    "php": _pattern("use", r"^[ \t]*use\s+(?:function\s+|const\s+)?([\w\\]+)"),
    "shell": _pattern("source", r"^[ \t]*(?:source|\.)[ \t]+([^\s;&|]+)"),
    **dict.fromkeys(("markdown", "restructuredtext", "text", "asciidoc", "org", "tex"), _mentions),
}


def read_import(kind: str, module: str, names: Sequence[str], language: str) -> Iterator[Import]:
    """An import as the text writes it, as `Import`s: quotes, dots and groups taken apart.

    >>> list(read_import("use", "crate::a::{b, c::D}", (), "rust"))[1]
    Import(level=0, module='crate::a::c::D', names=(), kind='use')
    """
    if kind == "use" and language == "rust":
        yield from (Import(0, path, (), kind) for path in use_leaves(module))
    elif kind == "use":
        for full in [f"{module}\\{name}" for name in names] or [module]:
            yield Import(0, full.lstrip("\\"), (), kind)
    elif kind == "source" or (kind == "require" and language == "php"):
        if found := re.search(r"([\w./-]+)['\")]*$", module.strip()):
            yield Import(1, found.group(1).lstrip("/"), (), kind)
    else:
        bare = re.sub(r"\s", "", module).strip("\"'<>`")
        dots = len(bare) - len(bare.lstrip(".")) if language in _DOTTED else 0
        relative = int(kind == "require.relative")
        yield Import(dots or relative, bare[dots:], tuple(names), "require" if relative else kind)


def use_leaves(tree: str) -> list[str]:
    """The paths of a Rust `use`, aliases and globs left off.

    >>> use_leaves("a::{self, b as c, d::{e, f::*}}")
    ['a', 'a::b', 'a::d::e', 'a::d::f']
    """
    leaves: list[str] = []
    prefixes: list[str] = []
    path, ends_here = "", False
    for token in re.findall(r"\{|\}|,|(?:r#)?\w+(?:\s+as\s+\w+)?|\*", tree + ","):
        if token == "{":
            prefixes.append(path)
            ends_here = False
        elif token in ",}":
            leaves += [path] if ends_here else []
            if token == "}" and prefixes:
                prefixes.pop()
            path, ends_here = prefixes[-1] if prefixes else "", False
        else:
            name = "" if path and token in ("*", "self") else token.split()[0].removeprefix("r#")
            path, ends_here = "::".join(filter(None, [path, name])), True
        if len(leaves) >= MAX_USE_LEAVES or len(path) > MAX_PATH_CHARACTERS:
            break
    return list(dict.fromkeys(leaves))
