"""Continuing a run: which one is meant, and which of its stages are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from training import models
from training.command import places
from training.dataset.store import WindowStore
from training.errors import DataError, EliteError, MissingInput, UsageError, raise_all
from training.manager.runs import find_run, latest_resumable, list_runs
from training.records import BaseModel
from training.rundir import RunDirectory
from training.settings import BY_NAME, Config, nearest

# What a resume compares beside the configuration (trainer.identities).
COMPARED = ("data", "base", "windows per update")


def meant(text: str) -> Path:
    """The run named by path or name, or the newest unfinished one. Raises MissingInput when there is none."""
    if text:
        return find_run(text, places.RUNS)
    found = latest_resumable(places.RUNS)
    if found is not None:
        return Path(found.path)
    known = ", ".join(f"{info.name} ({info.state})" for info in list_runs(places.RUNS)[:5])
    raise MissingInput(f"No unfinished run in {places.RUNS.absolute()}; "
                       + (f"there are: {known}." if known else "there are none."))


def allowed(keys: Sequence[str] | None, resume: bool) -> tuple[str, ...]:
    """What `--allow-change` names. Raises UsageError for names of nothing that a resume compares."""
    problems: list[EliteError] = []
    for key in keys or ():
        if key not in BY_NAME and key not in COMPARED and not key.startswith("versions."):
            problems.append(UsageError(f"--allow-change {key} names nothing that a resume compares: it is a "
                                       f"configuration key, {', '.join(COMPARED)}, or versions.PACKAGE."
                                       f"{nearest(key, tuple(BY_NAME))}"))
    if keys and not resume:
        problems.append(UsageError("--allow-change does nothing without --resume."))
    raise_all(problems)
    return tuple(keys or ())


def dataset_is_whole(path: Path) -> bool:
    """Whether the run's windows are there, so that they need not be made again."""
    try:
        WindowStore.open(RunDirectory(path).dataset)
    except (MissingInput, DataError):
        return False
    return True


def base_of(config: Config, progress: Callable[[str, int, int, str], None]) -> BaseModel:
    """The base model a run was planned with, its files fetched. Raises MissingInput."""
    base = models.resolve(config["model.base"])
    models.fetch(base, progress, config["model.revision"])
    return base
