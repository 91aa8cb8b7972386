"""The table of `plan --all`: machines beside base models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from training.console.parts import note, show
from training.console.theme import plain, rows
from training.records import GIB, RepositoryFacts, Request

COLUMNS = 4                      # machines beside each other in 80 columns
DEFAULT_HOURS = 48.0
LIMITS = {"device_memory": "device", "host_memory": "host"}


def outlook(console: Console, found: Sequence[Any], facts: RepositoryFacts, request: Request) -> None:
    """Tier, context and hours of every machine with every base model; one of either in full."""
    console.print(plain(f"Plans for {facts.path}, {facts.code_bytes / 1e6:,.1f} MB, "
                        f"{request.max_hours or DEFAULT_HOURS:g} hours", "head"), soft_wrap=True)
    machines = list(dict.fromkeys(row.machine for row in found))
    models = list(dict.fromkeys(row.model for row in found))
    if len(machines) == 1 or len(models) == 1:
        _in_full(console, found, "model" if len(machines) == 1 else "machine",
                 machines[0] if len(machines) == 1 else models[0])
        return
    for start in range(0, len(machines), COLUMNS):
        _block(console, found, machines[start:start + COLUMNS], models)
    console.print()
    note(console, "Tier, context in tokens, and hours; s: the streamed step; -: no plan fits. Tier 0 is a "
                  "window shorter than tier 1's. `--base-model` or `--hardware` shows one of them in full, "
                  "with the limit that decides.", "quiet")


def _block(console: Console, found: Sequence[Any], machines: Sequence[str], models: Sequence[str]) -> None:
    cells = {(row.machine, row.model): row.cell for row in found}
    table = rows("", *(_folded(name) for name in machines), right=tuple(range(1, len(machines) + 1)))
    table.padding = (0, 1, 0, 0)
    for model in models:
        table.add_row(plain(model), *(cells[machine, model] for machine in machines))
    console.print()
    show(console, table)


def _folded(name: str) -> str:
    """A machine's name over two lines of at most ten columns, where it has a place to fold at.

    >>> _folded("rtx-2060-super"), _folded("h100")
    ('rtx-2060\\nsuper', 'h100')
    """
    if len(name) <= 10 or "-" not in name:
        return name
    head, _, tail = name.rpartition("-")
    return f"{head}\n{tail}"


def _in_full(console: Console, found: Sequence[Any], name: str, other: str) -> None:
    note(console, f"With {other}:")
    table = rows(name.capitalize(), "Tier", "Context", "Step", "Device", "Host", "Disk", "Hours",
                 "By", right=(1, 2, 4, 5, 6, 7), wide=8)
    table.padding = (0, 1, 0, 0)
    for row in found:
        if row.refused:
            table.add_row(plain(getattr(row, name)), "-", *[""] * 6, plain("no plan fits", "quiet"))
            continue
        by = ", ".join(LIMITS.get(limit, limit) for limit in row.by)
        sizes = [f"{size / GIB:,.1f}" for size in (row.device_bytes, row.host_bytes, row.disk_bytes)]
        table.add_row(plain(getattr(row, name)), f"{row.tier}", row.context, row.step, *sizes,
                      f"{row.hours:.1f}", plain(by, "quiet"))
    show(console, table)
    note(console, "Device, host and disk in GiB.", "quiet")
    reasons = dict.fromkeys(row.refused for row in found if row.refused)
    for reason in list(reasons)[:3]:
        note(console, f"No plan: {reason}", "quiet")
