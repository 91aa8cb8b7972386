"""ModelShape from any Hugging Face config.json, by arithmetic alone: no torch, no weights.

A decoder is an embedding, `layers` times (attention, MLP, norms), a final norm and a head. What differs
between model families is data (`FAMILIES`); a family that is not listed is counted as a Llama and the
shape's note says so. Checked against transformers' own modules in tests/test_shapes.py, parameter for
parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.errors import DataError
from training.records import LinearShape, ModelShape

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` builds a layer. Bias fields: True, False, or the config key that decides.

    `qkv` and `mlp` hold the linear layers' names (one qkv name: fused; two gated mlp names: gate and up
    fused). `norms`: H-wide norms in a layer. `qk_norm`: "" | "head" (head_dim wide) | "full" (all heads
    wide). `positions`: rows of a learned position table beyond the context, None for rotary embeddings.
    `kept`: MLP-wide tensors that autograd keeps of the activation (transformers writes gelu_new out: 4;
    fused: 1).
    """

    qkv: tuple[str, ...] = QKV
    out: str = "o_proj"
    mlp: tuple[str, ...] = GATED
    gated: bool = True
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    final_norm: bool = True
    qk_norm: str = ""
    positions: int | None = None
    tied: bool = False
    kept: int = 3


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GEMMA = replace(_LLAMA, mlp_bias=False, tied=True)
_GPT2 = Family(qkv=("c_attn",), out="c_proj", mlp=("c_fc", "c_proj"), gated=False, qkv_bias=True,
               out_bias=True, mlp_bias=True, norm_bias=True, positions=0, tied=True, kept=4)
_GPTJ = Family(out="out_proj", mlp=("fc_in", "fc_out"), gated=False, mlp_bias=True, head_bias=True, norms=1,
               norm_bias=True, kept=4)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(),
    "mixtral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias="qkv_bias"),
    "qwen3": replace(_LLAMA, mlp_bias=False, qk_norm="head"),
    "qwen3_moe": replace(_LLAMA, mlp_bias=False, qk_norm="head"),
    "granite": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "seed_oss": replace(_LLAMA, out_bias="attention_out_bias"),
    "olmo": replace(_LLAMA, mlp_bias=False, norms=0, final_norm=False),
    "olmo2": replace(_LLAMA, mlp_bias=False, qk_norm="full"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4),
    "gemma3_text": replace(_GEMMA, norms=4, qk_norm="head"),
    "cohere": replace(_GEMMA, norms=1),
    "phi": Family(out="dense", mlp=("fc1", "fc2"), gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
                  head_bias=True, norms=1, norm_bias=True, kept=4),
    "phi3": Family(qkv=("qkv_proj",), mlp=("gate_up_proj", "down_proj")),
    "starcoder2": Family(mlp=("c_fc", "c_proj"), gated=False, qkv_bias="use_bias", out_bias="use_bias",
                         mlp_bias="use_bias", norm_bias=True, tied=True, kept=1),
    "stablelm": Family(qkv_bias="use_qkv_bias", norm_bias=True),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, kept=1),
    "gpt_neox": Family(qkv=("query_key_value",), out="dense", mlp=("dense_h_to_4h", "dense_4h_to_h"),
                       gated=False, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True,
                       norm_bias=True, kept=1),
    "gptj": _GPTJ,
    "codegen": replace(_GPTJ, qkv=("qkv_proj",)),
    "opt": Family(out="out_proj", mlp=("fc1", "fc2"), gated=False, qkv_bias=True, out_bias=True,
                  mlp_bias=True, norm_bias=True, positions=2, tied=True, kept=1),
    "deepseek_v2": replace(_LLAMA, qkv_bias=False),
}
# Config keys that default to true in transformers when the file leaves them out.
_TRUE_BY_DEFAULT = {("starcoder2", "use_bias"), ("qwen2_moe", "qkv_bias"), ("gpt_neox", "attention_bias"),
                    ("seed_oss", "attention_bias")}
