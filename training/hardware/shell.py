"""Facts about this machine as shell assignments, for install_extreme_optimizations.sh.

    eval "$(python -m training.hardware.shell)"

Standard library only, so that it serves before the requirements are installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import sys
from pathlib import Path

from training.hardware import nvidia, support

ROOT = Path(__file__).resolve().parent.parent.parent


def pinned(name: str, requirements: str) -> str:
    """The requirement of one package as requirements.txt has it, else its bare name.

    >>> pinned("ninja", "rich==15.0.0\\nninja==1.13.2  # DeepSpeed\\n")
    'ninja==1.13.2'
    """
    match = re.search(rf"^{re.escape(name)}==\S+", requirements, re.MULTILINE)
    return match[0] if match else name


def triton_pin() -> str:
    """The triton that the installed torch asks for; `triton` when it names none (a CPU build)."""
    try:
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []
    return next((need.split(";")[0].strip() for need in needs if re.match(r"triton[^-\w]", need)), "triton")


def build_jobs(cores: int, ram_bytes: int, job_bytes: int = 6 << 30) -> int:
    """Compilers to run at once for flash-attn, each of which needs about 6 GiB.

    >>> build_jobs(16, 32 << 30)
    5
    """
    return max(1, min(cores, ram_bytes // job_bytes))


def assignments() -> dict[str, str]:
    """Name -> value; a fact that does not hold is empty."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    driver = nvidia.fetch()
    capability = min((nvidia.capability_of(gpu) for gpu in driver.gpus), default=(0, 0))
    packages, tools, cuda = support.installed_packages(), support.found_tools(), support.torch_cuda_version()
    built = support.built_ops(support.op_cache(cuda))
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "GPU": ", ".join(gpu.name for gpu in driver.gpus), "GPU_PROBLEM": driver.problem,
        "CAPABILITY": str(capability[0] * 10 + capability[1]),
        "TORCH": packages.get("torch", ""), "TORCH_CUDA": cuda, "DEEPSPEED": packages.get("deepspeed", ""),
        "TORCH_INDEX": nvidia.torch_index(driver.version, f"{capability[0]}.{capability[1]}"),
        "TORCH_PIN": pinned("torch", requirements), "NINJA_PIN": pinned("ninja", requirements),
        "TRITON_PIN": triton_pin(), "NO_COMPILER": support.missing_compiler(tools),
        "NINJA": tools.get("ninja", ""), "NVCC": tools.get("nvcc", ""),
        "BUILT_OPS": " ".join(built), "JOBS": str(build_jobs(os.cpu_count() or 1, ram_bytes)),
    }


def main() -> None:
    """Write the assignments to standard output."""
    for name, value in assignments().items():
        sys.stdout.write(f"{name}={shlex.quote(value)}\n")


if __name__ == "__main__":
    main()
