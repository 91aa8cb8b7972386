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
torture` counts every row in full, about an hour on 2 cores; `make test` runs a short form of those that
have a test. "Counted" is what the newest full count found: tries that ended as expected, of those made; rows
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

{sections}
{soak}{saves}{others}"""


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


def figures() -> tuple[dict[str, dict[str, Any]], str]:
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
    counts, places = figures()
    parts = [f"## {title}\n\n{_table(section, counts)}\n" for title, section in
             ((SECTIONS[name], section) for name, section in rows().items()) if section]
    when = f"Counted on {places}." if counts else "No full count was made yet."
    text = PAGE.format(counted=when, sections="\n".join(parts), soak=_soak(_newest("soak")),
                       saves=_saves(_newest("checkpoint-stall")), others=_others(_newest("peer-reliability")))
    return text.rstrip() + "\n"


def _newest(name: str) -> dict[str, Any]:
    found = sorted(RESULTS.glob(f"{name}-20*.json"))
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else {}


def _soak(found: dict[str, Any]) -> str:
    if not found:
        return "## A soak\n\nNot measured; `benchmarks/soak.py` does.\n\n"
    kills = found["kills"]
    who = ", ".join(f"{count} {name}" for name, count in sorted(kills.items()))
    return f"""## A soak

{found["date"]}, {found["cores"]} CPU cores: for {found["minutes"]:.0f} minutes runs of
{found["steps"]} updates got a SIGKILL every {found["least_s"]:.0f} to {found["most_s"]:.0f} s ({who}) and
went on. Of {found["runs"]} runs with {sum(kills.values())} kills {found["same"]} ended in the digest and the
losses of the run that was not killed (`benchmarks/soak.py`).

"""


def _saves(found: dict[str, Any]) -> str:
    if not found:
        return "## What a checkpoint costs\n\nNot measured; `benchmarks/checkpoint_stall.py` does it.\n\n"
    lines = [(f"{each['parameters'] / 1e6:,.0f} M", f"{each['bytes'] / 1e6:,.0f} MB",
              f"{each['save_s']:.2f} s", f"{each['save_s'] / (found['every_s'] + each['save_s']):.2%}")
             for each in found["sizes"]]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""## What a checkpoint costs

The training waits for it. {found["date"]}, {found["cores"]} CPU cores, the median of {found["tries"]} saves:
written, synced, hashed, renamed. The plan saves every {found["every_s"] / 60:.0f} minutes, and less often
where that were over 2 % of the time by the trial's own save (`benchmarks/checkpoint_stall.py`).

| Trained parameters | Checkpoint | Save | Of the time |
| ---: | ---: | ---: | ---: |
{rows}

"""


def _others(found: dict[str, Any]) -> str:
    if not found:
        return "## Others\n\nNot measured; `benchmarks/peer_reliability.py` does.\n"
    made, bad = found["versions"], found["not_a_number"]
    trainer, launcher = f"Hugging Face Trainer {made['transformers']}", f"DeepSpeed {made['deepspeed']}"
    ended = f"exit code {bad['exit_code']}"
    if "steps" in bad:
        ended += f", {bad['steps']} steps, weights {'finite' if bad['finite'] else 'not finite'}"
    lines = [(trainer, "SIGKILL at a random moment, a save at each step", _counts(found["kills"])),
             *((trainer, f"a file of its newest checkpoint: {kind}", _by_outcome(outcomes))
               for kind, outcomes in found["damages"].items()),
             (trainer, "a loss that is not a number, once", ended),
             *((launcher, what, f"ranks left in {each['with ranks left']} of {each['launches']}; exit codes "
                                f"{_counts(each['exit codes of the runner'])}")
               for what, each in found["launcher"].items())]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""## Others

The same faults for other trainers, {found["date"]}, {found["cores"]} CPU cores ("same": the weights of an
uninterrupted run). The trainer saves at each of 30 steps; DeepSpeed's two ranks only sleep
(`benchmarks/peer_reliability.py`).

| Trainer | Fault | What came of it |
| --- | --- | --- |
{rows}
"""


def _by_outcome(outcomes: dict[str, str]) -> str:
    return "; ".join(f"{what}: {', '.join(name for name, each in sorted(outcomes.items()) if each == what)}"
                     for what in sorted(set(outcomes.values())))


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(found.items(), key=lambda item: -item[1]))


def _table(section: list[dict[str, Any]], counts: dict[str, Any]) -> str:
    head = ["", "Fault", "Expected", "Asked", "Counted", "How", "Others"]
    lines = [[str(row["row"]), row["fault"], row["expected"], row["acceptance"], _counted(row, counts),
              row["answer"], row["peers"] or "-"] for row in sorted(section, key=lambda row: int(row["row"]))]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in cells)} |"
                     for cells in [head, ["---"] * len(head), *lines])


def _counted(row: dict[str, Any], counts: dict[str, Any]) -> str:
    if found := list(counts.get(str(row["row"]), {}).values()):
        notes = "".join(f"; {each['note'].strip('; ')}" for each in found if each["note"])
        return f"{sum(each['passed'] for each in found):,} of {sum(each['of'] for each in found):,}{notes}"
    if not row["test"]:
        return "not counted"
    short = row["test"].startswith("tests/torture/")
    return f"{'a test, not counted' if short else 'asserted in full by `make test`'}: `{row['test']}`"
