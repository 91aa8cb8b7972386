"""Plans: which tier and why, every key with a reason, the user's values, and what is refused."""

import re
import subprocess
import sys
import time

import pytest

from training import models
from training.errors import CannotWrite, DoesNotFit, EliteError, Problems, UsageError
from training.hardware.profiler import from_preset
from training.planning import OptimalConfigCalculator, presets
from training.records import (
    GIB,
    Figure,
    Gpu,
    HardwareProfile,
    Plan,
    RepositoryFacts,
    Request,
    Support,
    from_data,
    to_data,
)
from training.settings import KEYS, Config

FACTS = RepositoryFacts(path="/r", name="repo", files=200, code_files=180, code_bytes=5_000_000,
                        languages={"python": 180})
LARGE = RepositoryFacts(path="/r", name="repo", files=9000, code_files=9000, code_bytes=900_000_000,
                        languages={"python": 9000})
CPU = {"cpu.matmul_fp32": 7.5e10, "cpu.matmul_bf16": 1e9}


def profile(gpu_gib=0.0, capability="8.9", count=1, ram_gib=64, disk_gib=500, supports=(), **figures):
    gpus = tuple(Gpu(index=index, name="Card", architecture="", capability=capability,
                     total_bytes=int(gpu_gib * GIB), free_bytes=int(gpu_gib * GIB))
                 for index in range(count if gpu_gib else 0))
    card = {"gpu0.matmul_bf16": 1.6e14, "gpu0.matmul_fp16": 1.6e14} if gpu_gib else {}
    figures = {**CPU, **card, **figures}
    return HardwareProfile(
        name="x", source="measured", date="", system="Linux", cpu_name="c", cpu_cores=2, cpu_flags=(),
        ram_total_bytes=ram_gib * GIB, ram_available_bytes=ram_gib * GIB, gpus=gpus, disk_path="/",
        disk_free_bytes=disk_gib * GIB, supports=dict(supports),
        figures={name: Figure(value=value, unit="FLOP/s", method="test") for name, value in figures.items()})


def plan(machine, name="phi-2", facts=FACTS, **request):
    base = models.registry()[name] if isinstance(name, str) else name
    return OptimalConfigCalculator(machine).calculate(Request(repo="/r", **request), base, facts)


def value(made, key):
    return made.choices[key].value


def wrong(error_class, machine=None, name="phi-2", **request):
    with pytest.raises(error_class) as error:
        plan(machine or profile(24), name, **request)
    return str(error.value)


MACHINES = [(profile(), "embedded"), (profile(), "phi-2"), (profile(8, "7.5"), "phi-2"),
            (profile(24), "qwen2.5-coder-7b"), (profile(140), "qwen3-coder-30b-a3b"),
            (profile(80, count=4), "phi-2"),
            (profile(24), "embedded"), (profile(24), "starcoderbase-1b")]


@pytest.mark.parametrize(("machine", "name"), MACHINES)
def test_every_key_has_a_value_a_source_and_a_reason_and_they_make_a_configuration(machine, name):
    made = plan(machine, name)
    assert list(made.choices) == [key.name for key in KEYS]
    assert all(choice.source in ("user", "measured", "derived", "preset") for choice in made.choices.values())
    assert all(len(choice.why) >= 6 for choice in made.choices.values())
    Config({name: choice.value for name, choice in made.choices.items()})
    assert from_data(Plan, to_data(made)) == made


@pytest.mark.parametrize(("machine", "name"), MACHINES)
def test_a_chosen_plan_is_within_every_limit(machine, name):
    made = plan(machine, name)
    assert set(made.limits) == {"device_memory", "host_memory", "disk", "hours", "repository", "model"}
    assert all(limit.why for limit in made.limits.values())
    assert made.tier <= min(limit.tier for limit in made.limits.values()) or made.tier == 0


def test_without_a_gpu_the_embedded_model_is_trained_in_short_packed_windows_within_minutes():
    made = plan(profile(), "embedded")
    assert (made.tier, made.context_tokens, made.target_tokens) == (0, 512, 512)
    assert (value(made, "lora.enabled"), value(made, "model.quantization")) == (False, "none")
    assert (value(made, "training.budget_s"), value(made, "deepspeed.stage")) == (150.0, 0)
    assert made.total_s < 200
    assert value(made, "model.dtype") == "float32"
    assert made.choices["model.dtype"].why == "fp32 multiplies at 75 GFLOP/s on this CPU, bf16 at 1"


