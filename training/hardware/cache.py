"""A profile measured earlier, for this run or another, reused: its rates are kept, what is free is read.

The file may be torn, or come with a run directory from elsewhere. It counts only when it is a whole, own,
recent measurement of this very machine with the same driver and packages; else all is measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from training.errors import EliteError
from training.records import Figure, Gpu, HardwareProfile, from_data
from training.rundir import write_record

VARIABLE = "ELITE_PROFILE"
MAX_DAYS = 7
MAX_FILE_BYTES = 1 << 20
# Of RAM and device memory, between two readings of the same machine (a kernel update, a moved reserve).
SIZE_TOLERANCE = 0.05
# A full profile has these; a quick one does not.
WANTED = ("cpu.train_fp32", "cpu.attention_backward", "cpu.memory_bandwidth")
# The probe held a CUDA context while it measured, up to about 1 GiB, which the driver's own reading lacks.
CONTEXT_BYTES = 3 << 29
JITTER_BYTES = 64 << 20      # of free memory, on a machine that does nothing else
# Supports that follow from what is installed alone; the others were tried or follow from rates.
UNTRIED = ("deepspeed", "compiler", "cuda")
SIZES = ("allocatable_bytes", "allocatable_piece_bytes", "unreleased_bytes")


def shared_path() -> Path | None:
    """Where the last profile of this machine is kept for other runs: `ELITE_PROFILE`, else the user's cache;
    None when that variable is empty."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "elite" / "hardware.json"


def remember(profile: HardwareProfile) -> None:
    """Keep a whole measurement for other runs; where that cannot be written nothing is kept."""
    path = shared_path()
    if path is None or not is_sound(profile):
        return
    with contextlib.suppress(EliteError):
        write_record(path, profile)


def read(path: Path | None) -> HardwareProfile | None:
    """The profile in a file, None when there is none that can be trusted to be whole and own."""
    if path is None:
        return None
    try:
        text = _own_text(path)
        profile = from_data(HardwareProfile, json.loads(text)) if text else None
    except (OSError, ValueError, RecursionError):
        return None
    return profile if profile and is_sound(profile) else None


def _own_text(path: Path) -> str:
    """The text of a regular file of this user, "" for a link, a pipe, another's or an overlong file."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, encoding="utf-8") as file:
        found = os.fstat(file.fileno())
        own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
        if not stat.S_ISREG(found.st_mode) or not own or found.st_size > MAX_FILE_BYTES:
            return ""
        return file.read()


def is_sound(profile: HardwareProfile) -> bool:
    """Whether a profile was measured, in full, with figures that can be, and texts that may be printed."""
    values = [figure.value for figure in profile.figures.values() if figure.value is not None]
    return (profile.source == "measured" and all(profile.rate(name) for name in WANTED)
            and all(math.isfinite(value) and value >= 0 for value in values)
            and all(text.isprintable() for text in _texts(profile)))


def _texts(profile: HardwareProfile) -> Iterable[str]:
    yield from (profile.name, profile.system, profile.cpu_name, profile.disk_path, profile.date,
                *profile.versions.values())
    for name, figure in profile.figures.items():
        yield from (name, figure.unit, figure.method)
    for name, support in profile.supports.items():
        yield from (name, support.why, support.what_to_do)


def measured_at(profile: HardwareProfile) -> str:
    """When the profile's rates were measured."""
    return profile.rates_date or profile.date


def is_recent(date: str, now: datetime.datetime, days: float = MAX_DAYS) -> bool:
    """Whether an ISO date lies in the last `days` and not in the future.

    >>> now = datetime.datetime.fromisoformat("2026-11-21T12:00:00+00:00")
    >>> [is_recent(d, now) for d in ("2026-11-20T00:00:00+00:00", "2026-11-01T00:00:00+00:00", "soon")]
    [True, False, False]
    """
    try:
        then = datetime.datetime.fromisoformat(date)
        return datetime.timedelta(0) <= now - then <= datetime.timedelta(days=days)
    except (ValueError, TypeError):
        return False


def same_machine(old: HardwareProfile, new: HardwareProfile) -> bool:
    """Whether two profiles are of one machine with one set of driver and packages. `new` needs no rates."""
    def identity(profile: HardwareProfile) -> tuple[object, ...]:
        return (profile.system, profile.cpu_name, profile.cpu_cores, profile.cpu_flags,
                [(gpu.name, gpu.capability) for gpu in _ordered(profile.gpus)], _lasting(profile.versions))

    return (identity(old) == identity(new) and _near(old.ram_total_bytes, new.ram_total_bytes)
            and _same_disk(old.disk_path, new.disk_path)
            and all(_near(one.total_bytes, other.total_bytes)
                    for one, other in zip(_ordered(old.gpus), _ordered(new.gpus), strict=True)))


def _same_disk(one: str, other: str) -> bool:
    """Whether two folders lie on one file system. Before its first run a run directory's is its parent's."""
    try:
        return os.stat(one).st_dev == os.stat(other).st_dev
    except OSError:
        return False


def _ordered(gpus: tuple[Gpu, ...]) -> list[Gpu]:
    return sorted(gpus, key=lambda gpu: (gpu.name, gpu.total_bytes, gpu.index))


def _lasting(versions: Mapping[str, str]) -> dict[str, str]:
    """The versions without cuDNN's, which torch and the packages write differently."""
    return {name: version for name, version in versions.items() if name != "cudnn"}


def _near(one: int, other: int) -> bool:
    return abs(one - other) <= SIZE_TOLERANCE * max(one, other)


def reused(old: HardwareProfile, new: HardwareProfile) -> HardwareProfile:
    """The new reading (sizes, what is free, limits, what is installed) with the old rates and trials."""
    free_bytes = {gpu.index: other.free_bytes
                  for gpu, other in zip(_ordered(old.gpus), _ordered(new.gpus), strict=True)}
    figures = {name: figure for name, figure in old.figures.items()
               if not name.startswith("host.") and not _outdated(name, figure, old.gpus, free_bytes)}
    limits = {name: figure for name, figure in new.figures.items() if name.startswith("host.")}
    if "host.pinned_limit" in old.figures and old.gpus:
        limits["host.pinned_limit"] = old.figures["host.pinned_limit"]
    gpus = tuple(dataclasses.replace(gpu, free_bytes=free_bytes[gpu.index]) for gpu in old.gpus)
    untried = {name: support for name, support in new.supports.items() if name.startswith(UNTRIED)}
    return dataclasses.replace(new, gpus=gpus, name=old.name, figures=figures | limits,
                               supports=old.supports | untried, versions=old.versions,
                               rates_date=measured_at(old))


def _outdated(name: str, figure: Figure, gpus: tuple[Gpu, ...], free_bytes: Mapping[int, int]) -> bool:
    """Whether a size of allocatable memory no longer holds, because more or less of it is free than then."""
    if not name.endswith(SIZES):
        return False
    gpu = next((gpu for gpu in gpus if name.startswith(f"gpu{gpu.index}.")), None)
    if gpu is None:
        return True
    grown_bytes = free_bytes[gpu.index] - gpu.free_bytes
    return not -JITTER_BYTES <= grown_bytes <= CONTEXT_BYTES or (figure.value or 0) > free_bytes[gpu.index]
