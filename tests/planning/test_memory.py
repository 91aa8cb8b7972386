"""The memory formulas against real updates, as benchmarks/planner.py measures them, and against libraries."""

import pytest

from benchmarks import activation_table, planner
from training import models
from training.planning import activations, memory
from training.shapes import shape_from_config

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 384, "vocab_size": 2048, "max_position_embeddings": 4096}
CONTEXT, TARGETS = 1024, 128
VALUES = {"model.dtype": "float32", "model.quantization": "none", "model.double_quant": True,
          "lora.enabled": True, "lora.rank": 8, "lora.targets": [], "dataset.context_tokens": CONTEXT,
          "dataset.target_tokens": TARGETS, "training.micro_batch": 1, "training.accumulation": 8,
          "training.checkpointing": False,
          "training.loss_chunk_tokens": 64, "training.keep_checkpoints": 2, "optimizer.name": "adamw",
          "deepspeed.stage": 0,
          "deepspeed.offload_optimizer": False, "deepspeed.offload_parameters": False, "device.kind": "cpu",
          "device.count": 1}


COMBINATIONS = dict(planner.combinations())


@pytest.mark.parametrize("name", [
    "llama", "phi", "gpt2", "llama, recomputed", "llama, q and v only", "llama, full, accumulated",
    "llama, full, recomputed", "llama, NF4, recomputed", "llama, bf16", "llama streamed, output kept",
    "llama streamed, full", "mistral, 2048", "gemma2, eager"])
def test_predicted_bytes_are_within_5_percent_of_a_real_update(name):
    row = planner.memory_row(name, COMBINATIONS[name])
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.05)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_table_of_activations_is_what_real_layers_keep(family):
    found = activation_table.kept_rows(family)
    assert found == {mode: {"kept": rows["kept"]} for mode, rows in activations.table()[family].items()}


def test_a_family_without_a_row_is_counted_as_a_llama():
    shape = shape_from_config({"model_type": "unheard_of", **SIZES})
    llama = shape_from_config({"model_type": "llama", **SIZES})
    assert activations.moments(shape, VALUES) == activations.moments(llama, VALUES)


def test_every_row_of_the_table_is_complete():
    for rows in activations.table().values():
        assert list(rows) == sorted(activations.MODES)
        assert all({"kept", "mlp"} & set(row) and len(row["kept"]) == 6 for row in rows.values())


def test_nf4_weights_take_what_bitsandbytes_stores(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    config = AutoConfig.for_model("phi", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    stored = 0
    for parameter in model.parameters():
        stored += parameter.numel() * parameter.element_size()
        if state := getattr(parameter, "quant_state", None):
            stored += state.absmax.numel() * state.absmax.element_size()
            stored += state.state2.absmax.numel() * state.state2.absmax.element_size()
    shape = shape_from_config(config.to_dict())
    values = {**VALUES, "model.quantization": "nf4"}
    assert memory.weight_bytes(shape, values) == pytest.approx(stored, rel=0.01)


def test_8_bit_optimizer_states_take_what_bitsandbytes_allocates():
    import torch
    from bitsandbytes.optim import AdamW8bit
    weight = torch.nn.Parameter(torch.zeros(512, 512))
    optimizer = AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(value.numel() * value.element_size() for name, value in optimizer.state[weight].items()
               if torch.is_tensor(value) and not name.startswith("qmap"))
    assert held / weight.numel() == pytest.approx(memory.ADAM_BYTES["adamw_8bit"], rel=0.01)


def estimate(name="phi-2", **changes):
    base = models.registry()[name]
    values = {**VALUES, "model.quantization": "nf4", "model.dtype": "bfloat16", "device.kind": "cuda",
              "training.checkpointing": True, "lora.targets": list(base.lora_targets)}
    return memory.estimate(base, {**values, **{k.replace("__", "."): v for k, v in changes.items()}})


def test_the_terms_add_up_to_the_devices_bytes():
    planned = estimate()
    assert sum(planned.terms.values()) == planned.device_bytes
    assert set(planned.terms) == {"weights", "adapter", "gradients", "optimizer", "activations", "working",
                                  "logits", "workspace", "runtime", "fragmentation"}


def test_phi_2_in_nf4_takes_the_designs_1_9_gb_at_most():
    assert estimate().terms["weights"] == pytest.approx(1.82e9, rel=0.01)


def test_recompute_saves_most_activations():
    kept, recomputed = estimate(training__checkpointing=False), estimate()
    assert recomputed.terms["activations"] < kept.terms["activations"] / 8


def test_offloading_moves_the_optimizer_to_the_host():
    here = estimate(deepspeed__stage=2)
    there = estimate(deepspeed__stage=2, deepspeed__offload_optimizer=True)
    assert "optimizer" not in there.terms
    assert there.host_bytes - here.host_bytes == pytest.approx(16 * here.terms["adapter"] / 4, abs=2)


def test_zero_shares_out_what_its_stage_says():
    one = estimate(lora__enabled=False, model__quantization="none", deepspeed__stage=2)
    four = estimate(lora__enabled=False, model__quantization="none", deepspeed__stage=2, device__count=4)
    third = estimate(lora__enabled=False, model__quantization="none", deepspeed__stage=3, device__count=4)
    assert four.terms["gradients"] * 4 == one.terms["gradients"]
    assert four.terms["optimizer"] * 4 == one.terms["optimizer"]
    assert four.terms["weights"] == one.terms["weights"] == third.terms["weights"] * 4


def test_experts_stay_in_16_bit():
    planned = estimate("qwen3-coder-30b-a3b")
    assert planned.terms["weights"] > 2 * models.registry()["qwen3-coder-30b-a3b"].shape.parameters["experts"]


def test_the_disk_holds_one_checkpoint_more_than_is_kept():
    trained = memory.trainable_parameters(models.registry()["phi-2"].shape, {
        **VALUES, "lora.targets": list(models.registry()["phi-2"].lora_targets)})
    assert estimate().disk_bytes == 3 * 12 * trained + memory.RECORDS_BYTES
