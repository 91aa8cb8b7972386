"""The catalogue of optimizations, `configs/optimizations.yaml`, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.errors import UsageError
from training.settings import nearest

CATALOGUE = Path(__file__).resolve().parents[2] / "configs" / "optimizations.yaml"
GROUPS = ("standard", "extreme", "also")    # `also`: choices of the recipe beyond the catalogue proper
CHANGES = ("memory", "speed", "quality", "disk")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """One entry of the catalogue; the head of the file says what each field holds."""

    id: str
    group: str
    name: str
    paper: str
    needs: tuple[str, ...]
    changes: tuple[str, ...]
    exact: bool
    conflicts: tuple[str, ...]
    code: str
    test: str
    default: str
    model: str
    on: dict[str, Any]
    off: dict[str, Any]
    both: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    auto: bool = False
    why_not_here: str = ""
    script: str = ""

    @property
    def trains(self) -> bool:
        """Whether its arms are training runs that learn something, not a few steps."""
        return "quality" in self.changes

    def arm(self, name: str) -> dict[str, Any]:
        """The keys of an arm, `on` or `off`."""
        return {**self.both, **(self.on if name == "on" else self.off)}


def catalogue(only: Sequence[str] | None = None) -> list[Optimization]:
    """The optimizations of the catalogue in its order, or those named. Raises UsageError for unknown ids."""
    # CSafeLoader reads the file in 8 ms, SafeLoader in 90.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load(CATALOGUE.read_text(encoding="utf-8"), Loader=loader)
    rows = [_row(group, row) for group in GROUPS for row in data.get(group, ())]
    known = {row.id: row for row in rows}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        near = nearest(unknown[0], known)
        raise UsageError(f"No optimization {unknown[0]}.{near} Known: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(only)] if only else rows


def _row(group: str, row: dict[str, Any]) -> Optimization:
    lists = {name: tuple(row[name]) for name in ("needs", "changes", "conflicts")}
    return Optimization(**{**row, **lists, "group": group})
