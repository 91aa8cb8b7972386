"""The streamed step in plans: when it is taken, which policy, what is refused, and what it costs."""

import dataclasses

import pytest
from test_calculator import LARGE, profile, value

from training import models
from training.errors import CannotWrite, DoesNotFit, UsageError
from training.planning import OptimalConfigCalculator, policies, streaming
from training.records import GIB, Figure, Request
from training.settings import KEYS

STREAM = [key.name for key in KEYS if key.name.startswith("stream.")]
FAR = {"model.rope_factor": 256.0}


def plan(machine, name="phi-2", settings=None, max_hours=1e6, **request):
    made = Request(repo="/r", settings=settings or {}, max_hours=max_hours, **request)
    return OptimalConfigCalculator(machine).calculate(made, models.registry()[name], LARGE)


def wrong(error_class, machine, name="phi-2", **request):
    with pytest.raises(error_class) as error:
        plan(machine, name, **request)
    return str(error.value)


def stream(made):
    return {name.split(".")[1]: value(made, name) for name in STREAM}


def test_phi_2_at_524288_tokens_fits_8_gib():
    made = plan(profile(8, "7.5", ram_gib=32, disk_gib=400), tier=8, settings=FAR)
    assert (made.tier, made.context_tokens) == (8, 524_288)
    assert made.memory.device_bytes < 0.88 * 8 * GIB
    assert value(made, "stream.pages") != "device"
    assert value(made, "training.micro_batch") == 1
    assert set(made.memory.terms) >= {"weights", "chunk", "page buffers", "tokens"}
    assert sum(made.memory.terms.values()) == made.memory.device_bytes


def test_4194304_tokens_of_a_small_coder_fit_24_gib():
    made = plan(profile(24, ram_gib=256, disk_gib=2000), "qwen2.5-coder-1.5b", tier=11,
                settings={"model.rope_factor": 128.0})
    assert made.memory.device_bytes < 0.88 * 24 * GIB
    assert made.memory.host_bytes < 0.9 * 256 * GIB


def test_an_8b_llama_at_a_million_tokens_fits_12_gib_by_the_formulas():
    from training.longcontext.costs import costs
    from training.longcontext.policy import StreamPolicy
    from training.shapes import frozen_bytes, shape_from_config
    shape = shape_from_config({"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
                               "intermediate_size": 14_336, "tie_word_embeddings": False})
    values = {"model.dtype": "bfloat16", "lora.enabled": True, "lora.rank": 4, "lora.targets": [],
              "deepspeed.stage": 2, "model.quantization": "nf4", "model.double_quant": True}
    policy = StreamPolicy(chunk_tokens=8192, mlp_tokens=2048, loss_tokens=256, inputs="pinned", keep_every=5,
                          pages="pinned")
    found = costs(streaming.geometry(shape, values), policy, 1 << 20, targets=131_072)
    weights = frozen_bytes(shape, "nf4", 2)
    assert found.device_bytes + weights + GIB < 0.88 * 12 * GIB
    assert found.host_bytes < 128 * GIB


def test_every_tier_of_the_table_is_judged():
    made = plan(profile(141, ram_gib=512, disk_gib=4000), "qwen3-coder-30b-a3b", tier=1)
    assert made.limits["device_memory"].tier == 11
    assert made.limits["device_memory"].why.startswith("tier 11 needs ")
    assert made.limits["model"].tier == 11


def test_where_the_plain_step_fits_and_is_no_slower_it_is_taken():
    made = plan(profile(24), tier=1)
    assert stream(made) == {**stream(made), "chunk_tokens": 0, "inputs": "device"}
    assert made.choices["stream.chunk_tokens"].why == "the plain step fits and is not slower"
    assert made.choices["stream.inputs"].why == "unused: the plain step"


def test_where_the_plain_step_does_not_fit_the_streamed_one_is_taken():
    made = plan(profile(12), "qwen2.5-coder-7b", tier=4)
    assert value(made, "stream.chunk_tokens") > 0
    assert made.choices["stream.chunk_tokens"].why.startswith(
        "the streamed step: the plain one does not fit, or is slower; the fastest that fits")
    assert not value(made, "training.checkpointing")


