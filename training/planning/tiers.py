"""The table of tiers (`configs/tiers.yaml`): context, target and adapter rank of each step of the ladder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from training.errors import EliteError, UsageError, raise_all

TABLE = Path(__file__).resolve().parent.parent.parent / "configs" / "tiers.yaml"
NEEDS = ("flash", "deepspeed", "streamed")
BASELINE_TOKENS = 256            # what "improvement" is measured against: context / 256


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One row of the table. `min_vram_gib` is a guide for people; measured memory decides."""

    tier: int
    context_tokens: int
    target_tokens: int
    lora_rank: int
    min_vram_gib: float
    needs: tuple[str, ...]

    @property
    def streamed(self) -> bool:
        """Whether only the streamed step reaches this context."""
        return "streamed" in self.needs

    @property
    def improvement(self) -> int:
        """Context as a multiple of a 256-token baseline."""
        return self.context_tokens // BASELINE_TOKENS


def load(path: Path | None = None) -> tuple[Tier, ...]:
    """The table, ascending; the shipped one unless another is named.

    Raises UsageError or Problems naming every wrong row.
    """
    return _load(path or TABLE)


@functools.cache
def _load(path: Path) -> tuple[Tier, ...]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"Cannot read the tiers in {path}: {' '.join(str(error).split())}.") from error
    rows = data.get("tiers") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{path} holds no list under `tiers`.")
    raise_all([problem for number, row in enumerate(rows, 1) for problem in _problems(number, row, path)])
    tiers = tuple(Tier(**{**row, "needs": tuple(row["needs"])}) for row in rows)
    raise_all([UsageError(f"{path}: tier {b.tier} has {b.context_tokens:,} tokens of context, tier "
                          f"{a.tier} has "
                          f"{a.context_tokens:,}; contexts must ascend.")
               for a, b in pairwise(tiers) if b.context_tokens <= a.context_tokens])
    return tiers


def _problems(number: int, row: Any, path: Path) -> list[EliteError]:
    names = {field.name for field in fields(Tier)}
    if not isinstance(row, dict) or set(row) != names:
        return [UsageError(f"{path}: row {number} must have exactly the keys {', '.join(sorted(names))}.")]
    found: list[EliteError] = []
    if row["tier"] != number:
        found.append(UsageError(f"{path}: row {number} has tier {row['tier']!r}; tiers count up from 1."))
    for name in ("context_tokens", "target_tokens", "lora_rank", "min_vram_gib"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
            found.append(UsageError(f"{path}: row {number} has {name} {value!r}; the least is 1."))
    if not isinstance(row["needs"], list) or set(row["needs"]) - set(NEEDS):
        found.append(UsageError(f"{path}: row {number} has needs {row['needs']!r}; known are "
                                f"{', '.join(NEEDS)}."))
    if not found and row["target_tokens"] > row["context_tokens"]:
        found.append(UsageError(f"{path}: row {number} has more target than context."))
    return found


def tier_of(context_tokens: int, tiers: Sequence[Tier]) -> int:
    """The highest tier whose context is reached; 0 below the table.

    >>> tier_of(4095, load()), tier_of(4096, load()), tier_of(60000, load())
    (0, 1, 5)
    """
    return max((row.tier for row in tiers if row.context_tokens <= context_tokens), default=0)
