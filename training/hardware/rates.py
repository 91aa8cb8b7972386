"""Rates measured with torch: matmul, attention, copies, and a small training step.

`torch` is passed in, so that importing this file costs nothing.
Shapes: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from training.hardware import trials
from training.hardware.speed import BYTES_PER_S, FLOPS, MIB, WEIGHTS_PER_S, not_measured, rate, seconds_of
from training.records import Figure

Measure = Callable[[], Figure]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SEQUENCE, HIDDEN, MLP, VOCAB, HEADS, LAYERS = 512, 256, 704, 4096, 4, 4
# Short and long. A CPU's long one is shorter: its backward pass at 8,192 would take 5 s on two cores.
ATTENTION_LENGTHS = {"cpu": (1024, 4096), "cuda": (1024, 8192)}
HEAD_DIM = 64
NF4_SIZE, NF4_TOKENS = {"cpu": 2048, "cuda": 4096}, {"cpu": 1024, "cuda": 8192}


def matmul(torch: Any, device: str, dtype: str, limit_s: float) -> Figure:
    """Rate of an (n, n) x (n, n) product, 2 n^3 FLOP, at the largest n that the time limit allows.

    n starts at 256 and doubles while the next size fits five times; bf16 and fp16 on a CPU without their
    instructions were seen at a hundredth of fp32's rate.
    """
    n, largest = 256, 2048
    if device != "cpu":
        roomy = torch.cuda.mem_get_info(device)[0] > 4 << 30
        n, largest = 1024, 8192 if roomy else 4096
    while True:
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        times = _times(torch, device, partial(torch.matmul, a, a), limit_s / 2)
        if n >= largest or min(times) * 8 * 5 > limit_s:
            return rate(2.0 * n**3, times, FLOPS, f"torch matmul, {dtype}, n={n}")
        n *= 2


def _times(torch: Any, device: str, work: Callable[[], Any], limit_s: float) -> list[float]:
    """Seconds of each call. On a GPU calls are timed in batches of about 5 ms: a lone short kernel would
    mostly measure its launch and the wait for it."""
    if device == "cpu":
        return seconds_of(work, limit_s)

    def batch(calls: int) -> None:
        for _ in range(calls):
            work()
        torch.cuda.synchronize(device)

    single_s = min(seconds_of(lambda: batch(1), limit_s / 4, repeats=3))
    calls = max(1, min(200, int(0.005 / max(single_s, 1e-6))))
    return [time_s / calls for time_s in seconds_of(lambda: batch(calls), limit_s)]


def train_step(torch: Any, limit_s: float) -> Figure:
    """FLOP/s that forward and backward of a small Llama-like stack reach on the CPU in fp32.

    Counted as 6 x parameters x tokens, the head included and the (tied) embedding table once; attention's
    own products come on top and are not counted, as in the planner's estimate of short windows.
    """
    model = _Stack(torch)
    ids = torch.randint(0, VOCAB, (1, SEQUENCE))
    times = seconds_of(lambda: model.step(ids), limit_s)
    method = (f"forward + backward, {LAYERS} Llama layers, hidden {HIDDEN}, MLP {MLP}, vocabulary {VOCAB}, "
              f"sequence {SEQUENCE}, as 6 x {model.parameters:,} parameters x tokens")
    return rate(6.0 * model.parameters * SEQUENCE, times, FLOPS, method)


class _Stack:
    """Llama's arithmetic in plain torch: RMSNorm, causal attention, SwiGLU, tied head, cross-entropy."""

    def __init__(self, torch: Any):
        self.torch = torch
        sizes = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
        self.table = self._weight(VOCAB, HIDDEN)
        self.layers = [[self._weight(*size) for size in sizes] for _ in range(LAYERS)]
        self.weights = [self.table, *(weight for layer in self.layers for weight in layer)]
        self.parameters = sum(weight.numel() for weight in self.weights)

    def _weight(self, rows: int, columns: int) -> Any:
        return (self.torch.randn(rows, columns) * 0.02).requires_grad_()

    def step(self, ids: Any) -> float:
        """One forward and backward; ids (B, S). Returns the loss."""
        functional = self.torch.nn.functional
        x = functional.embedding(ids, self.table)
        for layer in self.layers:
            x = self._layer(x, layer)
        logits = functional.linear(functional.rms_norm(x, (HIDDEN,)), self.table)
        loss = functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
        for weight in self.weights:
            weight.grad = None
        loss.backward()
        return float(loss.detach())

    def _layer(self, x: Any, weights: list[Any]) -> Any:
        functional = self.torch.nn.functional
        q_w, k_w, v_w, o_w, gate_w, up_w, down_w = weights
        batch, length, _ = x.shape
        normed = functional.rms_norm(x, (HIDDEN,))
        q, k, v = (functional.linear(normed, w).view(batch, length, HEADS, -1).transpose(1, 2)
                   for w in (q_w, k_w, v_w))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.linear(mixed.transpose(1, 2).reshape(batch, length, HIDDEN), o_w)
        normed = functional.rms_norm(x, (HIDDEN,))
        inner = functional.silu(functional.linear(normed, gate_w)) * functional.linear(normed, up_w)
        return x + functional.linear(inner, down_w)


