"""Tiny random models of many families, and the reference that a streamed step is held against.

The reference is the model's own eager forward and backward. Weights are large enough for soft-caps, scales
and biases to matter. Float64, except where Transformers multiplies experts in a kernel that has no float64.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from training.longcontext import StreamedStep, StreamPolicy

transformers.logging.set_verbosity_error()
VOCABULARY = 131
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0}
GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 128, "resid_pdrop": 0.0,
              "attn_pdrop": 0.0, "embd_pdrop": 0.0, "vocab_size": VOCABULARY, "bos_token_id": 1,
              "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {"head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


class Family(NamedTuple):
    """A family's classes (by default `<name>ForCausalLM`, `<name>Config`) and what its config needs."""

    changes: dict
    model: str = ""
    config: str = ""
    dtype: torch.dtype = torch.float64
    sizes: dict = SIZES
    training: bool = True


def moe(**changes) -> Family:
    """A family with experts."""
    return Family({**EXPERTS, **changes}, dtype=torch.float32)


DENSE = {
    "Llama": Family({"attention_bias": True, "mlp_bias": True}),
    "Mistral": Family({"sliding_window": 7}),
    "Ministral": Family({"sliding_window": 7, "layer_types": SLIDING}),
    "Qwen2": Family({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": Family({}),
    "Phi": Family({"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "Phi3": Family({"sliding_window": 9}),
    "Gemma": Family({"num_key_value_heads": 1}),
    "Gemma2": Family({"sliding_window": 7, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
                      "query_pre_attn_scalar": 11}),
    "Gemma3": Family({"sliding_window": 7, "layer_types": SLIDING, "query_pre_attn_scalar": 11,
                      "rope_parameters": {"sliding_attention": ROPE,
                                          "full_attention": {**ROPE, "rope_theta": 1e6}}},
                     config="Gemma3TextConfig"),
    "VaultGemma": Family({"sliding_window": 7}),
    "Starcoder2": Family({"sliding_window": 7, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "Granite": Family({"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7,
                       "logits_scaling": 3.0}),
    "Olmo": Family({"clip_qkv": 0.8}),
    "Olmo2": Family({}),
    "Olmo3": Family({"sliding_window": 7, "layer_types": SLIDING}),
    "SmolLM3": Family({"no_rope_layers": [1, 0, 1]}),
    "StableLm": Family({"use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5,
                        "hidden_dropout": 0.0}),
    "Glm": Family({"partial_rotary_factor": 0.5}),
    "Glm4": Family({"partial_rotary_factor": 0.5}),
    "SeedOss": Family({"residual_dropout": 0.0, "attention_bias": True}),
    "Exaone4": Family({"sliding_window": 7, "layer_types": SLIDING}),
    "Nemotron": Family({"partial_rotary_factor": 0.5, "hidden_dropout": 0.0}),
    "HunYuanDenseV1": Family({}),
    "Cohere": Family({"logit_scale": 0.5, "use_qk_norm": True}),
    "Cohere2": Family({"logit_scale": 0.5, "sliding_window": 7, "layer_types": SLIDING}),
    "GPTNeoX": Family({"attention_bias": True, "hidden_dropout": 0.0}),
    "GPT2": Family({"scale_attn_by_inverse_layer_idx": True}, model="GPT2LMHeadModel", sizes=GPT2_SIZES),
    "GPTBigCode": Family({"multi_query": True}, sizes=GPT2_SIZES),
    "OPT": Family({"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "Helium": Family({}),
    "Apertus": Family({}),
    "Arcee": Family({}),
    "Ernie4_5": Family({"use_bias": True}),
    "Persimmon": Family({"hidden_dropout": 0.0}),
    "Jais2": Family({}),
    "BitNet": Family({}),
    "Cwm": Family({"sliding_window": 7, "layer_types": SLIDING,
                   "rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "NanoChat": Family({"final_logit_softcapping": 2.0}),
    "Ministral3": Family({}),
    "Lfm2": Family({"layer_types": ["full_attention"] * 3, "block_auto_adjust_ff_dim": False}),
    "MiniCPM3": Family(LATENT),
    "Youtu": Family(LATENT),
}
MIXTURES = {
    "Mixtral": moe(sliding_window=None),
    "Qwen2Moe": moe(decoder_sparse_step=1, mlp_only_layers=[1]),
    "Qwen3Moe": moe(mlp_only_layers=[0], norm_topk_prob=True),
    "Olmoe": moe(),
    "FlexOlmo": moe(),
    "GraniteMoe": moe(embedding_multiplier=2.0, attention_multiplier=0.2, logits_scaling=3.0),
    "Phimoe": moe()._replace(training=False),  # its router draws experts at random in training mode
    "Glm4Moe": moe(first_k_dense_replace=1),
    "DeepseekV2": moe(**LATENT, first_k_dense_replace=1),
    "DeepseekV3": moe(**LATENT, first_k_dense_replace=1),
    "Ernie4_5_Moe": moe(moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    "HunYuanMoEV1": moe(),
    "Afmoe": moe(sliding_window=7, num_dense_layers=1),
    "MiniMaxM2": moe(),
    "JetMoe": moe(kv_channels=8),
}
FAMILIES = {**DENSE, **MIXTURES}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
NOT_SUPPORTED = {
    "Falcon": Family({}, sizes={name: size for name, size in SIZES.items() if name != "head_dim"}),
    "Bloom": Family({}),
    "Mpt": Family({"d_model": 32, "n_heads": 4, "n_layers": 3}),
    "GPTJ": Family({"rotary_dim": 4}),
    "Bert": Family({"attention_probs_dropout_prob": 0.0}, model="BertLMHeadModel"),
    "CTRL": Family({"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "resid_pdrop": 0.0,
                    "embd_pdrop": 0.0}, model="CTRLLMHeadModel"),
    "Doge": Family({}),
    "DiffLlama": Family({}),
    "GptOss": moe(),
    "Qwen3Next": moe(layer_types=LINEAR),
    "MiniMax": moe(layer_types=LINEAR),
    "Lfm2Conv": Family({"layer_types": ["conv", "full_attention", "conv"]}, model="Lfm2ForCausalLM",
                       config="Lfm2Config"),
    "Mamba": Family({"state_size": 4}),
    "Llama4": moe()._replace(config="Llama4TextConfig"),
    "DeepseekV32": moe(**LATENT, index_topk=4, index_n_heads=2, index_head_dim=8),
    "Gemma3n": Family({**PER_LAYER, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "laurel_rank": 4,
                       "activation_sparsity_pattern": [0.0] * 5,
                       "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
                      config="Gemma3nTextConfig"),
    "Gemma4": Family({**PER_LAYER, "num_kv_shared_layers": 0}, config="Gemma4TextConfig"),
    "Mixtral with a router loss": moe(output_router_logits=True)._replace(model="MixtralForCausalLM",
                                                                          config="MixtralConfig"),
}


def config_of(name: str, **changes):
    """The config of a tiny model."""
    family = {**FAMILIES, **NOT_SUPPORTED}[name]
    kind = getattr(transformers, family.config or f"{name}Config")
    config = kind(**{**family.sizes, **family.changes, **changes})
    config._attn_implementation = "eager"
    return config


def make(name: str, dtype: torch.dtype | None = None, **changes) -> nn.Module:
    """A tiny model in training mode with fresh random weights; the seed is in the captured output."""
    family = {**FAMILIES, **NOT_SUPPORTED}[name]
    refresh()
    model = getattr(transformers, family.model or f"{name}ForCausalLM")(config_of(name, **changes))
    return scattered(model).to(dtype or family.dtype).train(family.training)


def refresh() -> None:
    """Seed torch afresh and print the seed."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def scattered(model: nn.Module) -> nn.Module:
    """Random matrices, and norms and biases off their neutral values."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids, and labels of which a fifth is -100."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    labels = torch.where(torch.rand(batch, length) < 0.2, -100, ids)
    labels[:, -1] = ids[:, -1]
    return ids, labels


class Found(NamedTuple):
    """A loss and its gradients by parameter name."""

    loss: Tensor
    grads: dict[str, Tensor | None]


def gradients(model: nn.Module, loss) -> Found:
    """Run `loss()` backward from empty gradients."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return Found(value.detach(), grads)


def plain(model: nn.Module, ids: Tensor, labels: Tensor, **others) -> Found:
    """The model's own."""
    return gradients(model, lambda: model(input_ids=ids, labels=labels, use_cache=False, **others).loss)


def streamed(model: nn.Module, policy: StreamPolicy, ids: Tensor, labels: Tensor, **others) -> Found:
    """A fresh streamed step's."""
    step = StreamedStep(model, policy)
    return gradients(model, lambda: step(ids, labels, **others))


def distance(found: Found, expected: Found) -> float:
    """Largest difference of a gradient, relative to the parameter's largest.

    A gradient that is 0 but for rounding (a bias on keys) is held against the largest of all.
    """
    assert found.grads.keys() == expected.grads.keys()
    sizes = {name: 0.0 if g is None else float(g.abs().max()) for name, g in expected.grads.items()}
    largest = max(sizes.values())
    off = {name: _difference(found.grads[name], grad) / max(sizes[name], 1e-2 * largest)
           for name, grad in expected.grads.items()}
    worst = max(off, key=lambda name: off[name])
    print(f"furthest off: {worst}, {off[worst]:.1e}; loss {float(found.loss - expected.loss):.1e}")
    return off[worst]


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        other = b if a is None else a
        return 0.0 if other is None else float(other.abs().max())
    return float((a - b).abs().max())


def assert_equal(found: Found, expected: Found) -> None:
    """Within rounding. Eager attention takes its softmax in float32, whatever the model's type."""
    dtype = next(g.dtype for g in expected.grads.values() if g is not None)
    by_loss, by_grad = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-5, 2e-4)}[dtype]
    assert abs(float(found.loss - expected.loss)) <= by_loss * max(1.0, abs(float(expected.loss)))
    assert distance(found, expected) <= by_grad


def assert_same(found: Found, expected: Found) -> None:
    """Bit for bit."""
    assert torch.equal(found.loss, expected.loss)
    for name, grad in expected.grads.items():
        other = found.grads[name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name
