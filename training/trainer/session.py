"""One session of the training subprocess: its phases in order, its exit code, and result.json in every case.

Imports no torch, so that the first heartbeat comes before the seconds that importing it takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from training.configuration import load_config
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
from training.longcontext.errors import StoreFull, StreamError, Unsupported
from training.records import Plan, Quality, Result
from training.rundir import RunDirectory, read_record, write_record, write_text
from training.settings import Config
from training.trainer.failing import is_out_of_memory
from training.trainer.journal import Heartbeat
from training.trainer.stopping import Watch

if TYPE_CHECKING:
    from training.trainer.loop import Training

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Session:
    """What the phases share. `start`: the process's, monotonic; `marks`: seconds since then, by phase;
    `allowed`: what may have changed since the checkpoint."""

    run: RunDirectory
    local_rank: int
    start: float
    rank: int = 0
    ranks: int = 1
    config: Config = field(default_factory=lambda: Config({}))
    plan: Plan | None = None
    training: Training | None = None
    marks: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    lock_file: IO[str] | None = None
    trial: bool = False
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.watch = Watch(self.run.stop)
        self.heartbeat = Heartbeat(self.run, active=self.rank == 0)

    def mark(self, phase: str) -> None:
        """Remember when a phase ended."""
        self.marks[phase] = time.monotonic() - self.start

    def tell(self, phase: str) -> Callable[[str], None]:
        """A callback for slow work without a count: beats, and raises when a stop was asked for."""
        progress = self.heartbeat.progress(phase, self.watch.check)
        return lambda detail: progress(phase, 0, 0, detail)

    def lock(self) -> None:
        """Keep a second trainer out of this run directory; the system frees the lock with the process.

        Waits half a second: whoever lists runs takes a shared lock for a moment.
        """
        path = self.run.path / ".lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CannotWrite(f"Cannot write {path}: {error.strerror}.") from error
        self.lock_file = os.fdopen(handle, "a")
        for _ in range(10):
            with contextlib.suppress(OSError):
                fcntl.flock(self.lock_file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.05)
        raise CannotWrite(f"Another trainer is writing to {self.run.path}; stop it, or choose another "
                          "--output.")

    def unlock(self) -> None:
        """Let the next trainer in."""
        if self.lock_file is not None:
            self.lock_file.close()


def run_session(run_path: Path, local_rank: int, start: float, trial: bool = False,
                allowed: tuple[str, ...] = ()) -> int:
    """Train, or go on training, what a run directory describes; the exit code. Rank 0 writes result.json.

    `trial`: a few steps on random tokens instead, written to trial.json.
    """
    session = Session(run=RunDirectory(run_path), local_rank=local_rank, start=start, trial=trial,
                      allowed=allowed)
    try:
        return _guarded(session)
    finally:
        session.unlock()


def _guarded(session: Session) -> int:
    try:
        if not session.run.path.is_dir():
            raise MissingInput(f"There is no run directory {session.run.path}.")
        if session.rank == 0:
            session.lock()
    except EliteError as error:
        log.error("%s", error)  # the directory is another trainer's, so nothing is written there
        return error.exit_code
    try:
        session.watch.install()
        return _run(session)
    except EliteError as error:
        return _end(session, error)
    except StreamError as error:
        return _end(session, _of_the_stream(error, session))
    except Exception as error:
        log.exception("The trainer failed.")
        _confess(session, error)
        return _end(session, _as_elite(error, session))


def _confess(session: Session, error: BaseException) -> None:
    """Write failure.json, from which the command decides whether to start again and with what."""
    kind = "out_of_memory" if is_out_of_memory(error) else "fault"
    line = {"kind": kind, "phase": session.heartbeat.phase, "rank": session.rank,
            "step": session.training.progress.step if session.training else 0,
            "peak_bytes": session.facts.get("measured_bytes") or 0,
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    with contextlib.suppress(CannotWrite):
        write_text(session.run.failure, json.dumps(line, ensure_ascii=False) + "\n")


def _run(session: Session) -> int:
    if _is_done(session.run):
        log.info("%s holds a finished run already; nothing is done.", session.run.path)
        return 0
    session.heartbeat.beat("import")
    session.config, session.plan = load_config(session.run.path), read_record(Plan, session.run.plan)
    if session.rank == 0:
        session.run.result.unlink(missing_ok=True)
    session.watch.check()
    if session.trial:
        from training.trainer.trial import run

        run(session)
        return 0
    with session.watch.at_once():
        from training.trainer import phases

    phases.run(session)
    if session.rank == 0:
        write_record(session.run.result, result(session, "done"))
    session.heartbeat.beat("done")
    return 0


def _is_done(run: RunDirectory) -> bool:
    try:
        found = read_record(Result, run.result)
    except (MissingInput, DataError):
        return False
    return found.state == "done" and (run.path / found.model_dir).is_dir()


def _of_the_stream(error: StreamError, session: Session) -> EliteError:
    """What the streamed step refuses, as this command's own error with the way out."""
    text = " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, StoreFull):
        return CannotWrite(f"{text}. Free some, or set stream.inputs=pageable or a larger stream.keep_every.")
    if isinstance(error, Unsupported):
        return DataError(f"The streamed step cannot train {session.config['model.base']} exactly: {text}. "
                         "Set stream.chunk_tokens=0 for the plain step, with a context that fits it.")
    return UsageError(f"The streamed step cannot run as configured: {text}. See the stream.* keys, or set "
                      "stream.chunk_tokens=0.")


