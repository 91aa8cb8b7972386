"""Before a trial: which lengths to try. After it: the plan with what was measured in place of the formulas.

No trial runs here; training/trainer/trial.py takes the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.errors import DoesNotFit
from training.planning import choices, fitting, memory, mix, streaming, timing
from training.planning.fitting import Line, Pace
from training.planning.limits import gib, hours
from training.planning.memory import largest_term
from training.planning.situation import MIN_CONTEXT, Situation
from training.records import (
    BaseModel,
    Choice,
    Figure,
    HardwareProfile,
    Memory,
    Plan,
    Range,
    Trial,
    TrialStep,
)
from training.rundir import TrialLength, TrialOrder
from training.settings import most_targets

# Small lengths: a quarter and a half of the window, as long as they are cheap. On a CPU updates at an eighth
# and a quarter were 13 % off the whole window's seconds (median of nine ways), mostly above: short products
# are slower.
SMALL_SHARES = (4, 2)
SMALL_S, SMALL_SHARE = 60.0, 0.05        # what both may take: seconds, and of the time granted
SIZE_S, SIZE_SHARE = 300.0, 0.1          # what one micro-batch of the planned length may take
SMALL_BATCHES = 3                # micro-batches at a small length (training/trainer/trial.py)
# How far the formulas may be off without a trial (assumed). Memory: tensors alone are within 5 % over
# benchmarks/planner.py; the rest is what allocator and libraries hold on top. Time: a rate measured on large
# matrices is halved or reached by real layers.
MEMORY_ERROR, TIME_ERROR = 0.15, 2.0
# Least half-widths of a measured range: VmHWM and an allocator's reserve differ so much between two equal
# runs, and steps of one run on a machine with other work.
LEAST_MEMORY, LEAST_TIME = 0.03, 0.1
REPLANNED_ROOM = 0.95            # of what a plan needed whose trial ran out of memory
TOKENS_ERROR = 0.15              # of a repository's tokens as estimated from its bytes
EXTRAPOLATED_MEMORY, EXTRAPOLATED_TIME = 0.1, 0.35   # half-widths where no step of the planned size was taken


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a trial says of the planned window: peak bytes, seconds of a micro-batch and of the optimizer, and
    the relative half-widths of bytes and seconds."""

    device_bytes: float
    micro_s: float
    update_s: float
    line: Line
    pace: Pace
    bytes_off: float
    time_off: float


def granted_s(place: Situation, values: Mapping[str, Any]) -> float:
    """Seconds the training may take: its budget, or the hours."""
    return float(values["training.budget_s"]) or place.hours * 3600


