"""Seconds of a training step, from counted operations and measured rates.

Symbols as in `memory`. A multiply-add counts as 2 FLOP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.curve import curve_tokens
from training.longcontext.costs import Costs, Rates, step_s
from training.planning import activations, griewank, mix, streaming
from training.planning.memory import trainable_parameters
from training.records import HardwareProfile, ModelShape
from training.shapes import family_of

# Share of the measured matmul rate that a whole step reaches. CPU: a 4 M Llama in fp32 made 30-38 of 75
# GFLOP/s. GPU: half, which NF4 unpacking and short kernels leave of it (assumed; a trial on the card
# replaces it).
EFFICIENCY = {"cpu": 0.45, "cuda": 0.5}
NF4_CPU_EFFICIENCY = 0.3          # unpacking is not overlapped on a CPU
MEMORY_BYTES_PER_S = {"cpu": 1e10, "cuda": 3e11}
HOST_BYTES_PER_S = {"pinned": 12e9, "pageable": 6e9}
DISK_BYTES_PER_S = 1e9
STARTUP_S = {"cpu": 6.0, "cuda": 20.0}
LEAST_STEPS = 10                  # the trainer's own least (trainer/pacing.py)
TOKENS_PER_BYTE = 1 / 3.2         # of code, for a byte-level BPE; the dataset stage counts exactly


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one window: linear layers and head, and attention."""

    linear: float
    attention: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a run. `windows` of one epoch; `steps` and `total_s` of the run; `uncut_s` without a
    budget."""

    windows: int
    steps: int
    step_s: float
    total_s: float
    uncut_s: float


def window_flops(shape: ModelShape, values: Mapping[str, Any], targets: float = 0) -> Flops:
    """Operations of one window of S tokens, T of them targets; 0: as many as the mix has on average.

    Full training: 6 N a token (2 forward, 4 backward; Kaplan et al., arXiv:2001.08361, section 2.1), N the
    weights that multiply. LoRA: 4 N + 6 N' (no gradient of frozen weights; N' the adapter). Recompute adds
    2 (N + N') for each layer that is recomputed, in full training less the layer's last matrix, whose result
    nobody needs; with training.kept_inputs also whole forward computations between the inputs that are held
    (`griewank.forwards`). The head is computed for targets only. Causal attention: 2 S A a token and layer
    forward, 2.5 times that backward, once more for recompute (FlashAttention-2, arXiv:2307.08691, section
    4.1). parallel.ring shares a window out evenly.

    >>> from training.shapes import shape_from_config
    >>> small = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4,
    ...     "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096,
    ...     "tie_word_embeddings": True})
    >>> flops = window_flops(small, {"dataset.context_tokens": 512, "dataset.target_tokens": 512,
    ...     "lora.enabled": False, "training.checkpointing": False})
    >>> f"{flops.linear / 512:.3g}", f"{flops.attention / 512:.3g}"     # 6 x 4.26e6; 3.5 x 2 x 512 x 256 x 4
    ('2.56e+07', '3.67e+06')
    """
    context, targets = int(values["dataset.context_tokens"]), targets or mix.mean_targets(values)
    head = shape.vocab * shape.hidden
    body = shape.active_parameters - head - (0 if shape.tied else head) - shape.parameters.get("positions", 0)
    again_share, between_share = recomputed(shape, values)
    if values["lora.enabled"]:
        adapter = trainable_parameters(shape, values)
        linear, again = context * (4 * body + 6 * adapter) + targets * 4 * head, body + adapter
    else:
        last = sum(x.inputs * x.outputs * x.count for x in shape.linears
                   if x.name == family_of(shape).mlp[-1])
        linear, again = context * 6 * body + targets * 6 * head, body - last
        adapter = 0
    linear += 2 * context * (again * again_share + (body + adapter) * between_share)
    passes = 3.5 + again_share + between_share
    attention = passes * 2 * context * context * shape.heads * shape.head_dim * shape.layers
    ring = int(values.get("parallel.ring", 1))
    return Flops(linear=linear / ring, attention=attention / ring)


def recomputed(shape: ModelShape, values: Mapping[str, Any]) -> tuple[float, float]:
    """Forward computations beside the first, for each layer: those whose gradients follow, and those between
    the inputs that training.kept_inputs holds.

    >>> from training.shapes import shape_from_config
    >>> llama = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 32,
    ...     "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096})
    >>> recomputed(llama, {"training.checkpointing": True, "training.kept_inputs": 8})   # 32 + 24 of 32
    (1.0, 0.75)
    """
    whole, _, alive = activations.held(shape, values)
    if not alive:
        return 0.0, 0.0
    slots = int(values.get("training.kept_inputs", 0)) or shape.layers
    return 1 - whole / shape.layers, griewank.forwards(shape.layers, slots) / shape.layers - 1


def rates(values: Mapping[str, Any], profile: HardwareProfile) -> tuple[float, float, str]:
    """FLOP/s a step reaches in linear layers and in attention, and where they come from; (0, 0, why) if
    unmeasured. Where attention was not measured it is taken as fast as the linear layers."""
    linear, why = _linear_rate(values, profile)
    name = _first_device(values)
    forward, backward = profile.rate(f"{name}.attention_forward"), profile.rate(f"{name}.attention_backward")
    if not linear or not forward or not backward:
        return linear, linear, why
    return linear, 3.5 / (1 / forward + 2.5 / backward), why


def _first_device(values: Mapping[str, Any]) -> str:
    """The prefix of its figures: `cpu`, or that of the first GPU in use."""
    if values["device.kind"] == "cpu":
        return "cpu"
    used = str(values.get("device.gpus", "")).split(",")
    return f"gpu{used[0] or 0}"


def _linear_rate(values: Mapping[str, Any], profile: HardwareProfile) -> tuple[float, str]:
    """FLOP/s of linear layers: those of a measured training step or NF4 layer, else a share of matmul's."""
    nf4 = values["model.quantization"] == "nf4"
    if values["device.kind"] == "cpu":
        for name, what, fits in (("cpu.nf4_linear", "measured NF4 layers", nf4),
                                 ("cpu.train_fp32", "a measured training step", not nf4)):
            if fits and (found := profile.rate(name)):
                return found, f"{found / 1e9:,.0f} GFLOP/s, {what}"
        matmul = profile.rate("cpu.matmul_fp32") or 0.0
        share = NF4_CPU_EFFICIENCY if nf4 else EFFICIENCY["cpu"]
        return share * matmul, f"{share:g} of the measured {matmul / 1e9:,.0f} GFLOP/s matmul"
    device = _first_device(values)
    kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(values["model.dtype"])]
    matmul = profile.rate(f"{device}.matmul_{kind}") or profile.rate(f"{device}.matmul_fp16") or 0.0
    source = "the preset's" if profile.source == "preset" else "the measured"
    return EFFICIENCY["cuda"] * matmul, f"half of {source} {matmul / 1e12:,.0f} TFLOP/s"


