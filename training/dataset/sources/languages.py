"""Which language a file is written in, from its name and, for scripts, its first line."""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple


class Language(NamedTuple):
    """`kind`: code, docs (prose), or config (settings and markup that a build reads)."""

    name: str
    kind: str


_CODE = {
    "python": "py pyi pyx pxd", "javascript": "js jsx mjs cjs", "typescript": "ts tsx mts cts",
    "java": "java",
    "kotlin": "kt kts", "scala": "scala sc", "groovy": "groovy gradle", "go": "go", "rust": "rs", "c": "c h",
    "cpp": "cc cpp cxx hpp hh hxx ipp inl cppm", "cuda": "cu cuh", "csharp": "cs", "fsharp": "fs fsi fsx",
    "visual basic": "vb", "objective-c": "m mm", "swift": "swift", "ruby": "rb rake gemspec", "php": "php",
    "perl": "pl pm", "lua": "lua", "r": "r", "julia": "jl", "dart": "dart", "haskell": "hs lhs",
    "ocaml": "ml mli",
    "elixir": "ex exs", "erlang": "erl hrl", "clojure": "clj cljs cljc edn", "elm": "elm", "nim": "nim",
    "zig": "zig",
    "d": "d", "crystal": "cr", "fortran": "f f77 f90 f95 f03 f08", "pascal": "pas pp", "ada": "adb ads",
    "lisp": "lisp el scm rkt", "solidity": "sol", "verilog": "v sv svh", "vhdl": "vhd vhdl",
    "assembly": "s asm", "shell": "sh bash zsh fish", "powershell": "ps1 psm1", "batch": "bat cmd",
    "sql": "sql",
    "vue": "vue", "svelte": "svelte", "glsl": "glsl vert frag comp wgsl hlsl metal", "protobuf": "proto",
    "thrift": "thrift", "graphql": "graphql gql", "terraform": "tf hcl", "nix": "nix", "cython": "pxi",
    "notebook": "ipynb", "awk": "awk", "tcl": "tcl", "vim": "vim", "starlark": "bzl star", "cmake": "cmake",
    "make": "mk", "jinja": "j2 jinja jinja2", "coffeescript": "coffee",
}
_DOCS = {"markdown": "md markdown mdx", "restructuredtext": "rst", "text": "txt", "asciidoc": "adoc asciidoc",
         "tex": "tex", "org": "org"}
_CONFIG = {"yaml": "yaml yml", "toml": "toml", "json": "json jsonc json5", "ini": "ini cfg conf properties",
           "xml": "xml xsd csproj vcxproj props", "html": "html htm", "css": "css scss sass less"}
_NAMES = {"Makefile": "make", "GNUmakefile": "make", "makefile": "make", "Dockerfile": "docker",
          "Containerfile": "docker", "CMakeLists.txt": "cmake", "Rakefile": "ruby", "Gemfile": "ruby",
          "BUILD": "starlark", "BUILD.bazel": "starlark", "WORKSPACE": "starlark", "Jenkinsfile": "groovy",
          "meson.build": "meson", "SConstruct": "python", "Vagrantfile": "ruby", "Justfile": "make",
          "justfile": "make"}
_DOC_NAMES = ("README", "CHANGELOG", "CONTRIBUTING", "HACKING", "INSTALL")

_BY_EXTENSION = {extension: Language(name, kind)
                 for kind, table in (("config", _CONFIG), ("docs", _DOCS), ("code", _CODE))
                 for name, extensions in table.items() for extension in extensions.split()}
_BY_INTERPRETER = {"sh": "shell", "bash": "shell", "zsh": "shell", "dash": "shell", "ksh": "shell",
                   "fish": "shell",
                   "python": "python", "pypy": "python", "node": "javascript", "deno": "typescript",
                   "bun": "typescript", "ruby": "ruby", "perl": "perl", "php": "php", "lua": "lua",
                   "Rscript": "r", "julia": "julia", "tclsh": "tcl", "awk": "awk", "gawk": "awk",
                   "pwsh": "powershell",
                   "groovy": "groovy", "elixir": "elixir", "make": "make"}
_SHEBANG = re.compile(r"#!\s*(?:\S*/env\s+(?:-\S+\s+)*(?:\w+=\S*\s+)*)?(?:\S*/)?([A-Za-z]+)")


def of_name(path: str) -> Language | None:
    """The language by file name, or None when the name does not tell.

    >>> of_name("src/app.TSX"), of_name("Makefile"), of_name("photo.png")
    (Language(name='typescript', kind='code'), Language(name='make', kind='code'), None)
    """
    base = posixpath.basename(path)
    if base in _NAMES:
        return Language(_NAMES[base], "code")
    if base in _DOC_NAMES:
        return Language("text", "docs")
    if base == "go.mod":
        return Language("go module", "config")
    _, dot, extension = base.rpartition(".")
    return _BY_EXTENSION.get(extension.lower()) if dot else None


def of_shebang(first_line: str) -> Language | None:
    """The language of a script named by its `#!` line, or None.

    >>> of_shebang("#!/usr/bin/env python3"), of_shebang("#!/bin/bash -e")
    (Language(name='python', kind='code'), Language(name='shell', kind='code'))
    """
    found = _SHEBANG.match(first_line)
    name = _BY_INTERPRETER.get(found.group(1)) if found else None
    return Language(name, "code") if name else None
