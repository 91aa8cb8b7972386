"""What the ledger measured on this machine, as choices of a plan.

An entry of `benchmarks/results/ledger-*.json` that its catalogue marks `auto` switches its keys on where it
helped, and off where it hurt, on the same machine (CPU, cores, GPUs), the same device and the
same kind of model. A key that the user set stays. Of two that cannot go together the one with the larger gain
is taken. Reads JSON alone: no torch, no catalogue, so a plan follows what was measured, not what is listed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.records import HardwareProfile
from training.settings import problems_in

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# Names another folder of ledgers; empty, there are none.
VARIABLE = "ELITE_LEDGER"
SPOKEN = {"loss_at_time": "held-out loss at equal time", "loss": "held-out loss", "tokens_per_s": "tokens/s",
          "memory_bytes": "memory"}
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one entry says: the values of `keys` are better than those of `against`, on which it was tried.

    `helped`: those keys switch the optimization on; else off, since it hurt. `gain`: of the loss, the speed
    and the memory, as shares.
    """

    id: str
    model: str
    device: str
    helped: bool
    keys: Mapping[str, Any]
    against: Mapping[str, Any]
    conflicts: tuple[str, ...]
    gain: tuple[float, float, float]
    why: str

    def holds(self, name: str, planned: Any) -> bool:
        """Whether it has a say about a key for which this is planned without it: of a third value nothing
        was measured."""
        return planned in (self.keys[name], self.against.get(name))


def machine_of(profile: HardwareProfile) -> dict[str, Any]:
    """What makes two profiles the same machine to a ledger."""
    return {"cpu": profile.cpu_name, "cores": profile.cpu_cores, "gpus": [gpu.name for gpu in profile.gpus]}


def words(machine: Mapping[str, Any]) -> str:
    """A machine in words.

    >>> words({"cpu": "AMD EPYC", "cores": 2, "gpus": []})
    'AMD EPYC, 2 cores, no GPU'
    """
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return f"{machine['cpu']}, {machine['cores']} core{'s' if machine['cores'] != 1 else ''}, {gpus}"


def slug(machine: Mapping[str, Any]) -> str:
    """The part of a ledger's file name that tells machines apart.

    >>> slug({"cpu": "Intel(R) Xeon(R)", "cores": 8, "gpus": ["NVIDIA A100"]})
    'intel-r-xeon-r-8-cores-nvidia-a100'
    """
    return re.sub(r"[^a-z0-9]+", "-", words(machine).lower()).strip("-")


def folder() -> Path | None:
    """Where ledgers lie: `ELITE_LEDGER`, else benchmarks/results; None when that variable is empty."""
    named = os.environ.get(VARIABLE)
    return RESULTS if named is None else Path(named) if named else None


def records(where: Path) -> list[dict[str, Any]]:
    """The ledgers of a folder, oldest first; a file that is none is left out."""
    found = []
    for path in sorted(where.glob("ledger-*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and isinstance(data.get("machine"), dict) and "entries" in data:
            found.append(data)
    return sorted(found, key=lambda data: str(data.get("date", "")))


def newest(found: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Row]]:
    """Of ledgers, oldest first, the newest entry of each optimization by machine (in words) and id."""
    machines: dict[str, dict[str, Row]] = {}
    for data in found:
        machines.setdefault(words(data["machine"]), {}).update({row["id"]: row for row in data["entries"]})
    return machines


def read(profile: HardwareProfile, where: Path | None = None) -> tuple[Evidence, ...]:
    """What was measured on this machine, largest gain first; nothing for a machine that is described."""
    where = where or folder()
    if where is None or profile.source != "measured":
        return ()
    rows = newest(records(where)).get(words(machine_of(profile)), {})
    told = [made for row in rows.values() if (made := _evidence(row))]
    return tuple(sorted(told, key=lambda each: (not each.helped, [-share for share in each.gain])))


def helps(row: Row) -> bool:
    """Whether an entry is worth switching on: it helped, or its loss is lower at equal time, in which the
    seconds of its steps are counted already, and nothing else is worse."""
    judged = {name: change["verdict"] for name, change in row["changes"].items()}
    worse = {name for name, verdict in judged.items() if verdict == "worse"}
    sooner = judged.get("loss_at_time") == "better" and worse <= {"tokens_per_s"}
    return bool(row["verdict"] == "helped" or sooner)


def _evidence(row: Row) -> Evidence | None:
    good = helps(row)
    if not row.get("auto") or not (good or row["verdict"] == "hurt"):
        return None
    keys, against = (row["on_keys"], row["off_keys"]) if good else (row["off_keys"], row["on_keys"])
    if problems_in(keys):
        return None            # a key of an earlier version
    return Evidence(id=row["id"], model=row["model"], device=row["device"], helped=good, keys=keys,
                    against=against, conflicts=tuple(row["conflicts"]), gain=_gain(row["changes"]),
                    why=_why(row))


def _gain(changes: Mapping[str, Any]) -> tuple[float, float, float]:
    def better(name: str, sign: int) -> float:
        change = changes.get(name)
        return sign * change["mean"] if change and change["verdict"] == "better" else 0.0
    return (max(better("loss_at_time", -1), better("loss", -1)), better("tokens_per_s", 1),
            better("memory_bytes", -1))


def _why(row: Row) -> str:
    changes = row["changes"]
    first = "loss_at_time" if "loss_at_time" in changes else "loss"
    shown = [name for name in SPOKEN if (name in (first, "tokens_per_s") and name in changes)
             or changes.get(name, {}).get("verdict") in ("better", "worse")]
    said = []
    for name in shown:
        change = changes[name]
        within = f" ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})" if name == first else ""
        said.append(f"{SPOKEN[name]} {100 * change['mean']:+.1f} %{within}")
    return f"ledger of {row['date']} on this machine: {', '.join(said)}"


def applicable(found: Sequence[Evidence], model: str, device: str,
               user: Mapping[str, Any]) -> tuple[Evidence, ...]:
    """The evidence for a kind of model on a device that can go together, in its order.

    Left out is what sets a key that the user set, what another one was measured against and beat, and what
    conflicts with one that comes before it.
    """
    own = [each for each in found if each.model == model and each.device == device
           and not each.keys.keys() & user.keys()]
    kept: list[Evidence] = []
    for each in own:
        beaten = any(other.against.get(name) == value and other.keys.get(name, value) != value
                     for other in own if other.helped and each.helped
                     for name, value in each.keys.items())
        if not beaten and all(_together(each, other) for other in kept):
            kept.append(each)
    return tuple(kept)


def _together(one: Evidence, other: Evidence) -> bool:
    shared = one.keys.keys() & other.keys.keys()
    if not (one.helped and other.helped):     # what is switched off conflicts with nothing but another value
        return not shared
    return (one.id not in other.conflicts and other.id not in one.conflicts
            and all(one.keys[name] == other.keys[name] for name in shared))
