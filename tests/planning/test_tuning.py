"""Batch, rate, precision, devices, allocator and warm-up: what is chosen where, and in which words."""

import math

import pytest
from test_calculator import FACTS, LARGE, plan, profile, value, wrong

from elite_train import AdvancedOptimizer, UltraAdvancedOptimizer
from training import models
from training.errors import UsageError
from training.planning.tuning import advanced, cards, search, ultra
from training.planning.tuning.advanced import Work
from training.records import GIB, Gpu, RepositoryFacts

BASE = models.registry()["phi-2"]
CUDA = {"device.kind": "cuda", "stream.chunk_tokens": 0, "model.dtype": "bfloat16"}


def cards_of(*each, rates=()):
    """A machine with GPUs of (GiB, capability); `rates` in TFLOP/s."""
    made = profile(24)
    gpus = tuple(Gpu(index=index, name=f"card{index}", architecture="", capability=capability,
                     total_bytes=int(gib * GIB), free_bytes=int(gib * GIB))
                 for index, (gib, capability) in enumerate(each))
    figures = {name: figure for name, figure in made.figures.items() if not name.startswith("gpu")}
    for index, rate in enumerate(rates):
        figures[f"gpu{index}.matmul_fp16"] = type(made.figures["cpu.matmul_fp32"])(
            value=rate * 1e12, unit="FLOP/s", method="test")
    return type(made)(**{**vars(made), "gpus": gpus, "figures": figures})


def chosen(machine, **user):
    return [gpu.index for gpu in cards.chosen(machine, {k.replace("_", "."): v for k, v in user.items()})[0]]


def test_equal_gpus_all_train():
    assert chosen(cards_of(*4 * [(24, "8.6")])) == [0, 1, 2, 3]
    made = plan(profile(24, count=4), tier=1)
    assert (value(made, "device.count"), value(made, "device.gpus")) == (4, "")
    assert made.choices["device.count"].why == (
        "one process for each GPU; all 4: none slows the others down or is too small beside them")


def test_a_small_or_slow_gpu_is_left_out_since_the_others_would_wait_for_it():
    machine = cards_of((6, "7.5"), (24, "8.6"), rates=(13, 71))
    assert chosen(machine) == [1]
    made = AdvancedOptimizer(machine).devices()
    assert made["device.count"].value == 1
    assert made["device.gpus"].value == "1"
    assert made["device.gpus"].why == ("left out 0 (card0, 6 GiB): each device waits for the slowest, in "
                                       "windows that fit the smallest")
    assert chosen(cards_of((24, "8.6"), (24, "8.9"), rates=(71, 82))) == [0, 1]
    assert chosen(cards_of((24, "8.6"), (24, "8.9"), rates=(40, 82))) == [1]


def test_the_gpu_left_out_does_not_limit_the_window():
    made = plan(cards_of((24, "8.6"), (6, "8.6"), rates=(71, 71)))
    assert value(made, "device.count") == 1
    assert made.memory.device_bytes > 6 * GIB


def test_a_count_takes_the_best_so_many_and_indices_are_taken_as_they_are():
    machine = cards_of((8, "8.6"), (24, "8.6"), (24, "8.6"), rates=(20, 71, 71))
    assert chosen(machine, device_count=2) == [1, 2]
    assert chosen(machine, device_count=1) == [1]
    assert chosen(machine, device_gpus="0,2") == [0, 2]
    made = plan(machine, settings={"device.gpus": "0,2"})
    assert (value(made, "device.gpus"), value(made, "device.count")) == ("0,2", 2)


@pytest.mark.parametrize(("settings", "words"), [
    ({"device.gpus": "5"}, "device.gpus names 5; the GPUs found have the indices 0."),
    ({"device.gpus": "first"}, "device.gpus is 'first'; give indices such as 0,2."),
    ({"device.allocator": "mapped"}, "device.allocator mapped is made for CPUs; on a GPU set it to default, "
                                     "expandable or split."),
])
def test_settings_of_the_device_that_cannot_be_honoured_are_refused(settings, words):
    assert words in wrong(UsageError, settings=settings)


def test_without_rates_memory_alone_decides():
    assert chosen(cards_of((24, "8.6"), (6, "8.6"), rates=(71,))) == [0]
    assert chosen(cards_of((24, "8.6"), (20, "8.6"))) == [0, 1]


