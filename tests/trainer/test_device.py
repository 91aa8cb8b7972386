"""The device.* choices inside the trainer: on a CPU as they are, on a GPU against a fake torch.cuda."""

import logging

import pytest
import torch
from trainer_fakes import VOCAB, config_of, same, training_of, weights_of
from transformers import LlamaConfig, LlamaForCausalLM

from training.records import GIB
from training.trainer import device as device_settings
from training.trainer import resources
from training.trainer.device import Defragmenter, apply, begin, take_pool, warm_up
from training.trainer.loss import causal_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GPU = {"device__kind": "cuda"}


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, attention_dropout=0.1, use_cache=False)).train()


class FakeCuda:
    """An allocator of 10 GiB with 1 GiB of context; torch.empty on it takes `reserved`."""

    def __init__(self, monkeypatch, reserved=0.0, allocated=0.0, free=None):
        self.reserved, self.allocated, self.calls = reserved, allocated, []
        self.free = free
        for name in ("memory_reserved", "memory_allocated", "mem_get_info", "empty_cache",
                     "set_per_process_memory_fraction", "synchronize", "max_memory_reserved",
                     "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        self._empty = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)

    def memory_reserved(self, device):
        return int(self.reserved * GIB)

    max_memory_reserved = memory_reserved

    def memory_allocated(self, device):
        return int(self.allocated * GIB)

    max_memory_allocated = memory_allocated

    def mem_get_info(self, device):
        free = 9 - self.reserved if self.free is None else self.free
        return int(free * GIB), 10 * GIB

    def empty_cache(self):
        self.calls.append("empty_cache")
        self.reserved = self.allocated

    def set_per_process_memory_fraction(self, share, device):
        self.calls.append((share, device))

    def synchronize(self, device):
        self.calls.append("synchronize")

    def empty(self, size, *, dtype, device):
        assert dtype == torch.uint8
        self.calls.append(("empty", size / GIB))
        if size > self.mem_get_info(device)[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.reserved += size / GIB
        return self._empty(0, dtype=dtype)


@pytest.fixture
def quiet(monkeypatch):
    """What `apply` sets for the process is put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("quiet")
def test_a_cpu_run_keeps_float32_products_and_leaves_the_gpu_alone():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    apply(config_of(), CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.usefixtures("quiet")
def test_precision_autotuner_and_cap_are_set_on_a_gpu(monkeypatch):
    fake = FakeCuda(monkeypatch)
    apply(config_of(**GPU, device__matmul_precision="high", device__cudnn_autotune=True,
                    device__memory_share=0.75), CUDA)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark is True
    assert fake.calls == [(0.75, CUDA)]
    apply(config_of(**GPU), CUDA)
    assert torch.backends.cudnn.benchmark is False
    assert len(fake.calls) == 1


def trainable(model):
    return dict(model.named_parameters())


def test_a_warm_up_runs_whole_windows_forward_and_backward_and_leaves_no_trace():
    model, before = tiny_llama(), dict(tiny_llama().named_parameters())
    seen, backward = [], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: backward.append(float(grad.norm())))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    line = warm_up(config_of(device__warmup_steps=3), model, trainable(model), CPU)
    assert line == "warmed up with 3 steps on made-up windows"
    assert seen[-3:] == 3 * [(2, 16)]  # before them the loss looks at one short sequence
    assert len(backward) == 3
    assert min(backward) > 0
    assert all(p.grad is None for p in model.parameters())
    assert same(dict(model.named_parameters()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_only_the_targets_of_a_made_up_window_have_a_loss():
    model = tiny_llama()
    few = {"dataset__fim_share": 0.0, "dataset__whole_share": 0.0, "dataset__commit_share": 0.0}
    ids, labels = device_settings._window(config_of(dataset__target_tokens=5, **few), model, 0)
    assert ids.shape == labels.shape == (2, 16)
    assert (labels[:, :11] == -100).all()
    assert torch.equal(labels[:, 11:], ids[:, 11:])
    assert int(ids.max()) < VOCAB
    assert not torch.equal(ids, device_settings._window(config_of(), model, 1)[0])


def test_a_made_up_window_has_the_most_targets_that_the_mix_makes():
    ids, labels = device_settings._window(config_of(dataset__target_tokens=5, dataset__whole_share=0.1),
                                          tiny_llama(), 0)
    assert torch.equal(labels, ids)


def test_by_default_nothing_is_warmed_up_and_the_streamed_step_never():
    model, seen = tiny_llama(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(1))
    assert begin(config_of(), model, trainable(model), CPU, 0) == []
    assert warm_up(config_of(device__warmup_steps=2, stream__chunk_tokens=8), model, {}, CPU) == ""
    assert seen == []


def test_a_warm_up_that_does_not_fit_raises_before_the_training():
    def too_large(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model = tiny_llama()
    model.model.layers[1].register_forward_pre_hook(too_large)
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate 20\.00 GiB"):
        begin(config_of(device__warmup_steps=1), model, trainable(model), CPU, 0)


def test_a_training_that_was_warmed_up_ends_in_the_same_weights(tmp_path):
    plain = training_of(tmp_path / "plain", model=tiny_llama(), loss=causal_loss)
    plain.train()
    model = tiny_llama()
    warm_up(config_of(device__warmup_steps=2), model, trainable(model), CPU)
    warmed = training_of(tmp_path / "warm", model=model, loss=causal_loss)
    warmed.train()
    assert same(weights_of(plain), weights_of(warmed))
    assert not same(weights_of(plain), dict(tiny_llama().named_parameters()))


def test_the_pool_takes_what_the_plan_still_lacks_in_one_piece(monkeypatch):
    fake = FakeCuda(monkeypatch, reserved=2.0)
    line = take_pool(config_of(**GPU, device__pool_share=0.5), CUDA, 10 * GIB)
    assert line == "took 2.00 GiB of cuda:0 for the steps to come"  # 5 less 2 reserved and 1 of context
    assert fake.calls == [("empty", 2.0)]


def test_a_pool_larger_than_what_is_free_is_cut_and_told(monkeypatch, caplog):
    FakeCuda(monkeypatch, reserved=2.0, free=1.25)
    with caplog.at_level(logging.WARNING):
        line = take_pool(config_of(**GPU, device__pool_share=0.9), CUDA, 10 * GIB)
    assert line == "took 1.00 GiB of cuda:0 for the steps to come"
    assert "The plan takes 6.00 GiB more of cuda:0 and 1.00 GiB is free" in caplog.text


def test_a_pool_that_cannot_be_had_in_one_piece_is_left(monkeypatch, caplog):
    fake = FakeCuda(monkeypatch, reserved=2.0)
    monkeypatch.setattr(fake, "mem_get_info", lambda device: (3 * GIB, 10 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 10 * GIB))
    with caplog.at_level(logging.WARNING):
        assert take_pool(config_of(**GPU, device__pool_share=0.9), CUDA, 10 * GIB) == ""
    assert "cannot be taken in one piece on cuda:0; the allocator grows as it needs" in caplog.text


def test_no_pool_on_a_cpu_and_none_when_the_plan_is_held_already(monkeypatch):
    assert take_pool({"device.pool_share": 0.9}, CPU, 10 * GIB) == ""
    fake = FakeCuda(monkeypatch, reserved=8.0)
    assert take_pool(config_of(**GPU, device__pool_share=0.9), CUDA, 10 * GIB) == ""
    assert fake.calls == []


def test_behind_a_pool_tensors_are_measured_and_not_the_reserve(monkeypatch):
    FakeCuda(monkeypatch, reserved=6.0, allocated=4.0)
    assert resources.measured_bytes(CUDA) == 7 * GIB
    assert resources.measured_bytes(CUDA, pooled=True) == 5 * GIB


def test_the_cache_is_emptied_on_schedule_when_a_fifth_lies_idle(monkeypatch):
    fake = FakeCuda(monkeypatch, reserved=5.0, allocated=4.0)
    watch = Defragmenter(config_of(**GPU, device__defragment_steps=3), CUDA)
    assert [watch.after_update() for _ in range(4)] == [False, False, True, False]
    assert fake.calls == ["empty_cache"]
    fake.reserved = 4.9  # less than a fifth
    assert [watch.after_update() for _ in range(5)] == 5 * [False]


def test_without_a_schedule_or_without_a_gpu_nothing_is_emptied(monkeypatch):
    fake = FakeCuda(monkeypatch, reserved=5.0, allocated=1.0)
    for watch in (Defragmenter(config_of(**GPU), CUDA), Defragmenter({"device.defragment_steps": 1}, CPU)):
        assert [watch.after_update() for _ in range(3)] == 3 * [False]
    assert fake.calls == []


def test_the_engine_looks_after_every_update(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(Defragmenter, "after_update", lambda self: looked.append(1))
    made = training_of(tmp_path / "run", config=config_of(training__max_steps=3))
    made.train()
    assert len(looked) == 3
