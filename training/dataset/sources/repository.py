"""What a repository holds: every file is seen once and ends accepted or dropped with a reason.

Nothing is executed, no symbolic link is followed, and only regular files are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pathspec

from training.dataset.sources.checkout import tracked_files
from training.dataset.sources.filters import verdict_on_name, verdict_on_text
from training.dataset.sources.languages import Language, of_name, of_shebang
from training.errors import DataError
from training.settings import BY_NAME

DEFAULT_MAX_FILE_BYTES: int = BY_NAME["dataset.max_file_bytes"].default
MIN_REPOSITORY_BYTES = 64
MAX_FOLDER_DEPTH = 64
_TOOL_FOLDERS = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv", ".tox",
                           ".nox",
                           ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".idea", ".cache"})
# A folder holding all names of one group was written by a tool, this one among them.
_OUTPUT_MARKS = (("CACHEDIR.TAG",), ("pyvenv.cfg",), ("ds_config.json", "plan.json"),
                 ("manifest.json", "tokens.bin"))

_NOT_ACCEPTED = "ignored by rule"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One accepted file. `path` is relative, with `/`, printable; line ends are `\\n`, no byte-order mark."""

    path: str
    language: str
    kind: str
    text: str

    @property
    def bytes(self) -> int:
        """Size of the text as UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """One file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Every file of a repository: `sources` are accepted, `dropped` are not; together all that was seen."""

    root: Path
    name: str
    sources: tuple[SourceFile, ...]
    dropped: tuple[Dropped, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many files each reason dropped, most frequent first."""
        counts = Counter(item.reason for item in self.dropped)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def survey(root: Path, max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
           progress: Callable[[int, int], None] = lambda done, total: None) -> Survey:
    """Read and sort out every file below `root`; `progress` gets files done and in all.

    Raises DataError when there is nothing, or no code, that can be trained on.
    """
    names, dropped = list_files(root)
    sources: list[SourceFile] = []
    seen: dict[str, str] = {}
    for index, name in enumerate(names):
        found = examine(root, name, max_file_bytes)
        if isinstance(found, SourceFile):
            digest = hashlib.sha256(found.text.encode("utf-8")).hexdigest()
            if digest in seen:
                found = Dropped(path=found.path, reason="duplicate")
            else:
                seen[digest] = found.path
                sources.append(found)
        if isinstance(found, Dropped):
            dropped.append(found)
        if index % 64 == 0:
            progress(index, len(names))
    result = Survey(root=root, name=root.name, sources=tuple(sources), dropped=tuple(dropped))
    _check(result)
    return result


def _check(found: Survey) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.items())
    if not found.sources and not [item for item in found.dropped if item.reason != _NOT_ACCEPTED]:
        raise DataError(f"The repository {found.root} is empty: no file to read"
                        + (f" ({reasons})." if reasons else "."))
    if not any(source.kind == "code" for source in found.sources):
        docs = f"{len(found.sources):,} documents or settings and no code"
        raise DataError(f"The repository {found.root} holds no code to train on: {docs}"
                        + (f"; left out: {reasons}." if reasons else "."))
    size_bytes = sum(source.bytes for source in found.sources)
    if size_bytes < MIN_REPOSITORY_BYTES:
        raise DataError(f"The repository {found.root} holds {size_bytes} bytes of text; the least is "
                        f"{MIN_REPOSITORY_BYTES}" + (f" (left out: {reasons})." if reasons else "."))


def list_files(root: Path) -> tuple[list[str], list[Dropped]]:
    """Relative names below `root` (git's view where there is one), and what tools wrote there."""
    tracked = tracked_files(root)
    if tracked is None:
        names, dropped = _walk(root)
    else:
        names, dropped = tracked, []
    outputs = _output_folders(names)
    kept = []
    for name in names:
        if any(name.startswith(folder) for folder in outputs):
            dropped.append(Dropped(path=printable(name), reason=_NOT_ACCEPTED))
        else:
            kept.append(name)
    return kept, dropped


def _output_folders(names: list[str]) -> tuple[str, ...]:
    """Folders (with a closing `/`) whose marks show that a tool wrote them; the root itself is never one."""
    known = set(names)
    found = set()
    for marks in _OUTPUT_MARKS:
        for name in names:
            folder, slash, base = name.rpartition("/")
            if slash and base == marks[0] and all(f"{folder}/{mark}" in known for mark in marks):
                found.add(f"{folder}/")
    return tuple(sorted(found))


def _walk(root: Path) -> tuple[list[str], list[Dropped]]:
    names: list[str] = []
    dropped: list[Dropped] = []
    for name, ignored in _entries(root, "", ()):
        if ignored:
            dropped.append(Dropped(path=printable(name), reason=ignored))
        else:
            names.append(name)
    return sorted(names), dropped