@pytest.mark.parametrize(("machine", "device", "scratch", "dtype", "words"), [
    (cards_of((24, "8.6")), "cuda", False, "bfloat16", "compute capability 8.6 multiplies bf16"),
    (cards_of((8, "7.5")), "cuda", False, "float16", "7.5 has no bf16 tensor cores; fp16 with a scaled loss"),
    (cards_of((24, "8.6"), (24, "7.5")), "cuda", False, "float16", "7.5 has no bf16"),
    (profile(), "cpu", False, "float32", "fp32 multiplies at 75 GFLOP/s on this CPU, bf16 at 1"),
    (profile(**{"cpu.matmul_bf16": 3e11}), "cpu", False, "bfloat16", "4.0 times as fast as fp32"),
    (profile(**{"cpu.matmul_bf16": 3e11}), "cpu", True, "float32", "fp32 multiplies at 75"),
])
def test_precision_follows_the_device(machine, device, scratch, dtype, words):
    found = AdvancedOptimizer(machine).precision(device, scratch)
    assert found.value == dtype
    assert words in found.why


def batch(windows=1000, context=4096, user=None, **work):
    found = AdvancedOptimizer(profile(24), user).batch(Work(windows=windows, context_tokens=context, **work))
    return found["training.micro_batch"].value, found["training.accumulation"].value, (
        found["training.accumulation"].why)


def test_an_update_is_a_power_of_two_of_windows_whatever_runs_at_once():
    assert batch()[:2] == (1, 8)
    assert batch(devices=4)[:2] == (1, 2)
    assert batch(user={"training.micro_batch": 4})[1] == 2
    assert batch(devices=16)[:2] == (1, 1)
    assert batch()[2] == "an update of about 8 windows, of 4 to 64 that published recipes take"


def test_few_windows_or_little_time_make_it_smaller_and_say_so():
    assert batch(windows=50)[1:] == (4, "50 windows, so that an epoch still has 8 updates")
    assert batch(windows=3)[1] == 1
    assert batch(affordable=5.5, affordable_why="slow")[1:] == (4, "slow")


def test_a_model_from_nothing_takes_2048_tokens_at_once():
    assert batch(context=512, scratch=True)[:2] == (4, 1)
    assert batch(context=2048, scratch=True)[:2] == (1, 1)
    assert batch(windows=9, context=512, scratch=True)[:2] == (1, 1)


@pytest.mark.parametrize(("lora", "windows", "rate"), [
    (True, 16, 2e-4), (True, 8, 1.41e-4), (True, 4, 1e-4), (True, 64, 4e-4), (False, 64, 2e-5),
    (False, 4, 5e-6)])
def test_published_rates_are_scaled_with_the_root_of_the_batch(lora, windows, rate):
    known = advanced.LORA if lora else advanced.FULL
    found = AdvancedOptimizer(profile(24)).learning_rate(BASE, lora, windows)
    assert found.value == rate == float(f"{known.rate * math.sqrt(windows / known.windows):.3g}")
    assert known.source in found.why


def test_the_rate_says_where_it_comes_from():
    assert AdvancedOptimizer(profile(24)).learning_rate(BASE, True, 8).why == (
        "0.0002 at 16 windows an update (QLoRA, arXiv:2305.14314, table 9), times sqrt(8 / 16) by the "
        "square-root rule for Adam (arXiv:2205.10287); alpha / rank keeps it for every rank")
    assert value(plan(profile(24), tier=1), "training.learning_rate") == 1.41e-4
    large = models.registry()["qwen2.5-coder-32b"]
    assert AdvancedOptimizer(profile(24)).learning_rate(large, True, 16).value == 1e-4


def test_a_model_made_from_nothing_has_muon_at_its_own_rate_and_adamw_at_its():
    own = plan(profile(), "embedded")
    assert (value(own, "optimizer.name"), value(own, "training.learning_rate")) == ("muon", 1e-2)
    asked = plan(profile(), "embedded", settings={"optimizer.name": "adamw"})
    assert value(asked, "training.learning_rate") == 2e-3


def test_the_adapter_s_scale_is_the_one_the_rate_was_published_with_at_every_rank():
    for tier in (1, 4):
        assert value(plan(profile(24), tier=tier), "lora.alpha") == 16


def ultra_of(machine, user=None, window_s=1.0, **values):
    return UltraAdvancedOptimizer(machine, user).choices({**CUDA, **values}, window_s)


