"""Sees one trainer's subprocess through: starts it, passes stops on, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from training.errors import EliteError
from training.manager import group, launcher
from training.manager.forecast import Forecast
from training.manager.monitor import Monitor, Update
from training.manager.outcome import Ending
from training.records import Plan
from training.rundir import RunDirectory, read_record
from training.settings import Config

Progress = Callable[[str, int, int, str], None]
# Before its first step a trainer has nothing to save, so a stop does not wait for it.
EARLY_PHASES = ("start", "import", "load", "compile_ops", "trial")
EARLY_GRACE_S = 5.0
# A step at the longest contexts takes minutes, and the trainer ends it before it saves.
GRACE_S = 3600.0
POLL_S = 0.25
# For the stacks of all threads to be written.
STACKS_S = 1.0


def silent(phase: str, done: int, total: int, detail: str) -> None:
    """The default progress: none."""


@dataclass
class Stop:
    """What was asked of the trainer so far. Signal handlers write here, and the stop file; the loop acts."""

    asked: str = ""
    interrupts: int = 0
    asked_s: float = 0.0
    filed: bool = False
    sent: int = 0

    def ask(self, name: str) -> None:
        """Note one SIGINT or SIGTERM; the first one's name decides the exit code."""
        self.interrupts += name == "SIGINT"
        if not self.asked:
            self.asked, self.asked_s = name, time.monotonic()


def due_signal(stop: Stop, phase: str, waited_s: float, grace_s: float = GRACE_S) -> int:
    """The signal that the trainer's group should have had by now, or 0 while the stop file is enough.

    A second Ctrl+C is SIGINT, which a trainer takes as "leave now" (its checkpoints are renamed into place,
    so none is torn); the third is SIGKILL. Without these: SIGTERM after the grace, SIGKILL after twice that.
    """
    if not stop.asked:
        return 0
    grace_s = EARLY_GRACE_S if phase in EARLY_PHASES else grace_s
    if stop.interrupts >= 3 or waited_s > 2 * grace_s:
        return signal.SIGKILL
    if stop.interrupts == 2:
        return signal.SIGINT
    return signal.SIGTERM if waited_s > grace_s else 0


class Supervisor:
    """Starts the trainer on one run directory and watches it to its end."""

    def __init__(self, run: RunDirectory, *, script: Path = launcher.SCRIPT, grace_s: float = GRACE_S,
                 arguments: Sequence[str] = (), forecast: Forecast | None = None):
        """`arguments` go to the trainer besides its run directory; `forecast` is the monitor's."""
        self.run, self.script, self.grace_s = run, script, grace_s
        self.arguments, self.forecast = tuple(arguments), forecast

    def watch(self, config: Config, progress: Progress, lock_handle: int, stop: Stop) -> Ending:
        """See the subprocess through and say how it ended. The lock's descriptor is inherited by it; `stop`
        is what the caller's `noted_stops` writes to."""
        kills = group.oom_kills()
        stop.filed = False      # a file for an attempt before this one is gone
        status, hung = self._supervise(config, progress, stop, lock_handle)
        return Ending(returncode=status, asked=stop.asked, forced=stop.sent > 0,
                      oom_kills=group.oom_kills() - kills, hung=hung)

    def _supervise(self, config: Config, progress: Progress, stop: Stop,
                   lock_handle: int) -> tuple[int, bool]:
        """Start the subprocess and see it through; its exit status, and whether it was ended because it gave
        no sign of life. Leaves no process behind."""
        argv = launcher.command(config, self.run.path, sys.executable, script=self.script,
                                arguments=self.arguments, port=launcher.free_port(),
                                devices=launcher.device_ids(config, os.environ))
        process, pipe = launcher.start(argv, launcher.environment(config, os.environ), self.run.log,
                                       lock_handle)
        monitor = Monitor(self.run, forecast=self.forecast, planned_step_s=self._planned_step_s())
        try:
            while (status := _wait(process)) is None:
                self._step(process.pid, monitor, progress, stop)
                if monitor.hung and not stop.asked and self._hangs(process.pid, monitor):
                    return -signal.SIGKILL, True
            tell(progress, monitor.poll(), stop)
            return status, False
        finally:
            if process.poll() is None:
                group.send(process.pid, signal.SIGKILL)
                process.wait()
            group.clear(process.pid)
            os.close(pipe)

    def _step(self, pid: int, monitor: Monitor, progress: Progress, stop: Stop) -> None:
        update = monitor.poll()
        if stop.asked:
            update = self._pass_on(pid, update, stop)
        tell(progress, update, stop)

    def _planned_step_s(self) -> float:
        try:
            return read_record(Plan, self.run.plan).step_s
        except EliteError:
            return 0.0

    def _hangs(self, pid: int, monitor: Monitor) -> bool:
        """Whether it is not merely stopped; its ranks' stacks are then in the log."""
        if group.stopped(pid):
            monitor.awake()
            return False
        group.dump_stacks(pid, self.script)
        time.sleep(STACKS_S)
        return True

    def _pass_on(self, pid: int, update: Update, stop: Stop) -> Update:
        """Ask the trainer to stop: by file first, then by signals to its whole group."""
        if not stop.filed:
            stop.filed = True
            if not _ask_by_file(self.run, stop.asked):
                group.send(pid, signal.SIGTERM)
        number = due_signal(stop, update.phase, time.monotonic() - stop.asked_s, self.grace_s)
        if number and number != stop.sent and stop.sent != signal.SIGKILL:
            stop.sent = number
            group.send(pid, signal.Signals(number))
        if update.phase in EARLY_PHASES:
            return Update(update.phase, update.done, update.total, "stopping")
        more = "" if stop.asked != "SIGINT" or stop.sent else "; Ctrl+C again leaves at once"
        detail = f"stopping and saving{more}"
        return Update(update.phase, update.done, update.total, detail)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return None


def tell(progress: Progress, update: Update, stop: Stop | None = None) -> None:
    """Call `progress`. A closed terminal or pipe does not end the training; Ctrl+C there counts as one."""
    try:
        progress(update.phase, update.done, update.total, update.detail)
    except (OSError, ValueError):
        pass  # ValueError: standard output was closed
    except KeyboardInterrupt:
        if stop is None:
            raise
        stop.ask("SIGINT")


def _ask_by_file(run: RunDirectory, name: str) -> bool:
    """Without what a handler may have interrupted in the middle: no locks, no temporary names."""
    aside = run.stop.with_name(f".{run.stop.name}-{os.getpid()}")
    try:
        aside.write_text(name + "\n", encoding="utf-8")
        os.replace(aside, run.stop)
    except OSError:
        return False
    return True


@contextmanager
def noted_stops(stop: Stop, run: RunDirectory) -> Iterator[None]:
    """Note SIGINT and SIGTERM in `stop` and outlive a closed terminal; the old handlers come back after.

    The first one writes the stop file itself: the loop may hang in a write to a pipe that nobody reads.
    Outside the main thread Python allows no handlers: there the caller's own stay.
    """

    def note(number: int, frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)
        if not stop.filed:
            stop.filed = _ask_by_file(run, stop.asked)

    handlers: dict[signal.Signals, Any] = {signal.SIGINT: note, signal.SIGTERM: note,
                                           signal.SIGHUP: signal.SIG_IGN}
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
