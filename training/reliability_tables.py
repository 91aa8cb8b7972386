"""docs/reliability.md: each fault of configs/reliability/, what is expected and what was counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TABLES, RESULTS = ROOT / "configs" / "reliability", ROOT / "benchmarks" / "results"
SECTIONS = {"crash": "A kill, a crash, a damaged file", "resume": "Going on",
            "processes": "Processes and signals",
            "resources": "Memory, disk, numbers", "input": "Input that is not what it should be",
            "security": "Input that means harm"}
FIELDS = {"row", "fault", "expected", "acceptance", "test", "answer", "peers"}

PAGE = """# Reliability

Generated from `configs/reliability/` and `benchmarks/results/reliability-*.json` by `make docs`. `make
torture` counts every row in full, some hours on 2 cores; `make test` runs a short form of those that have a
test. "Counted" is what the newest full count found: tries that ended as expected, of those made; rows
without a figure say why. {counted}

How it is done:

- A checkpoint is written in `.staging-<step>-<pid>`, every file is synced, a manifest with sizes and sha256
  comes last, then the folder is renamed and its parent synced. A folder named `checkpoint-<step>` is
  therefore whole. Older ones are deleted after that, by a rename first; the newest two, the best and the
  one to go back to from loss spikes stay.
- Nothing random is stored: each update seeds Python, NumPy and torch from (`run.seed`, step, rank), and the
  order of windows is a function of (seed, epoch). So a resumed run makes the same updates, bit for bit on
  one device.
- The newest checkpoint whose every hash is right is gone on with, and the line says why newer ones were
  skipped. What changed since (configuration, windows, base model, versions) is refused with the difference;
  `--allow-change KEY` goes on all the same and leaves a line in `changes.jsonl`.
- A trainer that was killed, hangs or fails is started again from there, at most three times without a step
  more. When memory ran out, one thing is changed at a time that leaves windows and updates the same: the
  micro-batch, the allocator, recomputation, the loss's pieces, the streamed step, its chunks, where layer
  inputs live. Each restart leaves a line in `recovery.jsonl`.
- A trainer counts as hung after ten times its median step without a sign of life, a minute at least; the
  stacks of its threads are then in `train.log`.

{sections}"""


def rows() -> dict[str, list[dict[str, Any]]]:
    """The rows of each section, by number. Raises ValueError for a row that lacks a field or comes twice."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in SECTIONS:
        path = TABLES / f"{name}.yaml"
        found[name] = yaml.safe_load(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    every = [row for section in found.values() for row in section]
    if wrong := [row.get("row") for row in every if set(row) != FIELDS]:
        raise ValueError(f"rows {wrong} do not have exactly {sorted(FIELDS)}")
    numbers = [row["row"] for row in every]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a row stands there twice")
    return found


def counted() -> tuple[dict[str, dict[str, Any]], str]:
    """Of each row the newest figures of each test, and when and where they were counted."""
    found: dict[str, dict[str, Any]] = {}
    places = []
    for path in sorted(RESULTS.glob("reliability-*.json")):
        made = json.loads(path.read_text(encoding="utf-8"))
        places.append(f"{made['date']} ({made['cores']} CPU cores)")
        for row, tests in made["rows"].items():
            found.setdefault(row, {}).update(tests)
    return found, ", ".join(places)


def page() -> str:
    """docs/reliability.md."""
    counts, places = counted()
    parts = [f"## {title}\n\n{_table(section, counts)}\n" for title, section in
             ((SECTIONS[name], section) for name, section in rows().items()) if section]
    when = f"Counted on {places}." if counts else "No full count was made yet."
    return PAGE.format(counted=when, sections="\n".join(parts))


def _table(section: list[dict[str, Any]], counts: dict[str, Any]) -> str:
    head = ["", "Fault", "Expected", "Asked", "Counted", "How", "Others"]
    lines = [[str(row["row"]), row["fault"], row["expected"], row["acceptance"], _counted(row, counts),
              row["answer"], row["peers"] or "-"] for row in sorted(section, key=lambda row: int(row["row"]))]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in cells)} |"
                     for cells in [head, ["---"] * len(head), *lines])


def _counted(row: dict[str, Any], counts: dict[str, Any]) -> str:
    if found := list(counts.get(str(row["row"]), {}).values()):
        notes = "".join(f"; {each['note']}" for each in found if each["note"])
        return f"{sum(each['passed'] for each in found):,} of {sum(each['of'] for each in found):,}{notes}"
    return f"a test, not counted: `{row['test']}`" if row["test"] else "not counted"
