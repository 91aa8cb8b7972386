"""The process group of one trainer: who is in it, signalling it, and making sure that it is empty."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil


def members(group: int) -> list[int]:
    """Process ids of a group's living members; zombies, which nobody may be there to reap, do not count."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def send(group: int, number: signal.Signals) -> None:
    """Signal every member of a group; an empty group is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def stopped(group: int) -> bool:
    """Whether a member was stopped with SIGSTOP, or by a debugger."""
    return any(_status(pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) for pid in members(group))


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return ""


def dump_stacks(group: int, script: Path) -> None:
    """Ask each process of a group that runs `script` itself for its threads' stacks (SIGUSR1). A launcher
    would end at that signal."""
    for pid in members(group):
        with contextlib.suppress(OSError, psutil.Error):
            words = psutil.Process(pid).cmdline()
            if "deepspeed.launcher.launch" not in words and str(script) in words:
                os.kill(pid, signal.SIGUSR1)


def clear(group: int, grace_s: float = 2.0, look: Callable[[int], list[int]] = members) -> list[int]:
    """End what is left of a group: SIGTERM, then SIGKILL after `grace_s`. Returns who had to be ended."""
    left = look(group)
    if not left:
        return []
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        send(group, number)
        limit = time.monotonic() + patience_s
        while time.monotonic() < limit:
            if not look(group):
                return left
            time.sleep(0.05)
    return left


# This control group's own count first; the second is the whole machine's.
OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


def oom_kills(counters: Sequence[Path] = OOM_COUNTERS) -> int:
    """How often the kernel has killed a process for want of memory; 0 when it does not say."""
    for path in counters:
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
