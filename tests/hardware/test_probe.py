"""The torch measurements, on tiny sizes; the whole probe runs in test_profiler."""

import time

import pytest
import torch

from training.hardware import probe, rates, trials
from training.hardware.ops import wanted
from training.records import GIB, Figure, Gpu

MIB = 1 << 20


def gpu(index, name="NVIDIA A100", total=40 * GIB):
    return Gpu(index=index, name=name, architecture="Ampere", capability="8.0", total_bytes=total,
               free_bytes=total)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matmul_measurement_keeps_its_time_limit_however_slow_the_type(dtype):
    began = time.monotonic()
    figure = rates.matmul(torch, "cpu", dtype, 0.1)
    assert figure.value > 0
    assert time.monotonic() - began < 3


def test_the_training_stack_learns_its_one_window():
    torch.manual_seed(0)
    stack = rates._Stack(torch)
    ids = torch.randint(0, rates.VOCAB, (1, 64))
    before = stack.step(ids)
    with torch.no_grad():
        for weight in stack.weights:
            weight -= 0.05 * weight.grad / weight.grad.norm()
    assert before == pytest.approx(8.3, abs=0.3)
    assert stack.step(ids) < before


def test_the_training_rate_counts_every_weight_once():
    stack = rates._Stack(torch)
    a_layer = 4 * 256 * 256 + 3 * 256 * 704
    assert stack.parameters == 4096 * 256 + 4 * a_layer


def test_attention_runs_backward_through_the_fused_kernels_alone():
    figure = rates.attention(torch, "cpu", "float32", 128, backward=True)
    assert figure.value > 0
    assert "causal SDPA" in figure.method


def test_attention_flop_follow_the_causal_formula():
    assert rates.attention_flop(8192, 16, 64, backward=False) == 2 * 8192**2 * 1024
    assert rates.attention_flop(8192, 16, 64, backward=True) == 5 * 8192**2 * 1024


def test_a_failed_measurement_is_a_figure_with_its_reason():
    def fails():
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    figure = rates.guarded(fails, "FLOP/s")
    assert figure.value is None
    assert figure.method == "not measured: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"


def test_every_gpu_figure_of_the_plan_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (8 * GIB, 8 * GIB))
    names = set(rates.gpu_measures(torch, 0, (7, 5), quantized=True))
    assert {f"gpu0.{name}" for name in (
        "matmul_bf16", "matmul_fp16", "matmul_fp32", "attention_forward", "attention_backward",
        "memory_bandwidth", "h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable",
        "attention_forward_1024", "attention_backward_1024", "nf4_linear", "nf4_unpack")} <= names


def test_every_cpu_figure_of_the_plan_is_measured_and_nf4_only_with_its_package():
    plain = set(rates.cpu_measures(torch, quantized=False))
    assert plain == {f"cpu.{name}" for name in (
        "matmul_fp32", "matmul_bf16", "matmul_fp16", "train_fp32", "memory_bandwidth", "attention_forward",
        "attention_backward", "attention_forward_1024", "attention_backward_1024")}
    assert set(rates.cpu_measures(torch, quantized=True)) - plain == {"cpu.nf4_linear", "cpu.nf4_unpack"}


def test_the_way_gpus_are_timed_counts_calls_and_waits_for_them(monkeypatch):
    # `cpu:0` is a device to torch and not the CPU to these functions, which time it as they time a GPU.
    waits, calls = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    times = rates._times(torch, "cpu:0", lambda: (calls.append(1), time.sleep(0.001)), 0.1)
    assert all(0.001 <= one < 0.01 for one in times)
    assert len(calls) > 3 * len(times)
    assert set(waits) == {"cpu:0"}
    figure = rates.attention(torch, "cpu:0", "float32", 64, backward=True, limit_s=0.05)
    assert figure.value > 0
    assert "16 heads of 64, 64 tokens" in figure.method
    assert rates.copy(torch, "cpu:0", MIB, 0.05).method == "copy of 1 MiB, read + written"


