"""What the trainer tells the outside while it runs: heartbeat.json, metrics.jsonl, evaluations.jsonl."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.errors import CannotWrite
from training.rundir import RunDirectory

log = logging.getLogger(__name__)

BEATS_PER_S = 4.0
# What an evaluation was made of; a line that does not say is of the last weights.
LAST, AVERAGED = "last", "averaged"
Progress = Callable[..., None]


class Heartbeat:
    """Rewrites heartbeat.json: at once when the phase changes, else at most `BEATS_PER_S` times a second."""

    def __init__(self, run: RunDirectory, active: bool = True):
        """Inactive on every rank but 0."""
        self._path = run.heartbeat
        self._active = active
        self.phase = ""
        self._last_s = 0.0
        self.step = 0
        self.steps = 0

    def beat(self, phase: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Tell the phase and how far it is (`total` 0: unknown)."""
        now = time.monotonic()
        if not self._active or (phase == self.phase and now - self._last_s < 1 / BEATS_PER_S):
            self.phase = phase
            return
        self.phase, self._last_s = phase, now
        line = {"pid": os.getpid(), "phase": phase, "step": self.step, "steps": self.steps, "done": done,
                "total": total, "detail": detail, "time": time.time()}
        aside = self._path.with_name(f".heartbeat-{os.getpid()}")
        try:
            aside.write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
            os.replace(aside, self._path)
        except OSError:
            pass  # a full disk must not end the training; the checkpoint will tell

    def progress(self, phase: str, check: Callable[[], None]) -> Progress:
        """A progress callback that beats under one phase; `check` may raise to stop what reports to it."""
        def report(inner: str, done: int, total: int, detail: str = "") -> None:
            check()
            self.beat(phase, done, total, detail or inner)
        return report


class Journal:
    """Appends JSON lines; after a resume each step stands there once."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._unwritten: dict[Path, list[dict[str, Any]]] = {run.metrics: [], run.evaluations: []}

    def rewind(self, step: int, identity: str) -> None:
        """Drop metrics after `step`, evaluations after it or of another configuration, and torn lines."""
        wanted: dict[Path, Callable[[dict[str, Any]], bool]] = {
            self._run.metrics: lambda line: line["step"] <= step,
            self._run.evaluations: lambda line: line["step"] <= step and line.get("identity") == identity}
        for path, keep in wanted.items():
            self._unwritten[path] = list(filter(keep, self._unwritten[path]))
            _keep(path, keep)

    def metrics(self, line: dict[str, Any]) -> None:
        """One line for one optimizer step. A disk that refuses ends no training: lines wait for the next."""
        self._add(self._run.metrics, line)

    def _add(self, path: Path, line: dict[str, Any]) -> None:
        """One line more of a file, and with it what waits for any of them."""
        self._unwritten[path].append({key: _finite(value) for key, value in line.items()})
        for place, waiting in self._unwritten.items():
            try:
                _append(place, *waiting)
            except OSError as error:
                if place == path and len(waiting) == 1:
                    log.warning("Cannot write %s: %s. The training goes on.", path, error.strerror)
            else:
                waiting.clear()

    def changes(self, changed: Sequence[dict[str, Any]], where: str) -> None:
        """What was allowed to change since a checkpoint. Raises CannotWrite."""
        for change in changed:
            log.warning("%s was %r in %s and is %r now, as --allow-change %s allows", change["key"],
                        change["before"], where, change["after"], change["key"])
        try:
            _append(self._run.changes, *({**change, "since": where, "time": time.time()}
                                         for change in changed))
        except OSError as error:
            raise CannotWrite(f"Cannot write {self._run.changes}: {error.strerror}.") from error

    def evaluation(self, line: dict[str, Any]) -> None:
        """One line for one evaluation; where the disk refuses, as for `metrics`."""
        self._add(self._run.evaluations, line)

    def evaluation_at(self, step: int, weights: str = LAST) -> dict[str, Any] | None:
        """The evaluation made at a step, or None."""
        found = [line for line in self.evaluations(weights) if line.get("step") == step]
        return found[-1] if found else None

    def evaluations(self, weights: str = LAST) -> list[dict[str, Any]]:
        """All evaluations of the steps' own weights (`LAST`) or of their average (`AVERAGED`), oldest first.
        """
        path = self._run.evaluations
        return [line for line in (*read_lines(path), *self._unwritten[path])
                if line.get("weights", LAST) == weights]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; torn ones and a missing file give nothing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if isinstance(data, dict):
            found.append(data)
    return found


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if isinstance(line.get("step"), int) and wanted(line)]
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_text("".join(_line(item) for item in kept), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CannotWrite(f"Cannot write {path}: {error.strerror}.") from error


def _append(path: Path, *lines: dict[str, Any]) -> None:
    """All lines or none: what a full disk took of them is taken back."""
    if not lines:
        return
    text = "".join(map(_line, lines)).encode()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(text) == len(text):
                return
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _line(data: dict[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in data.items()}, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
