"""Bytes of a training step, term by term, from the model's shape and the configuration's values.

Symbols: S tokens of a window, B windows at once, H hidden, I intermediate, L layers, V vocabulary, e bytes
of the compute type, A attention width (heads x head_dim), K key/value width (kv_heads x head_dim), r LoRA
rank. `values` is a mapping of configuration keys (`training.micro_batch`). Formulas describe
training/trainer with transformers 5 and PEFT 0.21; tests hold them against measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.planning import activations
from training.planning.activations import DTYPE_BYTES, adapted
from training.records import GIB, BaseModel, Memory, ModelShape
from training.settings import most_targets
from training.shapes import frozen_bytes, lora_parameters

MIB = 1 << 20
# CUDA context with cuBLAS and the kernels of a step: 0.4-0.6 GiB by card (PyTorch forum reports; not
# measured here).
CUDA_RUNTIME_BYTES = GIB // 2
# Resident Python + torch + transformers after a first tiny step, weights taken off (VmHWM, 2026-11, torch
# 2.13 CPU).
CPU_RUNTIME_BYTES = 365 * MIB
CPU_RUNTIME_NF4_BYTES = 620 * MIB
# Reserved above live bytes. GPU: expandable segments leave 2-5 %. CPU: glibc keeps freed tensors of up to
# 32 MiB in its heap (M_MMAP_THRESHOLD's largest value). Over 20 runs of Llamas of 1-8 M the peak grew
# 1.4-1.5 times the live bytes with one micro-batch an update and 1.8-2.2 times with more; 1.9 and 2.6 times
# with recompute; 1.05 times where the hidden states of a micro-batch were larger than 32 MiB.
GPU_FRAGMENTATION = 0.05
CPU_FRAGMENTATION = {"one": 0.5, "several": 0.9, "one, recomputed": 1.0, "several, recomputed": 1.5}
CPU_FRAGMENTATION_LARGE = 0.1
GLIBC_HEAP_BYTES = 32 * MIB
TRAINER_HOST_BYTES = 3 * GIB          # resident set of a CUDA process with torch, pinned buffers included
COMMAND_HOST_BYTES = 150 * MIB        # the command that watches it
RECORDS_BYTES = 256 << 10             # on disk: configuration, plan, metrics, log, report
BUCKET_ELEMENTS = 50_000_000          # reduce_bucket_size and allgather_bucket_size in ds_config.json
MUON_TOGETHER = 1 << 20          # numbers of matrices orthogonalized together (trainer.muon.TOGETHER)
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256, "muon": 8.0}


def estimate(base: BaseModel, values: Mapping[str, Any], dataset_tokens: int = 0,
             download_bytes: int = 0) -> Memory:
    """Memory of one training process with this configuration; the terms add up to the device's bytes."""
    terms = {name: int(size) for name, size in device_terms(base.shape, values).items() if size >= 1}
    device_bytes = sum(terms.values())
    return Memory(device_bytes=device_bytes, host_bytes=host_bytes(base.shape, values, device_bytes),
                  disk_bytes=disk_bytes(base.shape, values, dataset_tokens) + download_bytes, terms=terms)


def device_terms(shape: ModelShape, values: Mapping[str, Any]) -> dict[str, float]:
    """Every term in bytes by name: weights, adapter, optimizer, workspace, runtime, and at the step's fullest
    moment activations, working (what the pass works with), logits and gradients; fragmentation of these."""
    moving = max(step_moments(shape, values), key=lambda found: sum(found.values()))
    return {**outer_terms(shape, values), **moving,
            "fragmentation": _fragmentation(shape, values) * sum(moving.values())}


def outer_terms(shape: ModelShape, values: Mapping[str, Any]) -> dict[str, float]:
    """What does not depend on how the step is taken. `average` is on a CPU, whose memory is the host's;
    `exchange` is what DistributedDataParallel holds."""
    average = average_bytes(shape, values) if values["device.kind"] == "cpu" else 0.0
    found = {"weights": weight_bytes(shape, values), "adapter": adapter_bytes(shape, values),
             "optimizer": optimizer_bytes(shape, values), "workspace": workspace_bytes(shape, values),
             "runtime": _runtime_bytes(values)}
    return found | {name: size for name, size in (("average", average), (
        "exchange", exchange_bytes(shape, values))) if size}


