"""Stage 2: what to run on this machine. Numbers decide; each choice carries its source and its reason."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from training import expectations
from training.errors import raise_all
from training.longcontext.policy import StreamPolicy
from training.planning import choices, limits, policies, refusals, situation, streaming, tiers, timing
from training.planning.evidence import Evidence
from training.planning.limits import Candidate, gib, hours
from training.planning.refusals import SMALL_CONTEXTS
from training.planning.situation import Situation
from training.planning.tiers import Tier
from training.records import BaseModel, Choice, HardwareProfile, Plan, RepositoryFacts, Request, TierRow
from training.settings import contradictions

# One tier of the table worked out, by its index; each is worked out once.
Rows = Callable[[int], Candidate]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The window to train. `by`: the limits that a longer one breaks, where limits decided."""

    candidate: Candidate
    by: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class OptimalConfigCalculator:
    """Chooses the longest context that memory, disk, hours and repository allow, and everything that goes
    with it."""

    def __init__(self, profile: HardwareProfile, measured: tuple[Evidence, ...] = ()):
        """`measured`: what the ledger says of this machine (`evidence.read`)."""
        self.profile, self.measured = profile, measured
        self.tiers = tiers.load()

    def calculate(self, request: Request, base: BaseModel, facts: RepositoryFacts) -> Plan:
        """The plan for this request, with every tier worked out.

        Raises UsageError or Problems (values that cannot be honoured), DoesNotFit (device or host memory)
        and CannotWrite (disk without room); the last two not with `request.anyway`.
        """
        place = self._place(request, base, facts)
        row = self._rows(place)
        rows = [row(index) for index in range(len(self.tiers))]
        fitting = [limits.fits(place, each) for each in rows]
        chosen = self._checked(place, self._choose(place, row))
        final = chosen.candidate
        return Plan(tier=final.tier, context_tokens=final.context_tokens, base_model=place.base.location,
                    target_tokens=int(final.choices["dataset.target_tokens"].value), choices=final.choices,
                    memory=final.memory, limits=limits.verdicts(place, rows, fitting),
                    steps=final.schedule.steps, step_s=_finite(final.schedule.step_s),
                    total_s=_finite(final.schedule.total_s), notes=(*chosen.notes, *_notes(place, final)),
                    tiers=tuple(map(_tier_row, self.tiers, rows, fitting)), room=_room(place))

    def outline(self, request: Request, base: BaseModel, facts: RepositoryFacts) -> Chosen:
        """The window that `calculate` would choose, without the tiers that do not decide; raises the same
        errors, without looking for the nearest plan that fits."""
        place = self._place(request, base, facts)
        chosen = self._choose(place, self._rows(place))
        found = refusals.shortage(place, chosen.candidate)
        if found and not request.anyway:
            raise found.error(found.text)
        return self._cut(place, chosen)

    def _place(self, request: Request, base: BaseModel, facts: RepositoryFacts) -> Situation:
        place, problems = situation.build(request, self.profile, base, facts, self.tiers, self.measured)
        raise_all(problems)
        return place

    def _rows(self, place: Situation) -> Rows:
        @functools.cache
        def row(index: int) -> Candidate:
            return self._candidate(place, self.tiers[index].context_tokens, "derived", "")
        return row

    def _checked(self, place: Situation, chosen: Chosen) -> Chosen:
        """The choice within the hours granted. Raises what it contradicts or has no room for."""
        values = {name: choice.value for name, choice in chosen.candidate.choices.items()}
        raise_all(contradictions(values))
        found = refusals.shortage(place, chosen.candidate)
        if found and not place.request.anyway:
            raise refusals.refusal(found, place, chosen.candidate, functools.partial(self._fitting, place))
        told = (f"--anyway: it runs although it does not fit. {found.text}",) if found else ()
        cut = self._cut(place, chosen)
        return replace(cut, notes=(*told, *cut.notes))

    def _fitting(self, place: Situation, request: Request, base: BaseModel) -> Candidate | None:
        """The window for another request on the same machine, or None where it would be refused."""
        other, problems = situation.build(request, self.profile, base, place.facts, self.tiers, self.measured)
        if problems or (request.tier is None and self._hopeless(other)):
            return None
        candidate = self._choose(other, self._rows(other)).candidate
        values = {name: choice.value for name, choice in candidate.choices.items()}
        return None if contradictions(values) or refusals.shortage(other, candidate) else candidate

    def _hopeless(self, place: Situation) -> bool:
        """Whether not even the shortest window that would be tried fits; a longer one takes no less."""
        if "dataset.context_tokens" in place.user or place.embedded or place.device == "cpu":
            return False
        return all(refusals.shortage(place, find(place, SMALL_CONTEXTS[-1], "derived", ""))
                   for find in (self._candidate, self._short_streamed))

    def _cut(self, place: Situation, chosen: Chosen) -> Chosen:
        candidate, notes = _within_hours(place, chosen.candidate)
        return replace(chosen, candidate=candidate, notes=(*chosen.notes, *notes))

    def _choose(self, place: Situation, row: Rows) -> Chosen:
        fixed, number = place.user.get("dataset.context_tokens"), place.request.tier
        if fixed is not None:
            return Chosen(candidate=self._candidate(place, int(fixed), "user", "set by the user"))
        if number is not None:
            return Chosen(candidate=row(number - 1).told("user", f"--tier {number}"))
        if place.embedded or place.device == "cpu":
            return Chosen(candidate=self._packed(place))
        found = limits.reached(place, map(row, range(len(self.tiers))))
        by = ", ".join(name.replace("_", " ") for name in found.by) or "none: it is the last of the table"
        if found.row is None:
            return self._below(place, found.by)
        source = "preset" if place.profile.source == "preset" else "measured"
        why = f"tier {found.tier}, the highest within every limit (decided by {by})"
        return Chosen(candidate=found.row.told(source, why), by=found.by)

    def _packed(self, place: Situation) -> Candidate:
        """Short windows in which every token is a target: the embedded model, and any base on a CPU."""
        if place.embedded:
            context, why = choices.EMBEDDED_CONTEXT, "a model this small gains nothing from more context"
        else:
            context, why = choices.CPU_CONTEXT, "on a CPU every token is dear, so each one read is trained on"
        context = min(context, place.base.shape.native_context, _power(place.repository_tokens))
        return self._candidate(place, context, "derived", f"{why}; `--tier` or `--context` asks for another")

    def _below(self, place: Situation, by: tuple[str, ...]) -> Chosen:
        """No tier fits: the longest packed window below the table that memory allows, through the plain
        step, else through the streamed one."""
        broken = ", ".join(name.replace("_", " ") for name in by)
        longest = min(place.max_context, max(_power(place.repository_tokens), SMALL_CONTEXTS[-1]))
        contexts = [size for size in SMALL_CONTEXTS if size <= longest] or [place.max_context]
        why = f"below tier 1, whose {self.tiers[0].context_tokens:,} tokens exceed: {broken}"
        for find in (self._candidate, self._short_streamed):
            for context in contexts:
                last = find(place, context, "measured", why)
                if not refusals.shortage(place, last):
                    return Chosen(candidate=last, by=by, notes=(
                        f"No tier fits ({broken}); windows of {context:,} tokens, packed, are trained "
                        "instead.",))
        return Chosen(candidate=last, by=by)

    def _short_streamed(self, place: Situation, context: int, source: str, why: str) -> Candidate:
        """A window shorter than those that are streamed unasked; the plain step where the user wants it."""
        if policies.asked(place) is False:
            return self._candidate(place, context, source, why)
        return self._streamed(place, choices.window_of(place, context, source, why), place.user)[0]

    def _candidate(self, place: Situation, context: int, source: str, why: str) -> Candidate:
        """One window length: activations kept if they fit, recomputed if not, or the streamed step."""
        wanted = policies.asked(place)
        if wanted:
            return self._streamed(place, choices.window_of(place, context, source, why), place.user)[0]
        for recompute in (False, True):
            window = choices.window_of(place, context, source, why, recompute)
            plain = self._worked(place, replace(window, step_why=policies.PLAIN))
            fitting = plain if plain.memory.device_bytes <= place.device_bytes else None
            if fitting:
                break
        if wanted is False or context < policies.LEAST_CONTEXT:
            return plain
        if fitting and not policies.worth_a_try(place, context):
            return fitting
        return self._compared(place, replace(window, recompute=False), fitting, plain)

    def _compared(self, place: Situation, window: choices.Window, fitting: Candidate | None,
                  plain: Candidate) -> Candidate:
        """The streamed step where the plain one does not fit or is slower."""
        streamed, over = self._streamed(place, window, place.user)
        if fitting is None:
            closer = plain.memory.device_bytes / max(1, place.device_bytes) < over
            return plain if over > 1 and closer else streamed
        timely = (limits.fits(place, streamed)["hours"], limits.fits(place, fitting)["hours"])
        if over > 1 or timely == (False, True):
            return fitting
        better = timely == (True, False) or policies.preferred(place, fitting, streamed)
        return streamed if better else fitting

    def _streamed(self, place: Situation, window: choices.Window,
                  user: Mapping[str, Any]) -> tuple[Candidate, float]:
        """The best streamed step for a window, and by how much it is over what the machine has."""
        first = choices.derive(place, replace(window, stream=StreamPolicy(), stream_why=policies.OPEN))
        values = {name: choice.value for name, choice in first.items()}
        fit = policies.choose(place, values, user)
        window = replace(window, stream=fit.policy, step_why=policies.step_why(place, window.context_tokens),
                         stream_why=policies.why(fit, place.device))
        return self._worked(place, window), fit.over

    def _worked(self, place: Situation, window: choices.Window) -> Candidate:
        chosen = choices.derive(place, window)
        values = {name: choice.value for name, choice in chosen.items()}
        return Candidate(
            context_tokens=window.context_tokens, target_tokens=window.target_tokens,
            tier=tiers.tier_of(window.context_tokens, self.tiers), choices=chosen,
            memory=streaming.estimate(place.base, values, place.repository_tokens,
                                      place.download_bytes),
            schedule=timing.schedule(place.base.shape, values, place.profile, place.facts.code_bytes))


