"""Bytes of a training step, term by term, from the model's shape and the configuration's values.

Symbols: S tokens of a window, B windows at once, H hidden, I intermediate, L layers, V vocabulary, e bytes
of the compute type, A attention width (heads x head_dim), K key/value width (kv_heads x head_dim), r LoRA
rank. `values` is a mapping of configuration keys (`training.micro_batch`). Formulas describe
training/trainer with transformers 5 and PEFT 0.21; tests hold them against measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.records import GIB, BaseModel, LinearShape, Memory, ModelShape
from training.shapes import family_of, frozen_bytes, lora_parameters

MIB = 1 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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
BUCKET_ELEMENTS = 50_000_000          # reduce_bucket_size and allgather_bucket_size in ds_config.json
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256}


def estimate(base: BaseModel, values: Mapping[str, Any], dataset_tokens: int = 0,
             download_bytes: int = 0) -> Memory:
    """Memory of one training process with this configuration; the terms add up to the device's bytes."""
    terms = {name: int(size) for name, size in device_terms(base.shape, values).items() if size >= 1}
    device_bytes = sum(terms.values())
    return Memory(device_bytes=device_bytes, host_bytes=host_bytes(base.shape, values, device_bytes),
                  disk_bytes=disk_bytes(base.shape, values, dataset_tokens) + download_bytes, terms=terms)


def device_terms(shape: ModelShape, values: Mapping[str, Any]) -> dict[str, float]:
    """Every term in bytes by name: weights, adapter, gradients, optimizer, activations, logits, workspace,
    runtime, fragmentation."""
    terms = {"weights": weight_bytes(shape, values), "adapter": adapter_bytes(shape, values),
             "gradients": gradient_bytes(shape, values), "optimizer": optimizer_bytes(shape, values),
             "activations": activation_bytes(shape, values), "logits": logits_bytes(shape, values),
             "workspace": workspace_bytes(shape, values)}
    moving = terms["activations"] + terms["logits"] + terms["workspace"]
    terms["runtime"] = _runtime_bytes(values)
    terms["fragmentation"] = _fragmentation(shape, values) * moving
    return terms