def copy(torch: Any, device: str, size_bytes: int, limit_s: float) -> Figure:
    """Memory bandwidth of one device: a copy of `size_bytes` on it, bytes read plus bytes written."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = _times(torch, device, lambda: target.copy_(source), limit_s)
    return rate(2.0 * size_bytes, times, BYTES_PER_S, f"copy of {size_bytes // MIB} MiB, read + written")


def transfer(torch: Any, device: str, size_bytes: int, pinned: bool, to_device: bool) -> Figure:
    """Bandwidth between host and device for one copy of `size_bytes`."""
    host = torch.ones(size_bytes, dtype=torch.uint8)
    host = host.pin_memory() if pinned else host
    there = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target, source = (there, host) if to_device else (host, there)
    times = _times(torch, device, lambda: target.copy_(source, non_blocking=pinned), 1.0)
    kind = "pinned" if pinned else "pageable"
    return rate(float(size_bytes), times, BYTES_PER_S, f"copy of {size_bytes // MIB} MiB, {kind} host memory")


def attention_flop(length: int, heads: int, head_dim: int, backward: bool) -> float:
    """FLOP of causal attention: 4 S^2 H forward, halved by the mask; backward 2.5 times that.

    >>> attention_flop(1024, 16, 64, backward=False) == 2 * 1024**2 * 1024
    True
    """
    forward = 2.0 * length**2 * heads * head_dim
    return 2.5 * forward if backward else forward


def attention(torch: Any, device: str, dtype: str, length: int, backward: bool,
              limit_s: float = 1.0) -> Figure:
    """Rate of causal SDPA at (1, N, S, 64) through its fused kernels; the backward pass is timed alone.

    N is 16 on a GPU; on a CPU, whose backward kernel spreads over heads alone, a multiple of the threads.
    """
    heads = 16 if device != "cpu" else cpu_heads(torch.get_num_threads())
    q, k, v = (torch.randn((1, heads, length, HEAD_DIM), device=device, dtype=getattr(torch, dtype),
                           requires_grad=backward) for _ in range(3))

    def forward() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.nn.attention.sdpa_kernel(_fused(torch)):
        if backward:
            out = forward()
            seed = torch.ones_like(out)
            times = _times(torch, device, lambda: torch.autograd.grad(
                out, (q, k, v), seed, retain_graph=True), limit_s)
        else:
            times = _times(torch, device, forward, limit_s)
    method = f"causal SDPA, fused kernels, {dtype}, {heads} heads of {HEAD_DIM}, {length:,} tokens"
    return rate(attention_flop(length, heads, HEAD_DIM, backward), times, FLOPS, method)


def cpu_heads(threads: int) -> int:
    """The least multiple of the threads that is 4 or more.

    >>> [cpu_heads(threads) for threads in (1, 2, 3, 8, 16)]
    [4, 4, 6, 8, 16]
    """
    return threads * -(-4 // threads)


def nf4_linear(torch: Any, device: str, dtype: str, limit_s: float) -> Figure:
    """Rate of one NF4 layer's forward and gradient by its input, as 4 x inputs x outputs x tokens FLOP.

    Unpacking is part of it, once a pass: with fewer tokens the rate is lower (`nf4_unpack` tells how much).
    """
    layer, tokens = _nf4_layer(torch, device, dtype), NF4_TOKENS[device.partition(":")[0]]
    size = layer.in_features
    x = torch.randn(tokens, size, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    seed = torch.ones_like(x)
    times = _times(torch, device, lambda: torch.autograd.grad(layer(x), x, seed), limit_s)
    method = f"NF4 linear {size:,} x {size:,}, forward + gradient by input, {dtype}, {tokens:,} tokens"
    return rate(4.0 * size * size * tokens, times, FLOPS, method)


def nf4_unpack(torch: Any, device: str, dtype: str, limit_s: float) -> Figure:
    """NF4 weights (double quantization) unpacked per second."""
    from bitsandbytes.functional import dequantize_4bit

    weight = _nf4_layer(torch, device, dtype).weight
    times = _times(torch, device, lambda: dequantize_4bit(weight.data, weight.quant_state), limit_s)
    count = weight.quant_state.shape.numel()
    return rate(float(count), times, WEIGHTS_PER_S, f"{count:,} NF4 weights unpacked to {dtype}")


def _nf4_layer(torch: Any, device: str, dtype: str) -> Any:
    size = NF4_SIZE[device.partition(":")[0]]
    kind = getattr(torch, dtype)
    layer = trials.bitsandbytes(torch).nn.Linear4bit(size, size, bias=False, compute_dtype=kind,
                                                     quant_type="nf4", compress_statistics=True)
    return layer.to(dtype=kind).to(device)


def _fused(torch: Any) -> list[Any]:
    """All SDPA kernels but the plain one, whose memory grows with S^2."""
    kinds = torch.nn.attention.SDPBackend
    return [kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.CUDNN_ATTENTION]


def cpu_measures(torch: Any, quantized: bool) -> dict[str, Measure]:
    """Every CPU rate by name, each a function that measures it. `quantized`: bitsandbytes is installed."""
    measures: dict[str, Measure] = {
        f"cpu.matmul_{tag}": partial(matmul, torch, "cpu", dtype, 0.5) for tag, dtype in DTYPES.items()}
    measures["cpu.train_fp32"] = partial(train_step, torch, 1.5)
    measures |= attention_measures(torch, "cpu", "cpu", "float32")
    measures["cpu.memory_bandwidth"] = partial(copy, torch, "cpu", 128 * MIB, 0.5)
    return measures | (nf4_measures(torch, "cpu", "cpu", "float32") if quantized else {})


def attention_measures(torch: Any, name: str, device: str, dtype: str) -> dict[str, Measure]:
    """Forward and backward at the short length (named by it) and at the long one (no suffix)."""
    short, long = ATTENTION_LENGTHS[device.partition(":")[0]]
    return {f"{name}.attention_{part}{tag}": partial(attention, torch, device, dtype, length,
                                                     part == "backward")
            for tag, length in ((f"_{short}", short), ("", long)) for part in ("forward", "backward")}


def nf4_measures(torch: Any, name: str, device: str, dtype: str) -> dict[str, Measure]:
    """The rates of NF4 layers."""
    return {f"{name}.nf4_linear": partial(nf4_linear, torch, device, dtype, 0.8),
            f"{name}.nf4_unpack": partial(nf4_unpack, torch, device, dtype, 0.3)}


def gpu_measures(torch: Any, index: int, capability: tuple[int, int],
                 quantized: bool) -> dict[str, Measure]:
    """Every rate of one CUDA device by name. Sizes shrink to a sixteenth of the free memory."""
    device, name = f"cuda:{index}", f"gpu{index}"
    half = "bfloat16" if capability >= (8, 0) else "float16"
    free_bytes, _ = torch.cuda.mem_get_info(index)
    size_bytes = min(256 * MIB, free_bytes // 16 // MIB * MIB)
    measures: dict[str, Measure] = {
        f"{name}.matmul_{tag}": partial(matmul, torch, device, dtype, 2.0) for tag, dtype in DTYPES.items()}
    measures |= attention_measures(torch, name, device, half)
    measures[f"{name}.memory_bandwidth"] = partial(copy, torch, device, size_bytes, 1.0)
    for kind, pinned in (("pinned", True), ("pageable", False)):
        measures[f"{name}.h2d_{kind}"] = partial(transfer, torch, device, size_bytes, pinned, True)
        measures[f"{name}.d2h_{kind}"] = partial(transfer, torch, device, size_bytes, pinned, False)
    return measures | (nf4_measures(torch, name, device, half) if quantized else {})


def guarded(measure: Measure, unit: str) -> Figure:
    """The figure, or one without a value that says what went wrong; a failed measurement ends nothing."""
    try:
        return measure()
    except Exception as error:
        return not_measured(unit, f"{type(error).__name__}: {error}")