def contexts(plan: Plan, place: Situation) -> tuple[int, ...]:
    """Small lengths to try, ascending: a quarter and a half of the window, whole chunks when streamed.

    Halved while both together would take more than a minute or 5 % of the time granted, at least to 64 and
    128 tokens or one and two chunks; none that is not shorter than the window.
    """
    values = plan_values(plan)
    unit = int(values["stream.chunk_tokens"]) or 1
    least = unit if unit > 1 else MIN_CONTEXT
    floors = (least, 2 * least)
    limit_s = min(SMALL_S, SMALL_SHARE * granted_s(place, values))
    lengths = [plan.context_tokens // share for share in SMALL_SHARES]
    while True:
        whole = [max(floor, -(-length // unit) * unit) for floor, length in zip(floors, lengths, strict=True)]
        found = tuple(sorted({length for length in whole if length < plan.context_tokens}))
        took_s = sum(SMALL_BATCHES * sum(_parts(place, values, length, plan)) for length in found)
        if took_s <= limit_s or tuple(whole) == floors:
            return found
        lengths = [length // 2 for length in lengths]


def order(plan: Plan, place: Situation) -> TrialOrder:
    """What the trainer is asked to try for this plan."""
    values = plan_values(plan)
    lengths = tuple(TrialLength(context_tokens=length, target_tokens=target_of(plan, length),
                                expected_s=sum(_parts(place, values, length, plan)))
                    for length in (*contexts(plan, place), plan.context_tokens))
    return TrialOrder(lengths=lengths, vocab_tokens=place.base.shape.vocab,
                      limit_s=min(SIZE_S, SIZE_SHARE * granted_s(place, values)),
                      held_out_windows=held_out_windows(place, values),
                      completions=int(values["evaluation.completions"]))


def held_out_windows(place: Situation, values: Mapping[str, Any]) -> int:
    """Windows of one evaluation: as configured, or all that the held-out share of the code makes."""
    tokens = place.facts.code_bytes * timing.TOKENS_PER_BYTE * float(values["dataset.held_out_share"])
    there = math.ceil(tokens / int(values["dataset.target_tokens"]))
    return max(1, min(int(values["evaluation.windows"]), there))


def target_of(plan: Plan, context: int) -> int:
    """Target tokens of a trial's window: the same share as in those of the plan that have the most."""
    return max(1, min(context, most_targets(plan_values(plan)) * context // plan.context_tokens))


def tokens_of(plan: Plan, place: Situation) -> float:
    """Target tokens of the whole run."""
    values = plan_values(plan)
    per_step = int(values["training.micro_batch"]) * int(values["training.accumulation"])
    windows = min(per_step * timing.readers(values), timing.windows_in(place.facts.code_bytes, values))
    return plan.steps * windows * mix.mean_targets(values)


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan's configuration by key."""
    return {name: choice.value for name, choice in plan.choices.items()}


def with_batch(plan: Plan, micro: int, base: BaseModel) -> Plan:
    """The plan with another micro-batch, the windows of an update as they were."""
    values = plan_values(plan)
    windows = int(values["training.micro_batch"]) * int(values["training.accumulation"])
    why = f"{windows} windows of a device in an update, as planned, {micro} at a time"
    changed = {"training.micro_batch": Choice(micro, "measured", why),
               "training.accumulation": Choice(max(1, windows // micro), "measured", why)}
    values |= {name: choice.value for name, choice in changed.items()}
    held = replace(streaming.estimate(base, values), disk_bytes=plan.memory.disk_bytes)
    return replace(plan, choices={**plan.choices, **changed}, memory=held)


def _parts(place: Situation, values: Mapping[str, Any], length: int, plan: Plan) -> tuple[float, float]:
    target = target_of(plan, length)
    return fitting.parts_s(place.base.shape, fitting.at_length(values, length, target), place.profile, target)


def fit(trial: Trial, plan: Plan, place: Situation) -> Fit:
    """Bytes and seconds at the planned window: measured where a step of that size was taken, else along what
    the short ones gave."""
    values = plan_values(plan)
    good = [step for step in trial.steps if not step.error and step.seconds]
    small = [step for step in good if step.context_tokens < plan.context_tokens]
    moving = [fitting.moving_bytes(_formula(place, values, step)) for step in small]
    line = fitting.memory_line(small, moving, sum(
        size for name, size in plan.memory.terms.items() if name in fitting.FIXED))
    pace = fitting.pace([fitting.median(step.seconds) for step in good],
                        [_parts(place, values, step.context_tokens, plan) for step in good])
    device_bytes = line.at(fitting.moving_bytes(plan.memory))
    micro_s = pace.at(fitting.parts_s(place.base.shape, values, place.profile))
    bytes_off, time_off = EXTRAPOLATED_MEMORY, max(EXTRAPOLATED_TIME, pace.residual)
    if trial.confirmed:
        last = good[-1]
        bytes_off = max(LEAST_MEMORY, min(EXTRAPOLATED_MEMORY, abs(device_bytes / last.peak_bytes - 1)))
        fullest_s = pace.at(_parts(place, values, plan.context_tokens, plan))
        device_bytes = last.peak_bytes
        micro_s = fitting.median(last.seconds) * (micro_s / fullest_s if fullest_s else 1.0)
        time_off = max(LEAST_TIME, fitting.spread(last.seconds))
    update_s = good[-1].update_s if good else 0.0
    return Fit(device_bytes=max(device_bytes, trial.other_bytes), micro_s=micro_s, update_s=update_s,
               line=line, pace=pace, bytes_off=bytes_off, time_off=time_off)


def _formula(place: Situation, values: Mapping[str, Any], step: TrialStep) -> Memory:
    return fitting.memory_at(place.base, values, step.context_tokens, step.target_tokens)


def calibrated(plan: Plan, trial: Trial, place: Situation) -> Plan:
    """The plan with the trial's bytes and seconds, its length and what follows from it fitted to them again.

    A trial without a figure leaves the plan to the formulas.
    """
    if not any(step.seconds and not step.error for step in trial.steps):
        return replace(assumed(plan), trial=trial)
    found = fit(trial, plan, place)
    plan = replace(plan, trial=trial, memory=_weighed(plan, place, found))
    plan = _timed(plan, trial, place, found)
    source = "a step of the planned size" if trial.confirmed else f"shorter steps, {found.line.why}"
    timed = "a step of the planned size" if trial.confirmed else f"shorter steps: {found.pace.why}"
    tokens_off = 0.0 if plan.choices["training.max_steps"].value else TOKENS_ERROR
    if float(plan.choices["training.budget_s"].value):
        tokens_off = 0.05
    return replace(plan, ranges={
        **plan.ranges,
        "device_bytes": _range(plan.memory.device_bytes, found.bytes_off, source),
        "step_s": _range(plan.step_s, found.time_off, timed),
        "total_s": _range(plan.total_s, found.time_off + tokens_off,
                          f"{timed}; steps by the repository's size")})


def _range(expected: float, off: float, why: str, source: str = "measured") -> Range:
    return Range(low=expected * (1 - min(off, 0.9)), expected=float(expected), high=expected * (1 + off),
                 source=source, why=why)


def assumed(plan: Plan) -> Plan:
    """The plan with the ranges that formulas alone leave."""
    why = "formulas, no trial"
    time = {name: Range(low=value / TIME_ERROR, expected=float(value), high=value * TIME_ERROR,
                        source="derived", why=why)
            for name, value in (("step_s", plan.step_s), ("total_s", plan.total_s))}
    held = _range(plan.memory.device_bytes, MEMORY_ERROR, why, "derived")
    return replace(plan, ranges={**plan.ranges, "device_bytes": held, **time})


def _weighed(plan: Plan, place: Situation, found: Fit) -> Memory:
    """The plan's terms scaled to the measured sum: those that move by the fitted slope, the rest of the
    difference to the runtime, whose size no formula knows."""
    need = int(found.device_bytes)
    terms = {name: size if name in fitting.FIXED else int(size * found.line.slope)
             for name, size in plan.memory.terms.items()}
    runtime = need - sum(size for name, size in terms.items() if name != "runtime")
    if runtime >= 0:
        terms["runtime"] = runtime
    else:
        whole = sum(plan.memory.terms.values()) or 1
        terms = {name: size * need // whole for name, size in plan.memory.terms.items()}
        first = next(iter(terms))
        terms[first] += need - sum(terms.values())
    host_bytes = plan.memory.host_bytes
    if place.device == "cpu":
        host_bytes = memory.host_bytes(place.base.shape, plan_values(plan), need)
    return replace(plan.memory, device_bytes=need, host_bytes=host_bytes, terms=terms)


# -- the run's length ----------------------------------------------------------------------------------------


def _timed(plan: Plan, trial: Trial, place: Situation, found: Fit) -> Plan:
    """Steps and seconds of the run at the measured speed; epochs, budget and saves that depend on it."""
    values, user = plan_values(plan), place.user
    windows = timing.windows_in(place.facts.code_bytes, values)
    at_once = int(values["training.micro_batch"]) * timing.readers(values)
    in_epoch = math.ceil(windows / (at_once * int(values["training.accumulation"])))
    step_s = math.ceil(windows / at_once) / in_epoch * found.micro_s + found.update_s
    changed: dict[str, Choice] = {}
    budget_s = float(values["training.budget_s"])
    if budget_s and "training.epochs" not in user:
        changed["training.epochs"] = _epochs(place, budget_s, in_epoch * step_s)
    epochs = int(changed["training.epochs"].value if changed else values["training.epochs"])
    steps = min(epochs * in_epoch, int(values["training.max_steps"]) or epochs * in_epoch)
    if "training.save_steps" not in user:
        changed["training.save_steps"] = _saving(step_s, trial.save_s or 0.0)
    values |= {name: choice.value for name, choice in changed.items()}
    curve_s = timing.curve_windows(values) * found.micro_s / int(values["training.micro_batch"]) / 3
    extra_s = around_s(trial, values, steps) + curve_s
    if not budget_s and _must_be_cut(place, steps * step_s + extra_s):
        budget_s = max(1.0, place.hours * 3600 - extra_s)
        changed["training.budget_s"] = Choice(
            budget_s, "measured", f"at the trial's {step_s:,.3g} s a step all epochs take about "
                                  f"{hours(steps * step_s)}; {place.hours:g} h are granted")
    if budget_s:
        fitting_steps = max(timing.LEAST_STEPS, int(0.95 * budget_s / step_s)) if step_s else steps
        steps = max(1, min(steps, fitting_steps))
    total_s = steps * step_s + around_s(trial, values, steps) + curve_s
    return replace(plan, choices={**plan.choices, **changed}, steps=steps, step_s=step_s, total_s=total_s)


def _must_be_cut(place: Situation, total_s: float) -> bool:
    """Whether the hours end the run: not where its length was set and the hours were not."""
    length_set = {"training.epochs", "training.max_steps", "training.budget_s"} & set(place.user)
    return total_s > place.hours * 3600 and not (length_set and place.request.max_hours is None)


def _epochs(place: Situation, budget_s: float, epoch_s: float) -> Choice:
    most = choices.EMBEDDED_EPOCHS if place.embedded else choices.BASE_EPOCHS
    wanted = math.ceil(budget_s / epoch_s) if epoch_s else most
    return Choice(max(1, min(most, wanted)), "measured",
                  f"an epoch takes about {epoch_s:,.0f} s of {budget_s:,.0f} granted")


def _saving(step_s: float, save_s: float) -> Choice:
    """Saves so far apart that they take at most MOST_SAVING of the time."""
    if not step_s:
        return Choice(100, "measured", "no step's time is known")
    steps = max(1, min(1000, int(choices.SAVE_EVERY_S / step_s)),
                math.ceil(save_s / choices.MOST_SAVING / step_s))
    spent = f", {save_s / (steps * step_s + save_s):.1%} of the time" if save_s else ""
    return Choice(steps, "measured", f"about every {hours(steps * step_s)}{spent}")


def around_s(trial: Trial, values: Mapping[str, Any], steps: int) -> float:
    """Seconds of a run outside its steps: loading, evaluations, checkpoints, and the model at the end, which
    is written like a checkpoint. The trial's own seconds are not in it, nor the context curve's, which it
    does not try."""
    evaluations, saves = 2, 2
    for name in ("training.eval_steps", "training.save_steps"):
        more = (steps - 1) // int(values[name]) if int(values[name]) else 0
        evaluations, saves = (evaluations + more, saves) if "eval" in name else (evaluations, saves + more)
    return trial.load_s + evaluations * (trial.evaluation_s or 0.0) + saves * (trial.save_s or 0.0)


# -- when it does not fit ------------------------------------------------------------------------------------


def ran_out(plan: Plan) -> TrialStep | None:
    """The trial's step that ran out of memory, if one did."""
    return next((step for step in plan.trial.steps if step.error), None) if plan.trial else None


def room_factor(before: Plan, after: Plan, room_bytes: int) -> float | None:
    """By how much the room must be taken smaller for the formulas to plan what really fits; None when the
    measured plan fits. `before`: the plan by formulas, which is excluded when a step of it ran out."""
    need, planned = after.memory.device_bytes, before.memory.device_bytes
    failed = ran_out(after) is not None
    if not room_bytes or (not failed and need <= room_bytes):
        return None
    factor = min(1.0, planned / need)
    return min(factor, REPLANNED_ROOM * planned / room_bytes) if failed else factor


def shrunk(profile: HardwareProfile, factor: float) -> HardwareProfile:
    """The same machine with less memory to plan with: a GPU's, or on a machine without one the RAM."""
    if not profile.gpus:
        return replace(profile, ram_available_bytes=int(profile.ram_available_bytes * factor))

    def smaller(figure: Figure) -> Figure:
        return figure if figure.value is None else replace(figure, value=figure.value * factor)
    figures = {name: smaller(figure) if name.endswith(".allocatable_bytes") else figure
               for name, figure in profile.figures.items()}
    gpus = tuple(replace(gpu, free_bytes=int(gpu.free_bytes * factor)) for gpu in profile.gpus)
    return replace(profile, gpus=gpus, figures=figures)


def refusal(plan: Plan, room_bytes: int) -> DoesNotFit:
    """Why the measured plan cannot run, with the largest term and a way out."""
    failed, (name, size) = ran_out(plan), largest_term(plan.memory)
    what = (f"The trial's step of {failed.context_tokens:,} tokens ran out of memory" if failed else
            f"The trial measured {gib(plan.memory.device_bytes)} GiB at {plan.context_tokens:,} tokens")
    half = max(MIN_CONTEXT, plan.context_tokens // 2)
    return DoesNotFit(f"{what}; {gib(room_bytes)} GiB is usable. The largest term is {name} ({gib(size)} "
                      f"GiB). Nearest: --context {half}, or a smaller --base-model (docs/models.md).")


def replanned(before: Plan, after: Plan) -> str:
    """Why there is another plan than the first one."""
    measured = after.memory.device_bytes / max(1, before.memory.device_bytes)
    return (f"Planned again for less memory: the trial of {before.context_tokens:,} tokens "
            + ("ran out of it." if ran_out(after) else f"needed {measured:.0%} of what the formulas said."))
