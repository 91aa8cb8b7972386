"""What a trial is asked for, and the plan that its figures make: by hand-made trials of known machines."""

import dataclasses
import math

import pytest

from training import models
from training.planning import OptimalConfigCalculator, fitting, situation, tiers, timing, trial
from training.records import (
    GIB,
    Figure,
    Gpu,
    HardwareProfile,
    Plan,
    RepositoryFacts,
    Request,
    Trial,
    TrialStep,
    from_data,
    to_data,
)

FACTS = RepositoryFacts(path="/r", name="repo", files=200, code_files=180, code_bytes=5_000_000,
                        languages={"python": 180})


def machine(gpu_gib=0.0, ram_gib=64):
    size = int(gpu_gib * GIB)
    gpus = (Gpu(index=0, name="Card", architecture="", capability="8.9", total_bytes=size, free_bytes=size),)
    rates = {"cpu.matmul_fp32": 7.5e10, "gpu0.matmul_bf16": 1.6e14, "gpu0.allocatable_bytes": float(size)}
    return HardwareProfile(
        name="x", source="measured", date="", system="Linux", cpu_name="c", cpu_cores=2, cpu_flags=(),
        ram_total_bytes=ram_gib * GIB, ram_available_bytes=ram_gib * GIB, gpus=gpus if gpu_gib else (),
        disk_path="/", disk_free_bytes=500 * GIB,
        figures={name: Figure(value=value, unit="", method="test") for name, value in rates.items()})


def made(profile, name="embedded", facts=FACTS, **request):
    base, request = models.registry().get(name) or models.resolve(name), Request(repo="/r", **request)
    plan = OptimalConfigCalculator(profile).calculate(request, base, facts)
    return plan, situation.build(request, profile, base, facts, tiers.load())[0]


def truth(plan, place, length, slope=1.3, constant=1 << 28, linear=2.0, attention=3.0):
    """What a machine with these constants would measure at a length: (peak bytes, seconds)."""
    target = trial.target_of(plan, length)
    values = fitting.at_length(trial.plan_values(plan), length, target)
    moving = fitting.moving_bytes(fitting.memory_at(place.base, trial.plan_values(plan), length, target))
    parts = fitting.parts_s(place.base.shape, values, place.profile, target)
    return int(constant + slope * moving), linear * parts[0] + attention * parts[1]


def taken(plan, place, confirmed=True, **constants):
    lengths = trial.order(plan, place).lengths
    steps = []
    for length in lengths if confirmed else lengths[:-1]:
        peak, seconds = truth(plan, place, length.context_tokens, **constants)
        steps.append(TrialStep(context_tokens=length.context_tokens, target_tokens=length.target_tokens,
                               micro_batch=1, seconds=(seconds,) * 2, update_s=0.5, peak_bytes=peak))
    return Trial(steps=tuple(steps), load_s=7.0, resident_bytes=1 << 27, evaluation_s=3.0, save_s=1.0,
                 confirmed=confirmed)


@pytest.mark.parametrize(("profile", "name", "request_"), [
    (machine(), "embedded", {}), (machine(24), "phi-2", {}), (machine(24), "phi-2", {"context_tokens": 4096}),
    (machine(8), "phi-2", {"context_tokens": 65536, "settings": {"stream.chunk_tokens": 4096}})])
def test_small_lengths_ascend_below_the_window_in_whole_chunks(profile, name, request_):
    plan, place = made(profile, name, **request_)
    found = trial.contexts(plan, place)
    chunk = plan.choices["stream.chunk_tokens"].value or 1
    assert 1 <= len(found) <= 2
    assert list(found) == sorted(set(found))
    assert all(64 <= length < plan.context_tokens and length % chunk == 0 for length in found)
    order = trial.order(plan, place)
    assert [length.context_tokens for length in order.lengths] == [*found, plan.context_tokens]
    # In the largest windows of this mix (whole files) every token is a target, so it is in the trial's.
    assert order.lengths[-1].target_tokens == plan.context_tokens
    assert all(length.target_tokens == length.context_tokens for length in order.lengths)
    costs = [length.expected_s for length in order.lengths]
    assert costs == sorted(costs)
    if found[-1] > 2 * max(64, chunk):
        assert trial.SMALL_BATCHES * sum(costs[:-1]) <= 60.0


