"""What the plain step holds of activations: kept by autograd in every layer, and worked with at the peak.

Symbols as in `memory`. The table `configs/activations.yaml` says for each family how many bytes of each width
(hidden H, attention A, keys K, inner I, heads N, and 1) a layer keeps for a token, and how many the peak of a
pass holds beside them. benchmarks/activation_table.py derives it from real layers; tests derive rows anew.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training.planning import griewank
from training.records import LinearShape, ModelShape
from training.shapes import family_of

TABLE = Path(__file__).resolve().parent.parent.parent / "configs" / "activations.yaml"
WIDTHS = ("H", "A", "K", "I", "N", "1")
# How a model is trained: every weight in fp32, in 16 bits (under ZeRO), in fp32 under 16-bit autocast; or a
# frozen base with fp32 adapters, in fp32 or 16 bits.
MODES = ("full32", "full16", "autocast16", "lora32", "lora16")
UNLISTED = "llama"
CAPPED = frozenset({"gemma2", "vaultgemma"})     # cap the scores by a tanh
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Rows by family, mode and moment (`kept`, `mlp`, `norm`)."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load(TABLE.read_text(encoding="utf-8"), loader))


def mode_of(values: Mapping[str, Any]) -> str:
    """The mode of a configuration.

    >>> mode_of({"lora.enabled": True, "model.dtype": "bfloat16", "deepspeed.stage": 0})
    'lora16'
    """
    bits = "32" if DTYPE_BYTES[str(values["model.dtype"])] == 4 else "16"
    if values["lora.enabled"]:
        return "lora" + bits
    return "full32" if bits == "32" else "full16" if values["deepspeed.stage"] else "autocast16"


def stream_element_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of one number of the hidden states between layers: fp32 where their embedding is."""
    return 4 if mode_of(values) == "autocast16" else DTYPE_BYTES[str(values["model.dtype"])]


def widths(shape: ModelShape) -> dict[str, float]:
    """The widths of a shape by name."""
    return {"H": shape.hidden, "A": shape.heads * shape.head_dim, "K": shape.kv_heads * shape.head_dim,
            "I": shape.intermediate, "N": shape.heads, "1": 1}


def row_of(shape: ModelShape, values: Mapping[str, Any], moment: str) -> list[float] | None:
    """Bytes of each width; None where the moment is never the family's peak."""
    rows = table()
    return rows.get(shape.family, rows[UNLISTED])[mode_of(values)].get(moment)


def _bytes(shape: ModelShape, row: list[float] | None) -> float:
    found = widths(shape)
    return sum(each * found[name] for each, name in zip(row, WIDTHS, strict=True)) if row else 0.0


def adapted(shape: ModelShape, values: Mapping[str, Any]) -> list[LinearShape]:
    """The linear layers that get an adapter; an empty `lora.targets` means all."""
    names = values["lora.targets"]
    return [x for x in shape.linears if not names or x.name in names]


