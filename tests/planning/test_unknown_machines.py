"""Machines nobody has seen: more of anything never lowers the tier, more context never takes less."""

import dataclasses
from pathlib import Path

import pytest
from test_calculator import LARGE, profile

from training import models
from training.errors import EliteError
from training.hardware.presets import from_preset
from training.planning import OptimalConfigCalculator, presets, tiers
from training.records import GIB, Gpu, Plan, Request, from_data, to_data

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
GIBS = st.floats(0.5, 300).map(lambda size: round(size, 2))
MACHINES = st.fixed_dictionaries({
    "gpu_gib": st.floats(1, 160).map(lambda size: round(size, 2)),
    "capability": st.sampled_from(["7.5", "8.6", "9.0"]), "count": st.sampled_from([1, 1, 2, 4]),
    "ram_gib": GIBS, "disk_gib": st.floats(1, 4000).map(round),
    "gpu0.matmul_bf16": st.floats(1e13, 1e15), "gpu0.matmul_fp16": st.floats(1e13, 1e15)})
NAMES = st.sampled_from(["tiny-starcoder", "qwen2.5-coder-0.5b", "phi-2", "qwen2.5-coder-7b",
                         "deepseek-coder-v2-lite", "qwen2.5-coder-32b"])
# All epochs of the largest repository at the slowest rate: so that memory decides, not the hours.
ENDLESS = 1e12


def profiled(machine):
    ram_bytes = int(machine["ram_gib"] * GIB)
    return dataclasses.replace(profile(**{**machine, "ram_gib": 1}), ram_total_bytes=ram_bytes,
                               ram_available_bytes=ram_bytes)


def tier(machine, name, max_hours=ENDLESS):
    """The tier reached, -1 for a refusal."""
    request = Request(repo="/r", max_hours=max_hours, settings={"model.rope_factor": 4096.0})
    try:
        return OptimalConfigCalculator(profiled(machine)).outline(request, models.registry()[name],
                                                                  LARGE).candidate.tier
    except EliteError:
        return -1


@pytest.mark.parametrize("more", ["gpu_gib", "ram_gib", "disk_gib"])
def test_more_of_a_room_never_lowers_the_tier(more):
    @few
    @hypothesis.given(MACHINES, NAMES, st.floats(1.01, 4))
    def holds(machine, name, factor):
        assert tier({**machine, more: machine[more] * factor}, name) >= tier(machine, name)
    holds()


@few
@hypothesis.given(MACHINES, NAMES, st.floats(0.1, 1e5), st.floats(1, 50))
def test_more_hours_never_lower_the_tier(machine, name, hours, factor):
    assert tier(machine, name, hours * factor) >= tier(machine, name, hours)


POLICIES = st.fixed_dictionaries({
    "stream.chunk_tokens": st.sampled_from([0, 2048, 8192]), "lora.rank": st.just(8),
    "dataset.target_tokens": st.just(512), "deepspeed.stage": st.sampled_from([0, 2]),
    "training.micro_batch": st.sampled_from([1, 3]), "training.accumulation": st.just(2),
    "training.loss_chunk_tokens": st.just(256), "training.checkpointing": st.booleans()})
PLACES = st.fixed_dictionaries({
    "stream.inputs": st.sampled_from(["device", "pinned", "pageable", "disk"]),
    "stream.pages": st.sampled_from(["device", "pinned", "pageable"]),
    "stream.keep_every": st.sampled_from([1, 3]), "stream.mlp_tokens": st.sampled_from([0, 1024]),
    "stream.attention": st.sampled_from(["recompute", "keep"]),
    "stream.weights": st.sampled_from(["resident", "streamed"])})


@few
@hypothesis.given(POLICIES, PLACES, st.integers(10, 21), st.floats(1, 8))
def test_more_context_never_takes_fewer_bytes_of_the_same_policy(policy, places, power, factor):
    settings = {**policy, "model.rope_factor": 4096.0}
    if policy["stream.chunk_tokens"]:
        settings |= places | {"training.checkpointing": False}
    taken, calculator = [], OptimalConfigCalculator(profile(80, ram_gib=256))
    for context in (1 << power, int((1 << power) * factor)):
        request = Request(repo="/r", context_tokens=context, settings=settings, anyway=True)
        made = calculator.calculate(request, models.registry()["phi-2"], LARGE)
        taken.append(made.memory.device_bytes + made.memory.host_bytes + made.memory.disk_bytes)
        assert sum(made.memory.terms.values()) == made.memory.device_bytes
    assert taken[1] >= taken[0]


