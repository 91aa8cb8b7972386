"""The runs in a folder and their state, for `runs`, `resume` and the list that the command offers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from training.errors import DataError, MissingInput
from training.manager import lock
from training.manager.monitor import number, parse_heartbeat, read_rows
from training.rundir import RunDirectory, read_data

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RESUMABLE = ("interrupted", "failed", "prepared")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One run as its directory shows it.

    `state`: done, interrupted, failed, running or prepared (planned, not trained yet). `steps`: planned in
    all. `date`: of the last change, local time in ISO format.
    """

    path: str
    name: str
    state: str
    step: int
    steps: int
    loss: float | None
    date: str
    tier: int
    context_tokens: int
    base_model: str = ""
    error: str = ""


def newest_checkpoint(run_path: Path) -> int | None:
    """The highest step among the finished checkpoints (their manifest is there), or None."""
    steps = [int(match[1]) for path in run_path.glob("checkpoint-*/MANIFEST.json")
             if (match := _CHECKPOINT.fullmatch(path.parent.name))]
    return max(steps, default=None)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory: it has a plan or a configuration of ours."""
    run = RunDirectory(path)
    return run.plan.is_file() or run.config.is_file()


def list_runs(root: Path) -> list[RunInfo]:
    """The runs directly in `root`, newest first; folders that are no runs are passed over."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return []
    found = [describe_run(path) for path in folders if not path.name.startswith(".") and is_run(path)]
    return sorted(found, key=lambda info: (info.date, info.name), reverse=True)


def latest_resumable(root: Path) -> RunInfo | None:
    """The newest run in `root` that is not done and not running, or None."""
    return next((info for info in list_runs(root) if info.state in RESUMABLE), None)


def describe_run(path: Path) -> RunInfo:
    """One run's state, read from its files; whatever is torn counts as not there."""
    run = RunDirectory(path)
    plan, result, rows = _mapping(run.plan), _mapping(run.result), read_rows(run.metrics)
    last = rows[-1] if rows else {}
    return RunInfo(
        path=str(path), name=path.name, state=_state(run, result, bool(rows)),
        step=int(number(last, "step") or number(result, "steps") or 0), steps=_steps(run, plan),
        loss=number(last, "loss"), date=_date(run), tier=int(number(plan, "tier") or 0),
        context_tokens=int(number(plan, "context_tokens") or 0),
        base_model=str(plan.get("base_model") or ""), error=str(result.get("error") or ""))


def _state(run: RunDirectory, result: dict[str, Any], trained: bool) -> str:
    if lock.held(run.path):
        return "running"
    if result.get("state") in ("done", "interrupted", "failed"):
        return str(result["state"])
    if trained or run.result.exists() or run.heartbeat.exists() or newest_checkpoint(run.path) is not None:
        return "interrupted"
    return "prepared"


def _steps(run: RunDirectory, plan: dict[str, Any]) -> int:
    """Planned steps; the trainer's own count wins, since it fits them to the hours granted."""
    try:
        beat = parse_heartbeat(run.heartbeat.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        beat = None
    return beat.steps if beat and beat.steps else int(number(plan, "steps") or 0)


def _date(run: RunDirectory) -> str:
    newest_s = 0.0
    for path in (run.plan, run.config, run.metrics, run.result, run.heartbeat):
        try:
            newest_s = max(newest_s, path.stat().st_mtime)
        except OSError:
            continue
    return datetime.fromtimestamp(newest_s).isoformat(sep=" ", timespec="seconds")


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = read_data(path)
    except (MissingInput, DataError):
        return {}
    return data if isinstance(data, dict) else {}


def find_run(text: str, root: Path) -> Path:
    """A run by its path or by its name in `root`. Raises MissingInput naming the runs there are."""
    for path in (Path(text), root / text):
        if path.is_dir() and is_run(path):
            return path
    names = ", ".join(info.name for info in list_runs(root)[:5]) or "none"
    raise MissingInput(f"No run at {text}. Runs in {root}: {names}. "
                       "`python3 elite_train.py runs` lists them.")
