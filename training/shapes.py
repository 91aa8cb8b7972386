"""ModelShape from any Hugging Face config.json, by arithmetic alone: no torch, no weights.

A decoder is an embedding, `layers` times (attention, MLP, norms), a final norm and a head. What differs
between model families is data (`families`); a family that is not listed is counted as a Llama and the
shape's note says so. Checked against transformers' own modules in tests/test_shapes.py, parameter for
parameter and component for component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import DataError
from training.families import FAMILIES, UNLISTED, Experts, Family
from training.records import LinearShape, ModelShape
from training.windows import windows_of

_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "attention_heads", "n_heads"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim"),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"),
}
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Linear layers that no adapter helps: they choose experts or widen embeddings.
NOT_ADAPTED = frozenset({"shared_expert_gate", "wg", "project_in", "project_out"})


def family_of(shape: ModelShape) -> Family:
    """How the shape's family builds a layer; an unlisted one as Llama does."""
    return FAMILIES.get(shape.family, UNLISTED)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The integers of one config under one name each. `embedded`: width of the embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    embedded: int
    tied: bool


@dataclass(frozen=True)
class _Linear:
    """One linear layer kind: `count` in the whole model; `part` is the component it belongs to."""

    part: str
    name: str
    inputs: int
    outputs: int
    bias: bool
    count: int


@dataclass(frozen=True, kw_only=True)
class _Mixture:
    """Experts of one config: `layers` with them, of `number` each `width` wide, `chosen` by a token.

    `shared`: width of the experts every token passes through.
    """

    layers: int = 0
    number: int = 0
    chosen: int = 0
    width: int = 0
    shared: int = 0


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The sizes and parameter counts of the causal LM a config.json describes.

    `parameters` by component: embeddings, positions, attention, mlp, router, experts, norms, head (unless
    tied) and biases (of linear layers; the norms' own are norms). `active_parameters`: all of them, of the
    experts chosen / number (what one token passes through). Raises DataError naming the key when a size is
    missing or not a positive whole number.

    >>> tiny = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...         "intermediate_size": 16, "vocab_size": 10, "tie_word_embeddings": True}
    >>> shape_from_config(tiny).parameters["mlp"]      # 3 matrices of 8 x 16
    384
    """
    config, whole = _text_part(config)
    name = str(config.get("model_type", ""))
    family = FAMILIES.get(name, UNLISTED)
    renamed = {family.renamed.get(key, key): value for key, value in config.items()}
    config = {**family.defaults, **renamed}
    sizes = _sizes(config, family)
    mixture = _mixture(config, family.experts, sizes) if family.experts else _Mixture()
    linears = _projections(sizes) + _attention(config, family, sizes) + _mlp(config, family, sizes, mixture)
    parts = _parts(config, family, sizes, linears, mixture)
    idle = 1 - mixture.chosen / mixture.number if mixture.number else 0
    through = mixture.chosen * mixture.width + mixture.shared
    return ModelShape(
        family=name or "unknown", hidden=sizes.hidden, layers=sizes.layers, heads=sizes.heads,
        kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, vocab=sizes.vocab, tied=sizes.tied,
        intermediate=through if mixture.layers else sizes.intermediate,
        native_context=sizes.context, rope=family.rotary, parameters=parts,
        active_parameters=sum(parts.values()) - round(idle * parts.get("experts", 0)),
        linears=tuple(LinearShape(name=x.name, inputs=x.inputs, outputs=x.outputs, count=x.count)
                      for x in linears), rope_scaled=_rope_scaled(config),
        note=_note(config, name, whole), windows=windows_of(config, family.window, sizes.layers))


def _text_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The text model's config, and the model_type of the whole where that is another."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "vocab_size" in inner:
        return inner, str(config.get("model_type", "(none)"))
    return config, ""


def _note(config: Mapping[str, Any], name: str, whole: str) -> str:
    """What the count leaves open; empty for a listed family of attention layers alone."""
    other = sorted({str(kind) for kind in config.get("layer_types") or ()} - ATTENTION)
    said = [f"Only the text part of {whole} is counted."] if whole else []
    if other:
        said.append(f"Layers of the kind {', '.join(other)} are counted as attention.")
    if name not in FAMILIES:
        said.append(f"model_type {name or '(none)'} is not listed; counted as a Llama.")
    return " ".join(said)


def _sizes(config: Mapping[str, Any], family: Family) -> _Sizes:
    hidden, heads = _size(config, "hidden"), _size(config, "heads")
    head_dim = hidden // heads
    if family.latent:
        head_dim = _whole(config, "qk_nope_head_dim") + _whole(config, "qk_rope_head_dim")
    elif family.head_dim:
        head_dim = _whole(config, "head_dim", default=head_dim)
    return _Sizes(hidden=hidden, layers=_size(config, "layers"), heads=heads, head_dim=head_dim,
                  kv_heads=_kv_heads(config, family, heads),
                  intermediate=_intermediate(config, family, hidden),
                  vocab=_whole(config, "vocab_size"), context=_size(config, "context", default=2048),
                  embedded=_whole(config, family.narrow, default=hidden),
                  tied=bool(config.get("tie_word_embeddings", family.tied)))


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    if family.grouped == "multi_query":                                    # gpt_bigcode: one for all, or each
        return 1 if config.get("multi_query") else heads
    return _whole(config, family.grouped, default=heads)


def _intermediate(config: Mapping[str, Any], family: Family, hidden: int) -> int:
    """The dense MLP's width; families of before 2022 take a multiple of H when the file gives none."""
    default = family.mlp_multiple * hidden or None
    if family.mlp_width:
        return _whole(config, family.mlp_width, default=default)
    return _size(config, "intermediate", default=default)


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


