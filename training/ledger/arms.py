"""Single runs of the ledger: a run directory as the command makes it, trained, and its figures read back."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.configuration import ConfigurationManager
from training.dataset.generator import DatasetGenerator
from training.errors import EliteError
from training.ledger import base as bases
from training.ledger import worker
from training.ledger.judging import Arm
from training.manager.monitor import read_rows
from training.models import resolve
from training.planning.calculator import OptimalConfigCalculator
from training.records import BaseModel, HardwareProfile, Plan, RepositoryFacts, Request, Result
from training.rundir import RunDirectory, read_record
from training.settings import Config

Tell = Callable[[str], None]


class RunFailed(EliteError):
    """A run of the ledger did not end well."""


@dataclass(kw_only=True)
class Runs:
    """Makes and trains run directories below `work`. Datasets and bases are made once per distinct settings.

    `reduced`: replaces settings of every run; tests make them smaller with it.
    """

    repo: str
    profile: HardwareProfile
    work: Path
    reduced: Mapping[str, Any] = field(default_factory=dict)
    _made: dict[Any, Path] = field(default_factory=dict)
    _facts: dict[str, RepositoryFacts] = field(default_factory=dict)
    _count: int = 0

    def settings(self, model: str, trains: bool, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an arm: what all share, what this kind of run adds, then its own keys."""
        kind = bases.ADAPTER if model == "adapter" else bases.MODEL
        length = bases.TRAINED if trains else bases.TIMED
        return {**bases.COMMON, **kind, **length, **self.reduced, **keys}

    def base(self, keys: Mapping[str, Any], tell: Tell) -> BaseModel:
        """The base of adapters: the reduced embedded model, trained on other code than the repository."""
        wanted = {**bases.BASE, **self.reduced, **keys}
        name = ("base", *sorted(wanted.items()))
        if name not in self._made:
            tell("the base of adapters")
            code = self.work / "other-code"
            if not code.exists():
                bases.other_code(code)
            folder, config = self.folder(wanted, resolve("embedded"), 0, tell, str(code))
            self.train(folder, config, tell)
            self._made[name] = folder / "model"
        return resolve(str(self._made[name]))

    def config(self, settings: Mapping[str, Any], base: BaseModel, seed: int, repo: str = "") -> Config:
        """What a run with these settings would be configured as, without writing it."""
        plan = self._plan(settings, base, seed, repo or self.repo)
        return Config({name: choice.value for name, choice in plan.choices.items()})

    def _plan(self, settings: Mapping[str, Any], base: BaseModel, seed: int, repo: str,
              output: str = "") -> Plan:
        if repo not in self._facts:
            self._facts[repo] = DatasetGenerator.survey(repo)
        request = Request(repo=repo, output=output, model_name="ledger", base_model=base.location, seed=seed,
                          settings=dict(settings), anyway=True)
        return OptimalConfigCalculator(self.profile).calculate(request, base, self._facts[repo])

    def folder(self, settings: Mapping[str, Any], base: BaseModel, seed: int, tell: Tell,
               repo: str = "") -> tuple[Path, Config]:
        """A run directory with its dataset, and its configuration."""
        self._count += 1
        folder = self.work / f"run-{self._count}"
        plan = self._plan(settings, base, seed, repo or self.repo, str(folder))
        config = ConfigurationManager(folder).write(plan, self.profile, ["ledger"])
        (folder / "dataset").symlink_to(self._dataset(config, base, tell), target_is_directory=True)
        return folder, config

    def _dataset(self, config: Config, base: BaseModel, tell: Tell) -> Path:
        """The dataset of these settings; the same windows for every seed, which orders and initialises."""
        fixed = Config({**config, "run.seed": bases.DATASET_SEED, "run.name": ""})
        deciding = {name: value for name, value in fixed.items() if not name.startswith("dataset.curriculum")
                    and name.startswith(("dataset.", "embedded.vocab", "model.base", "model.revision"))}
        key = ("dataset", json.dumps(deciding, sort_keys=True))
        if key not in self._made:
            tell("a dataset")
            folder = self.work / f"dataset-{len(self._made)}"
            DatasetGenerator(fixed, folder, base, folder).generate()
            self._made[key] = folder
        return self._made[key]

    def train(self, folder: Path, config: Config, tell: Tell) -> Arm:
        """Train what a folder describes; its figures. Raises RunFailed."""
        run = RunDirectory(folder)

        def step() -> None:
            rows = read_rows(run.metrics)[-1:]
            tell(f"step {rows[0]['step']} of {config['training.max_steps']}" if rows else "loading")

        code = worker.run(folder, config, step)
        result = read_record(Result, run.result) if run.result.exists() else None
        if code or result is None or result.state != "done":
            said = result.error if result and result.error else f"exit code {code}"
            raise RunFailed(f"{said} Its log ends: {_end(run.log)}")
        return figures(run, result)


def figures(run: RunDirectory, result: Result) -> Arm:
    """What a finished run measured."""
    rows = read_rows(run.metrics)
    steps_s = [row["tokens"] / row["tokens_per_s"] for row in rows]
    at, passed = {0: 0.0}, 0.0
    for row, step_s in zip(rows, steps_s, strict=True):
        passed += step_s
        at[row["step"]] = passed
    losses = {row["step"]: row["loss"] for row in read_rows(run.evaluations) if row["loss"] is not None}
    after = result.quality["after"]
    if after is not None:
        losses[result.steps] = after.loss
    rates = [row["tokens_per_s"] for row in rows]
    return Arm(memory_bytes=float(result.memory["measured_bytes"] or 0),
               tokens_per_s=statistics.median(rates[bases.WARM_UP_STEPS:] or rates),
               loss=after.loss if after else float("nan"), disk_bytes=float(_disk(run.path)), seconds=passed,
               curve=tuple((at[step], loss) for step, loss in sorted(losses.items()) if step in at))


def _disk(folder: Path) -> int:
    """Bytes of the checkpoints."""
    return sum(path.stat().st_size for path in folder.glob("checkpoint-*/**/*") if path.is_file())


def _end(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return " | ".join(line.strip() for line in lines[-3:])[:400]
