"""ModelShape against transformers' own modules on the meta device: component for component."""

import json
import subprocess
import sys
import time

import components
import pytest

from training.errors import DataError
from training.families import FAMILIES, UNFUSED
from training.shapes import lora_parameters, shape_from_config

TINY = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 131, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 131, "n_positions": 128, "pad_token_id": 0,
       "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 8, "v_head_dim": 12}
OPT = {**{key: value for key, value in TINY.items() if key != "intermediate_size"}, "ffn_dim": 96,
       "word_embed_proj_dim": 64}
SIZES = {
    **dict.fromkeys(("gpt2", "openai-gpt", "gpt_bigcode"), GPT), "opt": OPT,
    **{name: {**GPT, "rotary_dim": 8} for name in ("gptj", "codegen")},
    "gpt_neo": {"hidden_size": 64, "num_layers": 6, "num_heads": 4, "vocab_size": 131, "window_size": 7,
                "max_position_embeddings": 128, "attention_types": [[["global", "local"], 3]]},
    "xglm": {"d_model": 64, "num_layers": 6, "attention_heads": 4, "ffn_dim": 96, "vocab_size": 131},
    "bloom": {"hidden_size": 64, "n_layer": 6, "n_head": 4, "vocab_size": 131},
    "mpt": {"d_model": 64, "n_layers": 6, "n_heads": 4, "vocab_size": 131, "max_seq_len": 128},
    **{name: {**TINY, "head_dim": 16}
       for name in ("helium", "ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
COUNTS = {"ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2}, "deepseek_v2": ROUTED, "deepseek_v3": ROUTED,
          "glm4_moe": ROUTED, "glm4_moe_lite": ROUTED, "dots1": ROUTED, "solar_open": ROUTED}
TYPES = {"mlp_layer_types": ["dense", "sparse"] * 3}
BIASES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias", "attention_out_bias", "bias",
          "enable_bias", "lm_head_bias")
KINDS = ["sliding_attention", "full_attention", "full_attention"] * 2
WINDOW = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}
# Keys that change what is built; a family ignores those it does not know.
RICH = {**dict.fromkeys(BIASES, True), "use_qk_norm": True, "qk_layernorm": True, "tie_word_embeddings": True}
POOR = {**dict.fromkeys(BIASES, False), "use_qk_norm": False, "qk_layernorm": False, "use_post_norm": False,
        "tie_word_embeddings": False}
SPARSE = {"first_k_dense_replace": 2, "decoder_sparse_step": 2, "mlp_only_layers": [1],
          "interleave_moe_layer_step": 2, "moe_layer_start_index": 2, "moe_layer_end_index": -1,
          "moe_layer_interval": 2, "shared_expert_intermediate_size": 56, "shared_intermediate_size": 56,
          "num_shared_experts": 2, "moe_num_shared_experts": 1, "intermediate_size_mlp": 100}
OWN = [("stablelm", {"use_parallel_residual": True}), ("gpt2", {"n_inner": 100}),
       ("gpt_bigcode", {"multi_query": False}), ("opt", {"word_embed_proj_dim": 16}),
       ("opt", {"do_layer_norm_before": False}), ("deepseek_v2", {"q_lora_rank": None}),
       ("deepseek_v3", {"q_lora_rank": None}), ("glm4_moe_lite", TYPES), ("mellum", TYPES),
       ("internlm3", {"qkv_bias": True, "bias": True}),
       ("llama", {"vocab_size": 192, "pad_vocab_size_multiple": 64}), ("mistral", {"head_dim": 24}),
       ("gemma3_text", {"head_dim": 24, "num_key_value_heads": 1}), ("cohere2", {"head_dim": 24})]
WINDOWED = [name for name, family in FAMILIES.items() if family.window and name != "gpt_neo"]
UNREAD = components.UNREAD_TYPES | {"qwen3_moe"}


def sizes(name):
    family = FAMILIES[name]
    chosen = {"num_experts_per_tok": 2, "moe_intermediate_size": 40,
              **COUNTS.get(name, {"num_experts": 4, "num_local_experts": 4})}
    return {**SIZES.get(name, TINY), **(LATENT if family.latent else {}),
            **(chosen if family.experts else {})}


def agree(name, overrides):
    """The shape from the keys alone, and from the config.json that transformers writes, is the model's."""
    model = components.make(name, overrides)
    parts, layers, seen = components.parameters(model), components.linears(model), components.windows(model)
    for config in ({"model_type": name, **overrides}, json.loads(model.config.to_json_string())):
        shape = shape_from_config(config)
        assert {part: count for part, count in shape.parameters.items() if count} == parts
        assert {(x.name, x.inputs, x.outputs): x.count for x in merged(shape)} == layers
        assert shape.windows == seen
        assert shape.tied == bool(model.config.tie_word_embeddings)
        assert shape.native_context == getattr(model.config, "max_position_embeddings", shape.native_context)
        assert shape.note == ""


def merged(shape):
    """Linear layers with equal names and sizes (dense and shared MLPs) as one row."""
    rows = {}
    for x in shape.linears:
        key = (x.name, x.inputs, x.outputs)
        rows[key] = type(x)(name=x.name, inputs=x.inputs, outputs=x.outputs,
                            count=x.count + (rows[key].count if key in rows else 0))
    return rows.values()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_component_of_a_family_is_counted_as_transformers_builds_it(name):
    agree(name, sizes(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_norms_and_tied_heads_follow_their_keys(name):
    agree(name, {**sizes(name), **RICH})
    agree(name, {**sizes(name), **POOR})


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.experts])
def test_layers_with_experts_and_shared_experts_follow_their_keys(name):
    agree(name, {**sizes(name), **SPARSE})


@pytest.mark.parametrize(("name", "changes"), OWN)
def test_what_one_family_alone_reads(name, changes):
    agree(name, {**sizes(name), **changes})


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows_are_read_as_transformers_reads_them(name):
    agree(name, {**sizes(name), **WINDOW, "sliding_window_pattern": 3, "attention_chunk_size": 5})
    agree(name, {**sizes(name), "sliding_window": 7, "use_sliding_window": False})
    if name not in UNREAD:
        agree(name, {**sizes(name), **WINDOW, "layer_types": KINDS})


@pytest.mark.parametrize(("changes", "seen"), [
    ({"model_type": "mistral"}, (4096,) * 6), ({"model_type": "mistral", "sliding_window": None}, ()),
    ({"model_type": "qwen2"}, ()), ({"model_type": "qwen2", **WINDOW}, (0, 0, 0, 7, 7, 7)),
    ({"model_type": "gemma2"}, (4096, 0) * 3), ({"model_type": "gemma3_text"}, (4096,) * 5 + (0,)),
    ({"model_type": "cohere2", "sliding_window_pattern": 2}, (4096, 0) * 3),
    ({"model_type": "gpt_oss"}, (128, 0) * 3), ({"model_type": "llama", "sliding_window": 7}, ()),
    ({"model_type": "olmo3", **WINDOW, "layer_types": KINDS}, (7, 0, 0, 7, 0, 0)),
])
def test_windows_of_known_configs(changes, seen):
    assert shape_from_config({**TINY, **changes}).windows == seen


DENSE = [name for name, family in FAMILIES.items() if not family.experts]


@pytest.mark.parametrize("name", DENSE)
def test_the_tensors_an_mlp_keeps_for_backward_are_counted(name):
    one = {key: 1 for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in sizes(name)}
    types = {"attention_types": [[["global"], 1]]} if name == "gpt_neo" else {}
    shape = shape_from_config({"model_type": name, **sizes(name), **one, **types})
    model = components.make(name, {**sizes(name), **one, **types}, device="cpu")
    assert components.kept(model, shape.hidden, shape.intermediate) == FAMILIES[name].kept


def test_lora_counts_what_peft_adds():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model("phi", **TINY)
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config),
                               LoraConfig(r=5, target_modules=["q_proj", "fc1", "fc2"]),
                               low_cpu_mem_usage=True)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(shape_from_config(config.to_dict()), ("q_proj", "fc1", "fc2"), 5) == added