@pytest.mark.parametrize(("context", "streamed"), [(8192, False), (16_384, True), (32_768, True)])
def test_on_a_cpu_windows_of_16384_tokens_and_more_are_streamed(context, streamed):
    made = plan(profile(ram_gib=32), "qwen2.5-coder-0.5b", context_tokens=context)
    assert bool(value(made, "stream.chunk_tokens")) is streamed
    assert "from 16,384 tokens on" in made.choices["stream.chunk_tokens"].why or not streamed
    assert made.memory.host_bytes > made.memory.device_bytes       # main memory is the device


def test_on_a_cpu_a_streamed_run_of_a_base_model_is_started_by_deepspeed():
    machine = profile(0, ram_gib=24)
    made = plan(machine, "qwen2.5-coder-0.5b", context_tokens=32_768)
    assert (value(made, "deepspeed.stage"), value(made, "deepspeed.offload_optimizer")) == (2, False)
    assert made.choices["deepspeed.stage"].why.startswith("tier 4 runs under DeepSpeed on every machine")
    assert value(plan(machine, "embedded", context_tokens=16_384), "deepspeed.stage") == 0


def test_what_the_user_sets_is_kept_and_the_rest_is_chosen_around_it():
    made = plan(profile(24, ram_gib=256), "qwen2.5-coder-7b", tier=5,
                settings={"stream.chunk_tokens": 3000, "stream.keep_every": 3, "stream.encoding": "int8"})
    assert stream(made) == {**stream(made), "chunk_tokens": 3000, "keep_every": 3, "encoding": "int8"}
    assert made.choices["stream.keep_every"].source == "user"
    assert any("int8 is lossy" in note for note in made.notes)
    assert sum(made.memory.terms.values()) == made.memory.device_bytes


def test_any_choice_of_the_streamed_step_asks_for_it():
    made = plan(profile(140, ram_gib=256), tier=1, settings={"stream.inputs": "pageable"})
    assert value(made, "stream.chunk_tokens") > 0
    assert made.choices["stream.chunk_tokens"].why.startswith("the streamed step, as you asked")


def test_layer_inputs_on_disk_are_counted_and_said():
    made = plan(profile(24, ram_gib=64, disk_gib=4000), tier=5, settings={"stream.inputs": "disk"})
    elsewhere = plan(profile(24, ram_gib=64, disk_gib=4000), tier=5, settings={"stream.inputs": "pageable"})
    states = 33 * 57_344 * 2560 * 2
    assert made.memory.disk_bytes - elsewhere.memory.disk_bytes >= states
    assert any("GiB of layer inputs to disk, which wears an SSD" in note for note in made.notes)


def test_less_of_one_room_moves_inputs_to_the_next():
    found = [plan(profile(12, ram_gib=ram_gib, disk_gib=4000), "qwen2.5-coder-7b", tier=7)
             for ram_gib in (1000, 90, 16)]
    assert [value(made, "stream.inputs") for made in found] == ["pinned", "pageable", "disk"]


def test_pinned_memory_stays_within_half_of_the_host():
    made = plan(profile(24, ram_gib=64, disk_gib=4000), "qwen2.5-coder-7b", tier=7,
                settings={"stream.inputs": "pinned"})
    assert made.memory.host_bytes - 4 * GIB < 32 * GIB
    assert value(made, "stream.keep_every") > 1


def test_what_the_machine_could_pin_is_a_limit_too():
    machine = profile(24, ram_gib=256, disk_gib=4000)
    figure = Figure(value=4.0 * GIB, unit="bytes", method="pinned until refused")
    limited = dataclasses.replace(machine, figures={**machine.figures, "host.pinned_limit": figure})
    found = [value(plan(each, "qwen2.5-coder-7b", tier=7), "stream.inputs") for each in (machine, limited)]
    assert found[0] == "pinned"
    assert found[1] != "pinned"


