"""Bytes of optimizers, averages, kept activations and exchanged gradients, against real updates where one
process can take them."""

import pytest
import torch

from benchmarks import planner
from benchmarks.measured_steps import Combination
from training import models
from training.planning import memory, timing
from training.planning.streaming import geometry
from training.records import BaseModel, Figure, HardwareProfile
from training.settings import Config
from training.shapes import shape_from_config
from training.trainer import averaging

LLAMA = {"model_type": "llama", **planner.SIZES}
SHORT, FULL, RECOMPUTED = {"dataset.context_tokens": 512}, {"lora.enabled": False}, {
    "training.checkpointing": True}
WAYS = {
    "muon": {**FULL, "optimizer.name": "muon", "dataset.context_tokens": 64, "dataset.target_tokens": 16},
    "muon, whole windows": {**FULL, "optimizer.name": "muon"},
    "lookahead": {**FULL, "optimizer.lookahead_steps": 2},
    "a kept layer": {**RECOMPUTED, "training.kept_layers": 1},
    "two kept layers": {**FULL, **RECOMPUTED, "training.kept_layers": 2},
    "one kept input": {**RECOMPUTED, "training.kept_inputs": 1},
    "two kept inputs": {**FULL, **RECOMPUTED, "training.kept_inputs": 2},
    "DoRA": {"lora.dora": True},
    "DoRA in NF4": {"lora.dora": True, "model.quantization": "nf4", "dataset.context_tokens": 64,
                    "dataset.target_tokens": 16},
}


def config(**changes):
    base = {"lora.enabled": False, "deepspeed.stage": 0, "model.dtype": "float32"}
    return Config({**base, **{name.replace("__", "."): value for name, value in changes.items()}})


@pytest.mark.parametrize("name", WAYS)
def test_predicted_bytes_of_a_real_update_are_within_5_percent(name):
    row = planner.memory_row(name, Combination(family="llama", sizes=planner.SIZES,
                                               values={**SHORT, **WAYS[name]}))
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.05)


@pytest.mark.parametrize(("kind", "place"), [("cpu", "device"), ("cuda", "host")])
def test_an_average_takes_what_it_allocates_in_host_memory(kind, place):
    shape = shape_from_config(LLAMA)
    trained = {"x": torch.nn.Parameter(torch.zeros(shape.total_parameters))}
    average = averaging.build(trained, config(training__averaging="ema", training__averaging_start=0.0))
    average.update(1, 1)
    held = sum(value.numel() * value.element_size() for value in average.weights.values())
    on, off = (memory.estimate(_base(shape), config(training__averaging=kept, device__kind=kind))
               for kept in ("ema", "none"))
    assert getattr(on, f"{place}_bytes") - getattr(off, f"{place}_bytes") == pytest.approx(held, abs=4)
    assert ("average" in on.terms) == (kind == "cpu")
    assert on.disk_bytes > off.disk_bytes


def _base(shape):
    return BaseModel(name="x", location="x", licence="", shape=shape, lora_targets=())


def test_devices_without_zero_hold_gradients_in_buckets_once():
    shape = shape_from_config(LLAMA)
    one, two, summed = (memory.device_terms(shape, config(device__count=count, training__accumulation=each))
                        for count, each in ((1, 1), (2, 1), (2, 4)))
    whole = 4 * shape.total_parameters
    assert "exchange" not in one
    assert two["exchange"] == summed["exchange"] == whole
    assert max(moment.get("gradients", 0.0) for moment in memory.step_moments(
        shape, config(device__count=2, training__accumulation=4))) >= whole     # and those of earlier ones
    assert max(moment.get("gradients", 0.0) for moment in memory.step_moments(
        shape, config(device__count=2, training__accumulation=1))) < whole


def test_compression_holds_the_errors_and_both_factors():
    """PowerSGD's own state, of one bucket as large as the model."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, _should_compress
    shape = shape_from_config(LLAMA)
    values = config(device__count=2, parallel__compression="powersgd", parallel__compression_rank=4)
    state = PowerSGDState(None, matrix_approximation_rank=4, min_compression_rate=2)
    factors = 0
    for rows, columns, count in memory._matrices(shape, values):
        if _should_compress(rows, columns, state.matrix_approximation_rank, state.min_compression_rate)[0]:
            factors += 4 * count * (rows + columns) * 4
    assert factors
    assert memory.exchange_bytes(shape, values) == 2 * 4 * shape.total_parameters + factors


def test_a_ring_shares_out_the_windows_tokens_and_their_time():
    shape = models.registry()["phi-2"].shape
    alone, ring = (config(parallel__ring=size, device__count=4, dataset__context_tokens=8192)
                   for size in (1, 4))
    one, four = (memory.step_moments(shape, values)[0] for values in (alone, ring))
    assert four["activations"] == one["activations"] / 4
    whole, part = (timing.window_flops(shape, values) for values in (alone, ring))
    assert (part.linear, part.attention) == (whole.linear / 4, whole.attention / 4)
    runs = [timing.schedule(shape, values, _quick(), 1 << 20) for values in (alone, ring)]
    assert runs[1].steps == pytest.approx(4 * runs[0].steps, rel=0.02)


def _quick():
    return HardwareProfile(
        name="x", source="measured", date="", system="Linux", cpu_name="c", cpu_cores=2, cpu_flags=(),
        ram_total_bytes=1, ram_available_bytes=1, gpus=(), disk_path="/", disk_free_bytes=1,
        figures={"cpu.train_fp32": Figure(value=1e12, unit="FLOP/s", method="test")})


def test_copies_that_wait_add_their_seconds_to_the_steps():
    shape = models.registry()["phi-2"].shape
    values = {"lora.enabled": True, "stream.chunk_tokens": 4096, "stream.inputs": "disk",
              "dataset.context_tokens": 65536, "device.kind": "cpu"}
    seconds = [timing.window_s(shape, Config({**values, "stream.overlap": overlap}), _quick())
               for overlap in (True, False)]
    assert seconds[1] > seconds[0]


def test_dora_adds_a_magnitude_for_each_output():
    shape = shape_from_config(LLAMA)
    values = {"lora.enabled": True, "lora.rank": 8, "lora.targets": ["q_proj", "down_proj"]}
    plain, dora = (memory.trainable_parameters(shape, Config({**values, "lora.dora": on}))
                   for on in (False, True))
    assert dora - plain == planner.SIZES["num_hidden_layers"] * 2 * planner.SIZES["hidden_size"]
    assert geometry(shape, Config({**values, "lora.dora": True})).kept > geometry(
        shape, Config({**values, "lora.dora": False})).kept
