"""What a trainer's failure means for the run: start again, with less memory if that ran out, or give up.

A restart goes on from the newest checkpoint, so nothing but time is lost by one that was not needed. Three in
a row that get no further than the one before are enough to know that the next will not either.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from training.configuration import deepspeed_config, to_yaml
from training.errors import (
    CannotWrite,
    DataError,
    DoesNotFit,
    EliteError,
    Interrupted,
    MissingInput,
    StoppedByUser,
    UsageError,
)
from training.manager import outcome
from training.manager.ladder import DEVICE, HOST, Rung, next_rung
from training.manager.monitor import number, read_rows
from training.manager.outcome import Ending
from training.manager.runs import newest_checkpoint
from training.records import GIB, Plan
from training.rundir import RunDirectory, read_data, read_record, write_text
from training.settings import Config, read_yaml

RESTARTS = 3                     # in a row without a step more than the furthest so far
RUNGS = 5                        # of the ladder, in a row without one: six starts at most
LOADING = ("start", "import", "load", "compile_ops")
MEMORY, HUNG, KILLED, FAULT = "out_of_memory", "hung", "killed", "fault"
# What is as wrong at the next start.
FINAL = (UsageError, DataError, MissingInput, CannotWrite, StoppedByUser)
HOST_SIGNS = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "defaultcpuallocator")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed attempt. `step`: of the newest line of metrics.jsonl; `memory`: whose ran out, or "";
    `error`: in the trainer's own words where it left some."""

    kind: str
    phase: str
    step: int
    error: str
    memory: str = ""
    peak_bytes: int = 0


def failure_of(run: RunDirectory, ending: Ending, error: EliteError) -> Failure | None:
    """What a restart may mend; None for an end that was asked for, or that the next start would repeat."""
    told = _told(run)
    kind, memory = _kind(run, ending, error, told)
    if not kind:
        return None
    rows = read_rows(run.metrics)
    step = number(rows[-1], "step") if rows else None
    return Failure(kind=kind, memory=memory, phase=str(told.get("phase") or _phase(run)), step=int(step or 0),
                   error=str(told.get("error") or _first_line(error)),
                   peak_bytes=int(number(told, "peak_bytes") or 0))


def _kind(run: RunDirectory, ending: Ending, error: EliteError, told: dict[str, Any]) -> tuple[str, str]:
    killed_by = outcome.signal_of(ending.returncode)
    if ending.asked:
        return "", ""
    if ending.hung:
        return HUNG, ""
    if told.get("kind") == MEMORY:
        return MEMORY, _whose(str(told.get("error")).lower())
    if killed_by == signal.SIGKILL and ending.oom_kills:
        return MEMORY, HOST
    if told.get("kind") == FAULT:
        return FAULT, ""
    if killed_by and killed_by != signal.SIGTERM:
        return KILLED, ""
    if ending.returncode in (Interrupted.exit_code, StoppedByUser.exit_code) or killed_by:
        return "", ""  # someone asked the trainer itself to stop
    if isinstance(error, FINAL) or outcome.read_result(run) is not None:
        return "", ""
    if isinstance(error, DoesNotFit):
        return MEMORY, DEVICE
    return KILLED if isinstance(error, Interrupted) else FAULT, ""


def _whose(text: str) -> str:
    on_host = text.startswith("memoryerror") or any(sign in text for sign in HOST_SIGNS)
    return HOST if on_host else DEVICE


def _told(run: RunDirectory) -> dict[str, Any]:
    try:
        found = read_data(run.failure)
    except EliteError:
        return {}
    return found if isinstance(found, dict) else {}


def _phase(run: RunDirectory) -> str:
    try:
        return str(read_data(run.heartbeat).get("phase") or "start")
    except (EliteError, AttributeError):
        return "start"


def _first_line(error: EliteError) -> str:
    return str(error).split("\n", 1)[0]


