"""Stage 1: measure this machine. `HardwareProfiler` asks the host, the driver and a torch subprocess."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from training.errors import EliteError
from training.hardware import cache, host, limits, nvidia, speed, support
from training.hardware.presets import from_preset as from_preset
from training.records import Figure, Gpu, HardwareProfile, from_data
from training.rundir import RunDirectory

Progress = Callable[[str, int, int, str], None]
ROOT = Path(__file__).resolve().parent.parent.parent
PROBE_TIMEOUT_S = 240.0
MARK = "\x1eprogress"


def silent(phase: str, done: int, total: int, detail: str) -> None:
    """The default progress callable."""


class HardwareProfiler:
    """Measures the machine that the run will use. `output`: the run directory, whose disk is measured."""

    def __init__(self, output: str | Path | None = None):
        self.output = Path(output) if output is not None else None

    def profile(self, quick: bool = False, progress: Progress | None = None,
                fresh: bool = False) -> HardwareProfile:
        """What the machine can do. Quick: without torch, under two seconds. Full: about 15 seconds on a CPU.

        A full profile of the same machine, in the run directory or of the last run, at most a week old, is
        reused unless `fresh`: its rates are kept (`rates_date`), what is free is read anew. Raises EliteError
        when the full profile's subprocess fails. A single figure that cannot be measured stands there without
        a value and with the reason.
        """
        tell = progress or silent
        tell("profile", 0, 0, "host and driver")
        machine = host.fetch(self.output)
        driver = nvidia.fetch()
        gpus = openable(driver)
        if not quick and not fresh and (kept := self._kept(machine, driver, gpus)):
            tell("profile", 1, 1, "")
            return kept
        figures = speed.disk(Path(machine.disk_path), **disk_test(quick, machine.disk_free_bytes))
        if quick:
            figures["cpu.matmul_fp32"] = speed.matmul_numpy()
            return assemble(machine, driver, gpus, figures, {})
        answer = run_probe(machine, tell)
        tell("profile", 1, 1, "")
        figures |= {name: from_data(Figure, figure) for name, figure in answer["figures"].items()}
        measured = assemble(machine, driver, tuple(from_data(Gpu, gpu) for gpu in answer["gpus"]), figures,
                            answer["trials"], answer.get("versions", {}))
        cache.remember(measured)
        return measured

    def _kept(self, machine: host.Host, driver: nvidia.Driver,
              gpus: tuple[Gpu, ...]) -> HardwareProfile | None:
        own = RunDirectory(self.output).hardware if self.output is not None else None
        now_ = datetime.datetime.now(datetime.timezone.utc)
        for path in (own, cache.shared_path()):
            old = cache.read(path)
            if old is not None and cache.is_recent(cache.measured_at(old), now_):
                new = assemble(machine, driver, gpus, {}, {})
                if cache.same_machine(old, new):
                    return cache.reused(old, new)
        return None


def disk_test(quick: bool, free_bytes: int) -> dict[str, Any]:
    """How long and with how many bytes the disk is measured; little of a disk with little left.

    >>> disk_test(False, 1 << 40), disk_test(False, 1 << 28)
    ({'limit_s': 1.5, 'size_bytes': 134217728}, {'limit_s': 1.5, 'size_bytes': 33554432})
    """
    small = quick or free_bytes < 2 << 30
    return {"limit_s": 0.3 if quick else 1.5, "size_bytes": (32 if small else 128) * speed.MIB}


def openable(driver: nvidia.Driver) -> tuple[Gpu, ...]:
    """Of the driver's GPUs those that CUDA_VISIBLE_DEVICES leaves, none where torch is a CPU build."""
    gpus = nvidia.visible(driver.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return gpus if _torch_may_open_gpus() else ()


def _torch_may_open_gpus() -> bool:
    """False when torch is installed as a CPU build; without torch, set-up will install a CUDA build."""
    return bool(support.torch_cuda_version()) or "torch" not in support.installed_packages(("torch",))


def assemble(machine: host.Host, driver: nvidia.Driver, gpus: tuple[Gpu, ...], figures: dict[str, Figure],
             trials: dict[str, str], versions: dict[str, str] | None = None) -> HardwareProfile:
    """The record from its parts. `gpus`: those that torch can use; the driver's others are told as idle.

    `versions`: what the probe reports. The host's limits are read here; a probe's figure goes before them.
    """
    figures = limits.figures(machine.ram_total_bytes, len(gpus)) | figures
    weakest = min((nvidia.capability_of(gpu) for gpu in gpus), default=None)
    facts = support.collect(
        cpu_flags=machine.cpu_flags, capability=weakest, trials=trials, figures=figures,
        idle_gpus=() if gpus else tuple(gpu.name for gpu in driver.gpus), gpu_advice=gpu_advice(driver),
        cudnn=(versions or {}).get("cudnn", ""))
    return HardwareProfile(
        name=profile_name(machine, gpus), source="measured", date=now(), system=machine.system,
        cpu_name=machine.cpu_name, cpu_cores=machine.cpu_cores, cpu_flags=machine.cpu_flags,
        ram_total_bytes=machine.ram_total_bytes, ram_available_bytes=machine.ram_available_bytes, gpus=gpus,
        disk_path=machine.disk_path, disk_free_bytes=machine.disk_free_bytes, figures=figures,
        supports=support.evaluate(facts),
        versions={name: version for name, version in {
            **facts.packages, "torch_cuda": facts.torch_cuda, "driver": driver.version, "cudnn": facts.cudnn,
        }.items() if version})


def gpu_advice(driver: nvidia.Driver) -> str:
    """What to do so that torch can use the driver's GPUs; "" when the driver has none and no fault."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and driver.gpus and support.torch_cuda_version():
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}; unset it to use the GPU."
    if not driver.gpus:
        return driver.what_to_do
    index = nvidia.torch_index(driver.version, driver.gpus[0].capability)
    release = support.installed_packages(("torch",)).get("torch", "").split("+")[0]
    wanted = f"torch=={release}" if release else "torch"
    return f"{sys.executable} -m pip install --force-reinstall {wanted} --index-url {index}"


def profile_name(machine: host.Host, gpus: tuple[Gpu, ...]) -> str:
    """A short name such as `2 x NVIDIA GeForce RTX 3090` or `AMD EPYC, 2 cores`."""
    if not gpus:
        return f"{machine.cpu_name}, {machine.cpu_cores} core{'s' if machine.cpu_cores != 1 else ''}"
    names = [gpu.name for gpu in gpus]
    parts = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name
             for name in dict.fromkeys(names)]
    return ", ".join(parts)


def now() -> str:
    """The date of a measurement, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def probe_command(machine: host.Host) -> list[str]:
    """The command line of the torch subprocess."""
    spills = ["--spills"] if machine.wsl or os.name == "nt" else []
    return [sys.executable, "-m", "training.hardware.probe", "--threads", str(machine.cpu_cores), *spills]


def run_probe(machine: host.Host, tell: Progress, timeout_s: float = PROBE_TIMEOUT_S,
              command: list[str] | None = None) -> dict[str, Any]:
    """Run the torch subprocess and return its JSON. Raises EliteError naming what went wrong.

    It runs in its own process group, which is ended with it on a timeout, on Ctrl+C and on any error.
    """
    command = command or probe_command(machine)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.PIPE,
                                   text=True, errors="replace", env=environment, start_new_session=True)
        late = threading.Event()

        def expire() -> None:
            late.set()
            _end(process)

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        try:
            words = _follow(process.stderr, tell)
            code = process.wait()
        finally:
            timer.cancel()
            _end(process)
        if late.is_set():
            raise EliteError(f"The hardware probe did not end within {timeout_s:g} s; "
                             "`profile --quick` measures without torch.")
        answer.seek(0)
        return _answer(code, answer.read(), words)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _follow(stream: IO[str] | None, tell: Progress) -> list[str]:
    """Pass progress lines on until the stream ends; returns the last other lines."""
    words: list[str] = []
    for line in stream or ():
        if line.startswith(MARK):
            _, done, total, name = line.rstrip("\n").split(" ", 3)
            tell("profile", int(done), int(total), name)
        elif line.strip():
            words = [*words[-19:], line.strip()]
    if stream:
        stream.close()
    return words


def _answer(code: int, text: str, words: list[str]) -> dict[str, Any]:
    try:
        answer = json.loads(text)
        if code == 0 and {"gpus", "figures", "trials"} <= answer.keys():
            return dict(answer)
    except (ValueError, AttributeError):
        pass
    said = words[-1][:200] if words else "it printed nothing"
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = ("install the requirements: `pip install -r requirements.txt`" if "No module named" in said
            else "`profile --quick` measures without torch, `doctor` says what is missing")
    raise EliteError(f"The hardware probe {ended}: {said}; {hint}.")
