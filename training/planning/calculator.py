"""Stage 2: what to run on this machine. Numbers decide; each choice carries its source and its reason."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from training import models, weights
from training.errors import CannotWrite, DoesNotFit, raise_all
from training.longcontext.policy import StreamPolicy
from training.planning import choices, limits, memory, policies, situation, streaming, tiers, timing
from training.planning.limits import Candidate, gib, hours
from training.planning.situation import Situation
from training.records import BaseModel, Choice, HardwareProfile, Limit, Plan, RepositoryFacts, Request
from training.settings import contradictions

SMALL_CONTEXTS = (2048, 1024, 512, 256)


class OptimalConfigCalculator:
    """Chooses the longest context that memory, disk, hours and repository allow, and everything that goes
    with it."""

    def __init__(self, profile: HardwareProfile):
        self.profile = profile
        self.tiers = tiers.load()

    def calculate(self, request: Request, base: BaseModel, facts: RepositoryFacts) -> Plan:
        """The plan for this request.

        Raises UsageError or Problems (values that cannot be honoured), DoesNotFit (device memory),
        CannotWrite (disk without room).
        """
        place, problems = situation.build(request, self.profile, base, facts, self.tiers)
        raise_all(problems)
        rows = [self._candidate(place, row.context_tokens, "derived", "") for row in self.tiers]
        verdicts = limits.verdicts(place, rows)
        chosen, notes = self._choose(place, verdicts)
        values = {name: choice.value for name, choice in chosen.choices.items()}
        raise_all(contradictions(values))
        _check_fit(place, chosen, verdicts, self._instead(place, chosen))
        chosen, more = _within_hours(place, chosen)
        return Plan(tier=chosen.tier, context_tokens=chosen.context_tokens, base_model=place.base.location,
                    target_tokens=int(chosen.choices["dataset.target_tokens"].value), choices=chosen.choices,
                    memory=chosen.memory, limits=verdicts, steps=chosen.schedule.steps,
                    step_s=_finite(chosen.schedule.step_s), total_s=_finite(chosen.schedule.total_s),
                    notes=(*_notes(place, chosen), *notes, *more))

    def _choose(self, place: Situation, verdicts: dict[str, Limit]) -> tuple[Candidate, list[str]]:
        fixed = place.user.get("dataset.context_tokens")
        if fixed is not None:
            return self._candidate(place, int(fixed), "user", "set by the user"), []
        if place.request.tier is not None:
            context = self.tiers[place.request.tier - 1].context_tokens
            return self._candidate(place, context, "user", f"--tier {place.request.tier}"), []
        if place.embedded or place.device == "cpu":
            return self._packed(place), []
        lowest = min(limit.tier for limit in verdicts.values())
        by = ", ".join(name.replace("_", " ") for name, limit in verdicts.items() if limit.tier == lowest)
        if lowest:
            context = self.tiers[lowest - 1].context_tokens
            return self._candidate(place, context, "measured", f"tier {lowest}, the highest within every "
                                                               "limit "
                                                               f"(decided by {by})"), []
        return self._below(place, by)

    def _packed(self, place: Situation) -> Candidate:
        """Short windows in which every token is a target: the embedded model, and any base on a CPU."""
        if place.embedded:
            context, why = choices.EMBEDDED_CONTEXT, "a model this small gains nothing from more context"
        else:
            context, why = choices.CPU_CONTEXT, "on a CPU every token is dear, so each one read is trained on"
        context = min(context, place.base.shape.native_context, _power(place.repository_tokens))
        return self._candidate(place, context, "derived", f"{why}; `--tier` or `--context` asks for another")

    def _below(self, place: Situation, by: str) -> tuple[Candidate, list[str]]:
        """No tier fits: the longest packed window below the table that memory allows."""
        last = None
        for context in SMALL_CONTEXTS:
            if context > min(place.max_context, max(_power(place.repository_tokens), SMALL_CONTEXTS[-1])):
                continue
            last = self._candidate(place, context, "measured",
                                   f"below tier 1, whose {self.tiers[0].context_tokens:,} tokens exceed: "
                                   f"{by}")
            if last.memory.device_bytes <= place.device_bytes:
                return last, [f"No tier fits ({by}); windows of {context:,} tokens, packed, are trained "
                              "instead."]
        return last or self._candidate(place, place.max_context, "measured", "the base's own limit"), []

    def _candidate(self, place: Situation, context: int, source: str, why: str) -> Candidate:
        """One window length: activations kept if they fit, recomputed if not, or the streamed step."""
        wanted = policies.asked(place)
        if wanted:
            return self._streamed(place, choices.window_of(place, context, source, why), place.user)[0]
        windows = [choices.window_of(place, context, source, why, recompute) for recompute in (False, True)]
        plain = [self._worked(place, replace(window, step_why=policies.PLAIN)) for window in windows]
        fitting = next((c for c in plain if c.memory.device_bytes <= place.device_bytes), None)
        if wanted is False or context < policies.LEAST_CONTEXT:
            return fitting or plain[-1]
        if fitting and not policies.worth_a_try(place, context):
            return fitting
        return self._compared(place, windows[0], fitting, plain[-1])

    def _compared(self, place: Situation, window: choices.Window, fitting: Candidate | None,
                  plain: Candidate) -> Candidate:
        """The streamed step where the plain one does not fit or is slower."""
        streamed, over = self._streamed(place, window, place.user)
        if fitting is None:
            closer = plain.memory.device_bytes / max(1, place.device_bytes) < over
            return plain if over > 1 and closer else streamed
        if over > 1 or not policies.preferred(place, fitting, streamed):
            return fitting
        return streamed

    def _streamed(self, place: Situation, window: choices.Window,
                  user: Mapping[str, Any]) -> tuple[Candidate, float]:
        """The best streamed step for a window, and by how much it is over what the machine has."""
        first = choices.derive(place, replace(window, stream=StreamPolicy(), stream_why=policies.OPEN))
        values = {name: choice.value for name, choice in first.items()}
        fit = policies.choose(place, values, user)
        window = replace(window, stream=fit.policy, step_why=policies.step_why(place, window.context_tokens),
                         stream_why=policies.why(fit, place.device))
        return self._worked(place, window), fit.over

    def _instead(self, place: Situation, chosen: Candidate) -> str:
        """For a step that does not fit as the user's stream.* keys set it: a policy that does."""
        own = [name for name in place.user if name.startswith("stream.")]
        if not own:
            return ""
        free = replace(place, user={k: v for k, v in place.user.items() if not k.startswith("stream.")})
        other, over = self._streamed(free, choices.window_of(free, chosen.context_tokens, "user", ""), {})
        if over > 1:
            return ""
        changed = {name: choice.value for name, choice in other.choices.items()
                   if name in place.user and name.startswith("stream.") and choice.value != place.user[name]}
        return "Nearest setting that fits: " + " ".join(f"--set {k}={v}" for k, v in changed.items()) + "."

    def _worked(self, place: Situation, window: choices.Window) -> Candidate:
        chosen = choices.derive(place, window)
        values = {name: choice.value for name, choice in chosen.items()}
        return Candidate(
            context_tokens=window.context_tokens, target_tokens=window.target_tokens,
            tier=tiers.tier_of(window.context_tokens, self.tiers), choices=chosen,
            memory=streaming.estimate(place.base, values, place.repository_tokens,
                                      _download_bytes(place.base)),
            schedule=timing.schedule(place.base.shape, values, place.profile, place.facts.code_bytes))