_Rules = tuple[tuple[str, pathspec.GitIgnoreSpec], ...]


def _entries(root: Path, folder: str, rules: _Rules) -> Iterator[tuple[str, str]]:
    """(name, "") of each file below `folder`; (name, reason) of each ignored file or folder."""
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except OSError:
        yield folder, "unreadable"
        return
    rules = (*rules, *_rules_in(root, folder))
    for entry in entries:
        name = f"{folder}{entry.name}"
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name in (".git", ".hg", ".svn"):
            continue
        if (is_folder and entry.name in _TOOL_FOLDERS) or _ignored(name + "/" * is_folder, rules):
            yield name, _NOT_ACCEPTED
        elif is_folder and name.count("/") >= MAX_FOLDER_DEPTH:
            yield name, f"over {MAX_FOLDER_DEPTH} folders deep"
        elif is_folder:
            yield from _entries(root, name + "/", rules)
        else:
            yield name, ""


def _rules_in(root: Path, folder: str) -> _Rules:
    text = read_regular(root, f"{folder}.gitignore", 1 << 20)
    if isinstance(text, str):
        return ()
    try:
        lines = text.decode("utf-8", "replace").splitlines()
        return ((folder, pathspec.GitIgnoreSpec.from_lines(lines)),)
    except ValueError:
        return ()


def _ignored(name: str, rules: _Rules) -> bool:
    """The deepest .gitignore that says anything about this name decides, as git has it."""
    for folder, spec in reversed(rules):
        answer = spec.check_file(name[len(folder):]).include
        if answer is not None:
            return bool(answer)
    return False


def examine(root: Path, name: str, max_file_bytes: int) -> SourceFile | Dropped:
    """One file as text, or why it is left out. `name` is relative to `root`, as the system spells it."""
    path = printable(name)

    def drop(reason: str) -> Dropped:
        return Dropped(path=path, reason=reason)

    if reason := verdict_on_name(path):
        return drop(reason)
    language = of_name(path)
    if language is None and "." in path.rpartition("/")[2].lstrip("."):
        return drop(_irregular(root, name) or "unknown type")
    data = read_regular(root, name, max_file_bytes)
    if isinstance(data, str):
        return drop(data)
    text = decode(data)
    if text is None:
        return drop("binary" if b"\0" in data else "not UTF-8")
    language = language or of_shebang(text[:200].split("\n", 1)[0])
    if language is None:
        return drop("unknown type")
    if language.name == "notebook":
        text = notebook_text(text)
    if reason := verdict_on_text(text, language.kind):
        return drop(reason)
    return _source(path, language, text)


def _source(path: str, language: Language, text: str) -> SourceFile:
    return SourceFile(path=path, language=language.name, kind=language.kind, text=text)


def _irregular(root: Path, name: str) -> str:
    """Why this is no regular file, or an empty string."""
    try:
        mode = os.lstat(os.path.join(root, name)).st_mode
    except (OSError, ValueError):
        return "missing from the working tree"
    if stat.S_ISLNK(mode):
        return "symbolic link"
    if stat.S_ISDIR(mode):
        return "nested repository"
    return "" if stat.S_ISREG(mode) else "no regular file"


def read_regular(root: Path, name: str, max_bytes: int) -> bytes | str:
    """The bytes of a regular file that lies inside `root`, or the reason why not (as text)."""
    if reason := _irregular(root, name):
        return reason
    full = os.path.join(root, name)
    if os.path.realpath(os.path.dirname(full)) != os.path.normpath(os.path.dirname(full)):
        return "symbolic link"
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os,
                                                                                                "O_BINARY", 0)
    try:
        with open(os.open(full, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "no regular file"
            data = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
            if len(data) > max_bytes or status.st_size > max_bytes:
                return f"over {max_bytes:,} bytes"
            return data
    except OSError:
        return "unreadable"


def decode(data: bytes) -> str | None:
    """Text with `\\n` line ends and without byte-order mark; None when it is binary or not UTF-8."""
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None


def notebook_text(text: str) -> str:
    """A Jupyter notebook's cells as one script: prose as comments, no outputs; "" when it is none."""
    try:
        cells = json.loads(text)["cells"]
        parts = []
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                source = "\n".join(f"# {line}".rstrip() for line in source.splitlines())
            if source.strip() and cell["cell_type"] in ("code", "markdown"):
                parts.append(source.strip("\n"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return "\n\n".join(parts) + "\n" if parts else ""


def printable(name: str) -> str:
    """A file name as one printable line: control characters and undecodable bytes are escaped.

    >>> printable("a\\nb/\\udcff.py")
    'a\\\\x0ab/\\\\xff.py'
    """
    name = name.replace(os.sep, "/") if os.sep != "/" else name
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() if ord(char) > 0xff
                   else f"\\x{ord(char):02x}" for char in shown)
