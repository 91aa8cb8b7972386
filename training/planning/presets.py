"""Machines to plan for without standing in front of them: `configs/hardware/*.yaml`, or a file of the same
form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from training.errors import EliteError, MissingInput, UsageError, raise_all
from training.settings import nearest

FOLDER = Path(__file__).resolve().parent.parent.parent / "configs" / "hardware"
_NUMBERS = ("ram_gib", "disk_free_gib")


def names() -> tuple[str, ...]:
    """The presets' names."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def by_memory() -> tuple[str, ...]:
    """The presets' names: those without GPU, then by GPU memory and speed."""
    return tuple(sorted(names(), key=lambda name: (*_size(_read(FOLDER / f"{name}.yaml")), name)))


def nearest_gpu(vram_gib: float, gpu_name: str = "") -> str:
    """The preset with a GPU of that name, else the one nearest in memory; of equals the slowest."""
    found = {name: _read(FOLDER / f"{name}.yaml") for name in names()}
    cards = {name: data for name, data in found.items() if data.get("gpu")}
    return min(cards, key=lambda name: (cards[name]["gpu"].get("name") != gpu_name,
                                        abs(_size(cards[name])[0] - vram_gib), _size(cards[name])[1]))


def _size(data: dict[str, Any]) -> tuple[float, float]:
    """GiB of one GPU and its TFLOP/s in 16 bit; 0 without one."""
    gpu = data.get("gpu") or {}
    return float(gpu.get("total_gib", 0)), float(gpu.get("matmul_bf16_tflops")
                                                 or gpu.get("matmul_fp16_tflops") or 0)


def load(name_or_path: str, vram_gib: float | None = None, ram_gib: float | None = None,
         disk_gib: float | None = None) -> dict[str, Any]:
    """A preset's mapping, as hardware.presets.from_preset reads it, with `--vram`, `--ram`, `--disk` put in.

    Raises MissingInput for an unknown name (with the nearest) or unreadable file, UsageError for what is
    wrong in it.
    """
    path = FOLDER / f"{name_or_path.lower()}.yaml"
    if name_or_path.lower() not in names():
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise MissingInput("No hardware preset or file "
                               f"{name_or_path!r}.{nearest(name_or_path.lower(), names())} "
                               f"Presets: {', '.join(names())}.")
    data = _read(path)
    raise_all(problems_in(data, path) + _override(data, vram_gib, ram_gib, disk_gib))
    return data


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MissingInput(f"Cannot read the hardware in {path}: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {type(data).__name__}; a hardware preset is a mapping with cpu "
                         "and ram_gib.")
    return data


def problems_in(data: dict[str, Any], path: Path) -> list[EliteError]:
    """What a preset lacks or says wrongly."""
    found: list[EliteError] = [UsageError(f"{path}: {key} is {data.get(key)!r}; it must be a number above 0.")
                               for key in _NUMBERS if not _positive(data.get(key))]
    for section, keys in (("cpu", ("cores",)), ("gpu", ("total_gib", "count"))):
        part = data.get(section)
        if part is None and section == "gpu":
            continue
        if not isinstance(part, dict):
            found.append(UsageError(f"{path}: {section} must be a mapping."))
            continue
        found += [UsageError(f"{path}: {section}.{key} is {part.get(key)!r}; it must be a number above 0.")
                  for key in keys if not _positive(part.get(key))]
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _override(data: dict[str, Any], vram_gib: float | None, ram_gib: float | None,
              disk_gib: float | None) -> list[EliteError]:
    found: list[EliteError] = []
    for flag, value in (("--vram", vram_gib), ("--ram", ram_gib), ("--disk", disk_gib)):
        if value is not None and not _positive(value):
            found.append(UsageError(f"{flag} {value:g}: give GiB above 0."))
    if vram_gib is not None and not isinstance(data.get("gpu"), dict):
        found.append(UsageError("--vram was given and this hardware has no GPU."))
    if found:
        return found
    if vram_gib is not None:
        data["gpu"]["total_gib"] = vram_gib
        data["gpu"].pop("free_gib", None)
    data["ram_gib"] = data.get("ram_gib") if ram_gib is None else ram_gib
    data["disk_free_gib"] = data.get("disk_free_gib") if disk_gib is None else disk_gib
    return []
