"""Continuing a run: which one is meant, and which of its stages are done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training import models
from training.command import places
from training.dataset.store import WindowStore
from training.errors import DataError, MissingInput
from training.manager.runs import find_run, latest_resumable, list_runs
from training.records import BaseModel
from training.rundir import RunDirectory
from training.settings import Config


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
