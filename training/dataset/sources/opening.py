"""Opening files below one folder so that nothing outside it is ever read, whatever changes meanwhile.

Every component of a name is opened from its parent's descriptor (openat) with O_NOFOLLOW: a file or a folder
that becomes a symbolic link between the listing and the read is not followed. Where the system has no openat
(Windows), the resolved path is compared before and the opened file's identity after opening.

A hard link cannot be told from any other name of the file: a regular file inside the tree counts as inside.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from training.dataset.sources.reasons import (
    CHANGED,
    IRREGULAR,
    LINK,
    MISSING,
    NESTED,
    OUTSIDE,
    SUBMODULE,
    UNREADABLE,
    over,
)

HAS_OPENAT = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# A pipe or terminal put in the file's place neither blocks nor becomes the controlling terminal.
_FILE = (os.O_RDONLY | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
         | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))


class _Refused(Exception):
    """A file is not read; the argument is the reason."""


class Root:
    """One folder, opened once, and what lies below it. Close it, or use it in a `with`.

    Names are relative, with `/`, as the system spells them. Raises OSError when the folder itself cannot be
    opened.
    """

    def __init__(self, path: Path, openat: bool = HAS_OPENAT):
        self.path = path
        self._fd = os.open(path, _FOLDER) if openat else -1

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back; twice is once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str, max_bytes: int) -> bytes | str:
        """The bytes of a regular file of at most `max_bytes`, or the reason why not (as text).

        Size and time of change are the same before and after the read; a file that changes is read once more.
        """
        try:
            folders, base = _split(name)
            for _ in range(2):
                with self._folder(folders) as folder:
                    data = _read(folder, base, max_bytes)
                if data is not None:
                    return data
        except _Refused as refused:
            return str(refused)
        except OSError as error:
            return _reason(error)
        return CHANGED

    def irregular(self, name: str) -> str:
        """Why this is no regular file, or an empty string; the file is not opened."""
        try:
            folders, base = _split(name)
            with self._folder(folders) as folder:
                return _irregular(_status(folder, base))
        except _Refused as refused:
            return str(refused)
        except OSError as error:
            return _reason(error)

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """(name, is it a folder) of what `folder` ("" or with a closing `/`) holds, sorted.

        Raises OSError, also when a component is a symbolic link.
        """
        try:
            with self._folder(folder.split("/")[:-1]) as place, os.scandir(place) as found:
                return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
        except _Refused as refused:
            raise OSError(errno.ELOOP, str(refused)) from None

    @contextmanager
    def _folder(self, folders: list[str]) -> Iterator[int | str]:
        """A folder below the root as a descriptor; without openat as a path."""
        if self._fd < 0:
            yield _checked_path(self.path, folders)
            return
        held = os.dup(self._fd)
        try:
            for part in folders:
                inner = _open_folder(held, part)
                os.close(held)
                held = inner
            yield held
        finally:
            os.close(held)


def _split(name: str) -> tuple[list[str], str]:
    """The folders of a name and its last component. Raises _Refused for a name that is not below the root."""
    *folders, base = name.split("/")
    if any(map(_leads_out, folders)) or (base and _leads_out(base)) or not name:
        raise _Refused(OUTSIDE)
    if not base:
        raise _Refused(NESTED)      # git's way to write an untracked repository
    return folders, base


def _leads_out(part: str) -> bool:
    """Whether a component is no plain name. git's own folder is outside what a repository holds."""
    return (part in ("", ".", "..") or part.lower() in (".git", "git~1") or "\0" in part
            or (os.sep != "/" and os.sep in part))


def _open_folder(parent: int, part: str) -> int:
    try:
        return os.open(part, _FOLDER | _NOFOLLOW, dir_fd=parent)
    except OSError:
        if stat.S_ISLNK(_status(parent, part).st_mode):
            raise _Refused(LINK) from None
        raise


def _checked_path(root: Path, folders: list[str]) -> str:
    """The folder's path, where no component of it is a link or junction at this moment."""
    full = os.path.join(os.path.realpath(root), *folders)
    if os.path.realpath(full) != os.path.normpath(full):
        raise _Refused(LINK)
    return full


def _status(folder: int | str, base: str) -> os.stat_result:
    if isinstance(folder, int):
        return os.stat(base, dir_fd=folder, follow_symlinks=False)
    return os.lstat(os.path.join(folder, base))


def _open(folder: int | str, base: str) -> IO[bytes]:
    if isinstance(folder, int):
        return open(os.open(base, _FILE, dir_fd=folder), "rb")
    return open(os.open(os.path.join(folder, base), _FILE), "rb")


def _read(folder: int | str, base: str, max_bytes: int) -> bytes | None:
    """The file's bytes, or None when it changed. Raises _Refused, OSError."""
    seen = _status(folder, base)
    _refuse(seen, max_bytes)
    with _open(folder, base) as file:
        before = os.fstat(file.fileno())
        _refuse(before, max_bytes)
        data = file.read(before.st_size + 1)
        after = os.fstat(file.fileno())
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if isinstance(folder, str):
        same &= os.path.samestat(seen, before) and os.path.realpath(folder) == os.path.normpath(folder)
    return data if same and len(data) == before.st_size else None


def _refuse(status: os.stat_result, max_bytes: int) -> None:
    if reason := _irregular(status):
        raise _Refused(reason)
    if status.st_size > max_bytes:
        raise _Refused(over(max_bytes))


def _irregular(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return LINK
    if stat.S_ISDIR(status.st_mode):
        return SUBMODULE
    return "" if stat.S_ISREG(status.st_mode) else IRREGULAR


def _reason(error: OSError) -> str:
    if error.errno in (errno.ELOOP, getattr(errno, "EMLINK", None)):
        return LINK
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return IRREGULAR
    return MISSING if error.errno in (errno.ENOENT, errno.ENOTDIR) else UNREADABLE