def test_epochs_from_the_user_switch_the_budget_off():
    made = plan(profile(), "embedded", epochs=2)
    assert value(made, "training.budget_s") == 0
    assert made.choices["training.epochs"].source == "user"
    assert value(plan(profile(), "embedded", settings={"training.max_steps": 7}), "training.budget_s") == 0


def test_a_small_repository_still_gets_several_updates_an_epoch():
    few = RepositoryFacts(path="/r", name="r", files=9, code_files=9, code_bytes=60_000, languages={})
    made = plan(profile(), "embedded", facts=few)
    assert made.steps >= 8 * 8
    assert value(made, "training.epochs") == 8
    assert value(made, "dataset.held_out_share") == 0.2


def test_a_base_on_a_cpu_gets_nf4_lora_short_windows_and_half_an_hour():
    made = plan(profile(), "qwen2.5-coder-0.5b")
    assert (made.context_tokens, made.target_tokens) == (1024, 1024)
    assert (value(made, "lora.enabled"), value(made, "model.quantization")) == (True, "nf4")
    assert value(made, "training.budget_s") == 1800


def test_a_gpu_gets_the_highest_tier_within_every_limit():
    made = plan(profile(24), "qwen2.5-coder-7b")
    assert made.tier == made.limits["hours"].tier == min(limit.tier for limit in made.limits.values()) > 3
    assert made.memory.device_bytes <= 0.88 * 24 * GIB
    assert made.choices["dataset.context_tokens"].why == (
        f"tier {made.tier}, the highest within every limit (decided by hours)")


def test_more_memory_never_lowers_the_tier():
    plain = {"stream.chunk_tokens": 0}
    plans = [plan(profile(size), "qwen2.5-coder-7b", facts=LARGE, max_hours=1e5, settings=plain)
             for size in (12, 16, 24, 40, 80, 140)]
    reached = [made.limits["device_memory"].tier for made in plans]
    assert reached == sorted(reached)
    assert reached[-1] > reached[0]


def test_each_limit_lowers_the_tier_alone_and_says_so():
    roomy = {"gpu_gib": 140, "ram_gib": 512, "disk_gib": 4000, "gpu0.matmul_bf16": 9e14}
    free = plan(profile(**roomy), "phi-2", facts=LARGE, max_hours=1e6)
    assert free.limits["model"].tier == 5
    assert "32 times its native 2,048" in free.limits["model"].why
    hours = plan(profile(**roomy), "phi-2", max_hours=0.4)
    assert hours.tier == hours.limits["hours"].tier < free.tier
    assert "of 24 min granted" in hours.limits["hours"].why
    small = RepositoryFacts(path="/r", name="r", files=20, code_files=20, code_bytes=30_000, languages={})
    repository = plan(profile(**roomy), "phi-2", facts=small)
    assert (repository.tier, repository.limits["repository"].tier) == (2, 2)
    assert repository.limits["repository"].why == (
        "the repository has about 9,375 tokens; tier 3 is a window of 16,384")


def test_too_little_host_memory_is_said():
    assert "of host memory" in wrong(DoesNotFit, profile(140, ram_gib=3), tier=1)


def test_turing_computes_in_fp16_and_ampere_in_bf16():
    assert value(plan(profile(8, "7.5")), "model.dtype") == "float16"
    assert value(plan(profile(8, "8.6")), "model.dtype") == "bfloat16"


def test_a_low_tier_on_one_device_needs_no_deepspeed_and_a_higher_one_offloads():
    low, high = plan(profile(24), tier=2), plan(profile(24), tier=3)
    assert (value(low, "deepspeed.stage"), value(low, "deepspeed.offload_optimizer")) == (0, False)
    assert (value(high, "deepspeed.stage"), value(high, "deepspeed.offload_optimizer")) == (2, True)
    assert value(high, "optimizer.name") == "adamw"
    assert value(plan(profile(24, count=4), tier=1), "deepspeed.stage") == 2


