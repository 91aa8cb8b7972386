"""What many machines reach with many base models: `plan --all`, docs/tiers.md and docs/models.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from training.errors import EliteError
from training.planning.calculator import OptimalConfigCalculator
from training.planning.timing import TOKENS_PER_BYTE
from training.records import BaseModel, HardwareProfile, RepositoryFacts, Request

REFERENCE_TOKENS = 5_000_000
# What plans for no repository in particular are made for: 16 MB of code.
REFERENCE = RepositoryFacts(path="a repository of 5 M tokens", name="reference", files=2500, code_files=2500,
                            code_bytes=int(REFERENCE_TOKENS / TOKENS_PER_BYTE), languages={})


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One machine with one base model. `step`: plain, recomputed or streamed. `by`: the limits that a longer
    window breaks. `refused`: why there is no plan; the figures are 0 then. `hours` 0: no rate is known."""

    machine: str
    model: str
    tier: int
    context_tokens: int
    step: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    hours: float
    by: tuple[str, ...] = ()
    refused: str = ""

    @property
    def context(self) -> str:
        """The window in powers of 1,024."""
        return short_tokens(self.context_tokens)

    @property
    def cell(self) -> str:
        """Tier (s: streamed), window and hours in at most eleven columns; - without a plan."""
        if self.refused:
            return "-"
        hours = "?" if not self.hours else "<1" if self.hours < 1 else f"{self.hours:.0f}"
        return f"{self.tier}{'s' if self.step == 'streamed' else ''} {self.context} {hours}h"


def short_tokens(count: int) -> str:
    """Tokens in powers of 1,024.

    >>> short_tokens(57344), short_tokens(4 << 20), short_tokens(512), short_tokens(6000)
    ('56K', '4M', '512', '5.9K')
    """
    if count < 1024:
        return f"{count}"
    size, letter = (count / (1 << 20), "M") if count >= 1 << 20 else (count / 1024, "K")
    return f"{size:.0f}{letter}" if size == int(size) else f"{size:.1f}{letter}"


def outlook(machines: Mapping[str, HardwareProfile], bases: Iterable[BaseModel], request: Request,
            facts: RepositoryFacts = REFERENCE) -> Iterator[Outlook]:
    """One row for each machine and base model, in their order."""
    models = list(bases)
    for name, profile in machines.items():
        calculator = OptimalConfigCalculator(profile)
        for base in models:
            yield _one(calculator, name, replace(request, base_model=base.name), base, facts)


def _one(calculator: OptimalConfigCalculator, machine: str, request: Request, base: BaseModel,
         facts: RepositoryFacts) -> Outlook:
    try:
        chosen = calculator.outline(request, base, facts)
    except EliteError as error:
        return Outlook(machine=machine, model=base.name, tier=0, context_tokens=0, step="", device_bytes=0,
                       host_bytes=0, disk_bytes=0, hours=0.0, refused=str(error))
    found = chosen.candidate
    return Outlook(machine=machine, model=base.name, tier=found.tier, context_tokens=found.context_tokens,
                   step=found.step, device_bytes=found.memory.device_bytes, by=chosen.by,
                   host_bytes=found.memory.host_bytes, disk_bytes=found.memory.disk_bytes,
                   hours=round(found.schedule.total_s / 3600, 3) if found.schedule.total_s < 1e12 else 0.0)
