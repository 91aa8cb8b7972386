"""What must hold before a run starts, all problems at once: output, disk, RAM, limits, inputs, packages."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from training.errors import (
    CannotWrite,
    DataError,
    DoesNotFit,
    EliteError,
    MissingInput,
    Problems,
    UsageError,
    raise_all,
)
from training.manager import lock
from training.manager.runs import is_run
from training.records import GIB, Plan
from training.rundir import RunDirectory, read_data, read_record
from training.settings import Config, read_yaml

Check = Callable[[RunDirectory, Config], list[EliteError]]
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
# Shards, the log, pipes and sockets of one process stay below this; a soft limit of 1024 is usual.
OPEN_FILES = 256
# Threads of one rank: OpenMP's, autograd's, gloo's, the watchers'.
RANK_THREADS = 128
# NCCL's shared buffers of one rank.
SHARED_BYTES = 33 << 20
# The code is younger than this: an earlier date means a clock that was never set (1 January 2026).
EARLIEST_S = 1_767_225_600.0
WEIGHTS = ("*.safetensors", "*.bin")


def check_output(path: Path, resume: bool, fresh: bool) -> None:
    """Whether `path` can be the run directory, before anything is measured.

    Raises CannotWrite when it exists and neither `resume` nor `fresh` was given, is in use, is a file, or
    cannot be made; MissingInput when there is no run to resume; UsageError for both at once.
    """
    if resume and fresh:
        raise UsageError("--resume continues the run and --fresh begins it anew; give one of them.")
    if path.is_symlink() and not path.exists():
        raise CannotWrite(f"{path} is a link to nothing; remove it or choose another --output.")
    if path.exists() and not path.is_dir():
        raise CannotWrite(f"{path} is a file; the output is a folder. Choose another --output.")
    if resume and not is_run(path):
        raise MissingInput(f"{path} holds no run to resume. Leave --resume out to start one there.")
    if _occupied(path) and not resume:
        _check_occupied(path, fresh)
    _check_writable(path)


def _occupied(path: Path) -> bool:
    try:
        names = set(os.listdir(path)) if path.is_dir() else set()
    except OSError as error:
        raise CannotWrite(f"Cannot read {path}: {error.strerror}. Choose another --output.") from error
    return bool(names - {lock.NAME, lock.TRAINER_NAME})


def _check_occupied(path: Path, fresh: bool) -> None:
    if not is_run(path):
        raise CannotWrite(f"{path} exists and is not a run directory; nothing in it is touched. "
                          "Choose another --output.")
    if not fresh:
        raise CannotWrite(f"{path} already holds a run. --resume continues it, --fresh sets it aside and "
                          "starts anew, another --output leaves it alone.")
    if lock.held(path):
        raise CannotWrite(f"{path} is in use by another process, so --fresh cannot set it aside. Stop that "
                          "run or choose another --output.")


def _check_writable(path: Path) -> None:
    """Write and rename a file in the nearest folder that exists; nothing stays behind."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise CannotWrite(f"Cannot make {path}: {folder} is a file. Choose another --output.")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".elite-") as made:
            probe = Path(made) / "probe"
            probe.write_bytes(b"\0")
            os.rename(probe, probe.with_name("renamed"))
    except OSError as error:
        raise CannotWrite(f"Cannot write in {folder}: {error.strerror}. Choose another --output.") from error


def check_disk(path: Path, needed_bytes: int, what: str = "The run") -> None:
    """Raise CannotWrite when the file system that holds `path` has less than `needed_bytes` free."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CannotWrite(f"{what} needs {needed_bytes / GIB:.2f} GiB on the disk of {path}; "
                          f"{free_bytes / GIB:.2f} GiB is free. Free some room or choose another --output.")


def read_config(run: RunDirectory) -> Config:
    """The run's configuration. Raises MissingInput, UsageError or Problems."""
    return Config(read_yaml(run.config))