def test_an_nf4_layers_rates_are_measured_with_what_they_count(monkeypatch):
    monkeypatch.setitem(rates.NF4_SIZE, "cpu", 256)
    monkeypatch.setitem(rates.NF4_TOKENS, "cpu", 64)
    layer = rates.nf4_linear(torch, "cpu", "float32", 0.05)
    assert layer.value > 0
    assert layer.method == "NF4 linear 256 x 256, forward + gradient by input, float32, 64 tokens"
    unpacked = rates.nf4_unpack(torch, "cpu", "float32", 0.05)
    assert unpacked.value > 0
    assert (unpacked.unit, unpacked.method) == ("weights/s", "65,536 NF4 weights unpacked to float32")


def test_equal_gpus_are_measured_once_and_the_rates_lent():
    gpus = [gpu(0), gpu(1), gpu(2, name="NVIDIA T4", total=16 * GIB)]
    assert [probe.twin(one, gpus) for one in gpus] == [None, gpus[0], None]
    figures = {"gpu0.matmul_bf16": Figure(value=2e14, unit="FLOP/s", method="torch matmul", repeats=7)}
    (name, figure), = probe.borrowed(figures, gpus).items()
    assert (name, figure.value) == ("gpu1.matmul_bf16", 2e14)
    assert figure.method == "torch matmul (on GPU 0, the same model)"


@pytest.mark.parametrize(("name", "unit"), [
    ("gpu0.matmul_fp16", "FLOP/s"), ("cpu.train_fp32", "FLOP/s"), ("gpu0.attention_forward", "FLOP/s"),
    ("cpu.nf4_linear", "FLOP/s"), ("cpu.nf4_unpack", "weights/s"), ("gpu0.h2d_pinned", "bytes/s"),
    ("cpu.memory_bandwidth", "bytes/s")])
def test_a_figure_that_failed_still_has_its_unit(name, unit):
    assert probe.unit_of(name) == unit


def test_a_trial_that_raises_answers_with_the_reason_in_one_line():
    def broken(torch, device):
        print("noise")
        raise OSError("libcudart.so.12:\ncannot open shared object file")

    assert trials.attempt(broken, torch, "cpu") == "OSError: libcudart.so.12: cannot open shared object file"


def test_importing_bitsandbytes_leaves_torch_compile_as_it_was():
    before = torch.compile
    assert trials.bitsandbytes(torch).__name__ == "bitsandbytes"
    assert torch.compile is before


def test_a_package_that_is_not_installed_is_not_tried():
    assert set(trials.run_all(torch, "cpu", {})) == {"sdpa_flash", "sdpa_math"}


def test_on_a_gpu_each_kernel_is_tried_and_triton_only_with_a_compiler(monkeypatch):
    monkeypatch.setattr(trials, "attempt", lambda trial, torch, device: "")
    installed = {"bitsandbytes", "flash-attn", "liger-kernel", "triton"}
    kernels = {"sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "cudnn", "flash_attention_2",
               "liger", "bitsandbytes_4bit", "bitsandbytes_8bit"}
    assert set(trials.run_all(torch, "cuda", installed, compiler=False)) == kernels
    assert set(trials.run_all(torch, "cuda", installed, compiler=True)) == kernels | {"triton"}


@pytest.mark.parametrize("kind", ["FLASH_ATTENTION", "MATH"])
def test_an_attention_kernel_is_held_against_the_formula(kind, monkeypatch):
    assert trials.sdpa(kind)(torch, "cpu") == ""
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, is_causal: real(q, k, v))
    assert trials.sdpa(kind)(torch, "cpu").startswith("its result is ")


def test_a_kernel_that_a_device_lacks_answers_with_torchs_words():
    assert trials.attempt(trials.sdpa("CUDNN_ATTENTION"), torch, "cpu").startswith("RuntimeError: ")


def test_the_convolution_behind_the_cudnn_trial_is_the_sum_it_is_compared_with(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert trials.cudnn(torch, "cpu") == ""
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, weight: torch.zeros(1, 1, 6, 6))
    assert trials.cudnn(torch, "cpu") == "its convolution is wrong"


def test_the_shared_memory_op_is_for_cpu_ranks_on_linux():
    assert wanted("", "linux") == ("cpu_adam", "deepspeed_shm_comm")
    assert wanted("13.0", "linux") == wanted("", "darwin") == ("cpu_adam",)
