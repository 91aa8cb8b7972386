"""The full profile's subprocess: measures with torch and prints one JSON document.

It is a process of its own because a CUDA context would cost its parent about 0.5 GB of the device.

    python -m training.hardware.probe --threads 2 [--spills]

Standard output carries {"gpus", "figures", "trials", "versions"} and nothing else; standard error carries
progress lines (`MARK done total name`) and whatever libraries say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import psutil
import torch

from training.hardware import nvidia, rates, stress, trials
from training.hardware.speed import BYTES_PER_S, FLOPS, WEIGHTS_PER_S, not_measured
from training.hardware.support import found_tools, installed_packages, missing_compiler
from training.records import Figure, Gpu, to_data

MARK = "\x1eprogress"


def devices() -> list[Gpu]:
    """The GPUs that torch can open, in torch's order."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        capability = f"{major}.{minor}"
        found.append(Gpu(index=index, name=torch.cuda.get_device_name(index), capability=capability,
                         architecture=nvidia.architecture(capability), total_bytes=total_bytes,
                         free_bytes=free_bytes))
    return found


def twin(gpu: Gpu, gpus: list[Gpu]) -> Gpu | None:
    """An earlier GPU of the same name and size, whose rates serve for this one too."""
    return next((other for other in gpus if other.index < gpu.index
                 and (other.name, other.total_bytes) == (gpu.name, gpu.total_bytes)), None)


def measures(gpus: list[Gpu]) -> dict[str, rates.Measure]:
    """Every rate to measure, in order: the CPU's, then each distinct GPU's."""
    quantized = "bitsandbytes" in installed_packages(("bitsandbytes",))
    found = rates.cpu_measures(torch, quantized)
    for gpu in gpus:
        if twin(gpu, gpus) is None:
            major, minor = gpu.capability.split(".")
            found |= rates.gpu_measures(torch, gpu.index, (int(major), int(minor)), quantized)
    return found


def borrowed(figures: dict[str, Figure], gpus: list[Gpu]) -> dict[str, Figure]:
    """The rates of a GPU's twin under its own name; `method` says where they were measured."""
    found = {}
    for gpu in gpus:
        if other := twin(gpu, gpus):
            prefix = f"gpu{other.index}."
            for name, figure in figures.items():
                if name.startswith(prefix):
                    found[f"gpu{gpu.index}.{name[len(prefix):]}"] = Figure(
                        value=figure.value, unit=figure.unit, repeats=figure.repeats, spread=figure.spread,
                        method=f"{figure.method} (on GPU {other.index}, the same model)")
    return found


def unit_of(name: str) -> str:
    """The unit of a figure, by its name."""
    if "unpack" in name:
        return WEIGHTS_PER_S
    return FLOPS if any(part in name for part in ("matmul", "attention", "train", "linear")) else BYTES_PER_S


def allocatable(gpus: list[Gpu], spills: bool) -> dict[str, Figure]:
    """The memory stress test of every GPU, by figure name."""
    found: dict[str, Figure] = {}
    for gpu in gpus:
        try:
            sizes = stress.device_figures(torch, gpu.index, spills)
        except Exception as error:
            sizes = {"allocatable_bytes": not_measured("bytes", f"{type(error).__name__}: {error}")}
        found |= {f"gpu{gpu.index}.{name}": figure for name, figure in sizes.items()}
    return found


def pinned() -> dict[str, Figure]:
    """How much host memory CUDA may pin, tried."""
    memory = psutil.virtual_memory()
    return {"host.pinned_limit": stress.pinned_limit(torch, memory.total, memory.available)}


def versions() -> dict[str, str]:
    """What torch itself reports of the libraries it carries."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {"cudnn": dotted_cudnn(cudnn)} if cudnn else {}


def dotted_cudnn(number: int) -> str:
    """cuDNN's version from its number, whose form changed with version 9.

    >>> dotted_cudnn(8902), dotted_cudnn(91002)
    ('8.9.2', '9.10.2')
    """
    major = number // 10000 if number >= 90000 else number // 1000
    rest = number % (10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def examine(spills: bool) -> dict[str, Any]:
    """Measure everything; the result is what standard output carries."""
    gpus = devices()
    work = measures(gpus)
    figures: dict[str, Figure] = {}
    for done, (name, measure) in enumerate(work.items()):
        _tell(done, len(work) + 2, name)
        figures[name] = rates.guarded(measure, unit_of(name))
        if gpus:
            torch.cuda.empty_cache()
    _tell(len(work), len(work) + 2, "device memory" if gpus else "optimizations")
    figures |= borrowed(figures, gpus) | allocatable(gpus, spills) | (pinned() if gpus else {})
    _tell(len(work) + 1, len(work) + 2, "optimizations")
    answers = trials.run_all(torch, "cuda" if gpus else "cpu", installed_packages(),
                             compiler=not missing_compiler(found_tools()))
    return {"gpus": to_data(gpus), "figures": to_data(figures), "trials": answers, "versions": versions()}


def _tell(done: int, total: int, name: str) -> None:
    sys.stderr.write(f"{MARK} {done} {total} {name}\n")
    sys.stderr.flush()


def main() -> None:
    """Measure and print. Whatever else writes to standard output is sent to standard error."""
    parser = argparse.ArgumentParser(prog="training.hardware.probe")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--spills", action="store_true")
    arguments = parser.parse_args()
    out = os.dup(1)
    os.dup2(2, 1)
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    text = json.dumps(examine(arguments.spills))
    with os.fdopen(out, "w", encoding="utf-8") as stdout:
        stdout.write(text + "\n")


if __name__ == "__main__":
    main()