def check_run(run: RunDirectory, checks: Sequence[Check] = ()) -> tuple[str, ...]:
    """Every check of a prepared run. Returns warnings; raises what must be mended, all at once."""
    found = _caught(lambda: _check_writable(run.path))
    config, plan = None, None
    try:
        config = read_config(run)
    except EliteError as error:
        found.append(error)
    try:
        plan = read_record(Plan, run.plan)
    except EliteError as error:
        found.append(error)
    if config is not None:
        found += model_problems(config)
        found += process_problems(config) + pinned_problems(run, config) + port_problems(config)
        if plan is not None:
            found += room_problems(run, plan, config)
        for check in checks:
            found += check(run, config)
    found += dataset_problems(run) + limit_problems() + package_problems()
    raise_all(_flat(found))
    return (*version_warnings(), *clock_warnings(run))


def _caught(check: Callable[[], None]) -> list[EliteError]:
    try:
        check()
    except EliteError as error:
        return [error]
    return []


def _flat(found: Iterable[EliteError]) -> list[EliteError]:
    return [problem for error in found
            for problem in (error.problems if isinstance(error, Problems) else (error,))]


def room_problems(run: RunDirectory, plan: Plan, config: Mapping[str, Any]) -> list[EliteError]:
    """Whether disk and RAM hold what the plan counts; what the run holds already is not needed again."""
    present_bytes = _size_bytes(run.path)
    found = _caught(lambda: check_disk(run.path, max(0, plan.memory.disk_bytes - present_bytes)))
    ranks = int(config["device.count"])
    on_cpu = config["device.kind"] == "cpu"
    needed_bytes = ranks * (max(plan.memory.device_bytes, plan.memory.host_bytes) if on_cpu
                            else plan.memory.host_bytes)
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        found.append(DoesNotFit(
            f"The plan needs {needed_bytes / GIB:.1f} GiB of RAM; {free_bytes / GIB:.1f} GiB is free now. "
            "End other programs or plan a smaller --context or --tier."))
    return found


def _size_bytes(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def dataset_problems(run: RunDirectory) -> list[EliteError]:
    """Whether the dataset was finished and holds train windows and tokens to train on."""
    path = run.dataset / "manifest.json"
    try:
        manifest = read_data(path)
    except EliteError as error:
        return [error]
    again = "make the dataset again with --fresh"
    try:
        windows, trained = int(manifest["windows"]["train"]), int(manifest["tokens"]["trained_per_epoch"])
    except (KeyError, TypeError, ValueError):
        return [DataError(f"{path} names no train windows or trained tokens; {again}.")]
    found: list[EliteError] = []
    if windows < 1 or trained < 1:
        found.append(DataError(f"The dataset in {run.dataset} has {windows} train windows and {trained} "
                               "tokens to train on; choose more code or a smaller --context."))
    if not (run.dataset / "tokens.bin").is_file():
        found.append(MissingInput(f"{run.dataset / 'tokens.bin'} is not there; {again}."))
    return found


def model_problems(config: Mapping[str, Any]) -> list[EliteError]:
    """Whether a base model given as a folder is whole enough to load; names of the hub are not looked up."""
    base = str(config["model.base"])
    folder = Path(base).expanduser()
    if base == "embedded" or not (folder.is_absolute() or base.startswith(".") or folder.is_dir()):
        return []
    if not folder.is_dir():
        return [MissingInput(f"The base model's folder {base} is not there; move it back.")]
    absent = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        absent.append("weights (*.safetensors)")
    if not absent:
        return []
    return [MissingInput(f"The base model's folder {base} has no {' and no '.join(absent)}; complete it.")]


def limit_problems(needed: int = OPEN_FILES) -> list[EliteError]:
    """Whether this process may open enough files; a low soft limit is raised to what is needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return []
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return []
    return [DoesNotFit(f"A process may open {hard} files here and training opens up to {needed}; "
                       f"raise the limit with `ulimit -Hn {needed}` as an administrator.")]


def process_problems(config: Mapping[str, Any]) -> list[EliteError]:
    """Whether this user may start as many threads as the ranks need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    needed = int(config["device.count"]) * RANK_THREADS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return []
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NPROC, (needed, hard))
        return []
    return [DoesNotFit(f"This user may have {hard} processes and threads and training needs up to {needed}; "
                       f"raise the limit with `ulimit -Hu {needed}` as an administrator.")]


