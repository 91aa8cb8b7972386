"""ModelShape against transformers' own modules on the meta device: parameter for parameter."""

import json
import subprocess
import sys

import pytest

from training.errors import DataError
from training.shapes import FAMILIES, lora_parameters, shape_from_config

TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 130, "max_position_embeddings": 128,
}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 130, "n_positions": 128}
CASES = [
    ("llama", TINY),
    ("llama", {**TINY, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {**TINY, "head_dim": 24}), ("qwen2", TINY), ("qwen2", {**TINY, "tie_word_embeddings": True}),
    ("qwen3", {**TINY, "head_dim": 24}), ("granite", TINY), ("smollm3", {**TINY, "pad_token_id": 0}),
    ("seed_oss", {**TINY, "head_dim": 24}),
    ("olmo", TINY), ("olmo2", TINY), ("gemma", {**TINY, "head_dim": 32}),
    ("gemma2", {**TINY, "head_dim": 32}),
    ("gemma3_text", {**TINY, "head_dim": 32}), ("cohere", TINY), ("phi", TINY),
    ("phi3", {**TINY, "pad_token_id": 0}),
    ("starcoder2", TINY), ("stablelm", TINY), ("stablelm", {**TINY, "use_qkv_bias": True}),
    ("stablelm", {**TINY, "use_parallel_residual": True}),
    ("gpt2", GPT), ("gpt2", {**GPT, "n_inner": 100, "tie_word_embeddings": False}), ("gpt_bigcode", GPT),
    ("gpt_bigcode", {**GPT, "multi_query": False}), ("gpt_neox", TINY), ("gptj", {**GPT, "rotary_dim": 8}),
    ("codegen", {**GPT, "rotary_dim": 8}),
    ("opt", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96,
             "vocab_size": 130,
             "max_position_embeddings": 128, "word_embed_proj_dim": 64}),
    ("mixtral", {**TINY, "num_local_experts": 4}),
    ("qwen2_moe", {**TINY, "num_experts": 4, "moe_intermediate_size": 40,
                   "shared_expert_intermediate_size": 56,
                   "decoder_sparse_step": 2}),
    ("qwen3_moe", {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                   "mlp_only_layers": [0]}),
    ("deepseek_v2", {**TINY, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 2,
                     "kv_lora_rank": 24,
                     "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                     "moe_intermediate_size": 40, "first_k_dense_replace": 1, "num_experts_per_tok": 2}),
    ("deepseek_v2", {**TINY, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
                     "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                     "v_head_dim": 16, "moe_intermediate_size": 40, "first_k_dense_replace": 0,
                     "num_experts_per_tok": 2}),
]


def of_transformers(model_type, overrides, folder):
    """(parameters, {(name, in, out): count}, config.json as saved) of a model made on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    config = AutoConfig.for_model(model_type, **overrides)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {}
    for name, module in model.named_modules():
        if type(module) in (torch.nn.Linear, Conv1D) and not name.endswith(("lm_head", "embed_out")):
            if isinstance(module, Conv1D):
                key = (name.split(".")[-1], *module.weight.shape)
            else:
                key = (name.split(".")[-1], module.in_features, module.out_features)
            linears[key] = linears.get(key, 0) + 1
    saved = json.loads((folder / "config.json").read_text())
    return sum(p.numel() for p in model.parameters()), linears, saved


@pytest.mark.parametrize(("model_type", "overrides"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_counts_every_parameter_and_linear_layer_as_transformers_does(model_type, overrides, tmp_path):
    total, linears, config = of_transformers(model_type, overrides, tmp_path)
    shape = shape_from_config(config)
    assert shape.total_parameters == total
    assert {(x.name, x.inputs, x.outputs): x.count for x in shape.linears} == linears
    assert shape.note == ""


def test_the_cases_cover_every_listed_family():
    assert {model_type for model_type, _ in CASES} == set(FAMILIES)


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


def test_a_mixture_computes_with_the_chosen_experts_only():
    shape = shape_from_config({**TINY, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 40})
    assert shape.parameters["experts"] == 3 * 8 * 3 * 64 * 40
    assert shape.active_parameters == shape.total_parameters - 3 * 6 * 3 * 64 * 40
    assert shape.intermediate == 80


def test_the_text_part_of_a_multimodal_config_is_read():
    assert shape_from_config({"model_type": "x", "text_config": {**TINY, "model_type": "llama"}}).hidden == 64


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": None}, "config.json has no hidden_size; ELITE tunes decoder-only language models."),
    ({"vocab_size": -1}, "config.json has vocab_size = -1; it must be a whole number of at least 1."),
    ({"num_attention_heads": "4"}, "config.json has num_attention_heads = '4'; it must be a whole number "
                                   "of at least 1."),
])
def test_a_size_that_is_missing_or_wrong_is_named(change, message):
    with pytest.raises(DataError) as error:
        shape_from_config({**TINY, "model_type": "llama", **change})
    assert str(error.value) == message


def test_shapes_import_no_torch():
    code = "import sys, training.shapes; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
