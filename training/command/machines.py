"""Planning for a machine that is not this one: presets, saved profiles, and other sizes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from training.errors import UsageError
from training.hardware.presets import from_preset
from training.hardware.profiler import HardwareProfiler
from training.planning import presets
from training.records import GIB, Figure, HardwareProfile
from training.rundir import read_record


def described(hardware: str, vram_gib: float | None, ram_gib: float | None,
              disk_gib: float | None) -> HardwareProfile:
    """This machine, or a preset's or file's, with the sizes that were given in place of its own.

    Raises UsageError for sizes that make no sense, MissingInput for an unknown preset.
    """
    sizes = {"--vram": vram_gib, "--ram": ram_gib, "--disk": disk_gib}
    for flag, size in sizes.items():
        if size is not None and not (math.isfinite(size) and 0 < size <= 1 << 20):
            raise UsageError(f"{flag} is {size:g}; it must be more than 0 and at most {1 << 20:,} GiB.")
    return resized(load(hardware) if hardware else HardwareProfiler().profile(quick=True), sizes)


def load(name: str) -> HardwareProfile:
    """A preset of configs/hardware by name, or a file: a preset's YAML, or the hardware.json of a run.

    Raises MissingInput, UsageError or DataError.
    """
    if name.endswith(".json"):
        return read_record(HardwareProfile, Path(name).expanduser())
    return from_preset(presets.load(name))


def resized(profile: HardwareProfile, sizes: dict[str, float | None]) -> HardwareProfile:
    """The same machine with other memory and disk; what was measured of the old sizes is dropped."""
    ram, disk, vram = sizes["--ram"], sizes["--disk"], sizes["--vram"]
    if ram is not None:
        size = int(ram * GIB)
        profile = dataclasses.replace(profile, ram_total_bytes=size, ram_available_bytes=size)
    if disk is not None:
        profile = dataclasses.replace(profile, disk_free_bytes=int(disk * GIB))
    if vram is None:
        return profile
    if not profile.gpus:
        raise UsageError(f"--vram is {vram:g} and {profile.name} has no GPU; add --hardware NAME.")
    size = int(vram * GIB)
    gpus = tuple(dataclasses.replace(gpu, total_bytes=size, free_bytes=size) for gpu in profile.gpus)
    given = Figure(value=float(size), unit="bytes", method="--vram")
    figures = {name: given if name.endswith(".allocatable_bytes") else figure
               for name, figure in profile.figures.items()}
    return dataclasses.replace(profile, gpus=gpus, figures=figures)