def _fragmentation(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Share of the step's own bytes that the allocator holds on top."""
    if values["device.kind"] == "cuda":
        return GPU_FRAGMENTATION
    tokens = int(values["dataset.context_tokens"]) * int(values["training.micro_batch"])
    if tokens * shape.hidden * element_bytes(values) > GLIBC_HEAP_BYTES:
        return CPU_FRAGMENTATION_LARGE
    batches = "one" if int(values["training.accumulation"]) == 1 else "several"
    return CPU_FRAGMENTATION[batches + (", recomputed" if values["training.checkpointing"] else "")]


def element_bytes(values: Mapping[str, Any]) -> int:
    """e: bytes of one number of the compute type."""
    return DTYPE_BYTES[str(values["model.dtype"])]


def trainable_parameters(shape: ModelShape, values: Mapping[str, Any]) -> int:
    """The adapter's weights with LoRA, else all of them."""
    if values["lora.enabled"]:
        return lora_parameters(shape, tuple(x.name for x in adapted(shape, values)), int(values["lora.rank"]))
    return shape.total_parameters


def adapted(shape: ModelShape, values: Mapping[str, Any]) -> list[LinearShape]:
    """The linear layers that get an adapter; an empty `lora.targets` means all."""
    names = values["lora.targets"]
    return [x for x in shape.linears if not names or x.name in names]


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
        held = shape.total_parameters * (4 if element_bytes(values) == 4 else 4 + element_bytes(values))
    if values["deepspeed.stage"] == 3:
        return 0.0 if values["deepspeed.offload_parameters"] else held / int(values["device.count"])
    return held


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
    (arXiv:2110.02861). ZeRO adds an fp32 copy of the weights and shares all out; offloaded they lie on the
    host.
    """
    if values["deepspeed.offload_optimizer"]:
        return 0.0
    return _optimizer_state(shape, values) / (int(values["device.count"]) if values["deepspeed.stage"] else 1)


def _optimizer_state(shape: ModelShape, values: Mapping[str, Any]) -> float:
    master = 4 if values["deepspeed.stage"] else 0
    return (ADAM_BYTES[str(values["optimizer.name"])] + master) * trainable_parameters(shape, values)


def layer_bytes_per_token(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """What autograd keeps of one layer for one token.

    Fused attention: q, k, v and output, (2A + 2K) e. Activation: 3I e with a gate, I e fused, 4I e written
    out. Full training: each norm's input (RMSNorm: and normalized value), and what linear layers read: H a
    norm, A, I. LoRA: frozen linear layers keep nothing; a norm keeps its input (RMSNorm in fp32); each
    adapter an fp32 copy of its input, which with e = 4 is shared among layers that read the same tensor,
    and r fp32 numbers.

    >>> from training.shapes import shape_from_config
    >>> small = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4,
    ...     "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096})
    >>> full = {"model.dtype": "float32", "lora.enabled": False}
    >>> layer_bytes_per_token(small, full)      # (11 x 256 + 4 x 704) x 4
    22528.0
    """
    e, family = element_bytes(values), family_of(shape)
    attention, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = (2 * attention + 2 * keys + family.kept * shape.intermediate) * e
    if not values["lora.enabled"]:
        norm = 1 if family.norm_bias else 2
        read = min(family.norms, 2) * shape.hidden + attention + shape.intermediate
        return float(kept + (family.norms * norm * shape.hidden + read) * e)
    targets = adapted(shape, values)
    norms = family.norms * shape.hidden * (e if family.norm_bias else 4)
    ranks = 4 * int(values["lora.rank"]) * sum(x.count for x in targets) / shape.layers
    return kept + norms + ranks + 4 * _adapter_inputs(targets, shape, shared=e == 4)


def inner_bytes_per_token(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Of `layer_bytes_per_token`, what is kept inside the MLP: the activation's tensors and what the MLP's
    linear layers or their adapters read."""
    e, family = element_bytes(values), family_of(shape)
    kept = float(family.kept * shape.intermediate * e)
    if not values["lora.enabled"]:
        return kept + shape.intermediate * e
    inside = [x for x in adapted(shape, values) if x.name in family.mlp]
    ranks = 4 * int(values["lora.rank"]) * sum(x.count for x in inside) / shape.layers
    return kept + ranks + 4 * _adapter_inputs(inside, shape, shared=e == 4)


def _adapter_inputs(targets: list[LinearShape], shape: ModelShape, shared: bool) -> float:
    """Numbers that a layer's adapters keep of their inputs."""
    if not shared:
        return sum(x.inputs * x.count for x in targets) / shape.layers
    family, read = family_of(shape), dict[str, float]()
    for x in targets:
        if x.name in (family.out, family.mlp[-1]):
            role = f"{x.name} {x.inputs}"
        else:
            role = "norm 1" if x.name in family.qkv or family.norms == 1 else "norm 2"
        read[role] = x.inputs * x.count / shape.layers
    return sum(read.values())


def activation_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Plain: every layer's kept tensors. Recomputed (Chen et al., arXiv:1604.06174): each layer's input, H
    e a token, and one layer's kept tensors. Both: embedding and final norm, 3H e; attention's log-sum-exp,
    4 bytes a head; with a 16-bit adapter the widest fp32 gradient, 4I. Within 8 % of the live bytes of 16
    measured steps.
    """
    e = element_bytes(values)
    tokens = int(values["dataset.context_tokens"]) * int(values["training.micro_batch"])
    layer = layer_bytes_per_token(shape, values) + 4 * shape.heads
    inside = 3 * shape.hidden * e + (4 * shape.intermediate if values["lora.enabled"] and e == 2 else 0)
    if values["training.checkpointing"]:
        return tokens * (shape.layers * shape.hidden * e + layer + inside)
    return tokens * (shape.layers * layer + inside)


def logits_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """One chunk's logits, their fp32 copy, log-probabilities and gradients: 16 V bytes a token in 16 bit,
    12 V in fp32; for a trained head two fp32 gradients of it. Hidden states of all targets and their
    gradient: 2 H e.
    """
    targets = int(values["dataset.target_tokens"]) * int(values["training.micro_batch"])
    chunk = min(int(values["training.loss_chunk_tokens"]) or targets, targets)
    head = 0 if values["lora.enabled"] else 8 * shape.vocab * shape.hidden
    e = element_bytes(values)
    return chunk * shape.vocab * (12 if e == 4 else 16) + head + 2 * targets * shape.hidden * e


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
    offloaded = 0.0
    if values["deepspeed.offload_optimizer"]:
        offloaded += (8 + 4 + 4) * trainable_parameters(shape, values)
    if values["deepspeed.offload_parameters"]:
        offloaded += shape.total_parameters * element_bytes(values)
    return int(TRAINER_HOST_BYTES * int(values["device.count"]) + COMMAND_HOST_BYTES + offloaded)


def disk_bytes(shape: ModelShape, values: Mapping[str, Any], dataset_tokens: int) -> int:
    """Checkpoints (fp32 weights and two moments of what is trained; one more than kept while a new one is
    written), the result, and the dataset: 4 bytes a token, half as much again for the index and repeated
    spans."""
    trained = trainable_parameters(shape, values)
    checkpoints = (int(values["training.keep_checkpoints"]) + 1) * 12 * trained
    return int(checkpoints + 4 * trained + 6 * dataset_tokens)


def largest_term(memory: Memory) -> tuple[str, int]:
    """The name and bytes of the largest term."""
    return max(memory.terms.items(), key=lambda item: item[1])
