"""What the end of the subprocess means: a result, or the error that the command ends with.

Nothing here trusts an exit code alone. Done is: code 0 *and* a valid result.json of this attempt.
"""

from __future__ import annotations

import dataclasses
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from training.manager.monitor import number, read_rows
from training.manager.runs import newest_checkpoint
from training.records import Plan, Result
from training.rundir import RunDirectory, read_record
from training.texts import ACTING

TAIL_LINES = 12
TAIL_BYTES = 64 * 1024
CLASSES: dict[int, type[EliteError]] = {
    cls.exit_code: cls for cls in (EliteError, UsageError, DataError, MissingInput, DoesNotFit, CannotWrite,
                                   Interrupted, StoppedByUser)}
# (what the log says, the error's class, what it means and the way out); the first that matches counts.
SIGNS: tuple[tuple[str, type[EliteError], str], ...] = (
    (r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
     DoesNotFit, "the GPU's memory ran out; plan a smaller --context or --tier"),
    (r"can't allocate memory|Cannot allocate memory|MemoryError|std::bad_alloc",
     DoesNotFit, "the machine's memory (RAM) ran out; end other programs or plan a smaller --context"),
    (r"No space left on device|Disk quota exceeded",
     CannotWrite, "the disk is full; free some room"),
    (r"Read-only file system|Permission denied",
     CannotWrite, "a file could not be written; see the path in the log"),
    (r"Too many open files", EliteError, "too many open files; raise the limit with `ulimit -n 4096`"),
    (r"Address already in use|EADDRINUSE", Interrupted,
     "the port for the ranks was taken meanwhile; start again"),
    (r"ModuleNotFoundError|ImportError", MissingInput,
     "a Python package is missing or broken; `python3 elite_train.py doctor` says which"),
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|" + ACTING)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the subprocess ended.

    `returncode` below 0: by that signal. `asked`: the stop this command asked for, or "". `forced`: it did
    not wait for the trainer to end by itself. `oom_kills`: kills for want of memory meanwhile. `hung`: it was
    ended because it gave no sign of life.
    """

    returncode: int
    asked: str = ""
    forced: bool = False
    oom_kills: int = 0
    hung: bool = False


def signal_of(returncode: int) -> int:
    """The signal behind an exit status, or 0. DeepSpeed's launcher turns -9 into 247, a shell into 137.

    >>> signal_of(-9), signal_of(247), signal_of(137), signal_of(1), signal_of(130)
    (9, 9, 9, 0, 0)
    """
    if returncode < 0:
        return -returncode
    if 256 - returncode in (4, 6, 7, 8, 9, 11, 15):
        return 256 - returncode
    return returncode - 128 if returncode - 128 in (4, 6, 7, 8, 9, 11, 15) else 0


def log_tail(path: Path, offset: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last non-empty lines of a log from byte `offset` on, without terminal escapes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(offset, size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    found = [_ESCAPES.sub("", line.rpartition("\r")[2]).rstrip() for line in text.split("\n")]
    return [line for line in found if line][-lines:]


def read_result(run: RunDirectory) -> Result | None:
    """A valid result.json, or None when there is none, or it is torn, or says done without a model."""
    try:
        result = read_record(Result, run.result)
    except EliteError:
        return None
    if result.state not in ("done", "interrupted", "failed"):
        return None
    if result.state == "done" and not (result.digest and result.model_dir
                                       and (run.path / result.model_dir).is_dir()):
        return None
    return result


def conclude(run: RunDirectory, ending: Ending, log_offset: int = 0) -> tuple[Result, EliteError | None]:
    """The attempt's result, and the error to raise unless it is done.

    Where the trainer left no valid result, or one that its exit code contradicts, one is made from the log.
    """
    result = read_result(run)
    if result is not None and result.state == "done":
        if ending.returncode == 0:
            return result, None
        error: EliteError = EliteError(
            f"The trainer wrote its result and then ended with {code_text(ending.returncode)}, so the "
            f"result is not trusted. {_way_on(run)}{_tail_text(run, log_offset)}")
    elif result is not None:
        error = _told(run, result, ending, log_offset)
    else:
        error = _untold(run, ending, log_offset)
    if result is None:
        return _made_up(run, error), error
    return dataclasses.replace(result, state=_state(error), exit_code=error.exit_code,
                               error=result.error or str(error)), error


def instead(result: Result, error: EliteError) -> Result:
    """The result of a run that ends with another error than its last attempt did."""
    return dataclasses.replace(result, state=_state(error), error=str(error), exit_code=error.exit_code)


def _state(error: EliteError) -> str:
    return "interrupted" if isinstance(error, Interrupted | StoppedByUser) else "failed"


def _told(run: RunDirectory, result: Result, ending: Ending, log_offset: int) -> EliteError:
    if result.state == "interrupted":
        code = result.exit_code or ending.returncode
        by_user = code == StoppedByUser.exit_code or (ending.asked == "SIGINT" and code != 75)
        return stopped(run, "SIGINT" if by_user else "SIGTERM")
    cls = CLASSES.get(result.exit_code or ending.returncode, EliteError)
    if issubclass(cls, Interrupted | StoppedByUser):
        cls = EliteError
    tail = _tail_text(run, log_offset) if cls is EliteError else ""
    first = result.error.strip() or f"the trainer ended with {code_text(ending.returncode)}"
    return cls(f"Training failed{_where(run)}: {_sentence(first)} {_way_on(run)}{tail}")


def _untold(run: RunDirectory, ending: Ending, log_offset: int) -> EliteError:
    code, by_signal = ending.returncode, signal_of(ending.returncode)
    ended = ending.forced or by_signal or code in (Interrupted.exit_code, StoppedByUser.exit_code)
    if ending.asked and ended:
        return stopped(run, ending.asked)
    if ending.hung:
        return EliteError(f"The trainer gave no sign of life{_where(run)} and was ended; its threads' stacks "
                          f"are in {run.log}. {_way_on(run)}")
    if by_signal == signal.SIGKILL and ending.oom_kills:
        return DoesNotFit(f"The kernel killed the trainer{_where(run)}: the machine's memory (RAM) ran out. "
                          f"End other programs or plan a smaller --context or --tier. {_way_on(run)}")
    if by_signal in (signal.SIGKILL, signal.SIGTERM):
        return Interrupted(f"Something outside ended the trainer with {code_text(code)}{_where(run)}. "
                           f"{_way_on(run)}")
    cls, meaning = class_of("\n".join(log_tail(run.log, log_offset, 60)))
    if not meaning:
        cls = CLASSES.get(code, EliteError) if code in (65, 66, 71, 73) else EliteError
        meaning = ("it ended with code 0 but left no valid result.json" if code == 0
                   else f"it ended with {code_text(code)}")
    return cls(f"Training failed{_where(run)}: {_sentence(meaning)} {_way_on(run)}"
               f"{_tail_text(run, log_offset)}")


def class_of(log: str) -> tuple[type[EliteError], str]:
    """Which kind of failure a log's end shows, and its meaning, or nothing known."""
    for pattern, cls, meaning in SIGNS:
        if re.search(pattern, log):
            return cls, meaning
    return EliteError, ""


def stopped(run: RunDirectory, asked: str) -> EliteError:
    """The error of a run that was asked to stop, by the name of the signal."""
    if asked == "SIGINT":
        return StoppedByUser(f"Stopped by Ctrl+C{_where(run)}. {_way_on(run)}")
    return Interrupted(f"Stopped by {asked}{_where(run)}. {_way_on(run)}")


def _where(run: RunDirectory) -> str:
    rows = read_rows(run.metrics)
    step = number(rows[-1], "step") if rows else None
    return f" after step {int(step):,}" if step else " before the first step"


def _way_on(run: RunDirectory) -> str:
    saved = newest_checkpoint(run.path)
    start = f"from step {saved:,}" if saved is not None else "from the beginning (no checkpoint was saved)"
    return f"`python3 elite_train.py resume {run.path}` continues {start}."


def _tail_text(run: RunDirectory, log_offset: int) -> str:
    lines = log_tail(run.log, log_offset)
    return f"\nThe end of {run.log}:" + "".join(f"\n  {line}" for line in lines) if lines else ""


def code_text(returncode: int) -> str:
    """An exit status in words: the signal's name, or the code."""
    found = signal_of(returncode)
    return signal.Signals(found).name if found else f"code {returncode}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _made_up(run: RunDirectory, error: EliteError) -> Result:
    """A result from what the run directory shows, for an attempt that left none."""
    try:
        plan = read_record(Plan, run.plan)
    except EliteError:
        plan = None
    rows = read_rows(run.metrics)
    steps, times = len(rows), [value for row in rows if (value := number(row, "time")) is not None]
    peaks: list[Any] = [value for row in rows if (value := number(row, "device_bytes")) is not None]
    seconds = max(times) - min(times) if times else 0.0
    return Result(
        state=_state(error), steps=steps, epochs=float(rows[-1].get("epoch") or 0) if rows else 0.0,
        tokens_trained=int(sum(number(row, "tokens") or 0 for row in rows)), seconds=seconds,
        tier=plan.tier if plan else 0, context_tokens=plan.context_tokens if plan else 0,
        memory={"predicted_bytes": plan.memory.device_bytes if plan else None,
                "measured_bytes": int(max(peaks)) if peaks else None},
        time={"predicted_s": plan.total_s if plan else None, "measured_s": seconds or None},
        quality={"before": None, "after": None}, model_dir="", digest="", error=str(error),
        exit_code=error.exit_code)
