"""The run directory: where each thing lies, and writing that leaves a file complete or absent."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.errors import CannotWrite, DataError, MissingInput
from training.records import dumps, from_data

Record = TypeVar("Record")
# A file on its way to its name, as `write_text` and the journal make it; a killed process leaves it behind.
# Not the stop file's: the command may be writing that while the trainer starts.
ASIDE = re.compile(r"\.(heartbeat|[\w-]+\.(jsonl?|yaml|html|txt))-\w+")
TRIAL_ORDER, TRIAL = "trial-order.json", "trial.json"    # of a trial's own folder


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Nothing is created by naming them."""

    path: Path

    @property
    def hardware(self) -> Path:
        """What was measured of the machine."""
        return self.path / "hardware.json"

    @property
    def plan(self) -> Path:
        """Each choice with its source and reason."""
        return self.path / "plan.json"

    @property
    def config(self) -> Path:
        """What the trainer reads."""
        return self.path / "config.yaml"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's own configuration."""
        return self.path / "ds_config.json"

    @property
    def command(self) -> Path:
        """The command line that made this run."""
        return self.path / "command.txt"

    @property
    def dataset(self) -> Path:
        """Tokens, index, manifest, and the tokenizer."""
        return self.path / "dataset"

    @property
    def metrics(self) -> Path:
        """One JSON line a training step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON line an evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def heartbeat(self) -> Path:
        """The trainer's phase and progress, rewritten as it goes."""
        return self.path / "heartbeat.json"

    @property
    def stop(self) -> Path:
        """Exists while the trainer is asked to stop; holds the signal's name."""
        return self.path / "stop"

    @property
    def base_digests(self) -> Path:
        """Digests of the base model's files, by name, size and times."""
        return self.path / "base-digests.json"

    @property
    def changes(self) -> Path:
        """One JSON line for each change that a resume was allowed."""
        return self.path / "changes.jsonl"

    @property
    def failure(self) -> Path:
        """How the last attempt's trainer failed, in its own words; for the command."""
        return self.path / "failure.json"

    @property
    def recovery(self) -> Path:
        """One JSON line for each restart and what was changed for it."""
        return self.path / "recovery.jsonl"

    @property
    def log(self) -> Path:
        """What the subprocess printed."""
        return self.path / "train.log"

    @property
    def result(self) -> Path:
        """What happened."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The same for people."""
        return self.path / "report.html"


@dataclass(frozen=True, kw_only=True)
class TrialLength:
    """One length of a trial. `expected_s`: of a micro-batch, by the formulas (0: unknown)."""

    context_tokens: int
    target_tokens: int
    expected_s: float


@dataclass(frozen=True, kw_only=True)
class TrialOrder:
    """What a trial is asked for. `lengths` ascend and end with the planned one, whose step is left out when
    it would take more than `limit_s`. `held_out_windows`, `completions`: of one evaluation."""

    lengths: tuple[TrialLength, ...]
    vocab_tokens: int
    limit_s: float
    held_out_windows: int
    completions: int


def write_text(path: Path, text: str) -> None:
    """Write beside, fsync, rename: `path` holds the old text or the new one, never a part.

    Raises CannotWrite with the system's reason.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # a run holds its repository's text
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise CannotWrite(f"Cannot write {path}: {error.strerror}.") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise CannotWrite(f"Cannot write {path}: {error.strerror}.") from error


def write_record(path: Path, record: Any) -> None:
    """Write a record as JSON, complete or not at all."""
    write_text(path, dumps(record))


def read_data(path: Path) -> Any:
    """The JSON in a file. Raises MissingInput when it is not there, DataError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingInput(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error


def read_record(cls: type[Record], path: Path) -> Record:
    """A record from its JSON file. Raises MissingInput or DataError."""
    try:
        return from_data(cls, read_data(path))
    except ValueError as error:
        raise DataError(f"{path} is not a {cls.__name__}: {error}.") from error
