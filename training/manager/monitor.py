"""Reads a running trainer's heartbeat.json and metrics.jsonl into one progress line."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.manager.forecast import Forecast, LossForecast
from training.records import GIB
from training.rundir import RunDirectory

# Steps that the shown speed and the time left are averaged over.
SMOOTHED_STEPS = 10
# Steps whose median is learned from, and from how many on. The first two of a session warm up.
REMEMBERED_STEPS, LEARNED_STEPS = 64, 5
# A longer pause between two looks means that the command itself was stopped, as when a laptop sleeps.
ASLEEP_S = 10.0
# Seconds without a sign of life until a trainer counts as hung, by phase. DeepSpeed's op build took 64-95 s
# on 2 cores; 14 GB of weights from a slow disk take five minutes; a held-out window as long as a step.
QUIET_LIMIT_S = 600.0
QUIET_LIMITS_S = {"compile_ops": 1800.0, "load": 1800.0, "save": 1800.0, "export": 1800.0, "train": 1800.0}
# What the training line says of these phases between two updates.
ASIDE = {"save": "saving {}", "evaluate": "evaluating"}
# While it trains the limit is learned: so many steps of this session's median, and at least so long.
QUIET_STEPS, QUIET_LEAST_S = 10.0, 60.0
# The user is told at this share of it.
QUIET_TOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What rank 0 last said about itself."""

    phase: str
    step: int
    steps: int
    done: int
    total: int
    detail: str
    time: float


@dataclass(frozen=True)
class Update:
    """One call of `progress`: phase, done, total (0: unknown), detail."""

    phase: str
    done: int
    total: int
    detail: str


