"""How each model family (`model_type`) builds a decoder layer, as data; read by `shapes` and `windows`.

What a config.json leaves out takes the default of the family's own config class in transformers 5.23, so
that default is part of the data. tests/test_shapes.py holds every row against transformers' modules, both
with the keys written out and with them left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which layers see a sliding window when the config does not list them in `layer_types`.

    `rule`: all | every (all but each `step`-th) | but_first (all but layers 0, step, 2 step...) | after
    (from `max_window_layers` on) | alternate (even layers below `max_window_layers`) | no_rope (layers
    without rotary embedding; chunked attention: those with it) | local (`attention_types`) | none.
    `pattern`: the key that replaces `step`. `switch`: the key that must be true. `listed`: whether the
    family reads `layer_types`. `size`: the key of the width.
    """

    rule: str
    step: int = 0
    pattern: str = ""
    switch: str = ""
    listed: bool = True
    size: str = "sliding_window"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP.

    `count`, `chosen`: config keys of the number of experts and of those a token passes through, first found
    first read. `width`: key of one expert's width. `layers`: which layers have experts: all | first (from
    `first_k_dense_replace` on) | step (`decoder_sparse_step`, `mlp_only_layers`) | types (`mlp_layer_types`;
    without it from layer `dense` on, or the key `first`) | span (`moe_layer_start_index` .. `end`) |
    interleave (`moe_layers`). `shared`: key of the shared experts' number; `shared_width`: key of their
    width, "" for `width`. `shared_mlp`: names of their linear layers. `router`: name of the router where it
    is an nn.Linear. `router_vectors`, `biases`: expert-long vectors beside the router; biases in experts.
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    chosen: tuple[str, ...] = ("num_experts_per_tok",)
    width: str = "moe_intermediate_size"
    layers: str = "all"
    dense: int = 0
    first: str = ""
    shared: str = ""
    shared_width: str = ""
    shared_mlp: tuple[str, ...] = GATED
    shared_gate: str = ""
    router: str = ""
    router_vectors: int = 0
    biases: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` builds a layer. Bias fields: True, False, or the config key that decides.

    `qkv` and `mlp` hold the linear layers' names (one qkv name: fused; two gated mlp names: gate and up
    fused). `norms`: H-wide norms in a layer, and how many more (or fewer) a true key makes (`norms_if`).
    `qk_norm`: "" | "head" (head_dim wide) | "full" (all heads wide), where the key `qk_norm_if` is true.
    `positions`: rows of a learned position table beyond the context, None without one. `rotary`: rotary
    embeddings. `kept`: MLP-wide tensors that autograd keeps of the activation (transformers writes gelu_new
    out: 4; fused: 1). `latent`: multi-head latent attention. `head_dim`: whether the family reads that
    key. `grouped`: key of the number of key-value heads, "" for as many as query heads. `mlp_width`: key of
    the MLP's width, "" for the usual ones; `mlp_multiple`: the width over H when that key is left out.
    `narrow`: key of the embeddings' width where it may differ from H. `extra`:
    other parameters of a layer: (component, a count or "heads" | "hidden" | "intermediate"). `renamed`: keys
    that are read under another name. `defaults`: what the config class takes for a key that is left out.
    """

    qkv: tuple[str, ...] = QKV
    out: str = "o_proj"
    mlp: tuple[str, ...] = GATED
    gated: bool = True
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    norms: int = 2
    norms_if: tuple[str, int] = ("", 0)
    norm_bias: bool = False
    final_norm: bool | str = True
    embedding_norm: bool = False
    qk_norm: str = ""
    qk_norm_if: str = ""
    positions: int | None = None
    rotary: bool = True
    tied: bool = False
    kept: int = 3
    latent: bool = False
    head_dim: bool = True
    grouped: str = "num_key_value_heads"
    mlp_width: str = ""
    mlp_multiple: int = 0
    narrow: str = ""
    extra: tuple[tuple[str, int | str], ...] = ()
    experts: Experts | None = None
    window: Window | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _like(base: Family, **changes: Any) -> Family:
    """A family like another; its defaults are added to the other's."""
    return replace(base, **{**changes, "defaults": {**base.defaults, **changes.get("defaults", {})}})


def _of(context: int, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    """The defaults that many families have: context, key-value heads, and others by name."""
    groups = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return {"max_position_embeddings": context, **groups, **more}


_ALL = Window(rule="all", listed=False)
_EVERY_2, _EVERY_4 = Window(rule="every", step=2), Window(rule="every", step=4)
_BUT_4TH = Window(rule="but_first", step=4)
_EVERY_4_OR = Window(rule="every", step=4, pattern="sliding_window_pattern")
_AFTER = Window(rule="after", switch="use_sliding_window")
_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", defaults=_of(2048))
_PLAIN = _like(_LLAMA, mlp_bias=False)                          # biases in attention only
_BARE = Family(defaults=_of(2048))                              # no biases
_UNGATED = Family(mlp=("up_proj", "down_proj"), gated=False, qkv_bias="attention_bias",
                  out_bias="attention_bias", mlp_bias="mlp_bias", kept=1, defaults=_of(4096))
_QWEN = _of(32768, 32, max_window_layers=28, sliding_window=4096)
_GEMMA = _like(_PLAIN, tied=True, defaults=_of(8192, 16, head_dim=256))
_GEMMA2 = _like(_GEMMA, norms=4, window=_EVERY_2, defaults=_of(8192, 4, sliding_window=4096))
_COHERE = _like(_PLAIN, norms=1, tied=True, defaults=_of(8192))
_OLD = Family(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norm_bias=True, head_dim=False,
              grouped="", mlp_width="(fixed)", mlp_multiple=4, kept=1, defaults=_of(2048))
_GPT2 = _like(_OLD, qkv=("c_attn",), out="c_proj", mlp=("c_fc", "c_proj"), positions=0, rotary=False,
              tied=True, kept=4, mlp_width="n_inner",
              defaults={"max_position_embeddings": None, "n_positions": 1024})
_GPTJ = _like(_OLD, out="out_proj", mlp=("fc_in", "fc_out"), qkv_bias=False, out_bias=False, head_bias=True,
              norms=1, kept=4, mlp_width="n_inner",
              defaults={"max_position_embeddings": None, "n_positions": 2048})
_FUSED = _like(_OLD, qkv=("query_key_value",), out="dense", mlp=("dense_h_to_4h", "dense_4h_to_h"))
_FAIRSEQ = _like(_OLD, out="out_proj", mlp=("fc1", "fc2"), rotary=False, tied=True)
_MIXTRAL = Experts(width="intermediate_size")
_SHARED_MLP = replace(_MIXTRAL, shared_width="shared_intermediate_size",
                      shared_mlp=("input_linear", "output_linear"))
_GROUPED = Experts(layers="first", shared="n_shared_experts")
_STEPS = Experts(layers="step")
_TWO_OF_8 = {"n_routed_experts": 8, "num_experts_per_tok": 2}
_SINKS = (("attention", "heads"),)
_LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
           "v_head_dim": 128}

# transformers 5.23 offers these no fused attention (SDPA): their plain step holds every score.
UNFUSED = frozenset({"bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "gptj", "granite_swa",
                     "granitemoe_swa", "mpt", "openai-gpt", "vaultgemma", "xglm"})

UNLISTED = _like(_LLAMA, experts=Experts(layers="step", shared="n_shared_experts"), window=None)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "arcee": _UNGATED,
    "internlm3": _like(_LLAMA, renamed={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
                       defaults=_of(32768, 2, head_dim=128)),
    "iquestcoder": _like(_LLAMA, defaults=_of(131072, 8, head_dim=128)),
    "cwm": _like(_BARE, mlp_bias="mlp_bias", window=_BUT_4TH,
                 defaults=_of(131072, 8, head_dim=128, sliding_window=8192)),
    "hyperclovax": _like(_LLAMA, norms_if=("use_post_norm", 2), defaults={"use_post_norm": True}),
    "mistral": _like(_BARE, window=_ALL, defaults=_of(131072, 8, sliding_window=4096)),
    "ministral": _like(_BARE, window=replace(_ALL, listed=True),
                       defaults=_of(131072, 8, sliding_window=4096)),
    "ministral3": _like(_BARE, window=_ALL, defaults=_of(262144, 8, head_dim=128)),
    "qwen2": _like(_BARE, qkv_bias=True, window=_AFTER, defaults=_QWEN),
    "qwen3": _like(_PLAIN, qk_norm="head", window=_AFTER, defaults={**_QWEN, "head_dim": 128}),
    "granite": _LLAMA,
    "granite_swa": _like(_LLAMA, tied=True, extra=_SINKS, window=_BUT_4TH,
                         defaults=_of(8192, 4, sliding_window=128)),
    "smollm3": _like(_LLAMA, tied=True, window=Window(rule="no_rope", switch="use_sliding_window"),
                     defaults=_of(32768, 4)),
    "seed_oss": _like(_LLAMA, out_bias="attention_out_bias",
                      defaults=_of(524288, 8, head_dim=128, attention_bias=True)),
    "ernie4_5": _like(_BARE, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", tied=True,
                      defaults=_of(131072, 2, head_dim=128)),
    "hunyuan_v1_dense": _like(_PLAIN, qk_norm="head"),
    "helium": _like(_LLAMA, out_bias=False, defaults=_of(4096, 20, head_dim=128)),
    "exaone4": _like(_BARE, qk_norm="head", defaults=_of(2048, 32, sliding_window=4096),
                     window=_EVERY_4_OR),
    "olmo": _like(_PLAIN, norms=0, final_norm=False),
    "olmo2": _like(_PLAIN, qk_norm="full"),
    "olmo3": _like(_PLAIN, qk_norm="full", window=_EVERY_4, defaults={"sliding_window": 4096}),
    "glm": _like(_BARE, mlp=("gate_up_proj", "down_proj"), qkv_bias="attention_bias",
                 defaults=_of(131072, 2, head_dim=128, attention_bias=True)),
    "glm4": _like(_BARE, mlp=("gate_up_proj", "down_proj"), qkv_bias="attention_bias", norms=4,
                  defaults=_of(131072, 2, head_dim=128, attention_bias=True)),
    "phi3": _like(_BARE, qkv=("qkv_proj",), mlp=("gate_up_proj", "down_proj"), window=_ALL,
                  defaults=_of(4096)),
    "nemotron": _like(_UNGATED, norm_bias=True),
    "apertus": _like(_UNGATED, mlp_bias=False, qk_norm="head", extra=(("mlp", 2),), kept=3,
                     defaults=_of(65536)),
    "jais2": _like(_UNGATED, norm_bias=True, defaults=_of(8192, attention_bias=True, mlp_bias=True)),
    "nanochat": _like(_PLAIN, mlp=("fc1", "fc2"), gated=False, norms=0, final_norm=False, kept=1),
    "bitnet": _like(_PLAIN, extra=(("norms", "hidden"), ("norms", "intermediate")), kept=4,
                    defaults=_of(2048, 5)),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "vaultgemma": _like(_GEMMA2, norms=2),
    "gemma3_text": _like(_GEMMA2, qk_norm="head", defaults={"max_position_embeddings": 131072},
                         window=Window(rule="every", step=6, pattern="sliding_window_pattern")),
    "cohere": _like(_COHERE, qk_norm="full", qk_norm_if="use_qk_norm"),
    "cohere2": _like(_COHERE, defaults={"sliding_window": 4096},
                     window=_EVERY_4_OR),
    "phi": _like(_BARE, out="dense", mlp=("fc1", "fc2"), gated=False, qkv_bias=True, out_bias=True,
                 mlp_bias=True, head_bias=True, norms=1, norm_bias=True, qk_norm="head",
                 qk_norm_if="qk_layernorm", kept=4),
    "starcoder2": _like(_BARE, mlp=("c_fc", "c_proj"), gated=False, qkv_bias="use_bias", out_bias="use_bias",
                        mlp_bias="use_bias", norm_bias=True, tied=True, kept=1, window=_ALL,
                        defaults=_of(4096, 2, use_bias=True)),
    "stablelm": _like(_BARE, qkv_bias="use_qkv_bias", norm_bias=True, norms_if=("use_parallel_residual", -1),
                      head_dim=False, qk_norm="full", qk_norm_if="qk_layernorm", defaults=_of(4096, 32)),
    "persimmon": _like(_FUSED, qk_norm="head", qk_norm_if="qk_layernorm", mlp_width="intermediate_size",
                       defaults=_of(16384, qk_layernorm=True)),
    "gpt2": _GPT2,
    "openai-gpt": _like(_GPT2, final_norm=False, mlp_width="(fixed)", defaults={"n_positions": 512}),
    "gpt_bigcode": _like(_GPT2, kept=1, grouped="multi_query", defaults={"multi_query": True}),
    "gpt_neo": _like(_GPT2, qkv=QKV, out="out_proj", qkv_bias=False, mlp_width="intermediate_size",
                     defaults=_of(2048, window_size=256),
                     window=Window(rule="local", listed=False, size="window_size")),
    "gpt_neox": _like(_FUSED, qkv_bias="attention_bias", out_bias="attention_bias",
                      mlp_width="intermediate_size", defaults={"attention_bias": True}),
    "gptj": _GPTJ,
    "codegen": _like(_GPTJ, qkv=("qkv_proj",)),
    "opt": _like(_FAIRSEQ, qkv_bias="enable_bias", out_bias="enable_bias", mlp_bias="enable_bias",
                 positions=2, mlp_width="ffn_dim", narrow="word_embed_proj_dim",
                 final_norm="do_layer_norm_before",
                 defaults={"enable_bias": True, "do_layer_norm_before": True, "ffn_dim": 3072}),
    "biogpt": _like(_FAIRSEQ, positions=2, mlp_width="intermediate_size", defaults=_of(1024)),
    "xglm": _like(_FAIRSEQ, mlp_width="ffn_dim", defaults={"ffn_dim": 4096}),
    "bloom": _like(_FUSED, rotary=False, tied=True, embedding_norm=True),
    "mpt": _like(_OLD, qkv=("Wqkv",), out="out_proj", mlp=("up_proj", "down_proj"), qkv_bias=False,
                 out_bias=False, mlp_bias=False, norm_bias=False, rotary=False, tied=True),
    "youtu": _like(_PLAIN, latent=True, tied=True, defaults=_of(131072, **_LATENT)),
    "minicpm3": _like(_LLAMA, latent=True, tied=True, defaults=_of(
        32768, kv_lora_rank=256, q_lora_rank=768, qk_nope_head_dim=64, qk_rope_head_dim=32)),
    "mixtral": _like(_BARE, experts=_MIXTRAL, window=_ALL,
                     defaults=_of(131072, 8, n_routed_experts=8, num_experts_per_tok=2)),
    "qwen2_moe": _like(_BARE, qkv_bias="qkv_bias", window=replace(_AFTER, rule="alternate"),
                       experts=replace(_STEPS, shared_width="shared_expert_intermediate_size",
                                       shared_gate="shared_expert_gate"),
                       defaults={**_QWEN, **_of(32768, 16, qkv_bias=True, n_routed_experts=60,
                                                num_experts_per_tok=4, moe_intermediate_size=1408,
                                                shared_expert_intermediate_size=5632)}),
    "qwen3_moe": _like(_PLAIN, qk_norm="head", experts=_STEPS,
                       window=replace(_ALL, switch="use_sliding_window"),
                       defaults=_of(32768, 4, sliding_window=4096, n_routed_experts=128,
                                    num_experts_per_tok=8, moe_intermediate_size=768)),
    "mellum": _like(_PLAIN, qk_norm="head", experts=Experts(layers="types"), window=Window(rule="none"),
                    defaults=_of(131072, 4, head_dim=128, sliding_window=1024, n_routed_experts=64,
                                 num_experts_per_tok=8, moe_intermediate_size=896)),
    "olmoe": _like(_PLAIN, qk_norm="full", experts=_MIXTRAL,
                   defaults=_of(4096, n_routed_experts=64, num_experts_per_tok=8)),
    "flex_olmo": _like(_PLAIN, qk_norm="full", experts=_MIXTRAL,
                       defaults=_of(4096, n_routed_experts=7, num_experts_per_tok=5)),
    "granitemoe": _like(_PLAIN, experts=_MIXTRAL, defaults=_TWO_OF_8),
    "granitemoe_swa": _like(_PLAIN, experts=_SHARED_MLP, extra=_SINKS, window=_BUT_4TH,
                            defaults={**_TWO_OF_8, "sliding_window": 128}),
    "granitemoeshared": _like(_PLAIN, experts=_SHARED_MLP, defaults=_TWO_OF_8),
    "phimoe": _like(_PLAIN, head_bias="lm_head_bias", norm_bias=True, window=_ALL,
                    experts=_MIXTRAL,
                    defaults=_of(131072, 8, n_routed_experts=16, num_experts_per_tok=2)),
    "glm4_moe": _like(_PLAIN, out_bias=False, qk_norm="head", qk_norm_if="use_qk_norm", experts=_GROUPED,
                      defaults=_of(131072, 8, n_routed_experts=128, num_experts_per_tok=8,
                                   moe_intermediate_size=1408, n_shared_experts=1, first_k_dense_replace=1)),
    "dots1": _like(_PLAIN, qk_norm="head", experts=_GROUPED, window=replace(_AFTER, switch=""),
                   defaults=_of(2048, 32, sliding_window=4096, max_window_layers=62,
                                moe_intermediate_size=1408)),
    "solar_open": _like(_PLAIN, out_bias=False, experts=replace(_GROUPED, layers="all"), mlp_multiple=4,
                        defaults=_of(131072, 8, head_dim=128, n_routed_experts=128, num_experts_per_tok=8,
                                     moe_intermediate_size=1280, n_shared_experts=1)),
    "hy_v3": _like(_LLAMA, qk_norm="head",
                   experts=Experts(layers="types", dense=1, shared="num_shared_experts"),
                   defaults=_of(131072, 8, head_dim=128, n_routed_experts=192, num_experts_per_tok=8,
                                moe_intermediate_size=1536, num_shared_experts=1)),
    "minimax_m2": _like(_BARE, qk_norm="full", experts=_MIXTRAL,
                        defaults=_of(196608, 8, head_dim=128, n_routed_experts=256, num_experts_per_tok=8)),
    "exaone_moe": _like(_BARE, qk_norm="head", window=_EVERY_4_OR,
                        experts=Experts(layers="types", first="first_k_dense_replace",
                                        shared="num_shared_experts"),
                        defaults=_of(2048, 32, first_k_dense_replace=1, sliding_window=4096,
                                     n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024,
                                     num_shared_experts=1)),
    "ernie4_5_moe": _like(_BARE, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias",
                          head_bias="use_bias", tied=True,
                          experts=Experts(count=("moe_num_experts", "num_experts"),
                                          chosen=("moe_k", "num_experts_per_tok"), layers="span",
                                          shared="moe_num_shared_experts", router_vectors=1),
                          defaults=_of(131072, 4, num_experts=64, num_experts_per_tok=6,
                                       moe_intermediate_size=1536, moe_num_shared_experts=2)),
    "hunyuan_v1_moe": _like(_PLAIN, qk_norm="head",
                            experts=replace(_MIXTRAL, chosen=("moe_topk", "num_experts_per_tok"), router="wg",
                                            shared_width="intermediate_size"),
                            defaults=_of(2048, n_routed_experts=1, num_experts_per_tok=1)),
    "gpt_oss": _like(_PLAIN, experts=replace(_MIXTRAL, router_vectors=1, biases=True), extra=_SINKS,
                     window=_EVERY_2,
                     defaults=_of(131072, 8, head_dim=64, attention_bias=True, sliding_window=128,
                                  n_routed_experts=128, num_experts_per_tok=4)),
    "llama4_text": _like(_PLAIN, mlp_width="intermediate_size_mlp", window=Window(
        rule="no_rope", size="attention_chunk_size"),
                         experts=replace(_MIXTRAL, layers="interleave",
                                         shared_width="intermediate_size"),
                         defaults=_of(131072, 8, head_dim=128, attention_chunk_size=8192,
                                      intermediate_size_mlp=16384, n_routed_experts=16,
                                      num_experts_per_tok=1)),
    "deepseek_v2": _like(_LLAMA, latent=True, experts=_GROUPED,
                         defaults={**_LATENT, "n_routed_experts": 64, "moe_intermediate_size": 1407,
                                   "n_shared_experts": 2}),
    "deepseek_v3": _like(_PLAIN, latent=True, experts=_GROUPED,
                         defaults=_of(4096, **_LATENT, n_routed_experts=256, num_experts_per_tok=8,
                                      moe_intermediate_size=2048, n_shared_experts=1,
                                      first_k_dense_replace=3)),
    "glm4_moe_lite": _like(_PLAIN, latent=True,
                           experts=Experts(layers="types", dense=1, shared="n_shared_experts"),
                           defaults=_of(202752, **{**_LATENT, "q_lora_rank": 768, "qk_nope_head_dim": 192,
                                                   "v_head_dim": 256}, n_routed_experts=64,
                                        num_experts_per_tok=4, moe_intermediate_size=1536,
                                        n_shared_experts=1)),
}
