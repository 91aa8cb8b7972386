"""Stopping on request: SIGINT, SIGTERM, the stop file, or the loss of the parent process.

A request is a flag until the code in charge reaches a point where stopping loses nothing; `check` raises
there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from training.errors import EliteError, Interrupted, StoppedByUser

# A launcher may pass one Ctrl+C on as SIGINT and SIGTERM at once; only a later one means "now".
SECOND_SIGNAL_S = 2.0
AT_ONCE_S = 0.5
# Set by a parent that wants its trainer to end with it (a killed command must leave no process behind).
WATCH_PARENT = "ELITE_WATCH_PARENT"


def stop_error(signal_name: str, step: int = 0) -> EliteError:
    """The error that ends the run: StoppedByUser (130) for SIGINT, Interrupted (75) for anything else."""
    where = f"at step {step:,}" if step else "before the first step"
    if signal_name == "SIGINT":
        return StoppedByUser(f"Stopped by the user {where}; resume continues there.")
    return Interrupted(f"Stopped by {signal_name} {where}; resume continues there.")


class Watch:
    """Notices that this process should stop. `poll` is cheap enough to be called every micro-batch."""

    def __init__(self, stop_file: Path):
        self.step = 0  # updates made so far, for what `check` says
        self._file = stop_file
        self._signal = ""
        self._signal_time = 0.0
        self._parent = os.getppid() if os.environ.get(WATCH_PARENT) else 0

    def install(self) -> None:
        """Catch SIGINT and SIGTERM, and outlive a closed terminal. Main thread only."""
        signal.signal(signal.SIGINT, self._caught)
        signal.signal(signal.SIGTERM, self._caught)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._signal and now - self._signal_time > SECOND_SIGNAL_S:
            os._exit(StoppedByUser.exit_code)  # checkpoints are renamed into place, so leaving now tears none
        if not self._signal:
            self._signal, self._signal_time = signal.Signals(number).name, now

    def poll(self) -> str:
        """`SIGINT` or `SIGTERM` once a stop was asked for, else the empty string."""
        if not self._signal and self._file.exists():
            self._signal = "SIGINT" if "INT" in _content(self._file) else "SIGTERM"
        if not self._signal and self._parent and os.getppid() != self._parent:
            self._signal = "SIGTERM"
        return self._signal

    def check(self) -> None:
        """Raise StoppedByUser or Interrupted when a stop was asked for."""
        if asked := self.poll():
            raise stop_error(asked, self.step)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a stop raise wherever the code inside is: for slow work that leaves nothing half done.

        Raises again every half second, since a library may take the first exception for one of its own; what
        it makes of it is a stop, too.
        """
        def raise_if_asked(number: int, frame: FrameType | None) -> None:
            self.check()

        before = signal.signal(signal.SIGALRM, raise_if_asked)
        try:
            signal.setitimer(signal.ITIMER_REAL, AT_ONCE_S, AT_ONCE_S)
            yield
        except Exception:
            self.check()
            raise
        finally:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            finally:  # an alarm that came just before it has raised
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    def forget_file(self) -> None:
        """Remove the stop file once it was honoured, so that the next start is not stopped by it."""
        self._file.unlink(missing_ok=True)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