def _power(tokens: int) -> int:
    """The largest power of two within the repository's tokens, at least 64."""
    return max(situation.MIN_CONTEXT, 1 << max(0, tokens.bit_length() - 1))


def _finite(seconds: float) -> float:
    """JSON has no infinity: an unknown duration is written as 0."""
    return seconds if math.isfinite(seconds) else 0.0


def _tier_row(tier: Tier, row: Candidate, fitting: Mapping[str, bool]) -> TierRow:
    values = {name: row.choices[f"stream.{name}"].value for name in ("inputs", "pages", "weights")}
    stage = row.choices["deepspeed.stage"].value
    return TierRow(tier=tier.tier, context_tokens=row.context_tokens, target_tokens=row.target_tokens,
                   step=row.step, device_bytes=row.memory.device_bytes, host_bytes=row.memory.host_bytes,
                   disk_bytes=row.memory.disk_bytes, step_s=_finite(row.schedule.step_s),
                   total_s=_finite(row.schedule.uncut_s), fits=dict(fitting),
                   places={**(values if row.step == "streamed" else {}), "zero": str(stage)})


def _room(place: Situation) -> dict[str, int]:
    room = limits.rooms(place)
    return {"device_bytes": room["device_memory"], "host_bytes": room["host_memory"],
            "disk_bytes": room["disk"], "device_total_bytes": place.device_total_bytes}