def _flag(config: Mapping[str, Any], rule: bool | str) -> bool:
    return rule if isinstance(rule, bool) else bool(config.get(rule))


def _projections(sizes: _Sizes) -> list[_Linear]:
    """OPT's layers between narrower embeddings and the stack."""
    if sizes.embedded == sizes.hidden:
        return []
    return [_Linear("embeddings", "project_in", sizes.embedded, sizes.hidden, False, 1),
            _Linear("embeddings", "project_out", sizes.hidden, sizes.embedded, False, 1)]


def _attention(config: Mapping[str, Any], family: Family, sizes: _Sizes) -> list[_Linear]:
    if family.latent:
        return _latent_attention(config, sizes)
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    bias = _flag(config, family.qkv_bias)
    outs = (width, kv_width, kv_width) if len(family.qkv) == 3 else (width + 2 * kv_width,)
    rows = [_Linear("attention", name, sizes.hidden, out, bias, sizes.layers)
            for name, out in zip(family.qkv, outs, strict=True)]
    out_bias = _flag(config, family.out_bias)
    return [*rows, _Linear("attention", family.out, width, sizes.hidden, out_bias, sizes.layers)]


def _latent_attention(config: Mapping[str, Any], sizes: _Sizes) -> list[_Linear]:
    """DeepSeek-V2's multi-head latent attention (arXiv:2405.04434, section 2.1): K and V through a low
    rank."""
    rank, rotary = _whole(config, "kv_lora_rank"), _whole(config, "qk_rope_head_dim")
    nope = _whole(config, "qk_nope_head_dim")
    value = _whole(config, "v_head_dim", default=sizes.hidden // sizes.heads)
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


def _mixture(config: Mapping[str, Any], experts: Experts, sizes: _Sizes) -> _Mixture:
    number = next((int(config[key]) for key in experts.count if config.get(key)), 0)
    layers = _sparse_layers(config, experts, sizes.layers) if number else 0
    if not layers:
        return _Mixture()
    width = _whole(config, experts.width, default=sizes.intermediate)
    shared = int(config.get(experts.shared_width) or 0) if experts.shared_width else width
    if experts.shared:
        shared *= int(config.get(experts.shared) or 0)
    elif not experts.shared_width:
        shared = 0
    chosen = next((config[key] for key in experts.chosen if config.get(key)), 1)
    chosen = max(chosen) if isinstance(chosen, list) else int(chosen)      # hunyuan_v1_moe: one per layer
    return _Mixture(layers=layers, number=number, chosen=min(chosen, number), width=width, shared=shared)


def _sparse_layers(config: Mapping[str, Any], experts: Experts, layers: int) -> int:
    """How many layers have experts, by the family's rule."""
    if experts.layers == "first":
        return max(layers - int(config.get("first_k_dense_replace") or 0), 0)
    if experts.layers == "step":
        dense, step = set(config.get("mlp_only_layers") or ()), int(config.get("decoder_sparse_step") or 1)
        return sum(1 for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if experts.layers == "types":
        listed = config.get("mlp_layer_types")
        first = config.get(experts.first, experts.dense)
        return listed.count("sparse") if listed else max(layers - int(first), 0)
    if experts.layers == "span":
        last, step = config.get("moe_layer_end_index", 27), int(config.get("moe_layer_interval") or 1)
        span = range(config.get("moe_layer_start_index", 1), layers if last == -1 else min(last + 1, layers))
        return sum(1 for i in span if (i + 1) % step == 0)
    if experts.layers == "interleave":
        step = int(config.get("interleave_moe_layer_step") or 1)
        return len(config.get("moe_layers") or range(step - 1, layers, step))
    return layers


def _mlp(config: Mapping[str, Any], family: Family, sizes: _Sizes, mixture: _Mixture) -> list[_Linear]:
    """Dense MLPs, shared experts, and routers that are linear layers."""
    bias, dense = _flag(config, family.mlp_bias), sizes.layers - mixture.layers
    rows = _mlp_rows(family.mlp, family.gated, sizes.hidden, sizes.intermediate, bias, dense)
    if not mixture.layers or family.experts is None:
        return rows
    experts, count = family.experts, mixture.layers
    for name, part in ((experts.shared_gate, "mlp"), (experts.router, "router")):
        outputs = mixture.number if part == "router" else 1
        rows += [_Linear(part, name, sizes.hidden, outputs, False, count)] if name else []
    if mixture.shared:
        rows += _mlp_rows(experts.shared_mlp, True, sizes.hidden, mixture.shared, bias, count)
    return rows


def _mlp_rows(names: tuple[str, ...], gated: bool, hidden: int, width: int, bias: bool,
              count: int) -> list[_Linear]:
    """Linear layers of `count` MLPs; two names of a gated one: gate and up are one layer."""
    if not count:
        return []
    into = (2 * width,) if gated and len(names) == 2 else (width,) * (len(names) - 1)
    rows = [_Linear("mlp", name, hidden, out, bias, count) for name, out in zip(names, into, strict=False)]
    return [*rows, _Linear("mlp", names[-1], width, hidden, bias, count)]


def _parts(config: Mapping[str, Any], family: Family, sizes: _Sizes, linears: list[_Linear],
           mixture: _Mixture) -> dict[str, int]:
    parts = {"embeddings": sizes.vocab * sizes.embedded}
    if family.positions is not None:
        parts["positions"] = (sizes.context + family.positions) * sizes.hidden
    parts |= {"attention": 0, "mlp": 0, **_expert_parts(family, sizes, mixture)}
    parts["norms"] = _norms(config, family, sizes)
    for x in linears:
        parts[x.part] = parts.get(x.part, 0) + x.inputs * x.outputs * x.count
    for part, size in family.extra:
        parts[part] += sizes.layers * (size if isinstance(size, int) else getattr(sizes, size))
    if not sizes.tied:
        parts["head"] = sizes.vocab * sizes.embedded
    biases = sum(x.outputs * x.count for x in linears if x.bias)
    biases += sizes.vocab if _flag(config, family.head_bias) else 0
    return {**parts, "biases": biases} if biases else parts


def _expert_parts(family: Family, sizes: _Sizes, mixture: _Mixture) -> dict[str, int]:
    """Experts (fused parameters in transformers, not linear layers) and routers that are parameters."""
    if not mixture.layers or family.experts is None:
        return {}
    per_layer = mixture.number * mixture.layers
    matrices, rows = (3, 2) if family.gated else (2, 1)
    weights = matrices * sizes.hidden * mixture.width
    biases = rows * mixture.width + sizes.hidden if family.experts.biases else 0
    router = 0 if family.experts.router else sizes.hidden
    return {"experts": per_layer * (weights + biases),
            "router": per_layer * (router + family.experts.router_vectors)}


def _norms(config: Mapping[str, Any], family: Family, sizes: _Sizes) -> int:
    """Weights (and biases) of all norms."""
    each = 2 if family.norm_bias else 1
    key, more = family.norms_if
    count = (family.norms + (more if config.get(key) else 0)) * sizes.layers + family.embedding_norm
    vectors = (count + _flag(config, family.final_norm)) * sizes.hidden * each
    if not family.qk_norm_if or config.get(family.qk_norm_if):
        if family.qk_norm == "head":
            vectors += 2 * sizes.head_dim * sizes.layers * each
        if family.qk_norm == "full":
            vectors += (sizes.heads + sizes.kv_heads) * sizes.head_dim * sizes.layers
    if family.latent:
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