def window_s(shape: ModelShape, values: Mapping[str, Any], profile: HardwareProfile) -> float:
    """Seconds of one window's forward and backward; infinite when no rate is known."""
    linear, attention, _ = rates(values, profile)
    if not linear:
        return math.inf
    if streaming.streamed(values):
        found = streaming.costs_of(shape, values, batch=1, targets=round(mix.mean_targets(values)))
        return _streamed_s(found, stream_rates(values, profile, found.overlapped),
                           overlap=bool(values.get("stream.overlap", True)))
    flops = window_flops(shape, values)
    return flops.linear / linear + flops.attention / attention


def _streamed_s(found: Costs, rates: Rates, overlap: bool) -> float:
    """Seconds of a streamed step. Without stream.overlap computation, copies and the disk follow each other:
    their seconds are added."""
    if overlap:
        return step_s(found, rates)
    disk = {name: size for name, size in found.moved.items() if name in ("written", "read")}
    others = {name: size for name, size in found.moved.items() if name not in disk}
    return (step_s(replace(found, overlapped=False, moved=others), rates)
            + step_s(replace(found, attention_flops={}, linear_flops={}, moved=disk), rates))


def stream_rates(values: Mapping[str, Any], profile: HardwareProfile, overlapped: bool = True) -> Rates:
    """What the streamed step's formula divides by: measured figures, else those of PCIe 3.0 x16 and an
    ordinary NVMe disk (assumed). `overlapped`: host memory is pinned."""
    linear, attention, _ = rates(values, profile)
    if values["device.kind"] == "cpu":
        memory = profile.rate("cpu.memory_bandwidth") or MEMORY_BYTES_PER_S["cpu"]
        up = down = memory
    else:
        device = _first_device(values)
        memory = profile.rate(f"{device}.memory_bandwidth") or MEMORY_BYTES_PER_S["cuda"]
        kind = "pinned" if overlapped else "pageable"
        up, down = (profile.rate(f"{device}.{way}_{kind}") or HOST_BYTES_PER_S[kind]
                    for way in ("h2d", "d2h"))
    return Rates(linear=linear, attention=attention, up=up, down=down, memory=memory,
                 disk_write=profile.rate("disk.write") or DISK_BYTES_PER_S,
                 disk_read=profile.rate("disk.read") or DISK_BYTES_PER_S)


