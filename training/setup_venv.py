"""Makes and mends `.venv`: says what and how large, installs with visible progress, stamps last.

Standard library only. Without its stamp a set-up was cut short, and the next start completes it.
Run as `python3 -m training.setup_venv [--dev]` it makes the environment without starting the command.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training.bootstrap import ROOT, USAGE, Place, hollow, installed, missing, pins, restart, stamp_text
from training.errors import CannotWrite, EliteError, MissingInput, StoppedByUser
from training.pipview import PipProgress, follow, size_text

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Bytes fetched, bytes on disk, packages: measured on Linux x86-64; for the CUDA build the sum of its wheels.
CPU_SIZE = (330_000_000, 1_300_000_000, 49)
CUDA_SIZE = (2_900_000_000, 5_400_000_000, 68)
_OTHERS_PLACES = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "__PYVENV_LAUNCHER__")


def find_or_make(place: Place, argv: Sequence[str], inside: bool) -> int:
    """Set up what is missing and start again; returns an exit code only when the command is not to run.

    `inside`: the running interpreter is `.venv`'s own.
    """
    try:
        problem = venv_problem(place)
        if problem and {"--help", "-h"} & set(argv[1:]):
            sys.stdout.write(USAGE)
            return 0
        if problem and "--no-setup" in argv:
            _refuse(place, problem)
        elif problem:
            set_up(place, problem)
        elif inside:
            return _hidden(place)
        restart(place, argv)
    except EliteError as error:
        return _failed(error, argv)
    except KeyboardInterrupt:
        return _failed(StoppedByUser("Stopped; nothing was changed."), argv)
    return 70


def _hidden(place: Place) -> int:
    sys.stderr.write(f"{place.venv} is whole, but PYTHONPATH hides its packages behind others: "
                     f"{os.environ.get('PYTHONPATH', '')!r}. Unset it and start again.\n")
    return 66


def _refuse(place: Place, problem: str) -> None:
    version = runs_as(place.python)
    if version is None or lacks(place, version):
        raise MissingInput(f"The requirements are not installed ({problem}) and --no-setup forbids it. "
                           f"Run: {by_hand(place)}")


def _failed(error: EliteError, argv: Sequence[str]) -> int:
    if "--json" in argv:
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": error.exit_code}) + "\n")
    sys.stderr.write(f"{error}\n")
    return error.exit_code


def venv_problem(place: Place) -> str:
    """Why `.venv` cannot be used as it is, in a few words; empty when it can."""
    if not os.path.lexists(place.venv):
        return "there is no .venv yet"
    version = runs_as(place.python)
    if version is None:
        return ".venv has no Python that runs"
    if not place.stamped():
        return ".venv was left half-made"
    if place.stamped() != stamp_text(version, place.text()):
        return ".venv was made for other requirements"
    if lacking := lacks(place, version) or hollow(pins(place.text(), version), place.folders()):
        return f".venv lacks {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}"
    return ""


def lacks(place: Place, version: Sequence[int], extra: str = "") -> list[str]:
    """The pins of requirements.txt, and of one more file, that `.venv` does not meet."""
    text = place.text() + (Path(place.root, extra).read_text(encoding="utf-8") if extra else "")
    return missing(pins(text, version), installed(place.folders()))


def runs_as(python: str) -> tuple[int, int] | None:
    """The version an interpreter reports, or None when it does not run."""
    try:
        done = subprocess.run([python, "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"],
                              capture_output=True, text=True, timeout=30, check=True)
        major, minor = done.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def by_hand(place: Place) -> str:
    """The shell command that does what the set-up does."""
    index = f" --extra-index-url {CPU_INDEX}" if cpu_build_is_enough() else ""
    python, venv, inside, requirements = (shlex.quote(str(path)) for path in (
        sys.executable, place.venv, place.python, place.requirements))
    return f"{python} -m venv {venv} && {inside} -m pip install -r {requirements}{index}"


def cpu_build_is_enough() -> bool:
    """Whether torch's CUDA libraries (4 GB) would be of no use: Linux without an NVIDIA driver."""
    if platform.system() != "Linux":
        return False  # elsewhere the package index holds no CUDA build
    return not (os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi"))


def set_up(place: Place, problem: str, extra: str = "") -> None:
    """Make or mend `.venv` and stamp it. `extra`: one more requirements file, for developers.

    Raises MissingInput (no venv module, pip failed), CannotWrite (no room), StoppedByUser.
    """
    with _alone(place):
        if not extra and not venv_problem(place):
            return  # another start did it while this one waited
        _check_room(place, problem)
        Path(place.stamp).unlink(missing_ok=True)
        try:
            _make_venv(place)
            _forget_torn(place)
            _install(place, extra)
            version = _verified(place)
        except KeyboardInterrupt:
            raise StoppedByUser("Set-up stopped; .venv is kept and the next start completes it.") from None
        except OSError as error:
            raise CannotWrite(f"Cannot write {place.venv}: {error.strerror}.") from error
        Path(place.stamp).write_text(stamp_text(version, place.text()), encoding="utf-8")
    sys.stderr.write(f"Set-up done in {place.venv}.\n\n")


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """One set-up at a time: the kernel drops this lock with the process, so none is left behind."""
    if os.name == "nt":
        yield
        return
    import fcntl
    with open(place.requirements) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("Another start is setting up .venv; waiting for it.\n")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def _size() -> tuple[int, int, int]:
    return CPU_SIZE if cpu_build_is_enough() or platform.system() != "Linux" else CUDA_SIZE


def _check_room(place: Place, problem: str) -> None:
    fetched, on_disk, packages = _size()
    there = sum(file.stat().st_size for folder in place.folders() for file in Path(folder).rglob("*")
                if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(place.root).free
    about = "up to" if there else "about"
    sys.stderr.write(f"ELITE needs {packages} packages, PyTorch among them, and {problem}.\n"
                     f"Installing requirements.txt into {place.venv}:\n"
                     f"{about} {size_text(fetched)} to fetch, {size_text(on_disk)} on disk "
                     f"({size_text(there)} there, {size_text(free)} free).\n")
    if free < max(on_disk * 4 // 3 - there, 100_000_000 if there < on_disk else 0):
        raise CannotWrite(f"The set-up needs {size_text(on_disk * 4 // 3 - there)} free at {place.root}; "
                          f"{size_text(free)} is. Free some room or move the checkout.")


def _make_venv(place: Place) -> None:
    if runs_as(place.python) is not None and _pip_runs(place):
        return
    try:
        import ensurepip  # noqa: F401  Debian ships Python without it
        import venv  # noqa: F401
    except ImportError:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise MissingInput(f"This Python ({sys.executable}) cannot make environments: the venv module is not "
                           f"installed. On Debian and Ubuntu: sudo apt install {package}") from None
    if os.path.lexists(place.venv):
        sys.stderr.write(f"Rebuilding {place.venv}.\n")
    base = getattr(sys, "_base_executable", None) or sys.executable  # `.venv` must not rebuild itself
    made = subprocess.run([base, "-m", "venv", "--clear", place.venv],
                          env=_clean_environment(), capture_output=True, text=True, check=False)
    if made.returncode:
        last = (made.stderr or made.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise CannotWrite(f"Cannot make {place.venv}: {last[0]}. By hand: {by_hand(place)}")


def _forget_torn(place: Place) -> None:
    """Unregister packages without code or cut short while unpacking, which pip would take for installed."""
    version = runs_as(place.python) or (0, 0)
    gone = {name.replace("-", "_") for name in hollow(pins(place.text(), version), place.folders())}
    for folder in place.folders():
        for info in Path(folder).glob("*.dist-info"):
            if not (info / "RECORD").exists() or info.name.partition("-")[0].lower() in gone:
                shutil.rmtree(info)


def _pip_runs(place: Place) -> bool:
    return subprocess.run([place.python, "-m", "pip", "--version"], env=_clean_environment(),
                          capture_output=True, check=False).returncode == 0


def _clean_environment() -> dict[str, str]:
    """Without what makes pip look at, or install into, another place than `.venv`."""
    return {name: value for name, value in os.environ.items() if name not in _OTHERS_PLACES}


def _install(place: Place, extra: str) -> None:
    progress = PipProgress(_size()[2])
    absent = lacks(place, runs_as(place.python) or (0, 0))
    torch = next((f"{pin}+cpu" for pin in absent if pin.startswith("torch==")), "")
    if torch and cpu_build_is_enough():
        # The configured sources first (no other host is asked when they hold it), then PyTorch's own.
        theirs = ["--no-deps", "--retries=1", "--timeout=15", f"--index-url={CPU_INDEX}", torch]
        if _pip(place, progress, [torch]) and _pip(place, progress, theirs):
            sys.stderr.write("PyTorch's CPU build cannot be fetched; taking the default one (about "
                             f"{size_text(CUDA_SIZE[1])} on disk, with CUDA libraries).\n")
    files = ["-r", place.requirements, *(["-r", os.path.join(place.root, extra)] if extra else [])]
    if tail := _pip(place, progress, files):
        sys.stderr.write("".join(f"  {line}\n" for line in tail))
        raise MissingInput(f"pip could not install the requirements (all it said: {place.log}). The next "
                           f"start, with network, goes on from here. By hand: {by_hand(place)}")


def _pip(place: Place, progress: PipProgress, arguments: list[str]) -> list[str]:
    """Run `pip install`; nothing when it worked, else its last lines."""
    command = [place.python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
               "--no-color", "--progress-bar=off", *arguments]
    return follow(command, _clean_environment(), Path(place.log), progress,
                  packages=lambda: installed(place.folders()))


def _verified(place: Place) -> tuple[int, int]:
    version = runs_as(place.python) or (0, 0)
    lacking = lacks(place, version)
    sys.stderr.write("Checking that PyTorch loads.\n")
    check = subprocess.run([place.python, "-c", "import torch, typer, yaml"],
                           env=_clean_environment(), capture_output=True, text=True, check=False)
    if lacking or check.returncode:
        said = check.stderr.strip().splitlines() or [f"exit code {check.returncode}"]
        reason = f"lacks {', '.join(lacking)}" if lacking else said[-1]
        raise MissingInput(f"{place.venv} was installed and does not work: {reason}. "
                           f"Remove it and start again, or by hand: {by_hand(place)}")
    return version


def main(argv: Sequence[str], root: str = ROOT) -> int:
    """Make or mend `.venv`, with the developers' tools when `--dev` is given; returns the exit code."""
    place, extra = Place(root), "requirements-dev.txt" if "--dev" in argv else ""
    try:
        problem = venv_problem(place)
        if not problem and (lacking := lacks(place, runs_as(place.python) or (0, 0), extra)):
            problem = f".venv lacks {', '.join(lacking)}"
        if problem:
            set_up(place, problem, extra)
    except EliteError as error:
        return _failed(error, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
