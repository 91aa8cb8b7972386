"""What is installed, what works on this machine, and what to do about the rest.

Every check is one line. `exit_code` is 0 when nothing that training needs is missing; else the code of the
first required check that fails: 70 the installation, 71 the machine is too small, 73 cannot write.
Only the standard library is imported at the top, so that a broken installation can still be examined.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CannotWrite, DoesNotFit, EliteError
from training.records import GIB, Gpu, HardwareProfile

if TYPE_CHECKING:
    from training.hardware.nvidia import Driver

ROOT = Path(__file__).resolve().parent.parent
LEAST_PYTHON = (3, 10)
LEAST_DISK_BYTES = 2 * GIB
LEAST_RAM_BYTES = 2 * GIB
PIP = f"{sys.executable} -m pip install"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at. `exit_code`: 0 for what training can do without, else the code of its failure."""

    name: str
    group: str
    works: bool
    detail: str
    what_to_do: str = ""
    exit_code: int = 0


def examine(quick: bool = True) -> list[Check]:
    """Every check, in the order to read them. Quick: two seconds; else optimizations are tried with torch."""
    checks = [python_check(sys.version_info[:3]), venv_check()]
    checks += requirement_checks(ROOT / "requirements.txt")
    missing_basics = any(not check.works and check.name in ("psutil", "numpy") for check in checks)
    checks += machine_checks(ROOT)
    checks += tool_checks()
    checks += [cache_check(os.environ), *([] if missing_basics else hardware_checks(quick))]
    return checks


def exit_code(checks: Sequence[Check]) -> int:
    """0, or the code of the first check that training needs and that fails."""
    return next((check.exit_code for check in checks if check.exit_code and not check.works), 0)


def rows(checks: Sequence[Check]) -> list[tuple[str, str, str, str]]:
    """Table rows (group, name, state, detail with what to do); the group stands in its first row only.

    State: `yes`, `no` for what training can do without, `MISSING` for what it needs.
    """
    found, last = [], ""
    for check in checks:
        state = "yes" if check.works else "MISSING" if check.exit_code else "no"
        advice = f"\n-> {check.what_to_do}" if check.what_to_do and not check.works else ""
        found.append(("" if check.group == last else check.group, check.name, state, check.detail + advice))
        last = check.group
    return found


def python_check(version: tuple[int, int, int]) -> Check:
    """Whether this interpreter is recent enough."""
    needed = ".".join(map(str, LEAST_PYTHON))
    return Check(name="Python", group="installation", works=version[:2] >= LEAST_PYTHON, exit_code=70,
                 detail=f"{'.'.join(map(str, version))}; {needed} or newer is needed",
                 what_to_do=f"Install Python {needed} or newer and run the command with it.")


def venv_check() -> Check:
    """Whether a virtual environment is active; not required."""
    active = sys.prefix != sys.base_prefix
    return Check(name="virtual environment", group="installation", works=active,
                 detail=sys.prefix if active else f"none; packages go into {sys.prefix}",
                 what_to_do="`python3 elite_train.py` makes .venv on its first start.")


def requirement_checks(path: Path) -> list[Check]:
    """One check per line of requirements.txt whose marker fits this interpreter."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return [Check(name="requirements.txt", group="packages", works=False, exit_code=70,
                      detail=f"{path}: {error.strerror}", what_to_do="Restore the file.")]
    return [requirement_check(line) for line in requirement_lines(text)]


def requirement_lines(text: str) -> list[str]:
    """The requirements in the file's text, without comments and without those whose marker does not fit.

    >>> requirement_lines("# note\\nrich==15.0.0  # tables\\nnumpy==1.0; python_version < '3'\\n")
    ['rich==15.0.0']
    """
    found = []
    for line in text.splitlines():
        entry = re.sub(r"(^|\s)#.*$", "", line).strip()
        if entry and not entry.startswith("-"):
            marker = _parser()(entry).marker
            if marker is None or marker.evaluate():
                found.append(entry.split(";")[0].strip())
    return found


def _parser() -> Any:
    """The requirement parser: `packaging`, or the copy inside pip when that is what is missing."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    return Requirement


def requirement_check(line: str) -> Check:
    """Installed version against the pinned one; a local suffix (`+cpu`) is the same version.

    A package that is not there ends training; another version may work and was not tested.
    """
    from importlib.metadata import PackageNotFoundError, version

    requirement = _parser()(line)
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Check(name=requirement.name, group="packages", works=False, exit_code=70,
                     detail=f"not installed; {line} is needed", what_to_do=f"{PIP} '{line}'")
    right = requirement.specifier.contains(installed, prereleases=True)
    detail = installed if right else f"{installed} is installed; {line} is what was tested"
    return Check(name=requirement.name, group="packages", works=right, detail=detail,
                 what_to_do=f"{PIP} '{line}'")


def machine_checks(folder: Path) -> list[Check]:
    """Disk space, host memory, and whether runs can be written."""
    free_bytes = shutil.disk_usage(folder).free
    found = [Check(name="disk", group="machine", works=free_bytes >= LEAST_DISK_BYTES,
                   exit_code=DoesNotFit.exit_code,
                   detail=f"{free_bytes / GIB:.1f} GiB free; {LEAST_DISK_BYTES // GIB} GiB is the least",
                   what_to_do="Free some space, or put --output on another disk.")]
    return [*found, memory_check(), write_check(folder / "runs")]


