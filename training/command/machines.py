"""Planning for a machine that is not this one: presets, saved profiles, and other sizes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from training import models
from training.errors import UsageError
from training.hardware.presets import from_preset
from training.hardware.profiler import HardwareProfiler
from training.planning import presets
from training.records import GIB, BaseModel, Figure, HardwareProfile
from training.rundir import read_record


def described(hardware: str, vram_gib: float | None, ram_gib: float | None,
              disk_gib: float | None) -> HardwareProfile:
    """This machine, or a preset's or file's, with the sizes that were given in place of its own. Where this
    one has no GPU, `vram_gib` alone stands for one like the preset's that is nearest in memory.

    Raises UsageError for sizes that make no sense, MissingInput for an unknown preset.
    """
    sizes = {"--vram": vram_gib, "--ram": ram_gib, "--disk": disk_gib}
    for flag, size in sizes.items():
        if size is not None and not (math.isfinite(size) and 0 < size <= 1 << 20):
            raise UsageError(f"{flag} is {size:g}; it must be more than 0 and at most {1 << 20:,} GiB.")
    if hardware:
        return resized(load(hardware), sizes)
    here = HardwareProfiler().profile(quick=True)
    return resized(with_gpu(here, vram_gib) if vram_gib and not here.gpus else with_rates(here), sizes)


def with_gpu(here: HardwareProfile, vram_gib: float) -> HardwareProfile:
    """This machine with a GPU that it does not have: the speed is that of the preset nearest in memory."""
    like = load(presets.nearest_gpu(vram_gib))
    name = f"a GPU of {vram_gib:g} GiB, as fast as {like.name}, the preset nearest in memory"
    figures = {key: figure for key, figure in here.figures.items() if not key.startswith("gpu")}
    return dataclasses.replace(
        here, name=f"this machine with {name}", source="preset", supports=like.supports,
        gpus=(dataclasses.replace(like.gpus[0], name=name),),
        figures=figures | {key: figure for key, figure in like.figures.items() if key.startswith("gpu0.")})


def with_rates(here: HardwareProfile) -> HardwareProfile:
    """Speeds of GPUs that were not measured (a quick profile measures none): the preset's of the same name,
    else of the one nearest in memory."""
    if not here.gpus or any(here.rate(f"gpu0.matmul_{kind}") for kind in ("bf16", "fp16", "fp32")):
        return here
    gpu = here.gpus[0]
    like = load(presets.nearest_gpu(gpu.total_bytes / GIB, gpu.name))
    lent = {key: dataclasses.replace(figure, method=f"not measured: the preset {like.name}")
            for key, figure in like.figures.items() if key.startswith("gpu0.")}
    return dataclasses.replace(here, figures=lent | here.figures)


def every(hardware: str, vram_gib: float | None, ram_gib: float | None,
          disk_gib: float | None) -> dict[str, HardwareProfile]:
    """The machines of configs/hardware/ by name; only one where one was described."""
    if hardware or not (vram_gib is None and ram_gib is None and disk_gib is None):
        machine = described(hardware, vram_gib, ram_gib, disk_gib)
        return {hardware or machine.name: machine}
    return {name: load(name) for name in presets.by_memory()}


def bases(name: str) -> list[BaseModel]:
    """The base model of that name; every one of the registry, smallest first, for `auto`."""
    if name != "auto":
        return [models.resolve(name)]
    known = [base for base in models.registry().values() if base.location != models.EMBEDDED]
    return sorted(known, key=lambda base: base.shape.total_parameters)


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
