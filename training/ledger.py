"""What each optimization does on this machine: the same run with it on and with it off.

Both arms share repository, windows, seed and number of steps. Arms alternate (off, on, off, on, ...), since
a shared machine drifts. A difference counts only when every pair of runs agrees on its direction and its
median is larger than `NOTICEABLE`; otherwise the verdict is "no difference".
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from training.configuration import ConfigurationManager
from training.dataset.generator import DatasetGenerator
from training.errors import UsageError
from training.manager.manager import TrainingManager
from training.manager.monitor import read_rows
from training.models import resolve
from training.planning.calculator import OptimalConfigCalculator
from training.records import HardwareProfile, Request, to_data
from training.rundir import RunDirectory, read_data, write_record
from training.settings import nearest

CATALOGUE = Path(__file__).resolve().parent.parent / "configs" / "optimizations.yaml"
NOTICEABLE = {"memory_bytes": 0.02, "tokens_per_s": 0.05, "loss": 0.005}
RESULTS = CATALOGUE.parent.parent / "benchmarks" / "results"
BASE: dict[str, Any] = {"training.max_steps": 16, "training.save_steps": 0, "evaluation.completions": 0,
                        "evaluation.windows": 8, "training.micro_batch": 4, "training.accumulation": 1,
                        "training.checkpointing": False}
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """One entry of `configs/optimizations.yaml`; `on` and `off` are the keys of its two arms."""

    id: str
    name: str
    code: str
    paper: str
    needs: tuple[str, ...]
    exact: bool
    default: str
    on: dict[str, Any]
    off: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one run measured: peak memory, median target tokens/s after warm-up, held-out loss in nats."""

    memory_bytes: float
    tokens_per_s: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the ledger. `change`: relative median change per figure, on against off.

    `verdict`: helped, hurt, mixed, no difference, or not applicable here (then `why` says what is missing).
    """

    id: str
    name: str
    date: str
    verdict: str
    why: str
    change: dict[str, float]
    on: tuple[Arm, ...] = ()
    off: tuple[Arm, ...] = ()


def catalogue(only: list[str] | None = None) -> list[Optimization]:
    """The optimizations of the catalogue, or those named. Raises UsageError for an unknown id."""
    rows = [Optimization(**{**row, "needs": tuple(row["needs"])})
            for row in yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["optimizations"]]
    known = {row.id: row for row in rows}
    unknown = [name for name in only or [] if name not in known]
    if unknown:
        near = nearest(unknown[0], known)
        raise UsageError(f"No optimization {unknown[0]}.{near} Known: {', '.join(known)}.")
    return [known[name] for name in only] if only else rows


class Ledger:
    """Runs both arms of optimizations on one repository and machine, in folders of their own below `work`."""

    def __init__(self, repo: str, profile: HardwareProfile, work: Path, pairs: int = 2):
        self.repo, self.profile, self.work, self.pairs = repo, profile, work, pairs
        self.facts = DatasetGenerator.survey(repo)

    def measure(self, item: Optimization, progress: Progress) -> Entry:
        """Run the pairs of one optimization and judge them."""
        missing = missing_needs(item, self.profile)
        if missing:
            return _entry(item, "not applicable here", missing, {})
        on, off = [], []
        for pair in range(self.pairs):
            off.append(self._run(item.off, pair, f"{item.id}-off-{pair}", progress))
            on.append(self._run(item.on, pair, f"{item.id}-on-{pair}", progress))
        change = changes(on, off)
        return replace(_entry(item, verdict(on, off), "", change), on=tuple(on), off=tuple(off))

    def _run(self, settings: dict[str, Any], seed: int, name: str, progress: Progress) -> Arm:
        output = self.work / name
        base = resolve("embedded")
        request = Request(repo=self.repo, output=str(output), model_name=name, base_model="embedded",
                          seed=seed, settings={**BASE, **settings})
        plan = OptimalConfigCalculator(self.profile).calculate(request, base, self.facts)
        config = ConfigurationManager(output).write(plan, self.profile, [name])
        DatasetGenerator(config, output, base).generate()
        result = TrainingManager(output).train(lambda _, *state: progress(name, *state))
        after = result.quality["after"]
        rates = [row["tokens_per_s"] for row in read_rows(RunDirectory(output).metrics)][4:]
        return Arm(memory_bytes=float(result.memory["measured_bytes"] or 0),
                   tokens_per_s=statistics.median(rates), loss=after.loss if after else float("nan"))


def save(entries: Sequence[Entry], profile: HardwareProfile, pairs: int = 2, folder: Path = RESULTS) -> Path:
    """Write `ledger-<date>.json`; entries of the same day that were not measured again stay in it."""
    date = datetime.date.today().isoformat()
    path = folder / f"ledger-{date}.json"
    earlier = read_data(path)["entries"] if path.exists() else []
    new = {entry.id for entry in entries}
    kept = [entry for entry in earlier if entry["id"] not in new]
    gpus = ", ".join(gpu.name for gpu in profile.gpus) or "no GPU"
    write_record(path, {"date": date, "machine": f"{profile.cpu_name}, {profile.cpu_cores} cores, {gpus}",
                        "pairs": pairs, "steps": BASE["training.max_steps"],
                        "entries": [*kept, *to_data(list(entries))]})
    return path


def missing_needs(item: Optimization, profile: HardwareProfile) -> str:
    """Why this machine cannot run an optimization, or nothing."""
    for name in item.needs:
        support = profile.supports.get(name)
        if support is None or not support.works:
            return f"needs {name}: {support.why if support else 'not measured'}"
    return ""


def changes(on: list[Arm], off: list[Arm]) -> dict[str, float]:
    """Median over the pairs of (on - off) / off for each figure."""
    return {name: statistics.median(_ratios(on, off, name)) for name in NOTICEABLE}


def verdict(on: list[Arm], off: list[Arm]) -> str:
    """helped, hurt, mixed or no difference, by the rule at the top of this file."""
    better = {"memory_bytes": -1, "tokens_per_s": 1, "loss": -1}
    seen = set()
    for name, least in NOTICEABLE.items():
        ratios = _ratios(on, off, name)
        agree = all(r > 0 for r in ratios) or all(r < 0 for r in ratios)
        if agree and abs(statistics.median(ratios)) > least:
            seen.add("helped" if ratios[0] * better[name] > 0 else "hurt")
    return seen.pop() if len(seen) == 1 else "mixed" if seen else "no difference"


def _ratios(on: list[Arm], off: list[Arm], name: str) -> list[float]:
    return [getattr(a, name) / getattr(b, name) - 1 for a, b in zip(on, off, strict=True)]


def _entry(item: Optimization, judged: str, why: str, change: dict[str, float]) -> Entry:
    return Entry(id=item.id, name=item.name, date=datetime.date.today().isoformat(), verdict=judged, why=why,
                 change=change)
