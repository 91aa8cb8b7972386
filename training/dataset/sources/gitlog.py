"""git as three streams: what each commit changed, the patches of one commit, and one blob.

No stream holds more than a commit's or a file's bounded part: what is larger is read and left out. git runs
as in a bare repository, so that the work tree's .gitattributes are not read and no driver or filter is known.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from training.dataset.sources import reasons
from training.dataset.sources.checkout import command, git_place

MAX_CHANGED_FILES = 64          # a commit with more is an import or a reformat
MAX_PATCH_BYTES = 64 << 10
MAX_BLOB_BYTES = 256 << 10
MAX_TOKEN_BYTES = 16 << 10      # of a message or a path
STALL_S = 60
TOO_MANY = f"commit over {MAX_CHANGED_FILES} files"
PATCH_TOO_LARGE = f"patch over {MAX_PATCH_BYTES >> 10} KiB"
BLOB_TOO_LARGE = f"file over {MAX_BLOB_BYTES >> 10} KiB"
NO_FILE = b"000000"             # the mode of a side that does not exist
_CHUNK_BYTES = 1 << 16
# Blobs over 2 MiB count as binary and are not diffed. Edited renames are looked for among 200 files.
_CONFIG = ("-c", "core.bigFileThreshold=2m", "-c", "log.follow=false", "-c", "diff.suppressBlankEmpty=false")
_DIFF = ("--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=all", "--no-abbrev", "-M",
         "-l200", "-O/dev/null")
LOG = ("log", "--no-merges", "-z", "--raw", "--no-show-signature", "--no-notes", "--encoding=UTF-8", *_DIFF)
PATCHES = ("diff-tree", "--stdin", "-p", "-r", "--root", "--no-commit-id", "--full-index", "-U3",
           "--inter-hunk-context=0", *_DIFF)
BLOBS = ("cat-file", "--batch")
_END = b"~end-of-commit\n"       # `diff-tree --stdin` echoes what is no commit; no line of a patch begins so
_INDEX = re.compile(rb"index ([0-9a-f]{40,64})\.\.([0-9a-f]{40,64})")


Hunks = bytearray


class Entry(NamedTuple):
    """One changed file: modes and blobs of both sides, git's status letter, new and (if renamed) old path."""

    old_mode: bytes
    new_mode: bytes
    old: bytes
    new: bytes
    status: bytes
    path: bytes
    source: bytes


class Head(NamedTuple):
    """A commit and its changed files; `entries` is None where they are more than was asked for."""

    id: str
    time: int
    message: bytes
    entries: list[Entry] | None


class Git:
    """git processes that read one repository; killed on leaving, and when git gives nothing for `STALL_S`.

    The clock stands while `paused`, so that a slow reader is no stall. Raises EOFError from `ask` and the
    readers when git ended early.
    """

    def __init__(self, root: Path):
        place = git_place(root)
        if place is None:
            raise EOFError(f"{root} is no git repository")
        folder, self._prefix = place
        self._root, self._options = folder, ["--bare", f"--git-dir={folder}", *_CONFIG]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._alive_s: float | None = time.monotonic()

    def __enter__(self) -> Git:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for process in self._processes:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream:
                    _close(stream)
            process.wait()

    def start(self, arguments: tuple[str, ...], *revisions: str) -> subprocess.Popen[bytes]:
        """A process with its pipes; paths are below the folder that was asked for."""
        relative = [f"--relative={self._prefix}"] if self._prefix and arguments is not BLOBS else []
        line, environment = command([*self._options, *arguments, *relative, *revisions])
        process = subprocess.Popen(line, cwd=self._root, env=environment, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._processes.append(process)
        return process

    def alive(self) -> None:
        """git gave something, or is asked anew."""
        self._alive_s = time.monotonic()

    def paused(self) -> None:
        """Nothing is asked of git until `alive`."""
        self._alive_s = None

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, STALL_S / 4)):
            since = self._alive_s
            if since is not None and time.monotonic() - since > STALL_S:
                for process in self._processes:
                    process.kill()
                return


def _close(stream: IO[bytes]) -> None:
    with contextlib.suppress(OSError):      # what was still to be written to a process that is gone
        stream.close()