_NO_GROUPS = ("gpt2", "gpt_neox", "gptj", "codegen", "opt")  # read no num_key_value_heads
_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts"),
}


def family_of(shape: ModelShape) -> Family:
    """How the shape's family builds a layer; an unlisted one as Llama does."""
    return FAMILIES.get(shape.family, _LLAMA)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The integers of one config under one name each."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    tied: bool


@dataclass(frozen=True)
class _Linear:
    """One linear layer kind: `count` in the whole model; `part` is attention or mlp."""

    part: str
    name: str
    inputs: int
    outputs: int
    bias: bool
    count: int


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The sizes and parameter counts of the causal LM a config.json describes.

    Raises DataError naming the key when a size is missing or not a positive whole number.

    >>> tiny = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...         "intermediate_size": 16, "vocab_size": 10, "tie_word_embeddings": True}
    >>> shape_from_config(tiny).parameters["mlp"]      # 3 matrices of 8 x 16
    384
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "vocab_size" in inner:
        config = inner
    name = str(config.get("model_type", ""))
    family = FAMILIES.get(name, _LLAMA)
    sizes = _sizes(config, name, family)
    dense, experts, router, active_width = _mlp(config, family, sizes)
    linears = _attention(config, family, sizes) + dense
    parts = _parts(config, family, sizes, linears)
    parts |= {key: value for key, value in (("experts", experts), ("router", router)) if value}
    used = _active(config, experts)
    return ModelShape(
        family=name or "unknown", hidden=sizes.hidden, layers=sizes.layers, heads=sizes.heads,
        kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, intermediate=active_width, vocab=sizes.vocab,
        native_context=sizes.context, rope=family.positions is None, tied=sizes.tied, parameters=parts,
        active_parameters=sum(parts.values()) - experts + used,
        linears=tuple(LinearShape(name=x.name, inputs=x.inputs, outputs=x.outputs, count=x.count)
                      for x in linears if x.count), rope_scaled=_rope_scaled(config),
        note="" if name in FAMILIES else f"model_type {name or '(none)'} is not listed; counted as a Llama.")