def layer_bytes_per_token(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """What autograd keeps of one layer for one token, as the table has it; with adapters also r fp32 numbers
    of each, less what adapters that are left out would keep of their inputs; with DoRA, which scales both,
    the outputs of layer and adapter.

    >>> from training.shapes import shape_from_config
    >>> small = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4,
    ...     "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096})
    >>> full = {"model.dtype": "float32", "lora.enabled": False, "deepspeed.stage": 0,
    ...     "dataset.context_tokens": 512}
    >>> layer_bytes_per_token(small, full)      # (6 x 256 + 4 x 256 + 4 x 704) x 4, 4 heads x 4, 8
    21528.0
    """
    kept = _bytes(shape, row_of(shape, values, "kept")) + _score_bytes(shape, values)
    if not values["lora.enabled"]:
        return kept
    targets = adapted(shape, values)
    ranks = 4.0 * int(values["lora.rank"]) * sum(x.count for x in targets) / shape.layers
    kept += ranks + _scaled_bytes(shape, targets, values)
    return kept - _copies(shape, list(shape.linears), values) + _copies(shape, targets, values)


def _scaled_bytes(shape: ModelShape, layers: list[LinearShape], values: Mapping[str, Any]) -> float:
    """DoRA's gradient of a magnitude needs the outputs of the frozen layer and of its fp32 adapter."""
    if not values.get("lora.dora"):
        return 0.0
    e = DTYPE_BYTES[str(values["model.dtype"])]
    return (e + 4.0) * sum(x.outputs * x.count for x in layers) / shape.layers


def _score_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """What grows with the square of the window, a token's share in one layer.

    Without a fused kernel: for each head and key the softmax's output in fp32, in 16 bits its cast too, and
    of capped scores the tanh. With one, in layers of a sliding window shorter than the sequence: the mask in
    the compute type, and keys and values once for each query head, since a mask switches grouping off.
    """
    if values.get("stream.chunk_tokens"):
        return 0.0
    length, e = int(values["dataset.context_tokens"]), DTYPE_BYTES[str(values["model.dtype"])]
    if values.get("model.attention") == "eager":
        return float(shape.heads * length * ((4 if e == 4 else 6) + e * (shape.family in CAPPED)))
    share = _windowed_share(shape, length)
    return share * (length * e + 2 * (shape.heads - shape.kv_heads) * shape.head_dim * e)


def _windowed_share(shape: ModelShape, length: int) -> float:
    """Share of the layers whose sliding window is shorter than the sequence."""
    return sum(0 < window < length for window in shape.windows) / shape.layers


def _square_work(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Beside what layers keep, a token's share of the mask itself, and without a fused kernel of the
    gradient of one layer's scores."""
    length, e = int(values["dataset.context_tokens"]), DTYPE_BYTES[str(values["model.dtype"])]
    if values.get("model.attention") == "eager":
        return float(length * (4 * shape.heads + e))
    return float(length) if _windowed_share(shape, length) else 0.0


def inner_bytes_per_token(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Of `layer_bytes_per_token`, what is kept inside the MLP."""
    row = row_of(shape, values, "kept") or []
    inner = row[WIDTHS.index("I")] * shape.intermediate
    if not values["lora.enabled"]:
        return inner
    inside = [x for x in adapted(shape, values) if x.name in family_of(shape).mlp]
    ranks = 4.0 * int(values["lora.rank"]) * sum(x.count for x in inside) / shape.layers
    entering = [x for x in inside if x.name != family_of(shape).mlp[-1]]
    return inner + ranks + _scaled_bytes(shape, inside, values) + _copies(shape, entering, values)


def _copies(shape: ModelShape, layers: list[LinearShape], values: Mapping[str, Any]) -> float:
    """Bytes a token that adapters keep of their inputs: each an fp32 copy, which in fp32 all that read one
    tensor share, and which attention's output needs none of."""
    if mode_of(values) == "lora16":
        return 4.0 * sum(x.inputs * x.count for x in layers) / shape.layers
    family, read = family_of(shape), dict[str, float]()
    for x in layers:
        if x.name == family.out and x.name not in family.mlp:
            continue
        role = x.name if x.name == family.mlp[-1] else "1" if x.name in family.qkv else "2"
        read[role] = 4.0 * x.inputs * x.count / shape.layers
    return sum(read.values())


def moments(shape: ModelShape, values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(kept, worked with) in bytes of all tokens at each moment that can be the peak: the loss, and the
    backward passes of the final norm, of the last layer's MLP and of the first layer's.

    With recomputation (Chen et al., arXiv:1604.06174) layers keep their input, and the last one, while its
    backward pass runs, all that it keeps; in fp32 its input is among that and counts once. Of
    training.kept_layers k the last k keep all that they do, and the moment of the last layer's MLP is that of
    the last recomputed layer where that is fuller. Of training.kept_inputs n inputs are alive until the loss,
    and n or n + 1 with the one of the layer whose gradient is computed (`griewank.inputs`). training.compile
    has no term: compiled layers of a Llama (hidden 256, 512 tokens, 2026-11) kept 14 % less with adapters and
    20 % less in full training, so this is more than they need.
    """
    tokens = worked_tokens(values)
    layer, state = layer_bytes_per_token(shape, values), shape.hidden * stream_element_bytes(values)
    rotary = 2 * shape.head_dim * DTYPE_BYTES[str(values["model.dtype"])] if shape.rope else 0
    work = {name: _bytes(shape, _without_constant(row_of(shape, values, name))) + rotary
            for name in ("mlp", "norm")}
    work["loss"] = rotary + shape.hidden * _final_bytes(values)
    work = {name: each + _square_work(shape, values) for name, each in work.items()}
    work["first"] = work["mlp"]
    shared = state if state == 4 * shape.hidden else 0
    whole, placed, alive = held(shape, values)
    if alive:
        again = layer + _again_bytes(shape, values) - shared
        until = placed * state + whole * layer
        kept = {"loss": until, "norm": until, "mlp": max(alive * state + again, until if whole else 0.0),
                "first": state + again}
    else:
        kept = {**dict.fromkeys(work, shape.layers * layer), "first": layer}
    return {name: (tokens * kept[name], tokens * each) for name, each in work.items()}


def worked_tokens(values: Mapping[str, Any]) -> int:
    """Tokens that a device works on at once: of each window, the share that parallel.ring leaves it."""
    ring = int(values.get("parallel.ring", 1))
    return -(-int(values["dataset.context_tokens"]) // ring) * int(values["training.micro_batch"])


def held(shape: ModelShape, values: Mapping[str, Any]) -> tuple[int, int, int]:
    """Layers that keep their activations; of the others the inputs that are kept until the loss, and those
    alive while the last of them is computed again. The latter are 0 when nothing is recomputed.

    >>> from training.shapes import shape_from_config
    >>> llama = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 32,
    ...     "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096})
    >>> on = {"training.checkpointing": True}
    >>> held(llama, on), held(llama, on | {"training.kept_inputs": 4}), held(llama, on | {
    ...     "training.kept_layers": 8})
    ((0, 32, 32), (0, 4, 5), (8, 24, 24))
    """
    if not values["training.checkpointing"]:
        return shape.layers, 0, 0
    slots = int(values.get("training.kept_inputs", 0))
    if 0 < slots < shape.layers:
        return 0, slots, griewank.inputs(shape.layers, slots)
    whole = min(int(values.get("training.kept_layers", 0)), shape.layers)
    return whole, shape.layers - whole, shape.layers - whole


def _again_bytes(shape: ModelShape, values: Mapping[str, Any]) -> float:
    """Of a layer that runs again above a frozen embedding, beside what it keeps: the gradient that waits for
    it, and in 16 bits its fp32 input. In a pass that keeps everything the first layer, which keeps no input
    of its first norm, makes up for them."""
    if not values["lora.enabled"]:
        return 0.0
    return shape.hidden * (4.0 if mode_of(values) == "lora32" else 8.0)


def _without_constant(row: list[float] | None) -> list[float] | None:
    """The constant of a peak is the rotary embedding of the tiny model that it was derived from."""
    return [*row[:-1], 0.0] if row else None


def _final_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of width H that stand beside the loss: the final norm's input in fp32, when it is trained its
    normalized value too, and the decoder's output."""
    out = 4 if mode_of(values) == "autocast16" else DTYPE_BYTES[str(values["model.dtype"])]
    return 4 + out + (0 if values["lora.enabled"] else 4)