def test_an_unlisted_family_is_counted_as_a_llama_and_says_so():
    shape = shape_from_config({**TINY, "model_type": "newmodel"})
    assert shape.total_parameters == shape_from_config({**TINY, "model_type": "llama"}).total_parameters
    assert shape.note == "model_type newmodel is not listed; counted as a Llama."


def test_no_family_of_transformers_is_counted_wrong_in_silence():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN
    unlisted = set(KNOWN) - set(FAMILIES)
    assert {"mamba", "jamba", "qwen3_next", "gemma3n_text", "falcon"} <= unlisted
    assert set(FAMILIES) <= set(KNOWN)
    for name in unlisted:
        assert shape_from_config({**TINY, "model_type": name}).note == (
            f"model_type {name} is not listed; counted as a Llama.")


def test_layers_that_are_not_attention_are_told():
    shape = shape_from_config({**TINY, "model_type": "llama", "layer_types": ["conv", "full_attention"] * 3})
    assert shape.note == "Layers of the kind conv are counted as attention."


def test_a_mixture_computes_with_the_chosen_experts_only():
    shape = shape_from_config({**TINY, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 40, "num_hidden_layers": 3})
    assert shape.parameters["experts"] == 3 * 8 * 3 * 64 * 40
    assert shape.active_parameters == shape.total_parameters - 3 * 6 * 3 * 64 * 40
    assert shape.intermediate == 80