def test_deepspeed_that_does_not_work_is_not_planned_on_one_device():
    broken = {"deepspeed": Support(works=False, why="no compiler")}
    made = plan(profile(24, supports=broken.items()), tier=4)
    assert value(made, "deepspeed.stage") == 0
    assert "no compiler" in made.choices["deepspeed.stage"].why


def test_without_bitsandbytes_the_weights_stay_as_they_are_and_it_says_why():
    made = plan(profile(24, supports={"bitsandbytes_4bit": Support(works=False, why="no CUDA "
                                                                                    "library")}.items()))
    assert value(made, "model.quantization") == "none"
    assert made.choices["model.quantization"].why == "4-bit layers do not work here: no CUDA library"


def test_yarn_is_set_when_the_window_exceeds_the_native_context():
    made = plan(profile(24), tier=2)
    assert value(made, "model.rope_factor") == 4.0
    assert made.choices["model.rope_factor"].why == "YaRN: 8,192 tokens are 4 times the native 2,048"
    assert any("YaRN stretches its rotary embedding" in note for note in made.notes)
    assert value(plan(profile(24), "qwen2.5-coder-0.5b", tier=2), "model.rope_factor") == 1.0


def test_a_window_beyond_the_model_names_the_limit():
    assert wrong(UsageError, name="starcoderbase-1b", tier=3) == (
        "--tier 3 is 16,384 tokens, beyond what starcoderbase-1b can be trained at: 8,192 (it has no "
        "rotary embedding "
        "to stretch). Use --context 8192.")
    assert "its rotary embedding is already scaled" in wrong(
        UsageError, name="deepseek-coder-1.3b", context_tokens=16_385)
    assert wrong(UsageError, profile(), "embedded", context_tokens=16_385) == (
        "--context 16,385 is beyond what embedded can be trained at: 16,384 tokens (the embedded model's "
        "limit). "
        "Use --context 16384.")


@pytest.mark.parametrize(("request_", "message"), [
    ({"tier": 12}, "--tier 12: the table (configs/tiers.yaml) has tiers 1 to 11; leave it out and the "
                   "highest that "
                   "fits is chosen."),
    ({"tier": 0}, "--tier 0: the table"),
    ({"context_tokens": 0}, "--context 0: a window has at least 64 tokens."),
    ({"context_tokens": -5}, "--context -5: a window has at least 64 tokens."),
    ({"epochs": 0}, "--epochs 0: the least is 1."),
    ({"max_hours": 0.0}, "--max-hours 0 grants no time; give a number above 0 (default 48)."),
    ({"max_hours": float("nan")}, "--max-hours nan grants no time"),
    ({"seed": -1}, "--seed -1: the least is 0."),
    ({"settings": {"training.epoch": 2}}, "Unknown configuration key training.epoch. Nearest: "
                                          "training.epochs."),
    ({"settings": {"dataset.context_tokens": 0}}, "dataset.context_tokens is 0; the least is 1."),
    ({"tier": 3, "context_tokens": 4096}, "--tier 3 is 16,384 tokens and --context 4,096 is tier 1; give "
                                          "one of"),
    ({"settings": {"device.count": 3}}, "device.count is 3 and 1 GPUs were found."),
])
def test_a_value_that_cannot_be_honoured_is_refused(request_, message):
    assert message in wrong(EliteError, **request_)


def test_a_gpu_that_is_not_there_is_refused():
    assert "device.kind is cuda and no GPU was found" in wrong(
        UsageError, profile(), settings={"device.kind": "cuda"})


def test_all_problems_come_at_once():
    with pytest.raises(Problems) as error:
        plan(profile(24), tier=12, epochs=0, max_hours=-1.0, settings={"training.epoch": 2, "lora.rank": "x"})
    assert len(error.value.problems) == 5
    assert error.value.exit_code == 2


def test_contradicting_settings_are_refused():
    both = {"lora.enabled": False, "model.quantization": "nf4"}
    assert "freezes the weights" in wrong(UsageError, settings=both)


def test_what_the_user_set_wins_and_counts_in_the_memory():
    small = plan(profile(24), tier=1)
    large = plan(profile(24), tier=1, settings={"lora.rank": 512, "training.learning_rate": 1e-5})
    assert large.choices["lora.rank"].source == "user"
    assert value(large, "training.learning_rate") == 1e-5
    assert value(large, "lora.alpha") == 16
    assert large.memory.terms["adapter"] > 10 * small.memory.terms["adapter"]