def test_few_hours_make_the_small_lengths_smaller_and_the_limit_lower():
    long, short = ({"context_tokens": 65536, "max_hours": hours} for hours in (48.0, 0.02))
    lengths = [trial.contexts(*made(machine(24), "phi-2", **chosen)) for chosen in (long, short)]
    assert max(lengths[1]) < max(lengths[0])
    assert trial.order(*made(machine(24), "phi-2", **short)).limit_s < 10.0
    assert trial.order(*made(machine(24), "phi-2", **long)).limit_s == 300.0


@pytest.mark.parametrize(("profile", "name"), [(machine(24), "phi-2"), (machine(), "phi-2"),
                                               (machine(8), "qwen2.5-coder-1.5b")])
def test_short_steps_predict_the_planned_one(profile, name):
    plan, place = made(profile, name)
    found = trial.fit(taken(plan, place, confirmed=False), plan, place)
    peak, seconds = truth(plan, place, plan.context_tokens)
    assert found.device_bytes == pytest.approx(peak, rel=0.02)
    assert found.micro_s == pytest.approx(seconds, rel=0.2)


def test_a_trial_has_few_targets_only_where_every_window_has_few():
    alone = {"dataset.whole_share": 0.0, "dataset.commit_share": 0.0}
    plan, place = made(machine(24), "phi-2", context_tokens=8192, settings=alone)
    assert plan.choices["dataset.fim_share"].value == 0
    assert trial.order(plan, place).lengths[-1].target_tokens == plan.target_tokens == 2048


def test_a_step_with_the_most_targets_is_taken_down_to_the_mixs_mean():
    """Micro-batches of the run have fewer labels than the trial's, by as much as the head's operations."""
    plan, place = made(machine(24), "phi-2", context_tokens=8192)
    values = trial.plan_values(plan)
    measured = taken(plan, place, linear=2.0, attention=2.0)
    found = trial.fit(measured, plan, place)
    full, mixed = (sum(fitting.parts_s(place.base.shape, values, place.profile, targets))
                   for targets in (8192, 0))
    assert mixed < 0.99 * full
    assert found.micro_s == pytest.approx(measured.steps[-1].seconds[0] * mixed / full, rel=1e-3)
    assert found.device_bytes == measured.steps[-1].peak_bytes


@pytest.mark.parametrize(("step_s", "save_s", "steps"), [
    (1.0, 0.1, 300), (1.0, 12.0, 600), (600.0, 3.0, 1), (600.0, 30.0, 3), (0.01, 0.0, 1000),
    (0.01, 1.0, 5000), (0.0, 1.0, 100)])
def test_saves_take_at_most_a_fiftieth_of_the_time(step_s, save_s, steps):
    found = trial._saving(step_s, save_s)
    assert found.value == steps
    if step_s:
        assert save_s <= 0.02 * steps * step_s


def test_a_confirmed_step_is_the_plan():
    plan, place = made(machine(24), "phi-2", context_tokens=8192,
                       settings={"dataset.whole_share": 0.0, "dataset.commit_share": 0.0})
    measured = taken(plan, place)
    after = trial.calibrated(plan, measured, place)
    assert after.memory.device_bytes == measured.steps[-1].peak_bytes
    assert sum(after.memory.terms.values()) == after.memory.device_bytes
    assert min(after.memory.terms.values()) >= 0
    accumulation = after.choices["training.accumulation"].value
    assert after.step_s == pytest.approx(accumulation * measured.steps[-1].seconds[0] + 0.5, rel=0.01)
    saves = (after.steps - 1) // after.choices["training.save_steps"].value
    curve_s = timing.curve_windows(trial.plan_values(after)) * measured.steps[-1].seconds[0] / 3
    assert after.total_s == pytest.approx(
        after.steps * after.step_s + 7.0 + 2 * 3.0 + (2 + saves) * 1.0 + curve_s, rel=1e-4)
    for name, expected in (("device_bytes", after.memory.device_bytes), ("step_s", after.step_s),
                           ("total_s", after.total_s)):
        found = after.ranges[name]
        assert found.low < found.expected == expected < found.high
        assert found.source == "measured"
    assert from_data(Plan, to_data(after)) == after


def test_what_loads_or_saves_higher_than_the_steps_is_the_peak():
    plan, place = made(machine(24), "phi-2", context_tokens=4096)
    measured = dataclasses.replace(taken(plan, place), other_bytes=20 * GIB)
    assert trial.calibrated(plan, measured, place).memory.device_bytes == 20 * GIB