def memory_check() -> Check:
    """Host memory that is available now, within a container's limit."""
    try:
        from training.hardware.host import fetch
        available_bytes = fetch(None).ram_available_bytes
    except ImportError as error:
        return Check(name="memory", group="machine", works=False, detail=f"not measured: {error}")
    return Check(name="memory", group="machine", works=available_bytes >= LEAST_RAM_BYTES,
                 exit_code=DoesNotFit.exit_code,
                 detail=f"{available_bytes / GIB:.1f} GiB available; "
                        f"{LEAST_RAM_BYTES // GIB} GiB is the least",
                 what_to_do="Close other programs or raise the container's memory limit.")


def write_check(folder: Path) -> Check:
    """Whether a file can be written in `folder`, or beside it while it does not exist."""
    place = folder if folder.is_dir() else folder.parent
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".elite-doctor-") as file:
            file.write(b"x")
    except OSError as error:
        return Check(name="runs/", group="machine", works=False, exit_code=CannotWrite.exit_code,
                     detail=f"{place} cannot be written: {error.strerror}",
                     what_to_do="Change its permissions, or give --output a folder of yours.")
    return Check(name="runs/", group="machine", works=True, detail=f"{place} can be written")


def tool_checks() -> list[Check]:
    """Programs that some steps call: git for repositories by URL."""
    git = shutil.which("git")
    return [Check(name="git", group="tools", works=bool(git),
                  detail=git or "not found; only git URLs need it",
                  what_to_do="Install git: `sudo apt install git`.")]


def cache_check(environment: Mapping[str, str]) -> Check:
    """The Hugging Face cache and whether offline mode is set."""
    home = Path(environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME")
                                                   or Path.home() / ".cache") / "huggingface")
    hub = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    models = len(list(hub.glob("models--*"))) if hub.is_dir() else 0
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    count = f"{models} model{'' if models == 1 else 's'} in {hub}"
    if not offline:
        return Check(name="Hugging Face cache", group="models", works=True, detail=count)
    return Check(name="Hugging Face cache", group="models", works=models > 0,
                 detail=f"{count}; HF_HUB_OFFLINE is set, so nothing is downloaded",
                 what_to_do="Unset HF_HUB_OFFLINE, or use a local folder or `--base-model embedded`.")


def hardware_checks(quick: bool) -> list[Check]:
    """The GPU, DeepSpeed's op cache, and one check per optimization."""
    from training.hardware import nvidia, support
    from training.hardware.profiler import HardwareProfiler

    profiler, failed = HardwareProfiler(ROOT), []
    try:
        profile = profiler.profile(quick=quick)
    except EliteError as error:
        failed = [Check(name="torch", group="machine", works=False, exit_code=70, detail=str(error))]
        profile = profiler.profile(quick=True)
    cache = support.op_cache(support.torch_cuda_version())
    return [*failed, *gpu_checks(profile, nvidia.fetch()), op_check(cache, support.built_ops(cache)),
            *support_checks(profile)]


def gpu_checks(profile: HardwareProfile, driver: Driver) -> list[Check]:
    """Each GPU that training can use, or why there is none."""
    notes = [Check(name="note", group="GPU", works=False, detail=note) for note in driver.notes]
    if profile.gpus:
        return [Check(name=f"GPU {gpu.index}", group="GPU", works=True, detail=gpu_line(gpu))
                for gpu in profile.gpus] + notes
    cuda = profile.supports["cuda"]
    why = cuda.why if driver.gpus or not driver.problem else f"{cuda.why}: {driver.problem}"
    return [Check(name="GPU", group="GPU", works=False, detail=f"{why}; training runs on the CPU",
                  what_to_do=cuda.what_to_do), *notes]


def gpu_line(gpu: Gpu) -> str:
    """One GPU in words: name, architecture, capability, free and total memory."""
    return (f"{gpu.name} ({gpu.architecture}, {gpu.capability}), {gpu.free_bytes / GIB:.1f} of "
            f"{gpu.total_bytes / GIB:.1f} GiB free")


def op_check(cache: Path, built: Sequence[str]) -> Check:
    """DeepSpeed's compiled ops; what is not there is compiled on first use."""
    return Check(name="DeepSpeed ops", group="optimizations", works=bool(built),
                 detail=f"{', '.join(built)} in {cache}" if built
                 else f"none compiled yet in {cache}; the first run that needs one takes 1-2 minutes longer",
                 what_to_do="bash install_extreme_optimizations.sh --only deepspeed-ops")


def support_checks(profile: HardwareProfile) -> list[Check]:
    """One check per optimization that the profile knows of; `cuda` stands with the GPUs."""
    return [Check(name=name, group="optimizations", works=answer.works, detail=answer.why,
                  what_to_do=answer.what_to_do)
            for name, answer in profile.supports.items() if name != "cuda"]
