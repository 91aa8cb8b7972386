"""One run, one writer: an exclusive `flock` on `<run>/.command.lock` that the kernel drops with its holders.

The trainer's process inherits the descriptor, and its first rank holds `<run>/.lock` besides. So a run stays
locked as long as anything can write to it, also after a SIGKILL of the command, and a lock is never left
behind: there is nothing to remove by hand.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import psutil

from training.errors import CannotWrite

NAME = ".command.lock"
TRAINER_NAME = ".lock"
# `runs` probes with a shared lock for some microseconds; a start outlasts that.
PROBE_S = 0.5


class RunLock:
    """The lock of one run directory, held from `take` to `release`."""

    def __init__(self, run_path: Path):
        self.path = run_path / NAME
        self.handle = -1

    def take(self, patience_s: float = 20.0) -> None:
        """Take the lock. A trainer that outlived its command gets `patience_s` to end.

        Raises CannotWrite naming the process that holds it.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CannotWrite(f"Cannot write {self.path}: {error.strerror}.") from error
        began = time.monotonic()
        while not self._try():
            waited_s = time.monotonic() - began
            pid = holder(self.path)
            if waited_s >= PROBE_S and (pid is not None or waited_s >= patience_s):
                self.release()
                raise CannotWrite(_refusal(self.path.parent, pid))
            time.sleep(0.05)
        os.ftruncate(self.handle, 0)
        owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        os.pwrite(self.handle, json.dumps(owner).encode() + b"\n", 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if _locked(self.path.with_name(TRAINER_NAME)):
            fcntl.flock(self.handle, fcntl.LOCK_UN)
            return False
        return True

    def release(self) -> None:
        """Let go; heirs of the descriptor keep the lock until they end."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def _refusal(run_path: Path, pid: int | None) -> str:
    if pid is not None:
        return (f"{run_path} is in use by process {pid}. Wait for it, stop it with `kill {pid}` "
                "(it saves first), or choose another --output.")
    return (f"{run_path} is in use by a trainer without a command. It saves and ends by itself when its "
            "command was killed; try again in a minute, or choose another --output.")


def held(run_path: Path) -> bool:
    """Whether a command or a trainer works on a run now."""
    return _locked(run_path / NAME) or _locked(run_path / TRAINER_NAME)


def _locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def holder(path: Path) -> int | None:
    """The process that took a lock file last, or None when it has ended (its number may be another's now)."""
    try:
        owner = json.loads(path.read_text())
        process = psutil.Process(int(owner["pid"]))
        return process.pid if abs(process.create_time() - float(owner["started"])) < 1.0 else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