def test_a_slow_machine_gets_fewer_steps_within_the_hours():
    plan, place = made(machine(24), "phi-2", context_tokens=8192, max_hours=2.0)
    after = trial.calibrated(plan, taken(plan, place, linear=20.0, attention=20.0), place)
    assert after.total_s <= 2.0 * 3600
    assert after.steps < plan.steps
    assert after.choices["training.budget_s"].source == "measured"
    assert after.choices["training.budget_s"].why.endswith("2 h are granted")
    set_length = made(machine(24), "phi-2", context_tokens=8192, settings={"training.max_steps": 50})
    slow = taken(*set_length, linear=3e4, attention=3e4)
    assert trial.calibrated(set_length[0], slow, set_length[1]).steps == 50


def test_without_a_figure_the_formulas_stay_with_wide_ranges():
    plan, place = made(machine(24), "phi-2", context_tokens=4096)
    after = trial.calibrated(plan, Trial(steps=(), load_s=0.0, resident_bytes=0, skipped="no room"), place)
    assert (after.memory, after.step_s, after.trial.skipped) == (plan.memory, plan.step_s, "no room")
    assert {found.source for found in after.ranges.values()} == {"derived"}
    assert after.ranges["step_s"].high == 2 * plan.step_s


def test_a_plan_that_fits_needs_no_other_and_one_that_does_not_gets_a_smaller_room():
    plan, place = made(machine(24), "phi-2")
    room = place.device_bytes
    fine = trial.calibrated(plan, taken(plan, place, slope=0.9, constant=GIB // 4), place)
    assert trial.room_factor(plan, fine, room) is None
    over = dataclasses.replace(fine, memory=dataclasses.replace(fine.memory, device_bytes=2 * room))
    factor = trial.room_factor(plan, over, room)
    assert factor == pytest.approx(plan.memory.device_bytes / (2 * room))
    smaller = OptimalConfigCalculator(trial.shrunk(place.profile, factor)).calculate(
        place.request, place.base, place.facts)
    assert smaller.memory.device_bytes < plan.memory.device_bytes


def test_a_step_that_ran_out_excludes_its_own_plan():
    plan, place = made(machine(24), "phi-2")
    whole = taken(plan, place, slope=0.5)
    failed = dataclasses.replace(whole.steps[-1], seconds=(), peak_bytes=0, error="out of memory: 8 GiB")
    out = dataclasses.replace(whole, steps=(*whole.steps[:-1], failed), confirmed=False)
    after = trial.calibrated(plan, out, place)
    factor = trial.room_factor(plan, after, place.device_bytes)
    assert factor * place.device_bytes < plan.memory.device_bytes
    said = str(trial.refusal(after, place.device_bytes))
    assert said.startswith(f"The trial's step of {plan.context_tokens:,} tokens ran out of memory; ")
    assert said.endswith(f"Nearest: --context {plan.context_tokens // 2}, or a smaller --base-model "
                         "(docs/models.md).")
    assert trial.replanned(plan, after).endswith("ran out of it.")


def test_a_machine_without_a_gpu_shrinks_by_its_ram():
    assert trial.shrunk(machine(), 0.5).ram_available_bytes == 32 * GIB
    card = trial.shrunk(machine(24), 0.5)
    assert (card.gpus[0].free_bytes, card.rate("gpu0.allocatable_bytes")) == (12 * GIB, 12 * GIB)
    assert (card.ram_available_bytes, card.rate("gpu0.matmul_bf16")) == (64 * GIB, 1.6e14)


def test_a_pace_is_never_negative_and_falls_back_to_one_factor():
    falling = fitting.pace([2.0, 1.0], [(1.0, 0.5), (2.0, 1.0)])
    assert min(falling.fixed_s, falling.linear, falling.attention) >= 0
    small_share = fitting.pace([1.0, 2.0], [(1.0, 0.01), (2.0, 0.04)])
    assert small_share.linear == small_share.attention
    three = fitting.pace([1.6, 2.7, 5.4], [(1.0, 0.2), (2.0, 0.5), (4.0, 1.8)])
    assert math.isclose(three.at((4.0, 1.8)), 5.4, rel_tol=1e-6)
    assert fitting.pace([], []).why == "the formulas"


def test_peaks_too_close_to_tell_keep_the_formulas_growth():
    steps = [TrialStep(context_tokens=s, target_tokens=s, micro_batch=1, seconds=(1.0,), update_s=0.0,
                       peak_bytes=(500 << 20) + s) for s in (64, 128)]
    line = fitting.memory_line(steps, [8 << 20, 16 << 20], 0.0)
    assert line.slope == 1.0
    assert line.constant_bytes == pytest.approx(488 << 20, rel=1e-3)
    assert fitting.memory_line([], [], 123.0).at(7.0) == 130.0