@pytest.mark.parametrize(("settings", "message"), [
    ({"stream.chunk_tokens": 0, "stream.inputs": "disk"},
     "stream.inputs is disk and stream.chunk_tokens is 0, which takes the plain step; leave one of them "
     "out."),
    ({"stream.keep_every": 99}, "stream.keep_every is 99 and the model has 32 layers."),
    ({"stream.encoding": "int2"}, "stream.encoding is 'int2'; it must be one of exact, int8, int4."),
    ({"stream.chunk_tokens": -4}, "stream.chunk_tokens is -4; the least is 0."),
])
def test_a_policy_that_cannot_be_is_refused(settings, message):
    assert wrong(UsageError, profile(24), settings=settings) == message


def test_nothing_is_pinned_on_a_cpu():
    assert wrong(UsageError, profile(), settings={"stream.inputs": "pinned"}) == (
        "stream.inputs is pinned, which only copies to a GPU need; on a CPU set device.")


def test_a_policy_that_does_not_fit_names_the_largest_term_and_one_that_does():
    text = wrong(DoesNotFit, profile(8, "7.5", ram_gib=64, disk_gib=400), tier=8,
                 settings={**FAR, "stream.pages": "device"})
    assert "The largest term is their gradients (" in text
    assert "Nearest setting that fits: --set stream.pages=p" in text
    assert "\n" not in text


def test_a_disk_too_small_for_the_policy_is_refused_with_one_that_fits():
    text = wrong(CannotWrite, profile(24, ram_gib=256, disk_gib=8), "qwen2.5-coder-1.5b", tier=8,
                 settings={"stream.inputs": "disk"})
    assert "Nearest setting that fits: --set stream.inputs=" in text


def test_a_window_beyond_32_times_the_native_context_says_how_to_go_on():
    assert wrong(UsageError, profile(24), tier=8) == (
        "--tier 8 is 524,288 tokens, beyond what phi-2 can be trained at: 65,536 (32 times its native 2,048, "
        "the most YaRN was tested at). Use --context 65536, or try --set model.rope_factor=256.")


def test_frozen_weights_are_streamed_when_nothing_else_helps():
    made = plan(profile(6.7, ram_gib=64), "qwen2.5-coder-7b", tier=1)
    assert value(made, "stream.weights") == "streamed"
    assert made.memory.terms["weights"] < 0.6 * models.registry()["qwen2.5-coder-7b"].shape.total_parameters
    assert wrong(DoesNotFit, profile(6.7, ram_gib=64), "qwen2.5-coder-7b", tier=1,
                 settings={"stream.weights": "resident"}).startswith("This run needs ")


def test_a_faster_link_never_makes_the_step_slower():
    slow, fast = (plan(profile(24, ram_gib=256, **{"gpu0.h2d_pinned": rate, "gpu0.d2h_pinned": rate}),
                       "qwen2.5-coder-7b", tier=6) for rate in (1e9, 5e10))
    assert fast.step_s <= slow.step_s


def test_a_tie_goes_to_the_simpler_policy():
    from training.longcontext.policy import StreamPolicy
    simple = policies.Fit(policy=StreamPolicy(), step_s=100.0, over=0.5)
    moved = policies.Fit(policy=StreamPolicy(inputs="disk"), step_s=98.0, over=0.5)
    faster = policies.Fit(policy=StreamPolicy(inputs="disk"), step_s=90.0, over=0.5)
    assert policies._better(moved, simple) is simple
    assert policies._better(simple, faster) is faster
    assert policies._better(faster, policies.Fit(policy=StreamPolicy(), step_s=1.0, over=1.1)) is faster


def test_without_rates_a_policy_is_still_found():
    bare = profile(12)
    bare = type(bare)(**{**vars(bare), "figures": {}})
    made = plan(bare, "qwen2.5-coder-7b", tier=4)
    assert value(made, "stream.chunk_tokens") > 0
    assert made.step_s == 0.0