def parse_heartbeat(text: str) -> Heartbeat | None:
    """A heartbeat from its JSON, or None when the text is torn or of another shape.

    >>> parse_heartbeat('{"phase": "train", "step": 3, "steps": 9, "time": 1.5}').step
    3
    >>> parse_heartbeat('{"phase": "tra') is None
    True
    """
    try:
        data = json.loads(text)
        numbers = {name: int(data.get(name) or 0) for name in ("step", "steps", "done", "total")}
        return Heartbeat(phase=str(data["phase"]), detail=str(data.get("detail") or ""),
                         time=float(data["time"]), **numbers)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a JSON-lines text; a torn or foreign line is left out.

    >>> parse_lines('{"step": 1}\\n{"step": 2}\\n{"st')
    [{'step': 1}, {'step': 2}]
    """
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; none when it is not there."""
    try:
        return parse_lines(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


class Tail:
    """The new lines of a growing file, each once and whole; starts over when the file shrinks."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file started over, and the rows that came since the last call."""
        try:
            with self.path.open("rb") as file:
                restarted = file.seek(0, 2) < self.offset
                self.offset = 0 if restarted else self.offset
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return False, []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return restarted, parse_lines(whole.decode("utf-8", errors="replace"))


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row, or None."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def part(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside a mapping, or an empty one."""
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def speed(rows: Iterable[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Tokens a second over some steps and seconds a step, or None when nothing can be said.

    A step's seconds are `tokens / tokens_per_s`, so that a pause between two attempts does not count.

    >>> speed([{"tokens": 100, "tokens_per_s": 50.0}, {"tokens": 100, "tokens_per_s": 25.0}])
    (33.333333333333336, 3.0)
    """
    tokens, seconds, count = 0.0, 0.0, 0
    for row in rows:
        amount, rate = number(row, "tokens"), number(row, "tokens_per_s")
        if amount is not None and rate:
            tokens, seconds, count = tokens + amount, seconds + amount / rate, count + 1
    return (tokens / seconds, seconds / count) if seconds > 0 else (None, None)


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`.

    >>> clock(192), clock(3725)
    ('3:12', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(rows: Iterable[Mapping[str, Any]], steps: int) -> str:
    """The newest loss, the smoothed speed, the memory and the time left of `steps` in all.

    >>> describe([{"step": 4, "loss": 3.214, "tokens": 4200, "tokens_per_s": 2100.0,
    ...            "device_bytes": 1288490189}], 100)
    'loss 3.21 · 2,100 tokens/s · 1.2 GiB · 3:12 left'
    """
    rows = list(rows)
    if not rows:
        return ""
    last, (tokens_per_s, step_s) = rows[-1], speed(rows)
    loss, step = number(last, "loss"), number(last, "step")
    memory_bytes = number(last, "device_bytes") or number(last, "host_bytes")
    parts = [f"loss {loss:.2f}" if loss is not None else "loss is not finite",
             f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s else "",
             f"{memory_bytes / GIB:.1f} GiB" if memory_bytes else "",
             f"{clock((steps - step) * step_s)} left" if step_s and step is not None and steps > step else ""]
    return " · ".join(part for part in parts if part)


class Monitor:
    """Follows one run; `poll` reads what is new and says where it is."""

    def __init__(self, run: RunDirectory, now: Callable[[], float] = time.monotonic,
                 forecast: Forecast | None = None, planned_step_s: float = 0.0):
        """`planned_step_s`: seconds of an update by the plan, for the time until some were measured."""
        self.run = run
        self.planned_step_s = planned_step_s
        self._steps_s: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._polled = now()
        self.forecast = LossForecast(run.path, forecast, now)
        self.now = now
        self.rows: deque[dict[str, Any]] = deque(maxlen=SMOOTHED_STEPS)
        self.heartbeat: Heartbeat | None = None
        self._tail = Tail(run.metrics)
        earlier = self._tail.read()[1]  # sessions whose speed says nothing of this one's first steps
        self.rows.extend(earlier)
        self.forecast.add(earlier)
        self._changed = now()

    def poll(self) -> Update:
        """The newest state. Before the first heartbeat the phase is `start`."""
        restarted, rows = self._tail.read()
        if restarted:
            self.rows.clear()
            self.forecast.clear()
        self.rows.extend(rows)
        self.forecast.add(rows)
        if not restarted:  # then the rows are those of earlier sessions, written anew
            self._steps_s.extend(step_s for row in rows if (step_s := speed([row])[1]))
        beat, now = self._read_heartbeat(), self.now()
        if rows or (beat is not None and beat != self.heartbeat) or now - self._polled > ASLEEP_S:
            self._changed = now
        self._polled = now
        self.heartbeat = beat or self.heartbeat
        return self._update()

    @property
    def quiet_s(self) -> float:
        """Seconds since the trainer last showed a sign of life, by a clock that no date change moves."""
        return self.now() - self._changed

    def awake(self) -> None:
        """Count from now on: the trainer was stopped and may go on (SIGSTOP and SIGCONT)."""
        self._changed = self.now()

    @property
    def limit_s(self) -> float:
        """Seconds without a sign of life after which the trainer counts as hung."""
        phase = self.heartbeat.phase if self.heartbeat else "start"
        step_s = statistics.median(self._steps_s) if self._steps_s else self.planned_step_s
        if phase == "train" and len(self._steps_s) >= LEARNED_STEPS:
            return max(QUIET_LEAST_S, QUIET_STEPS * step_s)
        return max(QUIET_LIMITS_S.get(phase, QUIET_LIMIT_S), 2 * QUIET_STEPS * step_s)

    @property
    def hung(self) -> bool:
        """Whether there was no sign of life for longer than that."""
        return self.quiet_s > self.limit_s

    @property
    def step(self) -> int:
        """The newest step of metrics.jsonl, or 0."""
        return int(number(self.rows[-1], "step") or 0) if self.rows else 0

    def _read_heartbeat(self) -> Heartbeat | None:
        try:
            return parse_heartbeat(self.run.heartbeat.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None

    def _update(self) -> Update:
        beat = self.heartbeat
        if beat is None:
            return Update("start", 0, 0, self._quiet("start"))
        # A checkpoint or an evaluation on the way is a part of the training, not a phase of its own.
        aside = ASIDE.get(beat.phase, "") if 0 < beat.step < beat.steps else ""
        if beat.phase != "train" and not aside:
            return Update(beat.phase, beat.done, beat.total, self._quiet(beat.phase) or beat.detail)
        detail = aside.format(beat.detail) if aside else describe(self.rows, beat.steps)
        if expected := "" if aside else self.forecast.text(beat.steps):
            detail = f"{detail} · {expected}"
        done = max(beat.step, min(self.step, beat.steps))
        return Update("train", done, beat.steps, self._quiet("train") or detail)

    def _quiet(self, phase: str) -> str:
        if self.quiet_s < QUIET_TOLD * self.limit_s:
            return ""
        return f"no sign of life for {clock(self.quiet_s)}; started again at {clock(self.limit_s)}"
