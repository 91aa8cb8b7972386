"""Stage 5: starts the trainer's subprocess, watches it, passes stops on, and says how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from training.errors import CannotWrite, EliteError
from training.manager import launcher, outcome, preflight, recovery, report
from training.manager.forecast import Forecast
from training.manager.lock import RunLock
from training.manager.monitor import Update
from training.manager.outcome import Ending
from training.manager.supervision import (
    GRACE_S,
    POLL_S,
    Progress,
    Stop,
    Supervisor,
    due_signal,
    noted_stops,
    silent,
    tell,
)
from training.records import Result
from training.rundir import RunDirectory, write_record

__all__ = ["Stop", "TrainingManager", "due_signal"]
# A neighbour's memory, a driver or a disk may need some seconds to come back.
PAUSES_S = (0.0, 5.0, 20.0)


class TrainingManager:
    """Runs the trainer on one run directory. Everything it knows it reads from there."""

    def __init__(self, output: str | Path, *, script: Path = launcher.SCRIPT, grace_s: float = GRACE_S,
                 checks: Sequence[preflight.Check] = (), forecast: Forecast | None = None,
                 allowed: Sequence[str] = (), pauses_s: Sequence[float] = PAUSES_S):
        """`script` is the trainer's file; `grace_s` how long an asked trainer may go on; `allowed` what may
        have changed since the checkpoint; `pauses_s` before a restart that follows no progress.

        `checks` are added to the preflight and `forecast` expects a final loss from the curve so far: the
        command passes what needs other rooms.
        """
        self.run = RunDirectory(Path(output).resolve())
        self.checks, self.pauses_s = tuple(checks), tuple(pauses_s)
        arguments = [word for key in allowed for word in ("--allow-change", key)]
        self.supervisor = Supervisor(self.run, script=script, grace_s=grace_s, forecast=forecast,
                                     arguments=arguments)

    def preflight(self) -> tuple[str, ...]:
        """Check all that training needs. Returns warnings; raises one EliteError or Problems."""
        return preflight.check_run(self.run, self.checks)

    def train(self, progress: Progress = silent) -> Result:
        """Train, or continue, to the end; a finished run is returned as it is.

        Raises StoppedByUser, Interrupted, or the class of the failure; result.json holds the same.
        """
        finished = outcome.read_result(self.run)
        if finished is not None and finished.state == "done":
            return finished
        guard = RunLock(self.run.path)
        guard.take()
        try:
            for warning in self.preflight():
                tell(progress, Update("preflight", 0, 0, warning))
            return self._until_done(progress, guard.handle)
        finally:
            guard.release()

    def _until_done(self, progress: Progress, lock_handle: int) -> Result:
        """Attempts, until one is done or the recovery has nothing left to try."""
        recovering, stop = recovery.Recovery(self.run), Stop()
        with noted_stops(stop, self.run):
            while True:
                result, ending, error = self._attempt(progress, lock_handle, stop)
                if error is None:
                    self._report(progress)
                    return result
                failure = recovery.failure_of(self.run, ending, error)
                if failure is not None:
                    action = recovering.after(failure)
                    if action and self._pauses(progress, action, recovering.failures, stop):
                        continue
                    error = outcome.stopped(self.run, stop.asked) if action else recovering.given_up(error)
                    result = outcome.instead(result, error)
                _keep(self.run, result)
                self._report(progress)
                raise error

    def _pauses(self, progress: Progress, action: str, failures: int, stop: Stop) -> bool:
        """Tell what is done and wait before it; False when a stop was asked for meanwhile."""
        tell(progress, Update("restart", 0, 0, action), stop)
        until_s = time.monotonic() + self.pauses_s[min(failures, len(self.pauses_s)) - 1]
        while not stop.asked and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left_s))
        return not stop.asked

    def _attempt(self, progress: Progress, lock_handle: int,
                 stop: Stop) -> tuple[Result, Ending, EliteError | None]:
        _forget(self.run)
        config = preflight.read_config(self.run)
        offset = _size(self.run.log)
        ending = self.supervisor.watch(config, progress, lock_handle, stop)
        result, error = outcome.conclude(self.run, ending, offset)
        self.run.stop.unlink(missing_ok=True)
        return result, ending, error

    def _report(self, progress: Progress) -> None:
        try:
            report.write_report(self.run.path)
        except (EliteError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The training is what counts; a page that cannot be drawn must not change how it ended.
            tell(progress, Update("report", 0, 0, f"report.html was not written: {error}"))


def _forget(run: RunDirectory) -> None:
    """Remove what an earlier attempt left that this one would be mistaken for."""
    for path in (run.stop, run.heartbeat, run.result, run.failure):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(f"Cannot remove {path}: {error.strerror}.") from error


def _keep(run: RunDirectory, result: Result) -> None:
    try:
        write_record(run.result, result)
    except (CannotWrite, ValueError):
        run.result.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
