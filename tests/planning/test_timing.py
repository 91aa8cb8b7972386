"""Operations and seconds of a step."""

import math

import pytest

from training import models
from training.planning import timing
from training.records import Figure, HardwareProfile

VALUES = {"lora.enabled": True, "lora.rank": 8, "lora.targets": ["q_proj"],
          "training.checkpointing": False, "dataset.context_tokens": 1024, "dataset.target_tokens": 128,
          "dataset.held_out_share": 0.05, "training.micro_batch": 1, "training.accumulation": 8,
          "training.epochs": 3, "training.max_steps": 0, "training.budget_s": 0.0,
          "device.kind": "cpu", "device.count": 1, "model.quantization": "none",
          "model.dtype": "float32", "evaluation.windows": 8, "evaluation.completions": 2,
          "evaluation.completion_tokens": 48, "stream.chunk_tokens": 0}
SHAPE = models.registry()["phi-2"].shape


def profile(**figures):
    return HardwareProfile(
        name="x", source="measured", date="", system="Linux", cpu_name="c", cpu_cores=2, cpu_flags=(),
        ram_total_bytes=1, ram_available_bytes=1, gpus=(), disk_path="/", disk_free_bytes=1,
        figures={name.replace("__", "."): Figure(value=value, unit="FLOP/s", method="test")
                 for name, value in figures.items()})


def counted(family, lora, checkpointing):
    """FLOP of one real forward and backward as PyTorch counts them, and the planner's count."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.shapes import shape_from_config
    from training.trainer.loss import causal_lm
    config = AutoConfig.for_model(family, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
                                  num_key_value_heads=4, intermediate_size=256, vocab_size=500,
                                  max_position_embeddings=512)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    shape = shape_from_config(config.to_dict())
    targets = sorted({x.name for x in shape.linears})
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    if checkpointing:
        causal_lm(model).activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 500, (1, 512))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    planned = timing.window_flops(shape, {
        **VALUES, "lora.enabled": lora, "lora.targets": targets, "training.checkpointing": checkpointing,
        "dataset.context_tokens": 512, "dataset.target_tokens": 512})
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    return sum(counts.values()) - attention, planned


@pytest.mark.parametrize(("family", "lora", "checkpointing"), [
    ("llama", False, False), ("llama", True, False), ("phi", True, True), ("qwen2", False, True)])
def test_linear_operations_are_what_pytorch_counts(family, lora, checkpointing):
    measured, planned = counted(family, lora, checkpointing)
    assert planned.linear == pytest.approx(measured, rel=0.05)


def test_attention_grows_with_the_square_of_the_window():
    short = timing.window_flops(SHAPE, VALUES)
    long = timing.window_flops(SHAPE, {**VALUES, "dataset.context_tokens": 4096})
    assert long.attention == 16 * short.attention


def test_a_measured_training_rate_beats_the_matmul_rate():
    linear, _, why = timing.rates(VALUES, profile(cpu__train_fp32=3e10, cpu__matmul_fp32=1e11))
    assert (linear, why) == (3e10, "30 GFLOP/s, a measured training step")
    linear, _, why = timing.rates(VALUES, profile(cpu__matmul_fp32=1e11))
    assert (linear, why) == (4.5e10, "0.45 of the measured 100 GFLOP/s matmul")


def test_attention_has_its_own_rate_where_it_was_measured():
    gpu = {**VALUES, "device.kind": "cuda", "model.dtype": "bfloat16"}
    _, attention, _ = timing.rates(gpu, profile(gpu0__matmul_bf16=1e14, gpu0__attention_forward=7e13,
                                                gpu0__attention_backward=3.5e13))
    assert attention == pytest.approx(3.5 / (1 / 7e13 + 2.5 / 3.5e13))


def test_a_cpus_attention_and_nf4_layers_have_rates_of_their_own():
    rates = {"cpu__train_fp32": 3e10, "cpu__nf4_linear": 2e10, "cpu__attention_forward": 4e10,
             "cpu__attention_backward": 2e10}
    linear, attention, _ = timing.rates(VALUES, profile(**rates))
    assert (linear, attention) == (3e10, pytest.approx(3.5 / (1 / 4e10 + 2.5 / 2e10)))
    linear, _, why = timing.rates({**VALUES, "model.quantization": "nf4"}, profile(**rates))
    assert (linear, why) == (2e10, "20 GFLOP/s, measured NF4 layers")


def test_where_the_first_gpu_is_left_out_the_next_ones_rates_count():
    gpu = {**VALUES, "device.kind": "cuda", "model.dtype": "bfloat16", "device.gpus": "1,2"}
    linear, _, _ = timing.rates(gpu, profile(gpu0__matmul_bf16=1e13, gpu1__matmul_bf16=1e14))
    assert linear == 5e13


def test_without_any_rate_the_time_is_unknown():
    assert timing.window_s(SHAPE, VALUES, profile()) == math.inf


def test_every_token_outside_the_held_out_share_is_a_target_once():
    assert timing.windows_in(3_200_000, VALUES) == math.ceil(950_000 / (0.84 * 128))    # of 128


def test_time_goes_by_the_mean_targets_of_a_window_and_not_by_the_most():
    whole = {**VALUES, "dataset.whole_share": 0.5}
    few, mixed, all_ = (timing.window_flops(SHAPE, *values).linear for values in (
        (VALUES,), (whole,), (VALUES, 1024)))
    filled = 0.84 * 128
    mean = 1 / (0.5 / filled + 0.5 / 1024)
    assert (mixed - few) / (all_ - few) == pytest.approx((mean - filled) / (1024 - filled))


def test_epochs_and_updates_make_the_steps():
    made = timing.schedule(SHAPE, VALUES, profile(cpu__matmul_fp32=1e12), 3_200_000)
    assert made.windows == 8836
    assert made.steps == 3 * math.ceil(8836 / 8)
    assert made.total_s > made.steps * made.step_s


def test_a_budget_cuts_the_steps_and_never_below_ten():
    fast = profile(cpu__matmul_fp32=1e15)
    whole = timing.schedule(SHAPE, VALUES, fast, 3_200_000)
    cut = timing.schedule(SHAPE, {**VALUES, "training.budget_s": 100.1 * whole.step_s}, fast, 3_200_000)
    assert cut.steps == 95
    assert cut.uncut_s == whole.total_s
    least = timing.schedule(SHAPE, {**VALUES, "training.budget_s": whole.step_s}, fast, 3_200_000)
    assert least.steps == 10


def test_max_steps_ends_the_run_there():
    fast = profile(cpu__matmul_fp32=1e12)
    assert timing.schedule(SHAPE, {**VALUES, "training.max_steps": 7}, fast, 3_200_000).steps == 7
