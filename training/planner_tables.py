"""docs/planning.md: how a plan is made, and how far off it was when benchmarks/planner.py measured it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPLANATION = ROOT / "docs" / "explanations" / "planning.md"
NOT_MEASURED = "Not measured: run `python benchmarks/planner.py`."


def page() -> str:
    """The whole page."""
    newest = max((ROOT / "benchmarks" / "results").glob("planner-*.json"), default=None)
    found = json.loads(newest.read_text(encoding="utf-8")) if newest else {}
    return EXPLANATION.read_text(encoding="utf-8").format(
        errors=_errors(found), memory=_memory(found), time=_time(found), machine=_machine(found))


def _machine(found: Mapping[str, Any]) -> str:
    if not found:
        return "nothing yet"
    return f"{found['machine']}, {found['cores']} cores, torch {found['torch']}, {found['date']}"


def _errors(found: Mapping[str, Any]) -> str:
    """One line a tool: how many requests it answers, and how far it is off."""
    memory = found.get("memory")
    if not memory:
        return NOT_MEASURED
    tools = {"ELITE, without a trial": [row["off"] for row in memory["rows"]]}
    half = {"ELITE, without a trial": [row["off"] for row in memory["rows"] if "bf16" in row["name"]]}
    for name in memory["peers"]:
        tools[name] = [row["peers"][name] for row in memory["rows"]]
        half[name] = [row["peers"][name] for row in memory["rows"] if "bf16" in row["name"]]
    head = ["Estimate", "Answers", "Median error", "Worst", "Answers in bf16", "Median error", "Worst"]
    return _table(head, [[name, *_spread(offs), *_spread(half[name])] for name, offs in tools.items()])


def _spread(offs: list[float | None]) -> list[str]:
    """Count, median and worst of the answers that there are."""
    sizes = [abs(off) for off in offs if off is not None]
    if not sizes:
        return ["0", "-", "-"]
    return [f"{len(sizes)}", f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}"]


def _memory(found: Mapping[str, Any]) -> str:
    memory = found.get("memory")
    if not memory:
        return NOT_MEASURED
    peers = list(memory["rows"][0]["peers"])
    head = ["Request", "Measured MiB", "Predicted", "Off", *peers]
    body = []
    for row in memory["rows"]:
        others = [f"{row['peers'][name]:+.0%}" if row["peers"][name] is not None else "-" for name in peers]
        body.append([row["name"], f"{row['measured_bytes'] / 2**20:,.1f}",
                     f"{row['predicted_bytes'] / 2**20:,.1f}", f"{row['off']:+.1%}", *others])
    return _table(head, body)


def _time(found: Mapping[str, Any]) -> str:
    time = found.get("time")
    if not time:
        return NOT_MEASURED
    body = [[row["name"], f"{row['tokens']:,}", f"{row['measured_s']:.2f}", f"{row['predicted_s']:.2f}",
             f"{row['off']:+.0%}", f"{row['untried_off']:+.0%}", f"{row['spread']:.0%}"]
            for row in time["rows"]]
    ours, untried = time["ours"], time["untried"]
    body.append(["median, worst", "", "", "", f"{ours['median']:.0%}, {ours['worst']:.0%}",
                 f"{untried['median']:.0%}, {untried['worst']:.0%}", ""])
    return _table(["Request", "Tokens", "Measured s", "Predicted after two short lengths", "Off",
                   "Off without them", "Spread of repeats"], body)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
