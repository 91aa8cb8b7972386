"""Takes a trial: the trainer's subprocess with `--trial` on a prepared folder, and what it found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

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
from training.manager import launcher, outcome
from training.manager.lock import RunLock
from training.manager.outcome import Ending
from training.manager.preflight import read_config
from training.manager.supervision import Progress, Stop, Supervisor, noted_stops, silent
from training.records import Trial, TrialStep
from training.rundir import TRIAL, TRIAL_ORDER, RunDirectory, TrialOrder, read_record, write_record

GRACE_S = 5.0
# What would end the training just so: better now than hours later.
TELLING = (UsageError, DataError, MissingInput, CannotWrite)
NOTHING = Trial(steps=(), load_s=0.0, resident_bytes=0)


class TrialManager:
    """Takes one trial in a folder that holds config.yaml and ds_config.json."""

    def __init__(self, folder: str | Path, *, script: Path = launcher.SCRIPT):
        self.run = RunDirectory(Path(folder).resolve())
        self.supervisor = Supervisor(self.run, script=script, grace_s=GRACE_S, arguments=("--trial",))

    def take(self, order: TrialOrder, progress: Progress = silent) -> Trial:
        """The trial. Memory that ran out is a step with an error; a trial that could not be taken for reasons
        of its own says so in `skipped`.

        Raises StoppedByUser, Interrupted, and what the training would raise for its configuration or base.
        """
        write_record(self.run.path / TRIAL_ORDER, order)
        guard = RunLock(self.run.path)
        guard.take()
        try:
            with noted_stops(stop := Stop(), self.run):
                ending = self.supervisor.watch(read_config(self.run), progress, guard.handle, stop)
        finally:
            guard.release()
        return concluded(self.run, order, ending)


def concluded(run: RunDirectory, order: TrialOrder, ending: Ending) -> Trial:
    """What a trial's end means; see `TrialManager.take`."""
    if ending.asked == "SIGINT":
        raise StoppedByUser("Stopped by Ctrl+C during the trial. Nothing was written.")
    if ending.asked:
        raise Interrupted(f"Stopped by {ending.asked} during the trial. Nothing was written.")
    found = _found(run)
    if ending.returncode == 0 and found is not None:
        return found
    error = _error(run, ending)
    if isinstance(error, DoesNotFit):
        return _out_of_memory(found or NOTHING, order, str(error))
    if isinstance(error, TELLING):
        raise type(error)(f"The trial failed: {error}")
    return replace(found or NOTHING, confirmed=False, skipped=f"the trial failed: {error}")


def _found(run: RunDirectory) -> Trial | None:
    try:
        return read_record(Trial, run.path / TRIAL)
    except EliteError:
        return None


def _out_of_memory(found: Trial, order: TrialOrder, why: str) -> Trial:
    """The trial with the step that the process was killed in."""
    done = len(found.steps)
    if done >= len(order.lengths):  # after the last step, in the evaluation or the checkpoint
        return replace(found, skipped=why)
    at = order.lengths[done]
    step = TrialStep(context_tokens=at.context_tokens, target_tokens=at.target_tokens, micro_batch=0,
                     seconds=(), update_s=0.0, peak_bytes=0, error=why)
    return replace(found, steps=(*found.steps, step), confirmed=False)


def _error(run: RunDirectory, ending: Ending) -> EliteError:
    """The trainer's own word, else what its end and its log show."""
    told = outcome.read_result(run)
    if told is not None and told.error:
        return outcome.CLASSES.get(told.exit_code, EliteError)(told.error)
    if outcome.signal_of(ending.returncode) == 9 and ending.oom_kills:
        return DoesNotFit("the kernel killed it: the machine's memory (RAM) ran out")
    cls, meaning = outcome.class_of("\n".join(outcome.log_tail(run.log, 0, 60)))
    if meaning:
        return cls(f"{meaning}{_last_line(run)}")
    return EliteError(f"it ended with {outcome.code_text(ending.returncode)}{_last_line(run)}")


def _last_line(run: RunDirectory) -> str:
    lines = outcome.log_tail(run.log, 0, 1)
    return f" ({re.sub(r'^[0-9:]{8} ', '', lines[0])[:200]})" if lines else ""
