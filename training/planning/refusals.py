"""What a machine has no room for, and the nearest request that it has room for: found by planning it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from training import models
from training.errors import CannotWrite, DoesNotFit, EliteError
from training.planning import limits, memory, streaming
from training.planning.limits import Candidate, gib
from training.planning.situation import Situation
from training.records import BaseModel, Request
from training.settings import BY_NAME

SMALL_CONTEXTS = (2048, 1024, 512, 256)
# A plan for a request and base, or None where it would be refused.
Planner = Callable[[Request, BaseModel], Candidate | None]


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """One room that is too small. `text` says what is needed, what there is, and the largest term."""

    error: type[EliteError]
    text: str


@dataclass(frozen=True, kw_only=True)
class Other:
    """A request near the one that was refused. `flags` is what to add to the command for it."""

    flags: str
    request: Request
    base: BaseModel


def shortage(place: Situation, chosen: Candidate) -> Shortage | None:
    """The first room that a plan does not fit in: device memory, host memory, disk."""
    fitting = limits.fits(place, chosen)
    need, values = chosen.memory, {name: choice.value for name, choice in chosen.choices.items()}
    if not fitting["device_memory"]:
        kind = "device memory" if place.device == "cuda" else "memory"
        return Shortage(error=DoesNotFit, text=(
            f"This run needs {gib(need.device_bytes)} GiB at {chosen.context_tokens:,} tokens; "
            f"{gib(place.device_bytes)} GiB of {kind} is usable. {_largest(need.terms)}"))
    if not fitting["host_memory"]:
        return Shortage(error=DoesNotFit, text=(
            f"This run needs {gib(need.host_bytes)} GiB of host memory; {gib(place.host_bytes)} GiB is "
            f"usable. {_largest(_host_terms(place, values, need.device_bytes))}"))
    if not fitting["disk"]:
        return Shortage(error=CannotWrite, text=(
            f"This run writes {gib(need.disk_bytes)} GiB; {gib(place.profile.disk_free_bytes)} GiB is free "
            f"on its disk. {_largest(_disk_terms(place, values))}"))
    return None


def _largest(terms: Mapping[str, float]) -> str:
    name, size = max(terms.items(), key=lambda item: item[1])
    return f"The largest term is {name} ({gib(size)} GiB)."


def _host_terms(place: Situation, values: Mapping[str, Any], device_bytes: int) -> dict[str, float]:
    """Host bytes by name: the processes with what DeepSpeed offloads, and what the streamed step keeps
    there."""
    terms = {"the training processes": float(memory.host_bytes(place.base.shape, values, device_bytes))}
    if streaming.streamed(values) and place.device == "cuda":
        count = int(values["device.count"])
        terms |= {name: count * size for name, size in _costs(place, values).host.items()}
    return terms


def _disk_terms(place: Situation, values: Mapping[str, Any]) -> dict[str, float]:
    written = memory.disk_bytes(place.base.shape, values, place.repository_tokens)
    terms = {"checkpoints and dataset": float(written), "the base model": float(place.download_bytes)}
    if streaming.streamed(values):
        count = int(values["device.count"])
        terms |= {name: count * size for name, size in _costs(place, values).disk.items()}
    return terms


def _costs(place: Situation, values: Mapping[str, Any]) -> Any:
    return streaming.costs_of(place.base.shape, values)


def refusal(found: Shortage, place: Situation, chosen: Candidate, plan: Planner) -> EliteError:
    """The error to raise: the shortage, and the nearest request for which `plan` has room."""
    way = _way_out(place, chosen, plan)
    if found.error is CannotWrite:
        return CannotWrite(f"{found.text} Free some, give --output on another disk, or set "
                           f"training.keep_checkpoints=1.{' ' + way if way else ''}")
    return found.error(f"{found.text} {way or _nothing(place)}")


def _way_out(place: Situation, chosen: Candidate, plan: Planner) -> str:
    for other in _others(place, chosen, plan):
        if plan(other.request, other.base) is not None:
            return f"Nearest setting that fits: {other.flags}."
    return ""


def _nothing(place: Situation) -> str:
    kind = "--vram" if place.device == "cuda" else "--ram"
    return (f"No base model fits this machine, not even embedded; free memory, or see what would do with "
            f"`plan {kind} GIB`.")


def _others(place: Situation, chosen: Candidate, plan: Planner) -> Iterator[Other]:
    """Requests in the order of how much they give up: settings, context, base model."""
    yield from _settings(place, plan)
    yield from _shorter(place, chosen, place.base)
    smaller = [base for base in models.registry().values() if base.location != models.EMBEDDED
               and base.shape.total_parameters < place.base.shape.total_parameters]
    for base in sorted(smaller, key=lambda base: -base.shape.total_parameters):
        yield _with_base(place, base, _longest(place.request))
    last = models.registry()[models.EMBEDDED]
    yield _with_base(place, last, _longest(place.request))
    free = replace(_longest(place.request), settings={})
    yield Other(flags="--base-model embedded, without --set and --config", base=last,
                request=replace(free, base_model=models.EMBEDDED))


def _longest(request: Request) -> Request:
    """The request with its window left to the planner."""
    settings = {name: value for name, value in request.settings.items() if name != "dataset.context_tokens"}
    return replace(request, tier=None, context_tokens=None, settings=settings)


def _with_base(place: Situation, base: BaseModel, request: Request) -> Other:
    left_out = " and the window left to the planner" if request != place.request else ""
    return Other(flags=f"--base-model {base.name}{left_out}", base=base,
                 request=replace(request, base_model=base.name))


def _settings(place: Situation, plan: Planner) -> Iterator[Other]:
    """The same window with what the user set replaced by what the planner would choose: the streamed step's
    keys together, then each other key alone."""
    own = {name: value for name, value in place.request.settings.items() if name in BY_NAME}
    own.pop("dataset.context_tokens", None)
    stream = [name for name in own if name.startswith("stream.")]
    for names in [stream, *([name] for name in own if name not in stream)]:
        kept = {name: value for name, value in place.request.settings.items() if name not in names}
        free = plan(replace(place.request, settings=kept), place.base) if names else None
        if free is not None:
            changed = {name: free.choices[name].value for name in names
                       if free.choices[name].value != own[name]}
            yield Other(flags=" ".join(f"--set {name}={value}" for name, value in changed.items()),
                        request=replace(place.request, settings=place.request.settings | changed),
                        base=place.base)


def _shorter(place: Situation, chosen: Candidate, base: BaseModel) -> Iterator[Other]:
    """Lower tiers, then windows below the table, longest first."""
    free = _longest(place.request)
    for row in reversed(place.tiers):
        if row.context_tokens < chosen.context_tokens:
            yield Other(flags=f"--tier {row.tier}", request=replace(free, tier=row.tier), base=base)
    for context in SMALL_CONTEXTS:
        if context < chosen.context_tokens:
            request = replace(free, context_tokens=context)
            yield Other(flags=f"--context {context}", request=request, base=base)
