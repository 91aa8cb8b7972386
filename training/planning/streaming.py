"""The streamed step in the planner's terms: a model's geometry, a configuration's policy, and what they cost.

The formulas are training/longcontext/costs.py; here they meet ModelShape and the configuration's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.longcontext.costs import SLAB_BYTES, Costs, costs, weight_bytes
from training.longcontext.geometry import Geometry
from training.longcontext.policy import StreamPolicy
from training.planning import activations, memory
from training.records import BaseModel, Memory, ModelShape
from training.settings import BY_NAME, most_targets
from training.shapes import family_of, frozen_bytes

# The keys of stream.* that are fields of a policy under the same name.
FIELDS = ("chunk_tokens", "page_tokens", "mlp_tokens", "inputs", "keep_every", "encoding", "pages",
          "attention", "keys", "weights")
# Of what a chunk works with, held on top on a CPU: glibc keeps freed tensors of up to 32 MiB in its heap. The
# peak of a Llama of hidden 256 grew 1.9-2.1 times a chunk's bytes beyond the terms (4,096 and 8,192 tokens,
# chunks of 1,024 and 4,096, 2026-11).
CPU_FRAGMENTATION = 2.0


def streamed(values: Mapping[str, Any]) -> bool:
    """Whether a configuration trains through the streamed step."""
    return bool(values["stream.chunk_tokens"])


def stream_choices(policy: StreamPolicy | None, step_why: str,
                   whys: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Value and reason of every stream.* key; None is the plain step, which uses none of them."""
    if policy is None:
        unused = "unused: the plain step"
        plain = {f"stream.{name}": (getattr(StreamPolicy(), name), unused) for name in FIELDS}
        return {**plain, "stream.chunk_tokens": (0, step_why or "the plain step")}
    found = {f"stream.{name}": (getattr(policy, name), whys[name]) for name in FIELDS}
    return {**found, "stream.chunk_tokens": (policy.chunk_tokens, f"{step_why}; {whys['chunk_tokens']}")}


def problems(user: Mapping[str, Any], layers: int, device: str) -> list[str]:
    """Why the user's stream.* keys cannot make a policy on this device, one line each."""
    given = {name.split(".")[1]: value for name, value in user.items() if name.startswith("stream.")}
    changed = [name for name, value in given.items() if value != BY_NAME[f"stream.{name}"].default]
    if given.get("chunk_tokens") == 0 and changed:
        return [f"stream.{changed[0]} is {given[changed[0]]} and stream.chunk_tokens is 0, which takes the "
                "plain step; leave one of them out."]
    found = []
    if given.get("keep_every", 1) > layers:
        found.append(f"stream.keep_every is {given['keep_every']} and the model has {layers} layers.")
    for name in ("inputs", "pages"):
        if given.get(name) == "pinned" and device == "cpu":
            found.append(f"stream.{name} is pinned, which only copies to a GPU need; on a CPU set device.")
    return found


def policy_of(values: Mapping[str, Any]) -> StreamPolicy:
    """The policy that the stream.* keys describe."""
    chunk = int(values["stream.chunk_tokens"])
    return StreamPolicy(loss_tokens=int(values["training.loss_chunk_tokens"]) or chunk,
                        **{name: values[f"stream.{name}"] for name in FIELDS})


def geometry(shape: ModelShape, values: Mapping[str, Any]) -> Geometry:
    """A model's sizes as the streamed step's formulas want them.

    Fully trained weights without ZeRO are fp32, and so are the hidden states that leave their embedding.

    >>> from training.shapes import shape_from_config
    >>> llama = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4,
    ...     "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096})
    >>> found = geometry(llama, {"model.dtype": "float32", "lora.enabled": False, "deepspeed.stage": 0})
    >>> found.weights == 4 * 256**2 + 3 * 256 * 704, found.key_weights == 3 * 256**2
    (True, True)
    """
    lora, family = bool(values["lora.enabled"]), family_of(shape)
    e = memory.element_bytes(values) if lora or values["deepspeed.stage"] else 4
    as_streamed = {**values, "stream.chunk_tokens": 1}
    kept = activations.layer_bytes_per_token(shape, as_streamed)
    inner = activations.inner_bytes_per_token(shape, as_streamed)
    idle = ("embeddings", "head", "positions", "norms", "biases")
    others = sum(shape.parameters.get(name, 0) for name in idle)
    return Geometry(
        layers=shape.layers, hidden=shape.hidden, heads=shape.heads, key_heads=shape.kv_heads,
        head_dim=shape.head_dim, inner=shape.intermediate, vocabulary=shape.vocab, element_bytes=e,
        weights=max(0, shape.active_parameters - others) // shape.layers,
        key_weights=_weights(shape, family.qkv), mlp_weights=_weights(shape, family.mlp),
        kept=kept - inner, kept_inner=inner, trained=not lora,
        adapter=memory.trainable_parameters(shape, values) // shape.layers if lora else 0,
        layer_bytes=_layer_bytes(shape, values) if lora else 0, windows=shape.windows)