@few
@hypothesis.given(MACHINES, NAMES)
def test_a_plan_of_any_machine_survives_its_json_and_has_a_row_for_every_tier(machine, name):
    request = Request(repo="/r", anyway=True)
    made = OptimalConfigCalculator(profiled(machine)).calculate(request, models.registry()[name], LARGE)
    assert from_data(Plan, to_data(made)) == made
    assert [row.tier for row in made.tiers] == [row.tier for row in tiers.load()]
    for limit_name, limit in made.limits.items():
        fitting = [row.fits[limit_name] for row in made.tiers]
        assert limit.tier == (fitting.index(False) if False in fitting else len(fitting))
    assert all(row.step in ("plain", "recomputed", "streamed") for row in made.tiers)


def test_the_smallest_of_unequal_gpus_decides():
    unequal = profile(24, count=2)
    small = Gpu(**{**vars(unequal.gpus[1]), "index": 1, "total_bytes": 8 * GIB, "free_bytes": 7 * GIB})
    unequal = dataclasses.replace(unequal, gpus=(unequal.gpus[0], small))
    base, calculator = models.registry()["phi-2"], OptimalConfigCalculator(unequal)
    both = Request(repo="/r", settings={"device.gpus": "0,1", "device.count": 2})
    made = calculator.calculate(both, base, LARGE)
    assert made.room["device_total_bytes"] == 7 * GIB
    assert made.memory.device_bytes <= 0.88 * 7 * GIB
    assert ("The smallest of 2 GPUs (7.0 GiB free) decides, since each runs the same step; --set "
            "device.count=1 trains on one alone.") in made.notes
    alone = calculator.calculate(Request(repo="/r", settings={"device.count": 1}), base, LARGE)
    assert alone.room["device_total_bytes"] == 24 * GIB


@pytest.mark.parametrize(("name", "numbers"), [("rtx-2060-super", [8]), ("rtx-3090", [10, 11])])
def test_the_originals_examples_reach_their_tiers_on_phi_2_by_device_memory(name, numbers):
    """8 GB: tier 8; 24 GB: tiers 10 and 11; with what that takes of the host, the disk and the hours."""
    machine, base = from_preset(presets.load(name)), models.registry()["phi-2"]
    made = OptimalConfigCalculator(machine).calculate(Request(repo="/r"), base, LARGE)
    assert made.limits["device_memory"].tier >= numbers[-1]
    for row in (made.tiers[number - 1] for number in numbers):
        assert row.fits["device_memory"]
        assert 0 < row.device_bytes <= 0.88 * machine.gpus[0].total_bytes
        assert (row.step, row.fits["model"]) == ("streamed", False)
        assert min(row.host_bytes, row.disk_bytes) > GIB
        assert row.total_s > 3600
        assert row.places["zero"] == "2"
    assert made.limits["model"].why.startswith("phi-2 reaches 65,536 tokens: 32 times its native 2,048")


def test_a_twelfth_tier_is_planned_like_the_others(monkeypatch, tmp_path):
    path = Path(tmp_path / "tiers.yaml")
    row = ("  - {tier: 12, context_tokens: 8388608, target_tokens: 1048576, lora_rank: 2, min_vram_gib: 48, "
           "needs: [streamed]}\n")
    path.write_text(tiers.TABLE.read_text() + row)
    monkeypatch.setattr(tiers, "TABLE", path)
    machine = profile(80, ram_gib=2000, disk_gib=9000, **{"gpu0.matmul_bf16": 1e15})
    request = Request(repo="/r", max_hours=1e9, tier=12, settings={"model.rope_factor": 4096.0})
    made = OptimalConfigCalculator(machine).calculate(request, models.registry()["phi-2"], LARGE)
    assert (made.tier, made.context_tokens, made.tiers[-1].tier) == (12, 8_388_608, 12)
    assert made.limits["device_memory"].tier == 12
