"""The ledger's entries, and the file they are kept in: one a day and machine."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.ledger.catalogue import Optimization
from training.ledger.judging import Arm, Change, changes, verdict
from training.planning import evidence
from training.records import HardwareProfile, to_data
from training.rundir import read_data, write_record


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimization on one machine. `changes`: by figure, on against off; `why`: what is missing where it
    is not applicable, or the error where a run failed. `on_keys`, `off_keys`: the arms' settings."""

    id: str
    name: str
    group: str
    date: str
    machine: str
    device: str
    model: str
    auto: bool
    conflicts: tuple[str, ...]
    on_keys: dict[str, Any]
    off_keys: dict[str, Any]
    verdict: str
    why: str = ""
    steps: int = 0
    changes: dict[str, Change] = field(default_factory=dict)
    on: tuple[Arm, ...] = ()
    off: tuple[Arm, ...] = ()


def entry(item: Optimization, profile: HardwareProfile, judged: str = "", why: str = "",
          steps: int = 0, on: Sequence[Arm] = (), off: Sequence[Arm] = ()) -> Entry:
    """The entry of an optimization; without a verdict given, the arms' one."""
    found = changes(on, off, item.changes) if on and not judged else {}
    device = str(item.both.get("device.kind", profile.device))
    return Entry(id=item.id, name=item.name, group=item.group, date=datetime.date.today().isoformat(),
                 machine=evidence.words(evidence.machine_of(profile)), device=device, model=item.model,
                 auto=item.auto, conflicts=item.conflicts, on_keys=item.on, off_keys=item.off,
                 verdict=judged or verdict(found), why=why, steps=steps, changes=found, on=tuple(on),
                 off=tuple(off))


def save(entries: Sequence[Entry], profile: HardwareProfile, folder: Path | None = None) -> Path:
    """Write `ledger-<date>-<machine>.json`; entries of the day that were not measured again stay in it.

    `folder`: by default where plans look for it.
    """
    folder = folder or evidence.folder() or evidence.RESULTS
    date, machine = datetime.date.today().isoformat(), evidence.machine_of(profile)
    path = folder / f"ledger-{date}-{evidence.slug(machine)}.json"
    earlier = read_data(path)["entries"] if path.exists() else []
    new = {each.id for each in entries}
    kept = [each for each in earlier if each["id"] not in new]
    write_record(path, {"date": date, "machine": machine, "entries": [*kept, *to_data(list(entries))]})
    return path