@pytest.mark.parametrize(("name", "chosen"), [("gpt_oss", 4), ("mixtral", 2), ("deepseek_v3", 8)])
def test_the_number_of_chosen_experts_has_the_family_s_default(name, chosen):
    config = {**TINY, **LATENT, "model_type": name, "num_experts": 16, "first_k_dense_replace": 0,
              "moe_intermediate_size": 40}
    shape = shape_from_config(config)
    idle = shape.total_parameters - shape.active_parameters
    assert idle == shape.parameters["experts"] * (16 - chosen) // 16


def test_the_text_part_of_a_multimodal_config_is_read():
    shape = shape_from_config({"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text"}})
    assert (shape.hidden, shape.family) == (64, "gemma3_text")
    assert shape.note == "Only the text part of gemma3 is counted."


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": None}, "config.json has no hidden_size; ELITE tunes decoder-only language models."),
    ({"intermediate_size": None}, "config.json has no intermediate_size; ELITE tunes decoder-only language "
                                  "models."),
    ({"vocab_size": -1}, "config.json has vocab_size = -1; it must be a whole number of at least 1."),
    ({"num_attention_heads": "4"}, "config.json has num_attention_heads = '4'; it must be a whole number "
                                   "of at least 1."),
])
def test_a_size_that_is_missing_or_wrong_is_named(change, message):
    with pytest.raises(DataError) as error:
        shape_from_config({**TINY, "model_type": "llama", **change})
    assert str(error.value) == message


def test_a_shape_takes_less_than_a_millisecond():
    config = {**TINY, "model_type": "gemma3_text", "num_hidden_layers": 64}
    def once():
        start = time.process_time()
        for _ in range(20):
            shape_from_config(config)
        return (time.process_time() - start) / 20
    assert min(once() for _ in range(5)) < 1e-3


def test_shapes_import_no_torch():
    code = "import sys, training.shapes; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_families_without_fused_attention_are_those_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    found = {name for name in FAMILIES
             if not MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]._supports_sdpa}
    assert found == UNFUSED