def _sizes(config: Mapping[str, Any], name: str, family: Family) -> _Sizes:
    hidden, heads = _size(config, "hidden"), _size(config, "heads")
    kv_heads = _kv_heads(config, name, heads)
    head_dim = _whole(config, "head_dim", default=hidden // heads)
    if name == "deepseek_v2":
        head_dim = _whole(config, "qk_nope_head_dim") + _whole(config, "qk_rope_head_dim")
    context = _size(config, "context", default=2048)
    return _Sizes(family=name, hidden=hidden, layers=_size(config, "layers"), heads=heads, kv_heads=kv_heads,
                  head_dim=head_dim, intermediate=_size(config, "intermediate", default=4 * hidden),
                  vocab=_whole(config, "vocab_size"), context=context,
                  tied=bool(config.get("tie_word_embeddings", family.tied)))


def _kv_heads(config: Mapping[str, Any], name: str, heads: int) -> int:
    if name == "gpt_bigcode":
        return 1 if config.get("multi_query", True) else heads
    if name in _NO_GROUPS:
        return heads
    return _whole(config, "num_key_value_heads", default=heads)


def _rope_scaled(config: Mapping[str, Any]) -> bool:
    """Whether the rotary embedding is stretched already, so that YaRN cannot be set on top."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        return False
    return bool(scaling.get("rope_type", scaling.get("type", "default")) != "default")


def _size(config: Mapping[str, Any], what: str, default: int | None = None) -> int:
    for key in _ALIASES[what]:
        if config.get(key) is not None:
            return _whole(config, key)
    if default is None:
        raise DataError(f"config.json has no {_ALIASES[what][0]}; ELITE tunes decoder-only language models.")
    return default


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"config.json has {key} = {value!r}; it must be a whole number of at least 1.")
    return value


def _flag(config: Mapping[str, Any], family: str, rule: bool | str) -> bool:
    if isinstance(rule, bool):
        return rule
    return bool(config.get(rule, (family, rule) in _TRUE_BY_DEFAULT))


def _attention(config: Mapping[str, Any], family: Family, sizes: _Sizes) -> list[_Linear]:
    if sizes.family == "deepseek_v2":
        return _latent_attention(config, sizes)
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    bias = _flag(config, sizes.family, family.qkv_bias)
    outs = (width, kv_width, kv_width) if len(family.qkv) == 3 else (width + 2 * kv_width,)
    rows = [_Linear("attention", name, sizes.hidden, out, bias, sizes.layers)
            for name, out in zip(family.qkv, outs, strict=True)]
    out_bias = _flag(config, sizes.family, family.out_bias)
    return [*rows, _Linear("attention", family.out, width, sizes.hidden, out_bias, sizes.layers)]


def _latent_attention(config: Mapping[str, Any], sizes: _Sizes) -> list[_Linear]:
    """DeepSeek-V2's multi-head latent attention (arXiv:2405.04434, section 2.1): K and V through a low
    rank."""
    rank, rotary = _whole(config, "kv_lora_rank"), _whole(config, "qk_rope_head_dim")
    nope, value = _whole(config, "qk_nope_head_dim"), _whole(config, "v_head_dim")
    bias, query_rank = bool(config.get("attention_bias", False)), config.get("q_lora_rank")
    width, count = sizes.heads * (nope + rotary), sizes.layers
    if query_rank:
        query = [_Linear("attention", "q_a_proj", sizes.hidden, query_rank, bias, count),
                 _Linear("attention", "q_b_proj", query_rank, width, False, count)]
    else:
        query = [_Linear("attention", "q_proj", sizes.hidden, width, False, count)]
    return [*query,
            _Linear("attention", "kv_a_proj_with_mqa", sizes.hidden, rank + rotary, bias, count),
            _Linear("attention", "kv_b_proj", rank, sizes.heads * (nope + value), False, count),
            _Linear("attention", "o_proj", sizes.heads * value, sizes.hidden, bias, count)]


def _mlp(config: Mapping[str, Any], family: Family, sizes: _Sizes) -> tuple[list[_Linear], int, int, int]:
    """Dense MLP layers, expert weights, router weights, and the width one token passes through."""
    experts = next((int(config[k]) for k in _ALIASES["experts"] if config.get(k)), 0)
    sparse = _sparse_layers(config, sizes.layers) if experts else 0
    bias = _flag(config, sizes.family, family.mlp_bias)
    rows = _mlp_rows(family, sizes.hidden, sizes.intermediate, bias, sizes.layers - sparse)
    if not sparse:
        return rows, 0, 0, sizes.intermediate
    width = _whole(config, "moe_intermediate_size", default=sizes.intermediate)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared = shared or width * int(config.get("n_shared_experts") or 0)
    if sizes.family == "qwen2_moe":
        rows.append(_Linear("mlp", "shared_expert_gate", sizes.hidden, 1, False, sparse))
    rows += _mlp_rows(family, sizes.hidden, shared, bias, sparse) if shared else []
    matrices = 3 if family.gated else 2
    expert_weights = sparse * experts * matrices * sizes.hidden * width
    return rows, expert_weights, sparse * experts * sizes.hidden, _top_k(config) * width + shared


def _mlp_rows(family: Family, hidden: int, width: int, bias: bool, count: int) -> list[_Linear]:
    if family.gated and len(family.mlp) == 2:
        shapes: tuple[tuple[int, int], ...] = ((hidden, 2 * width), (width, hidden))
    elif family.gated:
        shapes = ((hidden, width), (hidden, width), (width, hidden))
    else:
        shapes = ((hidden, width), (width, hidden))
    return [_Linear("mlp", name, i, o, bias, count) for name, (i, o) in zip(family.mlp, shapes, strict=True)]


def _sparse_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers with experts: not the first dense ones, not those in `mlp_only_layers`, every
    `decoder_sparse_step`-th."""
    only_dense = set(config.get("mlp_only_layers") or ())
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
    return sum(1 for i in range(layers) if i >= first and i not in only_dense and (i + 1) % step == 0)


def _top_k(config: Mapping[str, Any]) -> int:
    return int(config.get("num_experts_per_tok") or config.get("moe_topk") or 1)


def _active(config: Mapping[str, Any], experts: int) -> int:
    """Expert weights that compute for one token."""
    number = next((int(config[k]) for k in _ALIASES["experts"] if config.get(k)), 1)
    return experts * min(_top_k(config), number) // number


def _parts(config: Mapping[str, Any], family: Family, sizes: _Sizes,
           linears: list[_Linear]) -> dict[str, int]:
    parts = {"embeddings": sizes.vocab * sizes.hidden}
    if family.positions is not None:
        parts["positions"] = (sizes.context + family.positions) * sizes.hidden
    for part in ("attention", "mlp"):
        parts[part] = sum(x.inputs * x.outputs * x.count for x in linears if x.part == part)
    biases = sum(x.outputs * x.count for x in linears if x.bias)
    parts["norms"] = _norms(config, family, sizes)
    if not sizes.tied:
        parts["head"] = sizes.vocab * sizes.hidden
    if family.head_bias:
        biases += sizes.vocab
    return {**parts, "biases": biases} if biases else parts


def _norms(config: Mapping[str, Any], family: Family, sizes: _Sizes) -> int:
    per_layer = family.norms
    if config.get("use_parallel_residual") and sizes.family == "stablelm":
        per_layer = 1
    vectors = (per_layer * sizes.layers + family.final_norm) * sizes.hidden * (2 if family.norm_bias else 1)
    if family.qk_norm == "head":
        vectors += 2 * sizes.head_dim * sizes.layers
    if family.qk_norm == "full":
        vectors += (sizes.heads + sizes.kv_heads) * sizes.head_dim * sizes.layers
    if sizes.family == "deepseek_v2":
        vectors += (_whole(config, "kv_lora_rank") + int(config.get("q_lora_rank") or 0)) * sizes.layers
    return vectors


def lora_parameters(shape: ModelShape, targets: tuple[str, ...], rank: int) -> int:
    """Weights of a LoRA adapter: rank x (inputs + outputs) for each adapted layer (arXiv:2106.09685,
    section 4.1).

    >>> shape = shape_from_config({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
    ...     "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10})
    >>> lora_parameters(shape, ("q_proj", "down_proj"), rank=2)      # 2 x (8 + 8) + 2 x (16 + 8)
    80
    """
    return sum(rank * (x.inputs + x.outputs) * x.count for x in shape.linears if x.name in targets)


def frozen_bytes(shape: ModelShape, quantization: str, element_bytes: int, double_quant: bool = True) -> int:
    """Bytes of frozen weights on a device.

    `nf4` (bitsandbytes, arXiv:2305.14314, section 3) stores each linear layer outside the head in 4 bits
    plus one fp32 constant for 64 weights; double quantization keeps that constant in 8 bits plus one fp32
    for 256 of them: 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight. Embeddings, head, norms, biases and
    experts (transformers keeps them in fused parameters that bitsandbytes does not touch) stay at
    `element_bytes`.

    >>> linear = shape_from_config({"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 1,
    ...     "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 1})
    >>> frozen_bytes(linear, "nf4", 2) - frozen_bytes(linear, "nf4", 0)    # embedding, head, 3 norms
    40960
    >>> round(8 * frozen_bytes(linear, "nf4", 0) / (4 * 4096 * 4096 + 3 * 4096 * 11008), 3)
    4.127
    """
    total = shape.total_parameters
    if quantization != "nf4":
        return total * element_bytes
    packed = sum(x.inputs * x.outputs * x.count for x in shape.linears)
    bits = 4 + (8 / 64 + 32 / (64 * 256) if double_quant else 32 / 64)
    return int(packed * bits / 8) + (total - packed) * element_bytes