def step_moments(shape: ModelShape, values: Mapping[str, Any]) -> list[dict[str, float]]:
    """The plain step's terms at each moment that can be its fullest: the loss, the backward passes of the
    final norm, of the last MLP and of the first, and the end, when all gradients exist and no activations.

    Gradients of earlier micro-batches are held all the time. Else those of a trained head exist from the loss
    on, and a layer's from its backward pass on; at the end an embedding's is made whole before it is added.
    """
    found, everything = [], _outside_buckets(shape, values)
    for name, (kept, worked) in activations.moments(shape, values).items():
        logits = logits_bytes(shape, values) if name == "loss" else _target_states(shape, values)
        found.append({"activations": kept, "working": worked, "logits": logits,
                      "gradients": _gradients_at(name, shape, values)})
    table = 0.0 if values["lora.enabled"] else float(4 * shape.vocab * shape.hidden)
    fullest = max(found, key=lambda moment: moment["activations"])
    return [*found, {**fullest, "working": _norm_bytes(shape, values), "logits": 0.0},
            {"gradients": everything + table},
            {"gradients": everything, "working": _update_bytes(shape, values)}]


def _norm_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """DoRA's norms of the largest adapted matrix (a, b) in a forward pass, in fp32: the unit matrix that the
    adapter's product is made from, the product, scaled, and added to the weight; and a copy of a 16-bit
    weight (PEFT 0.21, tuners/lora/dora.py)."""
    if not (values["lora.enabled"] and values.get("lora.dora")):
        return 0.0
    each = 12.0 if element_bytes(values) == 4 else 16.0
    return max(4.0 * x.inputs ** 2 + each * x.inputs * x.outputs for x in adapted(shape, values))