def pinned_problems(run: RunDirectory, config: Mapping[str, Any]) -> list[EliteError]:
    """Whether what is to be pinned was measured to be possible (`host.pinned_limit` of the profile)."""
    if config["stream.inputs"] != "pinned" and config["stream.pages"] != "pinned":
        return []
    try:
        limit = read_data(run.hardware)["figures"]["host.pinned_limit"]["value"]
        needed = read_data(run.plan)["memory"]["host_bytes"]
    except (EliteError, KeyError, TypeError):
        return []
    if not limit or needed <= limit:
        return []
    return [DoesNotFit(f"The plan has up to {needed / GIB:.1f} GiB of host memory and {limit / GIB:.1f} GiB "
                       "can be pinned here; set stream.inputs=pageable and stream.pages=pageable.")]


def port_problems(config: Mapping[str, Any]) -> list[EliteError]:
    """Whether ranks can reach each other on 127.0.0.1, and share memory where a GPU library wants it."""
    if int(config["device.count"]) < 2:
        return []
    found: list[EliteError] = []
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        found.append(MissingInput(f"No port of 127.0.0.1 can be opened ({error.strerror}), and ranks talk "
                                  "through one; bring the loopback interface up (`ip link set lo up`)."))
    with contextlib.suppress(OSError):
        free_bytes = shutil.disk_usage("/dev/shm").free
        needed_bytes = int(config["device.count"]) * SHARED_BYTES
        if config["device.kind"] == "cuda" and free_bytes < needed_bytes:
            found.append(DoesNotFit(f"/dev/shm has {free_bytes / 2**20:.0f} MiB and NCCL may need "
                                    f"{needed_bytes / 2**20:.0f}; start the container with a larger one "
                                    "(--shm-size=1g)."))
    return found


def package_problems(requirements: Path = REQUIREMENTS) -> list[EliteError]:
    """Whether each pinned package is installed, without importing one."""
    absent = [name for name, _ in pins(_text(requirements)) if _installed(name) is None]
    if not absent:
        return []
    return [MissingInput(f"Not installed: {', '.join(absent)}. Install with "
                         f"{sys.executable} -m pip install -r {requirements}.")]


def version_warnings(requirements: Path = REQUIREMENTS) -> tuple[str, ...]:
    """Packages whose version is not the one that was tested."""
    return tuple(f"{name} {have} is installed; {wanted} was tested"
                 for name, wanted in pins(_text(requirements))
                 if (have := _installed(name)) is not None and have.split("+")[0] != wanted)


def clock_warnings(run: RunDirectory, now_s: float | None = None) -> tuple[str, ...]:
    """A clock that was never set, or is behind the run's own files: only dates are wrong then."""
    now_s = time.time() if now_s is None else now_s
    if now_s < EARLIEST_S:
        return (f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now_s))}; dates will be wrong",)
    for path in (run.plan, run.metrics):
        with contextlib.suppress(OSError):
            ahead_s = path.stat().st_mtime - now_s
            if ahead_s > 3600:
                return (f"{path.name} is {ahead_s / 3600:.0f} h newer than the clock; dates will be wrong",)
    return ()


def pins(text: str, python: tuple[int, ...] = sys.version_info[:2]) -> list[tuple[str, str]]:
    """(package, version) of each `name==version` line that holds for this Python.

    >>> pins("torch==2.13.0\\nnumpy==1.0; python_version < '3.10'  # old", (3, 11))
    [('torch', '2.13.0')]
    """
    found = []
    for line in text.splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        match = re.fullmatch(r"\s*([A-Za-z0-9_.-]+)==([^\s]+)\s*", requirement)
        if match and _holds(marker, python):
            found.append((match[1], match[2]))
    return found


def _holds(marker: str, python: tuple[int, ...]) -> bool:
    match = re.fullmatch(r"\s*python_version\s*(<|>=)\s*['\"](\d+)\.(\d+)['\"]\s*", marker)
    if not match:
        return True
    limit = (int(match[2]), int(match[3]))
    return python < limit if match[1] == "<" else python >= limit


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