def _ask(process: subprocess.Popen[bytes], question: bytes) -> IO[bytes]:
    if process.stdin is None or process.stdout is None:
        raise EOFError("git has no pipes")
    try:
        process.stdin.write(question)
        process.stdin.flush()
    except OSError as error:
        raise EOFError("git ended early") from error
    return process.stdout


def heads(process: subprocess.Popen[bytes], most: int | None) -> Iterator[Head]:
    """Commits of `git log -z --raw` with the format `@%H %ct%n%B`, as they come.

    Entries of a commit with over `most` files are counted and not kept. Raises EOFError when git failed.
    """
    head, number = b"", 0
    entries: list[Entry] = []
    tokens = _tokens(_ask(process, b""))
    for token in tokens:
        if token.startswith(b"@"):
            if head:
                yield _head(head, entries if most is None or number <= most else None)
            head, entries, number = token, [], 0
            continue
        fields = token.lstrip(b"\n:").split(b" ")
        if len(fields) != 5:
            continue            # the line break that follows a message
        source = next(tokens, b"")
        path = next(tokens, b"") if fields[4][:1] in (b"R", b"C") else source
        number += 1
        if most is None or number <= most:
            modes, blobs = (fields[0], fields[1]), (fields[2], fields[3])
            entries.append(Entry(*modes, *blobs, fields[4][:1], path, source))
    if process.wait():
        raise EOFError("git ended early")
    if head:
        yield _head(head, entries if most is None or number <= most else None)


def _head(token: bytes, entries: list[Entry] | None) -> Head:
    first, _, message = token.partition(b"\n")
    name, _, seconds = first[1:].partition(b" ")
    return Head(name.decode("ascii", "replace"), int(seconds) if seconds.isdigit() else 0, message, entries)


def _tokens(out: IO[bytes]) -> Iterator[bytes]:
    """What stands between NULs, each cut at `MAX_TOKEN_BYTES`: a message of 100 MB is never held."""
    kept = b""
    while chunk := out.read1(_CHUNK_BYTES):   # type: ignore[attr-defined]
        first, *others = chunk.split(b"\0")
        kept += first[:MAX_TOKEN_BYTES - len(kept)]
        for piece in others:
            yield kept
            kept = piece[:MAX_TOKEN_BYTES]


def patches(process: subprocess.Popen[bytes], commit: str) -> dict[tuple[bytes, bytes], Hunks | str]:
    """(old blob, new blob) -> hunks of each file of a commit, or the reason that there are none.

    Raises EOFError when git ended early.
    """
    found: dict[tuple[bytes, bytes], Hunks | str] = {}
    key, hunks = (b"", b""), bytearray()
    for line in _lines(_ask(process, commit.encode() + b"\n" + _END)):
        if line.startswith(b"diff --git "):
            key, hunks = (b"", b""), bytearray()
        elif not hunks and (index := _INDEX.match(line)):
            key = index.group(1), index.group(2)
        elif not hunks and line.startswith(b"Binary files "):
            found[key] = reasons.BINARY
        elif (hunks or line.startswith(b"@@ ")) and not isinstance(found.get(key), str):
            hunks += line
            found[key] = hunks if len(hunks) <= MAX_PATCH_BYTES else PATCH_TOO_LARGE
    return found


def _lines(out: IO[bytes]) -> Iterator[bytes]:
    """Lines up to `_END`; of a line longer than a patch may be, the rest is read and left out."""
    while (line := out.readline(MAX_PATCH_BYTES + 1)) != _END:
        if not line:
            raise EOFError("git ended early")
        yield line
        while line and not line.endswith(b"\n"):
            line = out.readline(_CHUNK_BYTES)


def blob(process: subprocess.Popen[bytes], name: bytes) -> bytes | str:
    """A blob's bytes, or why not: it is missing, or larger than `MAX_BLOB_BYTES`. Raises EOFError."""
    out = _ask(process, name + b"\n")
    head = out.readline(4_096).split()
    if not head:
        raise EOFError("git ended early")
    if len(head) != 3:
        return reasons.UNREADABLE
    left = int(head[2])
    if left <= MAX_BLOB_BYTES:
        return out.read(left + 1)[:-1]
    while left > 0 and (piece := out.read(min(left, _CHUNK_BYTES))):
        left -= len(piece)
    out.read(1)
    return BLOB_TOO_LARGE
