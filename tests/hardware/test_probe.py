"""The torch measurements, on tiny sizes; the whole probe runs in test_profiler."""

import time

import pytest
import torch

from training.hardware import probe, rates, trials
from training.hardware.ops import wanted
from training.records import GIB, Figure, Gpu


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
    names = set(rates.gpu_measures(torch, 0, (7, 5)))
    assert {f"gpu0.{name}" for name in (
        "matmul_bf16", "matmul_fp16", "matmul_fp32", "attention_forward", "attention_backward",
        "memory_bandwidth", "h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable",
        "attention_forward_1024")} <= names


def test_equal_gpus_are_measured_once_and_the_rates_lent():
    gpus = [gpu(0), gpu(1), gpu(2, name="NVIDIA T4", total=16 * GIB)]
    assert [probe.twin(one, gpus) for one in gpus] == [None, gpus[0], None]
    figures = {"gpu0.matmul_bf16": Figure(value=2e14, unit="FLOP/s", method="torch matmul", repeats=7)}
    (name, figure), = probe.borrowed(figures, gpus).items()
    assert (name, figure.value) == ("gpu1.matmul_bf16", 2e14)
    assert figure.method == "torch matmul (on GPU 0, the same model)"


@pytest.mark.parametrize(("name", "unit"), [
    ("gpu0.matmul_fp16", "FLOP/s"), ("cpu.train_fp32", "FLOP/s"), ("gpu0.attention_forward", "FLOP/s"),
    ("gpu0.h2d_pinned", "bytes/s"), ("cpu.memory_bandwidth", "bytes/s")])
def test_a_figure_that_failed_still_has_its_unit(name, unit):
    assert probe.unit_of(name) == unit


def test_a_trial_that_raises_answers_with_the_reason_in_one_line():
    def broken(torch, device):
        print("noise")
        raise OSError("libcudart.so.12:\ncannot open shared object file")

    assert trials.attempt(broken, torch, "cpu") == "OSError: libcudart.so.12: cannot open shared object file"


def test_importing_bitsandbytes_leaves_torch_compile_as_it_was():
    before = torch.compile
    assert trials._bitsandbytes(torch).__name__ == "bitsandbytes"
    assert torch.compile is before


def test_a_package_that_is_not_installed_is_not_tried():
    assert set(trials.run_all(torch, "cpu", {})) == {"sdpa_flash"}


def test_the_shared_memory_op_is_for_cpu_ranks_on_linux():
    assert wanted("", "linux") == ("cpu_adam", "deepspeed_shm_comm")
    assert wanted("13.0", "linux") == wanted("", "darwin") == ("cpu_adam",)
