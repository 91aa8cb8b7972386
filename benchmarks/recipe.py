"""Tokens to the same held-out loss: the default recipe against plain AdamW with a cosine schedule.

    python3 benchmarks/recipe.py [--repo DIR]... [--seeds 1 2] [--seconds 90]

The embedded model on each repository (NetworkX and SymPy of this environment if none is given). Both arms
have the same windows, the same first weights and the same seconds of training steps; each runs its own cosine
schedule to its end within them. `default` is what `elite_train.py --auto` plans here. `plain` is AdamW at
2e-3, the best of the rates that were tried for it (docs/research.md), weight decay 0.01, clipping at 1. Told
per pair: held-out loss at the end of equal time, and the target tokens after which the default arm first has
the plain arm's last held-out loss, as a share of the plain arm's. Between two evaluations the loss is taken
to be linear in the tokens; the default arm's rate is still high there, so the share is an upper bound of what
a run made for fewer tokens would need. Writes benchmarks/results/recipe-<date>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.configuration import ConfigurationManager  # noqa: E402
from training.dataset.generator import DatasetGenerator  # noqa: E402
from training.hardware.profiler import HardwareProfiler  # noqa: E402
from training.manager.manager import TrainingManager  # noqa: E402
from training.manager.monitor import read_rows  # noqa: E402
from training.models import resolve  # noqa: E402
from training.planning.calculator import OptimalConfigCalculator  # noqa: E402
from training.records import Request  # noqa: E402
from training.rundir import RunDirectory  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EQUAL = {"training.save_steps": 0, "evaluation.completions": 0, "evaluation.context_targets": 0,
         "evaluation.windows": 24, "training.trial": False, "training.epochs": 1000}
PLAIN = {"optimizer.name": "adamw", "training.learning_rate": 2e-3, "training.schedule": "cosine",
         "training.weight_decay": 0.01, "training.clip_norm": 1.0, "training.averaging": "none",
         "training.label_smoothing": 0.0, "training.gradient_noise": 0.0, "optimizer.lookahead_steps": 0,
         "training.adaptive_clip": 0.0, "dataset.curriculum_stages": 1}
Curve = list[tuple[float, float]]


def tokens_to(loss: float, curve: Curve) -> float | None:
    """Tokens at which a curve of (tokens, loss) first has this loss, linear between its points; None: never.

    >>> tokens_to(5.0, [(0, 8.0), (100, 6.0), (200, 4.0)])
    150.0
    """
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low) if high > loss else before
    return None


class Bench:
    """Runs arms in folders of their own below `work`."""

    def __init__(self, work: Path, seconds: float):
        self.work, self.seconds = work, seconds
        self.profile = HardwareProfiler().profile()
        self.datasets: dict[tuple[str, int], Path] = {}

    def run(self, repo: str, seed: int, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """One arm, trained as the command trains."""
        folder = self.work / f"{Path(repo).name}-{seed}-{name}"
        base = resolve("embedded")
        facts = DatasetGenerator.survey(repo)
        steps = {"training.budget_s": self.seconds, "training.eval_steps": max(4, round(self.seconds / 9))}
        request = Request(repo=repo, output=str(folder), model_name=name, base_model="embedded", seed=seed,
                          settings={**EQUAL, **steps, **settings})
        plan = OptimalConfigCalculator(self.profile).calculate(request, base, facts)
        config = ConfigurationManager(folder).write(plan, self.profile, [name])
        if earlier := self.datasets.get((repo, seed)):
            shutil.copytree(earlier, folder / "dataset")
        DatasetGenerator(config, folder, base).generate()
        self.datasets[repo, seed] = folder / "dataset"
        TrainingManager(folder).train(lambda *_: None)
        return _read(RunDirectory(folder), {key: config[key] for key in PLAIN})


def _read(run: RunDirectory, settings: dict[str, Any]) -> dict[str, Any]:
    rows = read_rows(run.metrics)
    tokens = dict(zip((row["step"] for row in rows), accumulate(row["tokens"] for row in rows), strict=True))
    lines = [json.loads(line) for line in run.evaluations.read_text(encoding="utf-8").splitlines()]
    by_step = {line["step"]: line["loss"] for line in lines if line.get("weights", "last") == "last"}
    curve = [(tokens.get(step, 0), loss) for step, loss in sorted(by_step.items())]
    best = min(line["loss"] for line in lines if line["step"] == max(by_step))
    return {"curve": curve, "last": best, "tokens": tokens[max(tokens)], "settings": settings,
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows)}


def compare(repos: Sequence[str], seeds: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """A row for each repository and seed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seconds)
        for repo in repos:
            for seed in seeds:
                plain = bench.run(repo, seed, "plain", PLAIN)
                default = bench.run(repo, seed, "default", {})
                needed = tokens_to(plain["last"], default["curve"])
                rows.append({"repo": Path(repo).name, "seed": seed, "plain": plain, "default": default,
                             "tokens_share": needed / plain["tokens"] if needed else None})
                _show(rows[-1])
    return rows


def _show(row: dict[str, Any]) -> None:
    share = "never" if row["tokens_share"] is None else f"{row['tokens_share']:.0%}"
    plain, default = row["plain"], row["default"]
    print(f"{row['repo']}, seed {row['seed']}: after equal time plain {plain['last']:.3f} "
          f"({plain['tokens']:,} tokens), default {default['last']:.3f} ({default['tokens']:,} tokens); "
          f"plain's last loss after {share} of its tokens", flush=True)


def _installed(name: str) -> str:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed; name folders with --repo.")
    return str(Path(found.origin).parent)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=90.0)
    arguments = parser.parse_args()
    repos = arguments.repo or [_installed("networkx"), _installed("sympy")]
    rows = compare(repos, arguments.seeds, arguments.seconds)
    shares = [row["tokens_share"] for row in rows if row["tokens_share"]]
    path = RESULTS / f"recipe-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"date": date.today().isoformat(), "seconds": arguments.seconds, "rows": rows},
                               indent=1) + "\n", encoding="utf-8")
    if shares:
        print(f"median share of tokens: {statistics.median(shares):.0%}")
    print(f"Written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
