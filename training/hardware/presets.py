"""A machine described in data instead of measured: presets for planning on another machine than this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.errors import UsageError
from training.hardware import nvidia, opstates, speed, support
from training.records import GIB, Figure, Gpu, HardwareProfile, Support

# Suffix of a preset's key -> (factor, unit); the rest of the key is the figure's name.
SCALES = {"_tflops": (1e12, speed.FLOPS), "_gflops": (1e9, speed.FLOPS), "_gb_s": (1e9, speed.BYTES_PER_S),
          "_gib": (float(GIB), "bytes")}
RENAMED = {"memory": "memory_bandwidth", "allocatable": "allocatable_bytes"}
NO_FIGURES = ("total_gib", "free_gib")


def from_preset(data: Mapping[str, Any]) -> HardwareProfile:
    """A profile from a preset mapping, touching no machine; the method of every figure is the text in
    `sources` whose key begins its name with most letters (`gpu`, `gpu.h2d`, `disk`, ...), else `source`.

    Keys: name, source, sources, date, ram_gib, disk_free_gib, disk_write_gb_s, cpu {name, cores, flags,
    matmul_fp32_gflops, ...}, gpu {name, architecture, capability, total_gib, count, matmul_bf16_tflops,
    memory_gb_s, h2d_pinned_gb_s, ...}. A figure's key is its name and a suffix of SCALES.
    Raises UsageError naming what is missing or wrong.
    """
    where = str(data.get("name", "preset"))
    cpu, gpu = _section(data, "cpu", where), _section(data, "gpu", where)
    gpus = _gpus(gpu, where)
    sources = {"": str(data.get("source", "preset")), **_section(data, "sources", where)}
    disk = {key[len("disk_"):]: value for key, value in data.items() if key.startswith("disk_")}
    figures = preset_figures("cpu", cpu, sources) | preset_figures("disk", disk, sources)
    for one in gpus:
        figures |= preset_figures(f"gpu{one.index}", gpu, sources)
    ram_bytes = int(_number(data, "ram_gib", where) * GIB)
    flags = tuple(str(flag) for flag in cpu.get("flags") or ())
    weakest = min((nvidia.capability_of(one) for one in gpus), default=None)
    return HardwareProfile(
        name=where, source="preset", date=str(data.get("date", "")), system=str(data.get("system", "Linux")),
        cpu_name=str(cpu.get("name", "CPU")), cpu_cores=int(_number(cpu, "cores", where)), cpu_flags=flags,
        ram_total_bytes=ram_bytes, ram_available_bytes=ram_bytes, gpus=gpus, disk_path="",
        disk_free_bytes=int(_number(data, "disk_free_gib", where) * GIB), figures=figures,
        supports=preset_supports(weakest, flags, figures))


def _gpus(gpu: Mapping[str, Any], where: str) -> tuple[Gpu, ...]:
    if not gpu:
        return ()
    capability = str(gpu.get("capability", ""))
    total_bytes = int(_number(gpu, "total_gib", where) * GIB)
    free_bytes = int(_number(gpu, "free_gib", where) * GIB) if "free_gib" in gpu else total_bytes
    count = int(_number(gpu, "count", where)) if "count" in gpu else 1
    return tuple(Gpu(index=index, name=str(gpu.get("name", where)), capability=capability,
                     architecture=str(gpu.get("architecture") or nvidia.architecture(capability)),
                     total_bytes=total_bytes, free_bytes=free_bytes) for index in range(count))


def preset_figures(prefix: str, values: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures in one section of a preset.

    >>> preset_figures("gpu0", {"matmul_bf16_tflops": 36, "name": "x"}, {"": "spec"})["gpu0.matmul_bf16"]
    Figure(value=36000000000000.0, unit='FLOP/s', method='spec', repeats=1, spread=None)
    """
    found, section = {}, prefix.rstrip("0123456789")
    for key, value in values.items():
        suffix = next((end for end in SCALES if key.endswith(end)), "")
        if suffix and key not in NO_FIGURES and isinstance(value, int | float):
            name = key[:-len(suffix)]
            factor, unit = SCALES[suffix]
            found[f"{prefix}.{RENAMED.get(name, name)}"] = Figure(
                value=float(value) * factor, unit=unit, method=source_of(f"{section}.{key}", sources))
    return found


def source_of(key: str, sources: Mapping[str, Any]) -> str:
    """The source of one figure: that of the longest key which its own begins with.

    >>> source_of("gpu.h2d_pinned_gb_s", {"": "all", "gpu": "sheet", "gpu.h2d": "assumed", "cpu": "x"})
    'assumed'
    """
    return str(sources[max((start for start in sources if key.startswith(start)), key=len)])


def preset_supports(capability: tuple[int, int] | None, flags: tuple[str, ...],
                    figures: dict[str, Figure]) -> dict[str, Support]:
    """What works on a machine as described with everything installed: the capability decides."""
    return support.evaluate(support.Facts(
        system="Linux", cpu_flags=flags, capability=capability, torch_cuda="(assumed)",
        packages=dict.fromkeys(support.PACKAGES, "(assumed)"), built_ops=opstates.NAMES, figures=figures,
        cudnn="(assumed)",
        tools={name: name for name in support.TOOLS}))


def _section(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    section = data.get(key) or {}
    if not isinstance(section, Mapping):
        raise UsageError(f"Hardware preset {where}: {key} is {section!r}; it must be a mapping.")
    return section


def _number(data: Mapping[str, Any], key: str, where: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UsageError(f"Hardware preset {where}: {key} is {value!r}; it must be a number above 0.")
    return float(value)
