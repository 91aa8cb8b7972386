"""What the system allows a process here: pinned and locked memory, cgroups, open files, swap, /dev/shm."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from training.hardware import host
from training.records import Figure

SHM = Path("/dev/shm")


def figures(ram_total_bytes: int, gpus: int) -> dict[str, Figure]:
    """Every `host.*` figure, read and not timed. A limit that is not set has no value and says `no limit`.

    `gpus`: how many GPUs torch can use; they decide what `host.pinned_limit` depends on.
    """
    membership = host.read_text(Path("/proc/self/cgroup"))
    memory_bytes, _ = host.memory_limit(membership)
    locked_bytes = memlock_bytes()
    return {
        "host.pinned_limit": pinned_limit(ram_total_bytes, locked_bytes, gpus),
        "host.memlock_limit": _limit(locked_bytes, "bytes", "RLIMIT_MEMLOCK"),
        "host.cgroup_memory": _limit(memory_bytes or None, "bytes", "cgroup memory"),
        "host.cgroup_cpus": _limit(host.cpu_limit(membership), "cores", "cgroup CPU quota"),
        "host.open_files": _limit(open_files(), "files", "RLIMIT_NOFILE"),
        "host.swap": swap(), "host.shm": shm(SHM),
    }


def _limit(value: float | None, unit: str, name: str) -> Figure:
    if value is None:
        return Figure(value=None, unit=unit, method=f"no limit ({name})", repeats=0)
    return Figure(value=float(value), unit=unit, method=name)


def pinned_limit(ram_total_bytes: int, locked_bytes: int | None, gpus: int) -> Figure:
    """The most host memory a process may pin, always a number: RAM where nothing else limits it.

    With a GPU CUDA's driver pins, which RLIMIT_MEMLOCK does not bind; the full profile tries it. Without one
    pinning is `mlock`, which it binds.
    """
    if gpus:
        return Figure(value=float(ram_total_bytes), unit="bytes",
                      method="all RAM: CUDA's driver pins outside RLIMIT_MEMLOCK; not tried")
    if locked_bytes is not None and locked_bytes < ram_total_bytes:
        return Figure(value=float(locked_bytes), unit="bytes", method="RLIMIT_MEMLOCK")
    return Figure(value=float(ram_total_bytes), unit="bytes",
                  method="all RAM: RLIMIT_MEMLOCK sets no lower one")


def memlock_bytes() -> int | None:
    """RLIMIT_MEMLOCK, None when it is not limited or the system has no such limit."""
    return _soft_limit("RLIMIT_MEMLOCK")


def open_files() -> int | None:
    """RLIMIT_NOFILE, None when it is not limited or the system has no such limit."""
    return _soft_limit("RLIMIT_NOFILE")


def _soft_limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def swap() -> Figure:
    """Swap space in all, 0 when there is none."""
    import psutil

    try:
        return Figure(value=float(psutil.swap_memory().total), unit="bytes", method="size of the swap space")
    except (OSError, RuntimeError) as error:
        return Figure(value=None, unit="bytes", method=f"not measured: {error}", repeats=0)


def shm(path: Path) -> Figure:
    """Size of the shared-memory file system, which data loaders and CPU ranks exchange tensors through."""
    if not os.path.isdir(path):
        return Figure(value=None, unit="bytes", method=f"not measured: there is no {path}", repeats=0)
    return Figure(value=float(shutil.disk_usage(path).total), unit="bytes", method=f"size of {path}")