def _power(tokens: int) -> int:
    """The largest power of two within the repository's tokens, at least 64."""
    return max(situation.MIN_CONTEXT, 1 << max(0, tokens.bit_length() - 1))


def _finite(seconds: float) -> float:
    """JSON has no infinity: an unknown duration is written as 0."""
    return seconds if math.isfinite(seconds) else 0.0


def _download_bytes(base: BaseModel) -> int:
    """16-bit weights still to be fetched; 0 for local folders, cached models and the embedded one."""
    local = base.location == models.EMBEDDED or os.path.isabs(base.location)
    return 0 if local or weights.cached_folder(base.location) else 2 * base.shape.total_parameters


def _check_fit(place: Situation, chosen: Candidate, verdicts: dict[str, Limit], instead: str) -> None:
    """Raise DoesNotFit or CannotWrite; `instead` names a setting that fits, if one is known."""
    need, room = chosen.memory.device_bytes, place.device_bytes
    nearest = {name: instead or _nearest(verdicts[name], chosen) for name in ("device_memory", "host_memory")}
    if need > room:
        name, size = memory.largest_term(chosen.memory)
        raise DoesNotFit(f"This run needs {gib(need)} GiB at {chosen.context_tokens:,} tokens; {gib(room)} "
                         "GiB of "
                         f"{'device memory' if place.device == 'cuda' else 'memory'} is usable. The "
                         "largest term is "
                         f"{name} ({gib(size)} GiB). {nearest['device_memory']}")
    if chosen.memory.host_bytes > place.host_bytes and place.device == "cuda":
        raise DoesNotFit(f"This run needs {gib(chosen.memory.host_bytes)} GiB of host memory; "
                         f"{gib(place.host_bytes)} "
                         f"GiB is usable. {nearest['host_memory']}")
    if chosen.memory.disk_bytes > place.profile.disk_free_bytes:
        raise CannotWrite(f"This run writes {gib(chosen.memory.disk_bytes)} GiB; "
                          f"{gib(place.profile.disk_free_bytes)} "
                          f"GiB is free on its disk. {instead}".rstrip()
                          + " Free some, give --output on another disk, or set training.keep_checkpoints=1.")


def _nearest(limit: Limit, chosen: Candidate) -> str:
    if 0 < limit.tier < max(chosen.tier, 1) or (limit.tier and not chosen.tier):
        return f"Nearest setting that fits: --tier {limit.tier}."
    if chosen.context_tokens > SMALL_CONTEXTS[-1]:
        half = _power(chosen.context_tokens - 1)
        return f"Nearest: --context {half}, or a smaller --base-model (docs/models.md)."
    return "Choose a smaller --base-model (docs/models.md), or embedded."


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
    if context > place.repository_tokens:
        yield (f"The repository has about {place.repository_tokens:,} tokens, fewer than the window of "
               f"{context:,}; "
               "windows will be shorter.")
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
