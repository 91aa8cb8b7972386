"""Compile DeepSpeed's CPU ops ahead of the first run, and verify that they compute what they should.

    python -m training.hardware.ops --build [OP]...     compile (OP: cpu_adam, deepspeed_shm_comm, async_io)
    python -m training.hardware.ops --verify            load what is compiled; one step of CPU Adam
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.hardware import support

BUILDERS = {"cpu_adam": "CPUAdamBuilder", "deepspeed_shm_comm": "ShareMemCommBuilder",
            "async_io": "AsyncIOBuilder"}


def wanted(torch_cuda: str, platform: str) -> tuple[str, ...]:
    """The ops that runs here use: the shared-memory one serves CPU ranks on Linux only.

    >>> wanted("", "linux"), wanted("13.0", "linux")
    (('cpu_adam', 'deepspeed_shm_comm'), ('cpu_adam',))
    """
    return ("cpu_adam", "deepspeed_shm_comm") if platform == "linux" and not torch_cuda else ("cpu_adam",)


def use_own_ninja() -> None:
    """Put this interpreter's programs first on PATH.

    Ninja 1.11 and 1.13 hash commands differently, so a load through the system's ninja compiles anew what
    this environment's ninja had compiled (64 s on two cores), and the other way round.
    """
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def build(names: tuple[str, ...]) -> None:
    """Compile or load each op. Raises RuntimeError with the compiler's words when one fails."""
    from deepspeed.accelerator import get_accelerator

    cache = support.op_cache(support.torch_cuda_version())
    for name in names:
        began_s = time.perf_counter()
        builder = get_accelerator().create_op_builder(BUILDERS[name])
        if builder is None or not builder.is_compatible(verbose=True):
            raise RuntimeError(f"DeepSpeed says that {name} cannot be compiled on this machine")
        with sole_builder(cache, name):
            builder.load(verbose=True)
        sys.stderr.write(f"{name}: {time.perf_counter() - began_s:.0f} s\n")


@contextlib.contextmanager
def sole_builder(cache: Path, name: str) -> Iterator[None]:
    """Hold the op's lock, which the system frees with its process; the trainer takes the same file.

    torch's own `lock` file outlives a killed build, and every later load would wait for it for ever. While
    this lock is held no build of ours runs, so that file is a leftover and is removed.
    """
    (cache / name).mkdir(parents=True, exist_ok=True)
    with open(cache / f".{name}.flock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (cache / name / "lock").unlink(missing_ok=True)
        yield


def verify() -> str:
    """One step of DeepSpeed's CPU Adam against the value the formula gives; returns a line for the table.

    The compiled files are used as they are: nothing is compiled and no lock is waited for. The first Adam
    step moves a weight by the learning rate, whatever the gradient's size.
    Raises RuntimeError when an op is missing, cannot be loaded or computes something else.
    """
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder.builder import OpBuilder

    cuda = support.torch_cuda_version()
    cache, names = support.op_cache(cuda), wanted(cuda, sys.platform)
    if missing := [name for name in names if name not in support.built_ops(cache)]:
        raise RuntimeError(f"not compiled: {', '.join(missing)}")
    for name in names:
        OpBuilder._loaded_ops[name] = _load(cache / name / f"{name}.so", name)
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer: Any = DeepSpeedCPUAdam([weight], lr=0.1, adamw_mode=True, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    error = float((weight.detach() - 0.9).abs().max())
    if error > 1e-3:
        raise RuntimeError(f"CPU Adam is {error:.4f} off after one step of 0.1")
    return f"{len(names)} compiled, tried"


def _load(library: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{library} is no Python extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Run one of the two modes; a failure is one line on standard error and exit code 1."""
    parser = argparse.ArgumentParser(prog="training.hardware.ops")
    parser.add_argument("--build", nargs="*", choices=sorted(BUILDERS), metavar="OP")
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    use_own_ninja()
    try:
        if arguments.build is not None:
            build(tuple(arguments.build) or wanted(support.torch_cuda_version(), sys.platform))
        if arguments.verify:
            with contextlib.redirect_stdout(sys.stderr):
                line = verify()
            sys.stdout.write(line + "\n")
    except (RuntimeError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
