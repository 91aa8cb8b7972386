"""The formulas of the streamed step against real steps: stores, pages, kernel calls, and live bytes."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

from training.longcontext import StreamedStep, StreamPolicy, costs, flops, kernels, transfer
from training.longcontext.inputs import DeviceStore
from training.planning import streaming
from training.shapes import shape_from_config

SIZES = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 384, "vocab_size": 512, "max_position_embeddings": 8192,
         "tie_word_embeddings": True}
RANK = 8


def made(family="llama", lora=True, **sizes):
    """A random model in fp32, and its geometry as the planner derives it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(config.to_dict())
    if lora:
        targets = sorted({x.name for x in shape.linears})
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=targets))
    values = {"model.dtype": "float32", "lora.enabled": lora, "lora.rank": RANK, "lora.targets": [],
              "deepspeed.stage": 0, "model.quantization": "none", "model.double_quant": True}
    return model.train(), streaming.geometry(shape, values)


def trained_step(model, policy, length, batch=1):
    step = StreamedStep(model, policy)
    ids = torch.randint(0, 512, (batch, length))
    return step, lambda: step(ids, ids).backward()


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


class Counting(DeviceStore):
    """Bytes held, at most held, put in and read."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.down = self.up = 0

    def put(self, key, tensor):
        self.drop(key)
        super().put(key, tensor)
        self.now += size_of(tensor)
        self.most, self.down = max(self.most, self.now), self.down + size_of(tensor)

    def get(self, key):
        self.up += size_of(super().get(key))
        return super().get(key)

    def drop(self, key):
        if key in self:
            self.now -= size_of(super().get(key))
        super().drop(key)


POLICIES = [{}, {"keep_every": 2}, {"keep_every": 3}, {"keep_every": 5}, {"attention": "keep"},
            {"attention": "keep", "keep_every": 2}, {"keys": "keep"}, {"encoding": "int8"},
            {"encoding": "int4", "keep_every": 3}]


@pytest.mark.parametrize(("lora", "options"), [*((True, options) for options in POLICIES), (False, {}),
                                               (False, {"keep_every": 3})], ids=str)
def test_the_store_holds_and_moves_what_the_formulas_say(lora, options):
    model, geometry = made(lora=lora)
    policy = StreamPolicy(chunk_tokens=48, loss_tokens=32, **options)
    step, run = trained_step(model, policy, 200, batch=2)
    counting = step._machine.store = Counting()
    run()
    assert counting.most == sum(costs.store_bytes(geometry, policy, 200, 2).values())
    elsewhere = StreamPolicy(chunk_tokens=48, inputs="pageable", **options)
    moved = flops.moved_bytes(geometry, elsewhere, 200, 2)
    assert (counting.down, counting.up) == (moved["down"], moved["up"])


@pytest.mark.parametrize("place", ["device", "pageable"])
def test_pages_take_what_the_formula_says(place):
    model, geometry = made()
    policy = StreamPolicy(chunk_tokens=48, page_tokens=64, pages=place)
    step, run = trained_step(model, policy, 200, batch=2)
    run()
    held = step._pages[1]
    tensors = [held._k, held._v, held._dk, held._dv] if place == "device" else [
        tensor for page in held._pages for tensor in page.tensors]
    assert sum(size_of(t) for t in tensors) == sum(costs.page_bytes(geometry, policy, 200, 2).values())


@pytest.mark.parametrize("options", [{}, {"keep_every": 2}, {"attention": "keep"}], ids=str)
def test_pages_on_the_host_travel_as_the_formula_says(options):
    model, geometry = made()
    policy = StreamPolicy(chunk_tokens=50, pages="pageable", **options)
    step, run = trained_step(model, policy, 200)
    step._machine.store = Counting()
    found = {"save": 0, "load": 0}

    def counting(name, plain):
        def copy(source, target, *others):
            found[name] += size_of(target)
            return plain(source, target, *others)
        return copy

    for name in found:
        setattr(step._transfer, name, counting(name, getattr(step._transfer, name)))
    run()
    moved = flops.moved_bytes(geometry, policy, 200)
    assert (found["load"], found["save"]) == (moved["up"], moved["down"])


class Products(TorchDispatchMode):
    """FLOP of matrix products. (FlopCounterMode's module hooks do not work inside autograd.grad.)"""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def counted(monkeypatch, model, policy, length):
    """Attention FLOP of a step's kernel calls by their shapes, and linear FLOP as PyTorch counts them."""
    found = {"forward": 0.0, "backward": 0.0}

    def flop(q, k, causal):
        pairs = q.shape[2] * (q.shape[2] + 1) / 2 if causal else q.shape[2] * k.shape[2]
        return 4.0 * q.shape[0] * q.shape[1] * pairs * q.shape[3]

    def forward(q, k, v, causal, scale):
        found["forward"] += flop(q, k, causal)
        return kernels.FLASH_CPU.forward(q, k, v, causal, scale)

    def backward(dout, q, k, v, out, lse, causal, scale):
        found["backward"] += 2.5 * flop(q, k, causal)
        return kernels.FLASH_CPU.backward(dout, q, k, v, out, lse, causal, scale)

    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Kernel("counting", forward, backward))
    _, run = trained_step(model, policy, length)
    with Products() as products:
        run()
    return found, products.flops