def test_a_fixed_context_is_kept_and_its_tier_named():
    made = plan(profile(24), "qwen2.5-coder-1.5b", context_tokens=6000)
    assert (made.tier, made.context_tokens, made.target_tokens) == (1, 6000, 512)
    assert made.choices["dataset.context_tokens"].source == "user"
    packed = plan(profile(), "embedded", context_tokens=1024)
    assert (packed.tier, packed.context_tokens, packed.target_tokens) == (0, 1024, 1024)


def test_a_tier_that_does_not_fit_names_the_largest_term_and_the_nearest_that_does():
    text = wrong(DoesNotFit, profile(24), "qwen2.5-coder-7b", tier=6, settings={"stream.chunk_tokens": 0})
    assert re.fullmatch(r"This run needs \d+\.\d GiB at 131,072 tokens; 21\.1 GiB of device memory is "
                        r"usable\. The largest term is activations \(\d+\.\d GiB\)\. "
                        r"Nearest setting that fits: --set stream\.chunk_tokens=\d+\.", text), text


def test_a_base_too_large_for_the_card_is_said_so():
    text = wrong(DoesNotFit, profile(4), "qwen2.5-coder-32b")
    assert re.search(r"Nearest setting that fits: --base-model [a-z]", text), text


def test_below_the_table_a_shorter_packed_window_is_found():
    made = plan(profile(5.4, **{"gpu0.matmul_bf16": 1e12}), "phi-2")
    assert made.tier == 0
    assert made.target_tokens == made.context_tokens < 4096
    assert any(note.startswith("No tier fits (hours)") for note in made.notes)


def test_a_disk_without_room_is_refused():
    assert wrong(CannotWrite, profile(24, disk_gib=1)).startswith("This run writes ")


def test_hours_granted_cut_a_run_that_would_take_longer():
    made = plan(profile(24), facts=LARGE, max_hours=2.0, tier=3)
    assert value(made, "training.budget_s") > 0
    assert made.total_s <= 2.05 * 3600
    assert any(note.startswith("The run is cut to 2.0 h") for note in made.notes)


def test_a_length_that_was_set_is_not_cut_by_the_default_hours():
    made = plan(profile(24), facts=LARGE, epochs=300)
    assert value(made, "training.budget_s") == 0
    assert any("its length was set, so the default limit of 48 h is not "
               "applied" in note for note in made.notes)


def test_experts_that_stay_in_16_bit_are_told():
    made = plan(profile(140), "qwen3-coder-30b-a3b")
    assert any(note.startswith("The experts (54.0 GiB) stay in 16 bit") for note in made.notes)


def test_a_machine_without_rates_still_gets_a_plan():
    bare = HardwareProfile(**{**vars(profile(24)), "figures": {}})
    made = plan(bare, tier=1)
    assert made.step_s == 0.0
    assert plan(HardwareProfile(**{**vars(profile()), "figures": {}}), "embedded").steps > 0


def test_the_same_request_gives_the_same_plan():
    assert plan(profile(24)) == plan(profile(24))


def test_a_plan_takes_less_than_a_tenth_of_a_second():
    """CPU seconds, which busy neighbours do not blur: about 0.04 with the eleven tiers of the table."""
    calculator, base = OptimalConfigCalculator(profile(140)), models.registry()["qwen2.5-coder-32b"]
    took = []
    for _ in range(5):
        start = time.process_time()
        calculator.calculate(Request(repo="/r"), base, FACTS)
        took.append(time.process_time() - start)
    assert min(took) < 0.1


def test_planning_imports_no_torch():
    code = ("import sys; from training.planning import OptimalConfigCalculator, tables, presets; "
            "tables.tier_rows();"
            "sys.exit(bool({'torch', 'transformers', 'deepspeed', 'training.hardware'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_described_machine_has_no_measured_choices():
    described = from_preset(presets.load("rtx-4090"))
    request = Request(repo="x", output="x", model_name="x", base_model="qwen2.5-coder-7b")
    plan = OptimalConfigCalculator(described).calculate(request, models.resolve("qwen2.5-coder-7b"), FACTS)
    assert {choice.source for choice in plan.choices.values()} == {"user", "derived", "preset"}