def _within_hours(place: Situation, chosen: Candidate) -> tuple[Candidate, list[str]]:
    """The run cut to the hours granted, unless its length was set and the hours were not."""
    granted_s, total_s = place.hours * 3600, chosen.schedule.total_s
    if total_s <= granted_s or not math.isfinite(total_s):
        return chosen, []
    length_set = {"training.epochs", "training.max_steps", "training.budget_s"} & set(place.user)
    if length_set and place.request.max_hours is None:
        return chosen, [f"The run takes about {hours(total_s)}: its length was set, so the default limit of "
                        f"{place.hours:g} h is not applied."]
    extra_s = total_s - chosen.schedule.steps * chosen.schedule.step_s
    budget_s = max(1.0, granted_s - extra_s)
    why = f"all epochs take about {hours(total_s)}; --max-hours grants {hours(granted_s)}"
    budget = Choice(budget_s, "derived", why)
    values = {name: choice.value for name, choice in chosen.choices.items()} | {"training.budget_s": budget_s}
    shorter = timing.schedule(place.base.shape, values, place.profile, place.facts.code_bytes)
    return replace(chosen, choices={**chosen.choices, "training.budget_s": budget}, schedule=shorter), [
        f"The run is cut to {hours(granted_s)}: {why}."]


def _notes(place: Situation, chosen: Candidate) -> Iterable[str]:
    shape, context = place.base.shape, chosen.context_tokens
    if place.base.note:
        yield f"{place.base.name}: {place.base.note}"
    if not place.embedded and context > shape.native_context:
        yield (f"The window is {context / shape.native_context:.3g} times the {shape.native_context:,} "
               "tokens that "
               f"{place.base.name} knows; YaRN stretches its rotary embedding.")
    used = place.gpus_used
    if place.device == "cuda" and len({gpu.free_bytes for gpu in used}) > 1:
        yield (f"The smallest of {len(used)} GPUs ({gib(min(gpu.free_bytes for gpu in used))} GiB free) "
               "decides, since each runs the same step; --set device.count=1 trains on one alone.")
    yield from expectations.notes(place.repository_tokens, context, place.facts.code_files,
                                  epochs=int(chosen.choices["training.epochs"].value))
    if chosen.choices["stream.inputs"].value == "disk":
        values = {name: choice.value for name, choice in chosen.choices.items()}
        written = streaming.costs_of(shape, values, batch=1).moved["written"]
        yield f"Each window writes about {gib(written)} GiB of layer inputs to disk, which wears an SSD."
    if chosen.choices["stream.encoding"].value != "exact":
        yield (f"stream.encoding {chosen.choices['stream.encoding'].value} is lossy: kept layer inputs are "
               "rounded, so the gradients are not the plain step's.")
    if shape.parameters.get("experts") and chosen.choices["model.quantization"].value == "nf4":
        yield (f"The experts ({gib(2 * shape.parameters['experts'])} GiB) stay in 16 bit: bitsandbytes "
               "quantizes "
               "linear layers only, and transformers 5 keeps experts in fused parameters.")