def _weights(shape: ModelShape, names: tuple[str, ...]) -> int:
    """Weights of some linear layers in one decoder layer."""
    return sum(x.inputs * x.outputs * x.count for x in shape.linears if x.name in names) // shape.layers


def _layer_bytes(shape: ModelShape, values: Mapping[str, Any]) -> int:
    """Frozen bytes of one decoder layer, without the constants of NF4, which stay on the device."""
    e = memory.element_bytes(values)
    outside = sum(shape.parameters.get(name, 0) for name in ("embeddings", "head", "positions"))
    whole = frozen_bytes(shape, str(values["model.quantization"]), e, bool(values["model.double_quant"]))
    constants = 0.0
    if values["model.quantization"] == "nf4":
        constants = sum(x.inputs * x.outputs * x.count for x in shape.linears) * 0.127 / 8
    return int((whole - outside * e - constants) / shape.layers)


def costs_of(shape: ModelShape, values: Mapping[str, Any], policy: StreamPolicy | None = None,
             batch: int = 0, targets: int = 0) -> Costs:
    """What one streamed step of this configuration costs. `batch` 0: its own micro-batch. `targets` of a
    window, 0: the most that one has, which memory must hold; time goes by their mean."""
    return costs(geometry(shape, values), policy or policy_of(values), int(values["dataset.context_tokens"]),
                 targets=targets or most_targets(values),
                 batch=batch or int(values["training.micro_batch"]))


def estimate(base: BaseModel, values: Mapping[str, Any], dataset_tokens: int = 0,
             download_bytes: int = 0) -> Memory:
    """Memory of one training process, through the plain or the streamed step."""
    if not streamed(values):
        return memory.estimate(base, values, dataset_tokens, download_bytes)
    found = costs_of(base.shape, values)
    disk_bytes = download_bytes + memory.disk_bytes(base.shape, values, dataset_tokens)
    return _assembled(base.shape, values, found, disk_bytes)


def _outer(shape: ModelShape, values: Mapping[str, Any]) -> dict[str, float]:
    """What does not depend on the policy: weights, adapter, gradients, optimizer, workspace, runtime."""
    return {**memory.outer_terms(shape, values), "gradients": memory.gradient_bytes(shape, values)}


def outer_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Device bytes that do not depend on the policy, but for weights that it streams."""
    return sum(_outer(shape, values).values())


def _assembled(shape: ModelShape, values: Mapping[str, Any], found: Costs, disk_bytes: float) -> Memory:
    """A plan's memory. On a CPU main memory is the device, and holds what a policy puts on the host too."""
    policy = policy_of(values)
    terms = {**_outer(shape, values), **found.device,
             "fragmentation": fragmentation(shape, values, policy, found)}
    terms["weights"] -= weight_bytes(geometry(shape, values), policy)
    if values["device.kind"] == "cpu":
        terms |= {f"{name} (host)": size for name, size in found.host.items()}
    whole = {name: int(size) for name, size in terms.items() if size >= 1}
    device_bytes, count = sum(whole.values()), int(values["device.count"])
    host = memory.host_bytes(shape, values, device_bytes)
    if values["device.kind"] != "cpu":
        host += int(found.host_bytes) * count
    return Memory(device_bytes=device_bytes, host_bytes=host, terms=whole,
                  disk_bytes=int(disk_bytes + found.disk_bytes * count))


def fragmentation(shape: ModelShape, values: Mapping[str, Any], policy: StreamPolicy, found: Costs) -> float:
    """Held by the allocator on top: a share of the step's own bytes; on a CPU also half a slab."""
    if values["device.kind"] == "cuda":
        return memory.GPU_FRAGMENTATION * found.device_bytes
    working = found.device.get("chunk", 0.0) + found.device.get("logits", 0.0)
    tokens = min(policy.chunk_tokens, int(values["dataset.context_tokens"]))
    large = tokens * shape.hidden * memory.element_bytes(values) > memory.GLIBC_HEAP_BYTES
    share = memory.CPU_FRAGMENTATION_LARGE if large else CPU_FRAGMENTATION
    return share * working + SLAB_BYTES / 2