def test_a_gpu_on_linux_gets_expandable_segments_warm_up_and_tf32():
    found = ultra_of(profile(24))
    assert {name: choice.value for name, choice in found.items()} == {
        "device.warmup_steps": 2, "device.allocator": "expandable", "device.memory_share": 0.0,
        "device.pool_share": 0.0, "device.defragment_steps": 0, "device.cudnn_autotune": False,
        "device.matmul_precision": "high", "training.clip_norm": 1.0}
    assert found["device.cudnn_autotune"].why == (
        "not applicable here, because a decoder has no convolutions to tune")
    assert found["device.defragment_steps"].why == (
        "not applicable here, because expandable segments have no holes that emptying the cache would close")
    assert "arXiv:2005.14165" in found["training.clip_norm"].why


def test_on_a_cpu_each_says_why_it_is_not_applicable():
    found = ultra_of(profile(), **{"device.kind": "cpu", "model.dtype": "float32"})
    assert [choice.value for choice in found.values()] == [0, "default", 0.0, 0.0, 0, False, "highest", 1.0]
    assert all(choice.why.startswith("not applicable here, because ")
               for name, choice in found.items() if name not in ("device.allocator", "training.clip_norm"))


def test_windows_gets_whole_blocks_a_cap_and_a_defragmentation_schedule():
    machine = type(profile(24))(**{**vars(profile(24)), "system": "Windows 11 AMD64"})
    found = ultra_of(machine)
    assert found["device.allocator"].value == "split"
    assert found["device.defragment_steps"].value == ultra.DEFRAGMENT_STEPS
    assert found["device.memory_share"].value == 1.0
    assert "lend host memory without an error" in found["device.memory_share"].why


def test_wsl_is_capped_at_what_is_free():
    made = profile(24)
    half = tuple(type(gpu)(**{**vars(gpu), "free_bytes": gpu.total_bytes // 2}) for gpu in made.gpus)
    machine = type(made)(**{**vars(made), "gpus": half, "system": "Linux 6.6 x86_64 (WSL)"})
    assert ultra_of(machine)["device.memory_share"].value == 0.5
    assert ultra_of(machine)["device.allocator"].value == "expandable"


def test_a_warm_up_that_costs_too_much_is_left_out_and_the_pool_taken_instead():
    slow = ultra_of(profile(24), window_s=100.0)
    assert (slow["device.warmup_steps"].value, slow["device.pool_share"].value) == (0, ultra.POOL_SHARE)
    assert "2 steps of 100 s cost more" in slow["device.warmup_steps"].why
    streamed = ultra_of(profile(24), **{"stream.chunk_tokens": 8192})
    assert (streamed["device.warmup_steps"].value, streamed["device.pool_share"].value) == (0, 0.0)
    by_user = ultra_of(profile(24), user={"device.warmup_steps": 0})
    assert by_user["device.pool_share"].value == ultra.POOL_SHARE


def test_turing_has_no_tf32_and_float32_that_was_asked_for_stays():
    turing = ultra_of(profile(8, "7.5"), **{"model.dtype": "float16"})["device.matmul_precision"]
    assert (turing.value, turing.why) == (
        "highest", "not applicable here, because compute capability 7.5 has no TF32 (8.0 has)")
    assert ultra_of(profile(24), **{"model.dtype": "float32"})["device.matmul_precision"].value == "highest"


def test_the_search_is_not_for_what_it_cannot_help():
    values = {"stream.chunk_tokens": 0, "device.kind": "cuda"}
    tuning = AdvancedOptimizer(profile(24))
    assert tuning.not_searched(values) == ""
    assert "in chunks" in tuning.not_searched({**values, "stream.chunk_tokens": 4096})
    assert "repetition" in tuning.not_searched(values, scratch=True)
    assert "would end the process" in tuning.not_searched({**values, "device.kind": "cpu"})
    mine = AdvancedOptimizer(profile(24), {"training.micro_batch": 2})
    assert mine.not_searched(values) == "set by the user"


def test_every_machine_and_length_gives_windows_of_an_update_that_are_a_power_of_two():
    for count in (1, 2, 4):
        for facts in (FACTS, LARGE, RepositoryFacts(**{**vars(FACTS), "code_bytes": 40_000})):
            made = plan(profile(24, count=count), facts=facts, tier=1)
            windows = value(made, "training.micro_batch") * value(made, "training.accumulation") * count
            assert windows & (windows - 1) == 0
            assert windows <= 64
    assert search.divisible(8) == 8
