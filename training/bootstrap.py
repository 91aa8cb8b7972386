"""What every start does first: find the requirements, here or in `.venv` beside the command, or set them up.

Standard library only, and few modules of it: this runs at each start, twice when one restarts in `.venv`.
`ensure` returns at once where the running interpreter has every pinned requirement, so an environment of the
user's own is used as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PIN = re.compile(r'^([A-Za-z0-9_.-]+)==([^\s;]+)(?:\s*;\s*python_version\s*(>=|<)\s*"(\d+)\.(\d+)")?$')
_IMPORTS = {"pyyaml": "yaml"}  # where the folder has another name than the package

USAGE = """\
Usage: python3 elite_train.py [OPTIONS] [profile|plan|dataset|resume|runs|report|doctor|ledger]

  A source repository in, a code model tuned on it out. The requirements are not installed yet; any command
  but this help installs them into .venv first and says how large they are.

  --auto              ask nothing            --repo DIR|GIT-URL  what to train on, repeatable
  --output DIR        the run directory      --model-name NAME   its name (runs/NAME)
  --base-model NAME   or DIR, auto, embedded --epochs N          passes over the windows
  --tier N            row of the tier table  --context TOKENS    window length
  --max-hours H       time granted           --seed N            of every random choice
  --resume            continue the run       --fresh             move the old run aside
  --config FILE       YAML of settings       --set KEY=VALUE     one setting, repeatable
  --dry-run           stop after the plan    --json              one JSON document on standard output
  --anyway            even if it does not fit --no-setup         never install anything
  --allow-change KEY  resume although it changed --help          this text, in full once set up
"""


class Place:
    """Where the set-up lives: the checkout, its `.venv` and the files in it."""

    def __init__(self, root: str):
        self.root = root
        self.venv = os.path.join(root, ".venv")
        self.python = os.path.join(self.venv, "Scripts\\python.exe" if os.name == "nt" else "bin/python")
        self.stamp = os.path.join(self.venv, ".elite-ready")
        self.log = os.path.join(self.venv, "setup.log")
        self.requirements = os.path.join(root, "requirements.txt")

    def folders(self) -> list[str]:
        """The folders of `.venv` that hold packages."""
        library = os.path.join(self.venv, "lib")
        inner = [os.path.join(library, name) for name in _names(library) if name.startswith("python3.")]
        return [os.path.join(folder, "site-packages") for folder in [*inner, os.path.join(self.venv, "Lib")]]

    def text(self) -> str:
        """requirements.txt."""
        with open(self.requirements, encoding="utf-8") as file:
            return file.read()

    def stamped(self) -> str:
        """What the last set-up that came to its end was for; empty when there was none."""
        try:
            with open(self.stamp, encoding="utf-8") as file:
                return file.read()
        except (OSError, ValueError):
            return ""


def stamp_text(version: Sequence[int], requirements: str) -> str:
    """The stamp of an environment made with this Python version for these requirements."""
    return f"# Python {version[0]}.{version[1]}\n{requirements}"


def pins(text: str, version: Sequence[int]) -> dict[str, str]:
    """Name and version of every requirement that holds for this Python version.

    >>> pins('numpy==2.4.6; python_version >= "3.11"\\nPyYAML==6.0.3  # note', (3, 10))
    {'pyyaml': '6.0.3'}
    """
    found = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        match = _PIN.match(line)
        if line and not match:
            raise ValueError(f"requirements.txt: {line!r} is no exact pin")
        if match:
            name, pin, relation, major, minor = match.groups()
            newer = relation and tuple(version[:2]) >= (int(major), int(minor))
            if not relation or (relation == ">=") == newer:
                found[_plain(name)] = pin
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def installed(folders: Iterable[str]) -> dict[str, str]:
    """Name and version of every package installed to the end; the first folder wins, as in imports.

    Reads folder names only (2 ms; `importlib.metadata` takes 60 ms). A package cut short has no RECORD yet.
    """
    found: dict[str, str] = {}
    for folder in folders:
        for entry in (name for name in _names(folder) if name.endswith((".dist-info", ".egg-info"))):
            name, _, rest = entry.rpartition(".")[0].partition("-")
            if entry.endswith(".egg-info") or os.path.exists(os.path.join(folder, entry, "RECORD")):
                found.setdefault(_plain(name), rest.split("-py")[0])
    return found


def missing(wanted: dict[str, str], present: dict[str, str]) -> list[str]:
    """The pins that are not met. A local version such as 2.13.0+cpu meets 2.13.0."""
    return [f"{name}=={pin}" for name, pin in wanted.items() if present.get(name, "").split("+")[0] != pin]


def hollow(wanted: Iterable[str], folders: Iterable[str]) -> list[str]:
    """The packages that are registered as installed in `.venv` and whose code is gone."""
    present = {name.lower() for folder in folders for name in _names(folder)}
    return [name for name in wanted if _IMPORTS.get(name, name.replace("-", "_")) not in present]


def ensure(argv: Sequence[str], root: str = ROOT) -> None:
    """Return when the requirements are at hand; else set up `.venv` and start `argv` again inside it.

    Never raises: a problem ends the process with one line and its exit code.
    """
    place = Place(root)
    inside = os.path.realpath(sys.prefix) == os.path.realpath(place.venv)
    wanted = pins(place.text(), sys.version_info[:2])
    if not missing(wanted, installed(sys.path)) and not (inside and hollow(wanted, place.folders())):
        return
    if not inside and place.stamped().partition("\n")[2] == place.text():
        with contextlib.suppress(OSError):  # its interpreter is gone
            restart(place, argv)  # which looks at the packages there
    from training import setup_venv
    sys.exit(setup_venv.find_or_make(place, argv, inside))


def restart(place: Place, argv: Sequence[str]) -> None:
    """Run the same command line with `.venv`'s interpreter in place of this process; does not return.

    Raises OSError when that interpreter cannot be started.
    """
    command = [place.python, *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # os.execv there returns to the shell before the new process has ended
        import subprocess
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)
