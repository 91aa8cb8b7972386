"""Two parts of docs/optimizations.md: the default recipe beside a plain one, ELITE beside other trainers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

RECIPE = """## The default recipe beside a plain one

The embedded model on {repos}, {date}: each arm has the same windows and {seconds:.0f} s of training steps on
the same 2 CPU cores, and its own cosine schedule over them. Plain: AdamW at 2e-3, the best of the rates tried
for it. Default: what `--auto` plans. The last column is the share of the plain arm's target tokens after
which the default arm had the plain arm's last held-out loss (`python3 benchmarks/recipe.py`).

{table}
"""
PEERS = """## Beside other trainers

A Qwen2 of 5.5 M parameters, LoRA of rank 8 on all linear layers, fp32, one window an update, {cores} CPU
cores, {date}; {versions}. {rounds} of {steps} steps at most, in turn. Hugging Face's trainers
recompute activations; so does the second row of ELITE, whose first row is what its planner chose. Memory is
the process's peak with its imports (`python3 benchmarks/trainers.py`).{absent}

{table}
"""
NOT_YET = "## {}\n\nNot measured; `python3 benchmarks/{}.py` measures.\n"


def section() -> str:
    """Both parts, from the newest results."""
    return f"{_recipe(_newest('recipe'))}\n{_trainers(_newest('trainers'))}"


def _runs(count: int) -> str:
    return "One run" if count == 1 else f"Medians of {count} runs"


def _newest(name: str) -> dict[str, Any] | None:
    found = sorted(RESULTS.glob(f"{name}-*.json"))
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None


def _recipe(record: dict[str, Any] | None) -> str:
    if record is None:
        return NOT_YET.format("The default recipe beside a plain one", "recipe")
    rows, shares = [], []
    for row in record["rows"]:
        share = row["tokens_share"]
        shares += [share] if share else []
        arms = [row["plain"], row["default"]]
        rows.append([row["repo"], str(row["seed"]), *(f"{arm['last']:.3f}" for arm in arms),
                     *(f"{arm['tokens_per_s']:,.0f}" for arm in arms), f"{share:.0%}" if share else "never"])
    head = ["Repository", "Seed", "Loss, plain", "Loss, default", "Tokens/s, plain", "Tokens/s, default",
            "Tokens"]
    median = f"\n\nMedian share: {statistics.median(shares):.0%}." if shares else ""
    repos = " and ".join(dict.fromkeys(row["repo"] for row in record["rows"]))
    return RECIPE.format(repos=repos, date=record["date"], seconds=record["seconds"],
                         table=_table(head, rows) + median)


def _trainers(record: dict[str, Any] | None) -> str:
    if record is None:
        return NOT_YET.format("Beside other trainers", "trainers")
    rows = [[f"{row['length']:,}", row["name"], f"{row['tokens_per_s']:,.0f}",
             f"{row['tokens_per_s_range'][0]:,.0f}-{row['tokens_per_s_range'][1]:,.0f}",
             f"{row['peak_bytes'] / 1e6:,.0f} MB", _step(row["settings"])] for row in record["rows"]]
    head = ["Tokens", "Trainer", "Tokens/s", "Range", "Memory", "Step"]
    absent = f" Left out, not installed: {', '.join(record['left_out'])}." if record["left_out"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return PEERS.format(cores=record["cores"], date=record["date"], versions=versions, steps=record["steps"],
                        rounds=_runs(record["rounds"]), absent=absent, table=_table(head, rows))


def _step(settings: dict[str, Any]) -> str:
    if settings.get("stream.chunk_tokens"):
        return f"streamed, chunks of {settings['stream.chunk_tokens']:,}"
    if "training.checkpointing" not in settings:
        return "recomputed"
    return "recomputed" if settings["training.checkpointing"] else "activations kept"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
