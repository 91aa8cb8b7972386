"""docs/optimizations.md and docs/research.md: the catalogue, the papers, and what the ledger measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training.ledger import GROUPS, NOTICEABLE, Optimization, catalogue
from training.planning import evidence

ROOT = Path(__file__).resolve().parent.parent
RESEARCH = ROOT / "configs" / "research.yaml"
FIGURES = {"memory_bytes": "Memory", "tokens_per_s": "Tokens/s", "loss": "Loss, equal tokens",
           "loss_at_time": "Loss, equal time", "disk_bytes": "Disk"}
HEADS = {"standard": "Standard", "extreme": "Extreme", "also": "Also"}
LEADS = {"also": "Choices of the recipe beyond the catalogue, measured in the same way.\n\n"}
NOT_MEASURED = "Not measured; `python3 elite_train.py ledger` measures."
Row = Mapping[str, Any]
Machines = Mapping[str, Mapping[str, Row]]

PAGE = """# Optimizations

Generated from `configs/optimizations.yaml` and the ledgers in `benchmarks/results/` by `make docs`.

{count} optimizations: {standard} standard and {extreme} extreme ones. Exact means: the same gradients up to
rounding. Each names the test that fails when it silently does nothing. `--auto` switches those marked with *
by what the ledger measured on this very machine, and the plan says so; the others follow the planner's
formulas. `ELITE_LEDGER=DIR` names another folder of ledgers, and empty turns that off.

{groups}

## Measured

{measured}

What is not in these tables has not been measured. `python3 elite_train.py ledger` measures them on your
machine, in 15 to 30 minutes on two cores; `--only ID` takes one. Both arms share repository, windows, seed
and steps, and the real trainer runs them on a model of about one million parameters. Speed and memory are
taken over a few steps, arms in turn. Where quality is at stake each of the three pairs is a training run with
a seed of its own: held-out loss at equal tokens is that of the end, at equal time that at the moment when the
faster arm ended. Memory is the peak of a process, its libraries included.

A change is the mean over the pairs with Student's interval of 95 %. It counts when the interval holds no 0
and it is at least {thresholds}. All that counts better is "helped", all worse "hurt", some of both "mixed".

Verdicts near a threshold move from run to run. A second full run on the same kind of cores on 2026-11-22 (26
minutes; fewer steps at 4,096 tokens; `benchmarks/results/repeated-ledger-2026-11-22.json`, which `--auto`
does not read) gave the same verdict for 28 of 35. Muon and accumulation went from helped to mixed, SWA, EMA
and grouped-query attention from helped to no difference, dynamic batch size from mixed to hurt, selective
checkpointing from hurt to no difference. No figure that counted better in one counted worse in the other.

{hardware}

{streamed}"""
RESEARCH_PAGE = """# Research

Generated from `configs/research.yaml` and the ledgers in `benchmarks/results/` by `make docs`.

What ELITE rests on: the paper, the part that is used, and what was found here. "Not measured" means that no
figure of ours exists yet; section numbers were not checked against the papers. Figures come from the ledger
(`python3 elite_train.py ledger`), whose tables are in [optimizations](optimizations.md).

{table}