@pytest.mark.parametrize(("lora", "options"), [
    (True, {}), (True, {"keep_every": 2}), (True, {"attention": "keep", "keep_every": 3}),
    (True, {"keys": "keep"}), (False, {}), (False, {"mlp_tokens": 16})], ids=str)
def test_operations_are_what_is_called(monkeypatch, lora, options):
    model, geometry = made(lora=lora)
    policy = StreamPolicy(chunk_tokens=64, loss_tokens=64, **options)
    attention, linear = counted(monkeypatch, model, policy, 256)
    planned = flops.attention_flops(geometry, policy, 256)
    assert attention["backward"] == planned["backward"]
    assert attention["forward"] == sum(planned.values()) - planned["backward"]
    assert sum(flops.linear_flops(geometry, policy, 256, 256).values()) == pytest.approx(linear, rel=0.02)


def test_sliding_windows_shorten_the_attention(monkeypatch):
    model, geometry = made("mistral", sliding_window=40)
    policy = StreamPolicy(chunk_tokens=64, loss_tokens=64)
    attention, _ = counted(monkeypatch, model, policy, 256)
    windowed = type(geometry)(**{**vars(geometry), "windows": (40,) * geometry.layers})
    planned = flops.attention_flops(windowed, policy, 256)
    assert attention["backward"] == planned["backward"]
    full = type(geometry)(**{**vars(geometry), "windows": ()})
    assert planned["backward"] < 0.4 * flops.attention_flops(full, policy, 256)["backward"]


@pytest.fixture
def two_threads():
    """The attention kernel has a workspace for each: 131,072 bytes of the phi cases' 4.7 MB."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def live_bytes(run):
    """Most bytes alive at once of what a call allocates. What was there before and is freed inside it does
    not count; nothing is collected meanwhile, so that each call of the same kind has the same figure."""
    gc.collect()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    gc.disable()
    try:
        with torch.profiler.profile(activities=kinds, profile_memory=True) as trace:
            run()
    finally:
        gc.enable()
    events = list(trace.profiler.kineto_results.experimental_event_tree())
    for event in events:
        events.extend(event.children)
    live, most, now = {}, 0, 0
    for event in sorted((e for e in events if e.name == "[memory]"), key=lambda e: e.start_time_ns):
        size, place = event.extra_fields.alloc_size, event.extra_fields.ptr
        now += size if size > 0 else -live.pop(place, 0)
        if size > 0:
            live[place] = size
        most = max(most, now)
    return most


@pytest.mark.parametrize(("family", "lora", "length", "options"), [
    ("llama", True, 512, {"chunk_tokens": 128}), ("llama", True, 512, {"chunk_tokens": 256}),
    ("llama", True, 1024, {"chunk_tokens": 128}), ("llama", True, 1024, {"chunk_tokens": 256}),
    ("llama", False, 512, {"chunk_tokens": 256, "keep_every": 2}),
    ("phi", True, 512, {"chunk_tokens": 256, "attention": "keep"}),
    ("phi", True, 512, {"chunk_tokens": 256, "mlp_tokens": 64})])
def test_the_devices_bytes_are_within_10_percent_of_a_real_step(
        monkeypatch, two_threads, family, lora, length, options):
    monkeypatch.setattr(transfer, "SLAB_BYTES", 64)
    model, geometry = made(family, lora)
    policy = StreamPolicy(loss_tokens=64, **options)
    _, run = trained_step(model, policy, length)
    measured = live_bytes(run)
    gradients = sum(size_of(p) for p in model.parameters() if p.requires_grad)
    predicted = costs.costs(geometry, policy, length).device_bytes + gradients
    assert predicted == pytest.approx(measured, rel=0.10)