def _as_elite(error: Exception, session: Session) -> EliteError:
    text = " ".join(str(error).split())[:300]
    if is_out_of_memory(error):
        return DoesNotFit(f"Out of memory on {session.config['device.kind']}: {text} Choose a lower --tier "
                          "or --context.")
    return EliteError(f"{type(error).__name__}: {text}")


def _end(session: Session, error: EliteError) -> int:
    """Say why in one line and write it to result.json."""
    log.error("%s", error)
    stopped = isinstance(error, StoppedByUser | Interrupted)
    if stopped and session.rank == 0:
        session.watch.forget_file()
    if session.rank == 0:
        with contextlib.suppress(CannotWrite):
            write_record(session.run.result, result(session, "interrupted" if stopped else "failed", error))
    return error.exit_code


def result(session: Session, state: str, error: EliteError | None = None) -> Result:
    """What happened so far. Times are of all sessions of this run, a killed one up to its last checkpoint."""
    training, plan, facts = session.training, session.plan, session.facts
    seconds = training.seconds() if training else time.monotonic() - session.start
    return Result(
        state=state, steps=training.progress.step if training else 0,
        epochs=training.epochs if training else 0.0,
        tokens_trained=training.progress.tokens_trained if training else 0, seconds=seconds,
        tier=plan.tier if plan else 0, context_tokens=session.config["dataset.context_tokens"],
        memory={"predicted_bytes": plan.memory.device_bytes if plan else None,
                "measured_bytes": facts.get("measured_bytes")},
        time={"predicted_s": plan.total_s if plan else None, "measured_s": seconds},
        quality={"before": quality(facts.get("before")), "after": quality(facts.get("after"))},
        model_dir=facts.get("model_dir", ""), digest=facts.get("digest", ""),
        samples=tuple(facts.get("samples", ())), error=str(error or ""),
        exit_code=error.exit_code if error else 0)


def quality(evaluation: dict[str, Any] | None) -> Quality | None:
    """An evaluation's figures as the record; None when its loss is not finite, hence not a figure."""
    if evaluation is None or evaluation.get("loss") is None:
        return None
    figures: dict[str, Any] = {item.name: evaluation.get(item.name) for item in fields(Quality)}
    return Quality(**figures)