def _outside_buckets(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Gradients that are tensors of their own. DistributedDataParallel makes them views of its buckets when
    they are exchanged, so only those of earlier micro-batches are held twice."""
    in_buckets = distributed(values) and int(values["training.accumulation"]) == 1
    return 0.0 if in_buckets else gradient_bytes(shape, values)


def _update_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Muon's update of the matrices (a, b) that are orthogonalized together, s their shorter side, where it
    is largest: Nesterov's directions in fp32, two iterates and two Gram matrices
    (training/trainer/muon.py), in fp32 on a CPU and bf16 on a GPU."""
    if not _orthogonal(shape, values):
        return 0.0
    size = 4.0 if values["device.kind"] == "cpu" else 2.0
    counts: dict[tuple[int, int], int] = {}
    for x in shape.linears:
        counts[x.inputs, x.outputs] = counts.get((x.inputs, x.outputs), 0) + x.count
    each = {(a, b): 4.0 * a * b + 2 * size * (a * b + min(a, b) ** 2) for a, b in counts}
    return max(each[a, b] * min(count, max(1, MUON_TOGETHER // (a * b))) for (a, b), count in counts.items())


def _gradients_at(moment: str, shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Gradients of weights that exist at a moment."""
    everything = _outside_buckets(shape, values)
    if values["lora.enabled"]:
        return everything if several(values) else 0.0
    matrix, head = 4.0 * shape.hidden * shape.intermediate, 4.0 * shape.hidden * shape.vocab
    if distributed(values) and not everything:
        return {"loss": 0.0, "norm": head, "mlp": matrix, "first": matrix}[moment]
    if several(values):
        return everything + {"loss": 0.0, "norm": head, "mlp": matrix, "first": matrix}[moment]
    outside = sum(shape.parameters.get(name, 0) for name in ("embeddings", "positions", "head"))
    layers = 4.0 * (shape.total_parameters - outside) * (shape.layers - 1) / shape.layers
    return {"loss": 0.0, "norm": head, "mlp": head + matrix, "first": head + layers + matrix}[moment]


def several(values: Mapping[str, Any]) -> bool:
    """Whether gradients are held while a micro-batch is worked on."""
    return int(values["training.accumulation"]) > 1 or int(values["deepspeed.stage"]) > 0


def distributed(values: Mapping[str, Any]) -> bool:
    """Whether DistributedDataParallel exchanges gradients: several devices without ZeRO."""
    return int(values["device.count"]) > 1 and not int(values["deepspeed.stage"])


def _fragmentation(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Share of the step's own bytes that the allocator holds on top. On a CPU it is of the window whose
    hidden states are as large as glibc's heap takes; what a longer one holds beyond is given back."""
    if values["device.kind"] == "cuda":
        return GPU_FRAGMENTATION
    tokens = activations.worked_tokens(values)
    below = min(1.0, GLIBC_HEAP_BYTES / (tokens * shape.hidden * element_bytes(values)))
    batches = "one" if int(values["training.accumulation"]) == 1 else "several"
    share = CPU_FRAGMENTATION[batches + (", recomputed" if values["training.checkpointing"] else "")]
    return below * share + (1 - below) * CPU_FRAGMENTATION_LARGE


def element_bytes(values: Mapping[str, Any]) -> int:
    """e: bytes of one number of the compute type."""
    return DTYPE_BYTES[str(values["model.dtype"])]


def trainable_parameters(shape: ModelShape, values: Mapping[str, Any]) -> int:
    """The adapter's weights with LoRA, else all of them. DoRA adds a magnitude for each output of an adapted
    layer (arXiv:2402.09353, section 4)."""
    if not values["lora.enabled"]:
        return shape.total_parameters
    layers = adapted(shape, values)
    found = lora_parameters(shape, tuple(x.name for x in layers), int(values["lora.rank"]))
    return found + (sum(x.outputs * x.count for x in layers) if values.get("lora.dora") else 0)


def weight_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Frozen weights in NF4 or e bytes each; trained ones 4 bytes (plus a 16-bit copy under autocast or
    ZeRO).

    ZeRO-3 shares them out over the devices, or holds them on the host.

    >>> from training.shapes import shape_from_config
    >>> phi2 = shape_from_config({"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32,
    ...     "num_attention_heads": 32, "intermediate_size": 10240, "vocab_size": 51200})
    >>> nf4 = {"lora.enabled": True, "model.quantization": "nf4", "model.double_quant": True,
    ...        "model.dtype": "bfloat16", "deepspeed.stage": 0}
    >>> round(weight_bytes(phi2, nf4) / 1e9, 2)      # 2.52e9 x 4.127 / 8 + 0.26e9 x 2
    1.82
    """
    if values["lora.enabled"]:
        held: float = frozen_bytes(shape, str(values["model.quantization"]), element_bytes(values),
                                   bool(values["model.double_quant"]))
    elif values["deepspeed.stage"]:
        held = shape.total_parameters * element_bytes(values)
    else:
        held = 4 * shape.total_parameters + (0 if element_bytes(values) == 4 else _cast_bytes(shape, values))
    if values["deepspeed.stage"] == 3:
        return 0.0 if values["deepspeed.offload_parameters"] else held / int(values["device.count"])
    return held


def _cast_bytes(shape: ModelShape, values: Mapping[str, Any]) -> int:
    """Copies that autocast makes and keeps of the weights that multiply; an embedding is only read."""
    read = shape.parameters.get("positions", 0)
    read += 0 if shape.tied else shape.parameters.get("embeddings", 0)
    return element_bytes(values) * (shape.total_parameters - read)


def adapter_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """LoRA weights: PEFT keeps them in float32 (`autocast_adapter_dtype`)."""
    return 4.0 * trainable_parameters(shape, values) if values["lora.enabled"] else 0.0


def gradient_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Gradients in the trained weights' type, shared out from ZeRO-2 on."""
    size = 4 if values["lora.enabled"] or not values["deepspeed.stage"] else element_bytes(values)
    shares = int(values["device.count"]) if values["deepspeed.stage"] >= 2 else 1
    return size * trainable_parameters(shape, values) / shares


def optimizer_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Adam's two moments: 8 bytes a weight; in 8 bit 2 bytes and two fp32 constants for 256 weights
    (arXiv:2110.02861). Muon has one moment of matrices in decoder layers, 4 bytes (arXiv:2502.16982,
    algorithm 1), and Adam's two of the rest. Lookahead adds slow weights, 4 bytes (arXiv:1907.08610,
    algorithm 1). ZeRO adds an fp32 copy of the weights and shares all out; offloaded they lie on the host.
    """
    if values["deepspeed.offload_optimizer"]:
        return 0.0
    return _optimizer_state(shape, values) / (int(values["device.count"]) if values["deepspeed.stage"] else 1)


def _optimizer_state(shape: ModelShape, values: Mapping[str, Any]) -> float:
    each = ADAM_BYTES[str(values["optimizer.name"])] + (4 if values["deepspeed.stage"] else 0)
    each += 4 if values.get("optimizer.lookahead_steps") else 0
    return each * trainable_parameters(shape, values) - 4.0 * _orthogonal(shape, values)


def _orthogonal(shape: ModelShape, values: Mapping[str, Any]) -> int:
    """Weights that Muon orthogonalizes: matrices of decoder layers, but no adapter's and no fused experts."""
    if values["optimizer.name"] != "muon" or values["lora.enabled"]:
        return 0
    return sum(x.inputs * x.outputs * x.count for x in shape.linears)


def average_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """The average of the weights, in host memory: 4 bytes a trained weight (arXiv:1803.05407, section 3;
    training/trainer/averaging.py)."""
    on = values.get("training.averaging", "none") != "none"
    return 4.0 * trainable_parameters(shape, values) if on else 0.0


def exchange_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """DistributedDataParallel's buckets: every gradient once, 4 bytes a trained weight (arXiv:2006.15704,
    section 4.2). PowerSGD: the errors, as much again, and of each matrix (n, m) its factors, 4 r (n + m)
    (arXiv:1905.13727, algorithm 1), where they halve what travels; one bucket's copy is not counted."""
    if not distributed(values):
        return 0.0
    whole = 4.0 * trainable_parameters(shape, values)
    if values.get("parallel.compression", "none") == "none":
        return whole
    rank = int(values["parallel.compression_rank"])
    return 2 * whole + sum(4.0 * rank * (n + m) * count for n, m, count in _matrices(shape, values)
                           if 2 * rank * (n + m) < n * m)


def _matrices(shape: ModelShape, values: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(rows, columns, how many) of the matrices that are trained, fused experts left out."""
    if not values["lora.enabled"]:
        tables = [(shape.vocab, shape.hidden, 1 if shape.tied else 2)]
        return tables + [(x.outputs, x.inputs, x.count) for x in shape.linears]
    rank = int(values["lora.rank"])
    return [(side, rank, x.count) for x in adapted(shape, values) for side in (x.inputs, x.outputs)]


def logits_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Of one chunk in fp32: log-probabilities, their gradient and the logits' gradient, 12 V bytes a token;
    for a trained head two fp32 gradients of it. Hidden states of all targets and their gradient: 2 H e. The
    windows are those with the most targets.
    """
    targets = _worked_targets(values)
    chunk = min(int(values["training.loss_chunk_tokens"]) or targets, targets)
    head = 0 if values["lora.enabled"] else 8 * shape.vocab * shape.hidden
    return chunk * shape.vocab * 12 + head + 2 * _target_states(shape, values)


def _target_states(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Hidden states of all targets, or their gradient: H e each."""
    return float(_worked_targets(values) * shape.hidden * element_bytes(values))


def _worked_targets(values: Mapping[str, Any]) -> int:
    """Most targets that a device works on at once. Of a ring, the rank with the window's end has as many of
    them as its tokens are."""
    targets = most_targets(values) * int(values["training.micro_batch"])
    return min(targets, activations.worked_tokens(values))


def workspace_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """NF4: the largest layer unpacked to the compute type. ZeRO: a reduce and a gather bucket, never larger
    than what is trained; stage 3 gathers one layer's weights."""
    work = 0.0
    if values["model.quantization"] == "nf4":
        work += max((x.inputs * x.outputs for x in shape.linears), default=0) * element_bytes(values)
    if values["deepspeed.stage"]:
        work += 2 * min(BUCKET_ELEMENTS, trainable_parameters(shape, values)) * element_bytes(values)
    if values["deepspeed.stage"] == 3:
        work += 2 * shape.total_parameters * element_bytes(values) / shape.layers
    return work


def _runtime_bytes(values: Mapping[str, Any]) -> float:
    if values["device.kind"] == "cuda":
        return CUDA_RUNTIME_BYTES
    return CPU_RUNTIME_NF4_BYTES if values["lora.enabled"] else CPU_RUNTIME_BYTES


def host_bytes(shape: ModelShape, values: Mapping[str, Any], device_bytes: int) -> int:
    """Host memory of the run: on a CPU the step itself; on GPUs each process and what is offloaded."""
    if values["device.kind"] == "cpu":
        return device_bytes * int(values["device.count"]) + COMMAND_HOST_BYTES
    offloaded = average_bytes(shape, values)
    if values["deepspeed.offload_optimizer"]:
        offloaded += (8 + 4 + 4) * trainable_parameters(shape, values)
    if values["deepspeed.offload_parameters"]:
        offloaded += shape.total_parameters * element_bytes(values)
    return int(TRAINER_HOST_BYTES * int(values["device.count"]) + COMMAND_HOST_BYTES + offloaded)


def disk_bytes(shape: ModelShape, values: Mapping[str, Any], dataset_tokens: int) -> int:
    """Checkpoints (fp32 weights and two moments of what is trained, with Lookahead and averaging a copy
    each; one more than kept while a new one is written, and the best one), and the dataset: 4 bytes a token,
    half as much again for the index and repeated spans; records and log. The result is written when the one
    more is gone."""
    trained = trainable_parameters(shape, values)
    copies = 3 + bool(values.get("optimizer.lookahead_steps")) + bool(average_bytes(shape, values))
    count = int(values["training.keep_checkpoints"]) + 1 + bool(values.get("training.keep_best"))
    return int(count * 4 * copies * trained + 6 * dataset_tokens) + RECORDS_BYTES


def largest_term(memory: Memory) -> tuple[str, int]:
    """The name and bytes of the largest term."""
    return max(memory.terms.items(), key=lambda item: item[1])