@dataclass
class Recovery:
    """The restarts of one command on one run."""

    run: RunDirectory
    furthest: int = 0
    failures: int = 0
    loading_failures: int = 0
    history: list[tuple[Failure, str]] = field(default_factory=list)

    def after(self, failure: Failure) -> str:
        """What is done about a failure, in one line; empty when nothing is left to do.

        Raises CannotWrite when the changed configuration cannot be written.
        """
        if failure.step > self.furthest:
            self.furthest, self.failures, self.loading_failures = failure.step, 0, 0
        self.failures += 1
        action = self._about_memory(failure) if failure.kind == MEMORY else self._about_rest(failure)
        self.history.append((failure, action))
        self._record(failure, action)
        return action

    def _about_memory(self, failure: Failure) -> str:
        if self.failures > RUNGS or failure.phase in LOADING:
            return ""
        config = Config(read_yaml(self.run.config))
        rung = next_rung(config, failure.memory, failure.phase)
        if rung is None:
            return ""
        self._apply(config, rung, failure)
        return f"memory ran out in {failure.phase}: on with {rung.name}"

    def _about_rest(self, failure: Failure) -> str:
        if self.failures > RESTARTS:
            return ""
        if failure.phase in LOADING and failure.kind == FAULT:
            return self._about_loading(failure)
        where = f"after step {failure.step:,}" if failure.step else "before the first step"
        what = {HUNG: "gave no sign of life", KILLED: "was killed"}.get(failure.kind, "failed")
        return f"the trainer {what} {where}; restart {self.failures} of {RESTARTS} without progress"

    def _about_loading(self, failure: Failure) -> str:
        """What failed before the first step fails again, unless a checkpoint is to blame: the second time it
        is set aside, and the one before it taken."""
        saved = newest_checkpoint(self.run.path)
        self.loading_failures += 1
        if saved is None:
            return ""
        if self.loading_failures == 1:
            return f"the trainer failed while it loaded; checkpoint-{saved} is tried once more"
        self.loading_failures = 0
        aside = self.run.path / f"set-aside-checkpoint-{saved}-{os.getpid()}"
        try:
            os.rename(self.run.path / f"checkpoint-{saved}", aside)
        except OSError as error:
            raise CannotWrite(f"Cannot rename checkpoint-{saved}: {error.strerror}.") from error
        return f"checkpoint-{saved} ended the trainer twice; it is kept as {aside.name}"

    def _apply(self, config: Config, rung: Rung, failure: Failure) -> None:
        """Write config.yaml and ds_config.json with a rung's changes and the reason."""
        changed = Config({**config, **rung.changes})
        why = f"memory ran out after step {failure.step:,} ({failure.phase}): {rung.name}"
        reasons = self._reasons() | dict.fromkeys(rung.changes, why)
        write_text(self.run.deepspeed, json.dumps(deepspeed_config(changed), indent=2) + "\n")
        write_text(self.run.config, to_yaml(changed, reasons))

    def _reasons(self) -> dict[str, str]:
        try:
            return {name: choice.why for name, choice in read_record(Plan, self.run.plan).choices.items()}
        except EliteError:
            return {}

    def _record(self, failure: Failure, action: str) -> None:
        line = {"time": time.time(), **asdict(failure), "action": action or "given up"}
        try:
            with open(self.run.recovery, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError:
            pass  # a full disk must not keep the run from going on

    def given_up(self, error: EliteError) -> EliteError:
        """The error to end with, with what was tried."""
        memory = [(failure, action) for failure, action in self.history if failure.kind == MEMORY]
        if memory:
            return DoesNotFit(f"{_first_line(error)}\nMemory ran out {len(memory)} times:"
                              + "".join(map(_attempt, memory)) + f"\n{self._shorter()}")
        if len(self.history) > 1:
            return type(error)(f"{error}\n{len(self.history) - 1} restarts did not help: "
                               f"{self.history[-1][0].error}")
        return error

    def _shorter(self) -> str:
        try:
            tier = read_record(Plan, self.run.plan).tier
        except EliteError:
            tier = 0
        way = f"--fresh --tier {tier - 1}" if tier > 1 else "--fresh and a smaller --context"
        return f"The same command with {way} trains shorter windows, anew."


def _attempt(tried: tuple[Failure, str]) -> str:
    failure, action = tried
    peak = f", peak {failure.peak_bytes / GIB:.2f} GiB" if failure.peak_bytes else ""
    return f"\n  after step {failure.step:,}, {failure.phase}{peak}: {action or 'nothing is left to change'}"