{notes}"""


def optimizations_page(streamed: str, machines: Machines | None = None) -> str:
    """The catalogue by group, what was measured by machine, and what needs other hardware.

    `streamed`: the parts after it; `machines`: the newest entries by machine and id, by default those
    of benchmarks/results.
    """
    items = catalogue()
    by_group = {group: [item for item in items if item.group == group] for group in GROUPS}
    groups = "\n\n".join(f"### {HEADS[group]}\n\n{LEADS.get(group, '')}{_catalogue(found)}"
                         for group, found in by_group.items() if found)
    machines = _newest() if machines is None else machines
    counts = {group: len(by_group[group]) for group in ("standard", "extreme")}
    return PAGE.format(groups=groups, measured=_measured(machines) or NOT_MEASURED, streamed=streamed,
                       hardware=_hardware(items, machines), thresholds=_thresholds(),
                       count=sum(counts.values()), **counts)


def _newest() -> dict[str, dict[str, Row]]:
    return evidence.newest(evidence.records(evidence.RESULTS))


def _catalogue(items: list[Optimization]) -> str:
    head = ["What", "Id", "Changes", "Exact", "Default", "Needs", "Conflicts", "Code", "Test", "Source"]
    return table(head, [
        [item.name, f"`{item.id}`{' *' if item.auto else ''}", ", ".join(item.changes),
         "yes" if item.exact else "no", item.default, ", ".join(item.needs) or "-",
         ", ".join(f"`{name}`" for name in item.conflicts) or "-", _code(item.code), f"`{item.test}`",
         item.paper] for item in items])


def _code(place: str) -> str:
    path, _, symbol = place.partition(":")
    return f"`{path}`" + (f", `{symbol}`" if symbol else "")


def _measured(machines: Machines) -> str:
    """One table a machine: what ran there."""
    told = []
    for machine, rows in sorted(machines.items()):
        ran = [row for row in rows.values() if row["on"]]
        body = [[row["name"], row["verdict"], *(_cell(row["changes"].get(name)) for name in FIGURES),
                 f"{len(row['on'])} x {row['steps']}", row["date"]] for row in ran]
        failed = [f"{row['name']} failed: {row['why']}" for row in rows.values()
                  if row["verdict"] == "failed"]
        head = ["What", "Verdict", *FIGURES.values(), "Pairs x steps", "Date"]
        told.append("\n\n".join([f"On {machine}:", table(head, body), *failed]))
    return "\n\n".join(told)


def _cell(change: Row | None) -> str:
    """A change with its interval; bold where it counts."""
    if change is None:
        return "-"
    text = f"{change['mean']:+.1%} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
    return f"**{text}**" if change["verdict"] in ("better", "worse") else text


def _hardware(items: list[Optimization], machines: Machines) -> str:
    ran = {name for rows in machines.values() for name, row in rows.items() if row["on"]}
    waiting = [item for item in items if item.why_not_here and item.id not in ran]
    if not waiting:
        return ""
    rows = [[item.name, f"needs hardware: {item.why_not_here}", f"`{item.script}`"] for item in waiting]
    return "## Not measured yet\n\n" + table(["What", "Why", "What measures it"], rows)


def _thresholds() -> str:
    return ", ".join(f"{share:.1%} ({FIGURES[name].lower()})" for name, share in NOTICEABLE.items())


def research_page(machines: Machines | None = None) -> str:
    """The papers with what was found; `machines` as for `optimizations_page`."""
    data = yaml.safe_load(RESEARCH.read_text(encoding="utf-8"))
    machines = _newest() if machines is None else machines
    known = {item.id: item.name for item in catalogue()}
    rows = [[f"[{row['paper']}]({row['link']})", row["section"], row["formula"], row["used_for"],
             _finding(row, machines, known)] for row in data["papers"]]
    head = ["Paper", "Section", "Formula", "Used for", "Finding here"]
    return RESEARCH_PAGE.format(table=table(head, rows), notes=data["notes"])


def _finding(row: Row, machines: Machines, known: Mapping[str, str]) -> str:
    """The written finding, then the newest result of each entry that is named."""
    said = [row["finding"]] if "finding" in row else []
    for name in row.get("entry", ()):
        results = [rows[name] for rows in machines.values() if name in rows and rows[name]["on"]]
        newest = max(results, key=lambda found: str(found["date"]), default=None)
        said.append(f"{known[name]}: {_result(newest) if newest else 'not measured'}")
    return "; ".join(said)


def _result(row: Row) -> str:
    counts = [f"{FIGURES[name].lower()} {row['changes'][name]['mean']:+.1%}" for name in FIGURES
              if row["changes"].get(name, {}).get("verdict") in ("better", "worse")]
    figures = f" ({', '.join(counts)})" if counts else ""
    return f"{row['verdict']}{figures}, {row['machine']}, {row['date']}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
