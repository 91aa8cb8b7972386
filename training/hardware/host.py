"""The machine around the GPU: processor, memory, disk, and the limits a container sets on them."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

# cgroup v1 writes "no limit" as the largest page-aligned int64; no machine has an exbibyte.
NO_LIMIT_BYTES = 1 << 60
KNOWN_FLAGS = ("sse4_2", "avx", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16",
               "amx_fp16", "amx_int8", "amx_tile", "avx_vnni", "f16c", "fma", "neon", "asimd", "asimdhp",
               "bf16", "sve", "sve2", "i8mm")


@dataclass(frozen=True, kw_only=True)
class Host:
    """Processor, memory and disk as a process here may use them."""

    system: str
    wsl: bool
    cpu_name: str
    cpu_cores: int
    cpu_flags: tuple[str, ...]
    ram_total_bytes: int
    ram_available_bytes: int
    disk_path: str
    disk_free_bytes: int


def fetch(output: Path | None) -> Host:
    """Read the machine. The disk is the one that `output` lies on, or will lie on; nothing is created."""
    import psutil

    cpuinfo = read_text(Path("/proc/cpuinfo"))
    release = read_text(Path("/proc/version"))
    memory = psutil.virtual_memory()
    limit_bytes, used_bytes = memory_limit(read_text(Path("/proc/self/cgroup")))
    disk = existing_parent(output)
    return Host(
        system=_system(release), wsl="microsoft" in release.lower(),
        cpu_name=cpu_name(cpuinfo) or platform.processor() or platform.machine(),
        cpu_cores=usable_cores(_affinity(), cpu_limit(read_text(Path("/proc/self/cgroup")))),
        cpu_flags=cpu_flags(cpuinfo),
        ram_total_bytes=min(memory.total, limit_bytes or memory.total),
        ram_available_bytes=min(memory.available, max(0, limit_bytes - used_bytes) if limit_bytes
                                else memory.available),
        disk_path=str(disk), disk_free_bytes=shutil.disk_usage(disk).free)


def _system(release: str) -> str:
    note = " (WSL)" if "microsoft" in release.lower() else ""
    return f"{platform.system()} {platform.release()} {platform.machine()}{note}"


def read_text(path: Path) -> str:
    """A small system file's text, "" when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def existing_parent(path: Path | None) -> Path:
    """The nearest folder that exists at or above `path`; the current one for None."""
    place = (path or Path.cwd()).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo's text, "" when it gives none (ARM often does not)."""
    match = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def cpu_flags(cpuinfo: str) -> tuple[str, ...]:
    """Those instruction sets in /proc/cpuinfo's text that matter to arithmetic, sorted."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    present = set(match[1].split()) if match else set()
    return tuple(sorted(present & set(KNOWN_FLAGS)))


def usable_cores(affinity: int, quota: float | None) -> int:
    """Whole cores a process may keep busy, at least one.

    >>> usable_cores(16, 2.5), usable_cores(4, None), usable_cores(8, 0.5)
    (2, 4, 1)
    """
    return max(1, min(affinity, math.floor(quota) if quota else affinity))


def memory_limit(membership: str, root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """The tightest cgroup memory limit and the bytes used under it; (0, 0) when there is none.

    `membership`: the text of /proc/self/cgroup. Page cache that the kernel can drop counts as free.
    """
    tightest, used = 0, 0
    for folder in _folders(membership, root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if not 0 < limit < NO_LIMIT_BYTES:
            continue
        if not tightest or limit < tightest:
            usage = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
            tightest, used = limit, max(0, usage - _droppable(folder))
    return tightest, used


def _droppable(folder: Path) -> int:
    text = read_text(folder / "memory.stat")
    # Version 1 lists the group alone as inactive_file and the whole tree as total_inactive_file.
    match = (re.search(r"^total_inactive_file (\d+)$", text, re.MULTILINE)
             or re.search(r"^inactive_file (\d+)$", text, re.MULTILINE))
    return int(match[1]) if match else 0


def cpu_limit(membership: str, root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The tightest cgroup processor quota in cores, or None."""
    quotas = []
    for folder in _folders(membership, root, "cpu"):
        parts = read_text(folder / "cpu.max").split()
        if len(parts) != 2:
            parts = [str(_number(folder / "cpu.cfs_quota_us")), str(_number(folder / "cpu.cfs_period_us"))]
        if parts[0].isdigit() and int(parts[0]) > 0 and int(parts[1]) > 0:
            quotas.append(int(parts[0]) / int(parts[1]))
    return min(quotas) if quotas else None


def _folders(membership: str, root: Path, controller: str) -> list[Path]:
    """The cgroup's own folder and all above it, for version 2 and for version 1's controller.

    In a container /proc/self/cgroup may name a path of the host that is not mounted; its parents end at
    the mount's root, which then is the container's own group.
    """
    found: list[Path] = []
    for line in membership.splitlines() or ["0::/"]:
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        base = root if number == "0" and not names else root / controller
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in found if folder.is_dir()]


def _number(path: Path) -> int:
    """The number in a cgroup file; 0 for `max`, -1 and what cannot be read."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else 0
