"""Which files a repository has: git's own list, or a plain folder walked with its .gitignore rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pathspec

from training.dataset.sources.checkout import tracked_files
from training.dataset.sources.opening import Root
from training.dataset.sources.reasons import IGNORE_RULES, IGNORED, TOO_DEEP, UNREADABLE, Dropped, printable

MAX_FOLDER_DEPTH = 64
MAX_RULE_BYTES = 256 << 10
MAX_RULES = 4_096
# pathspec's regular expressions backtrack: `*a*a*a*a*a*b` on 90 letters takes 0.5 s, each further star 20x.
MAX_STARS = 3
_VERSION_CONTROL = frozenset({".git", ".hg", ".svn"})
_TOOL_FOLDERS = _VERSION_CONTROL | {"node_modules", "__pycache__", ".venv", "venv", ".tox", ".nox", ".idea",
                                    ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".cache"}
# A folder holding all names of one group was written by a tool, this one among them.
_OUTPUT_MARKS = {marks[0]: marks for marks in (("CACHEDIR.TAG",), ("pyvenv.cfg",),
                                               ("ds_config.json", "plan.json"),
                                               ("manifest.json", "tokens.bin"))}
_STARS = re.compile(r"\*{2,}")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a repository, unread. `names` are relative, as the system spells them, sorted."""

    root: Path
    name: str
    names: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    is_git: bool


def list_repository(root: Path) -> Listing:
    """The names below `root`: git's view where there is one; ignored and tool folders are in `dropped`."""
    tracked = tracked_files(root)
    names, dropped = _walk(root) if tracked is None else (tracked, [])
    outputs = _output_folders(names)
    kept = []
    for name in names:
        if outputs and name.startswith(outputs):
            dropped.append(Dropped(path=printable(name), reason=IGNORED))
        else:
            kept.append(name)
    return Listing(root=root, name=printable(root.name) or "repository", names=tuple(kept),
                   dropped=tuple(dropped), is_git=tracked is not None)


def _output_folders(names: list[str]) -> tuple[str, ...]:
    """Folders (with a closing `/`) whose marks show that a tool wrote them; the root itself is never one."""
    known = set(names)
    found = set()
    for name in names:
        folder, slash, base = name.rpartition("/")
        marks = _OUTPUT_MARKS.get(base, ()) if slash else ()
        if marks and all(f"{folder}/{mark}" in known for mark in marks):
            found.add(f"{folder}/")
    return tuple(sorted(found))


def _walk(root: Path) -> tuple[list[str], list[Dropped]]:
    names: list[str] = []
    dropped: list[Dropped] = []
    try:
        with Root(root) as opened:
            for name, reason in _entries(opened, "", ()):
                if reason:
                    dropped.append(Dropped(path=printable(name), reason=reason))
                else:
                    names.append(name)
    except OSError:
        dropped.append(Dropped(path=".", reason=UNREADABLE))
    return sorted(names), dropped


_Rules = tuple[tuple[str, pathspec.GitIgnoreSpec], ...]


def _entries(root: Root, folder: str, rules: _Rules) -> Iterator[tuple[str, str]]:
    """(name, "") of each file below `folder`; (name, reason) of each ignored file or folder."""
    try:
        entries = root.entries(folder)
    except OSError:
        yield folder or ".", UNREADABLE
        return
    if (".gitignore", False) in entries:
        own = _rules_in(root, folder)
        if own is None:
            yield folder or ".", IGNORE_RULES
            return
        rules = (*rules, *own)
    for base, is_folder in entries:
        name = f"{folder}{base}"
        if base in _VERSION_CONTROL:
            continue
        if (is_folder and base in _TOOL_FOLDERS) or _ignored(name + "/" * is_folder, rules):
            yield name, IGNORED
        elif is_folder and name.count("/") >= MAX_FOLDER_DEPTH:
            yield name, TOO_DEEP
        elif is_folder:
            yield from _entries(root, name + "/", rules)
        else:
            yield name, ""


def _rules_in(root: Root, folder: str) -> _Rules | None:
    """The rules of this folder's .gitignore; None when they are too many to hold every name against."""
    data = root.read(f"{folder}.gitignore", MAX_RULE_BYTES)
    if isinstance(data, str):
        return None if data.startswith("over ") else ()
    lines = data.decode("utf-8", "replace").splitlines()
    if len(lines) > MAX_RULES:
        return None
    rules = [rule for line in lines for rule in bounded_rule(line)]
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(rules)
    except ValueError:
        spec = pathspec.GitIgnoreSpec.from_lines([rule for rule in rules if _is_rule(rule)])
    return ((folder, spec),)


def _is_rule(line: str) -> bool:
    """git passes over a rule that it cannot read."""
    try:
        return bool(pathspec.GitIgnoreSpec.from_lines([line]))
    except ValueError:
        return False


def bounded_rule(line: str) -> list[str]:
    """The rule with at most `MAX_STARS` stars a name, and `MAX_STARS` times `**`.

    A wider rule takes the place of one with more, so that more is left out rather than less; a rule that
    takes files back (`!`) and has more is passed over.

    >>> bounded_rule("*.py[co]"), bounded_rule("*a*b*c*d.py"), bounded_rule("!*a*b*c*d.py")
    (['*.py[co]'], ['*a*d.py'], [])
    """
    if line.count("*") <= MAX_STARS:
        return [line]
    parts = line.split("/")
    deep = [index for index, part in enumerate(parts) if part == "**"]
    if len(deep) > MAX_STARS:
        parts = parts[:deep[1]] + parts[deep[-1]:]
    bounded = [part if part == "**" else _with_few_stars(_STARS.sub("*", part)) for part in parts]
    wider = len(deep) > MAX_STARS or bounded != [part if part == "**" else _STARS.sub("*", part)
                                                 for part in parts]
    return [] if wider and line.startswith("!") else ["/".join(bounded)]


def _with_few_stars(part: str) -> str:
    if part.count("*") <= MAX_STARS:
        return part
    first, second, *_, last = part.split("*")
    return "*" if "[" in part or "\\" in part else f"{first}*{second}*{last}"


def _ignored(name: str, rules: _Rules) -> bool:
    """The deepest .gitignore that says anything about this name decides, as git has it."""
    for folder, spec in reversed(rules):
        answer = spec.check_file(name[len(folder):]).include
        if answer is not None:
            return bool(answer)
    return False