def windows_in(code_bytes: int, values: Mapping[str, Any]) -> int:
    """Training windows of one epoch: every token outside the held-out share is a target once, and what the
    mix adds."""
    return mix.windows(code_bytes * TOKENS_PER_BYTE * (1 - float(values["dataset.held_out_share"])), values)


def readers(values: Mapping[str, Any]) -> int:
    """Devices, or rings of them, that read windows of their own; 1 for a ring of more than there are, which
    is refused once the plan is whole."""
    return max(1, int(values["device.count"]) // int(values.get("parallel.ring", 1)))


def schedule(shape: ModelShape, values: Mapping[str, Any], profile: HardwareProfile,
             code_bytes: int) -> Schedule:
    """Steps and seconds of the run, with start-up and both evaluations; `training.budget_s` cuts the
    steps."""
    per_step = int(values["training.micro_batch"]) * int(values["training.accumulation"])
    windows = windows_in(code_bytes, values)
    per_window_s = window_s(shape, values, profile)
    step_s = min(per_step, windows) * per_window_s
    in_epoch = math.ceil(windows / (per_step * readers(values)))
    steps = int(values["training.epochs"]) * in_epoch
    steps = min(steps, int(values["training.max_steps"]) or steps)
    extra, all_steps = extra_s(shape, values, profile, per_window_s), steps
    if budget_s := float(values["training.budget_s"]):
        affordable = int(0.95 * budget_s / step_s) if math.isfinite(step_s) and step_s else steps
        steps = max(1, min(steps, max(LEAST_STEPS, affordable)))
    return Schedule(windows=windows, steps=steps, step_s=step_s, total_s=steps * step_s + extra,
                    uncut_s=all_steps * step_s + extra)


def extra_s(shape: ModelShape, values: Mapping[str, Any], profile: HardwareProfile,
            per_window_s: float) -> float:
    """Start-up, the evaluations before and after, and the context curve: a forward pass is a third of a full
    step's operations, and a completion re-reads the weights for each token (2 N FLOP each, at a tenth of the
    rate). `per_window_s`: of a step, which a ring shares out and an evaluation does not."""
    linear, _, _ = rates(values, profile)
    if not linear:
        return STARTUP_S[str(values["device.kind"])]
    if int(values.get("parallel.ring", 1)) > 1:
        per_window_s = window_s(shape, {**values, "parallel.ring": 1}, profile)
    each_s = per_window_s / 3
    reading = int(values["evaluation.windows"]) * each_s
    written = int(values["evaluation.completions"]) * int(values["evaluation.completion_tokens"])
    writing = written * 2 * shape.active_parameters / (linear / 10)
    return STARTUP_S[str(values["device.kind"])] + 2 * (reading + writing) + curve_windows(values) * each_s


def curve_windows(values: Mapping[str, Any]) -> float:
    """Whole windows that a run's context curves read, before and after together. Shorter ones cost less a
    token, so this is the most."""
    context = int(values["dataset.context_tokens"])
    return curve_tokens(context, int(values.get("evaluation.context_targets", 0)),
                        int(values["dataset.target_tokens"])) / context
