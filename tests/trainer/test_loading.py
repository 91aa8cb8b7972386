"""Loading the model of a run: what is trained, what stays, and what each refusal says."""

import copy

import pytest
import torch

from tests.checkpoints import FIM, make_tiny_checkpoint, write_tokenizer
from tests.stores import make_store
from training.errors import DataError, MissingInput, UsageError
from training.settings import Config
from training.trainer import rope
from training.trainer.imports import quick_imports
from training.trainer.loading import load
from training.trainer.loss import causal_lm, causal_loss, held_still

CPU = torch.device("cpu")
TARGETS = {"phi": ["q_proj", "v_proj", "dense", "fc1", "fc2"],
           "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_checkpoint(folder / family, family, context_tokens=128) for family in TARGETS}


@pytest.fixture(scope="module")
def stores(tmp_path_factory, bases):
    folder = tmp_path_factory.mktemp("stores")
    return {family: make_store(folder / family, base) for family, base in bases.items()}


def settings(base, family="phi", **more):
    return Config({"model.base": str(base), "lora.enabled": True, "lora.targets": TARGETS[family],
                   "model.quantization": "nf4", "dataset.context_tokens": 96, "dataset.target_tokens": 32,
                   "training.checkpointing": True} | {k.replace("__", "."): v for k, v in more.items()})


def embedded(**more):
    return Config({"embedded.hidden": 64, "embedded.layers": 2, "embedded.mlp": 128,
                   "dataset.target_tokens": 32, "dataset.context_tokens": 96}
                  | {k.replace("__", "."): v for k, v in more.items()})


def windows(store, count=2):
    pairs = [store.window("train", i) for i in range(count)]
    return tuple(torch.tensor([list(pair[part]) for pair in pairs]) for part in (0, 1))


@pytest.mark.parametrize("family", ["phi", "qwen2"])
def test_nf4_and_lora_learn_on_the_cpu_and_move_the_adapter_alone(bases, stores, family):
    import bitsandbytes

    loaded = load(settings(bases[family], family), stores[family], CPU)
    quantized = {n: m for n, m in loaded.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(quantized) == {"phi": 12, "qwen2": 14}[family]
    inner = causal_lm(loaded.model)
    assert {inner.get_input_embeddings().weight.dtype, inner.lm_head.weight.dtype} == {torch.float32}
    assert loaded.kind == "adapter"
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in loaded.trainable.items())
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    optimizer = torch.optim.AdamW(loaded.trainable.values(), lr=1e-2)
    ids, labels = windows(stores[family])
    losses = []
    for _ in range(20):
        total, tokens = causal_loss(loaded.model, ids, labels, None, 16)
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / tokens)
    assert losses[-1] < losses[0] - 1.0, losses
    moved = {n for n, p in loaded.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(loaded.trainable)
    assert all(m.weight.dtype == torch.uint8 for m in quantized.values())


def test_an_evaluation_between_steps_leaves_4_bit_layers_trainable(bases, stores):
    """bitsandbytes repacks weights for CPU inference where the CPU has AVX512-BF16; that must stay off."""
    loaded = load(settings(bases["phi"]), stores["phi"], CPU)
    layers = [m for m in loaded.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)


def test_recomputed_activations_give_the_same_gradients(bases, stores):
    found = []
    for recompute in (False, True):
        config = settings(bases["qwen2"], "qwen2", training__checkpointing=recompute)
        loaded = load(config, stores["qwen2"], CPU)
        calls = []
        mlp = causal_lm(loaded.model).model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        causal_loss(loaded.model, *windows(stores["qwen2"]), None, 16)[0].backward()
        assert len(calls) == (2 if recompute else 1)
        found.append({name: p.grad for name, p in loaded.trainable.items()})
    assert any(g.abs().max() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


def test_the_adapter_starts_the_same_for_the_same_seed_only(bases, stores):
    first, again, other = (load(settings(bases["phi"], run__seed=s), stores["phi"], CPU) for s in (5, 5, 6))
    assert all(torch.equal(first.trainable[n], again.trainable[n]) for n in first.trainable)
    assert any(not torch.equal(first.trainable[n], other.trainable[n]) for n in first.trainable)


def test_loading_leaves_the_random_state_alone(bases, stores):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    load(settings(bases["phi"]), stores["phi"], CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_targets_are_refused_with_those_that_exist(bases, stores):
    message = r"lora\.targets names o_proj, gate_proj, .* are dense, fc1, fc2, k_proj, q_proj, v"
    with pytest.raises(UsageError, match=message):
        load(settings(bases["phi"], lora__targets=["q_proj", "o_proj", "gate_proj"]), stores["phi"], CPU)


def test_no_targets_means_every_linear_layer_but_the_head(bases, stores):
    loaded = load(settings(bases["phi"], lora__targets=[]), stores["phi"], CPU)
    found = {n.split(".")[-4] for n in loaded.trainable}
    assert found == {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}
    assert any("every linear layer" in note for note in loaded.notes)


def test_a_full_fine_tune_trains_every_weight_of_the_base(bases, stores):
    config = settings(bases["qwen2"], lora__enabled=False, model__quantization="none")
    loaded = load(config, stores["qwen2"], CPU)
    assert loaded.kind == "model"
    assert set(loaded.trainable) == {n for n, _ in loaded.model.named_parameters()}
    assert loaded.model.training


def test_weights_trained_without_deepspeed_stay_float32_and_compute_in_16_bit(bases, stores):
    config = settings(bases["qwen2"], lora__enabled=False, model__quantization="none",
                      model__dtype="bfloat16")
    loaded = load(config, stores["qwen2"], CPU)
    assert {p.dtype for p in loaded.trainable.values()} == {torch.float32}
    seen = []
    loaded.model.model.layers[0].mlp.register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    total, _ = causal_loss(loaded.model, *windows(stores["qwen2"]), None, 16)
    total.backward()
    assert torch.bfloat16 in seen
    assert {p.grad.dtype for p in loaded.trainable.values()} == {torch.float32}


def test_an_adapter_on_a_16_bit_base_is_float32_and_trains(bases, stores):
    loaded = load(settings(bases["phi"], model__dtype="bfloat16"), stores["phi"], CPU)
    inner = causal_lm(loaded.model)
    assert inner.get_input_embeddings().weight.dtype == inner.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.trainable.values()} == {torch.float32}
    total, tokens = causal_loss(loaded.model, *windows(stores["phi"], 1), None, 16)
    total.backward()
    assert float(total.detach()) / tokens < 20
    assert all(p.grad is not None for p in loaded.trainable.values())


def test_a_missing_base_says_how_to_get_one(tmp_path, stores):
    message = r"nobody/none is not on .*`hf download nobody/none`.* --base-model embedded"
    with pytest.raises(MissingInput, match=message) as caught:
        load(settings("nobody/none"), stores["phi"], CPU)
    assert caught.value.exit_code == 66
    assert "\n" not in str(caught.value)


def test_memory_that_runs_out_while_loading_is_not_taken_for_a_torn_checkpoint(bases, stores, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(settings(bases["phi"]), stores["phi"], CPU)


def test_a_torn_checkpoint_is_refused(tmp_path, stores):
    from safetensors.torch import load_file, save_file

    base = make_tiny_checkpoint(tmp_path / "torn", "phi", context_tokens=128)
    weights = load_file(base / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "layers.1.mlp.fc1" not in n}, base / "model.safetensors",
              metadata={"format": "pt"})
    config = settings(base, model__quantization="none")
    with pytest.raises(DataError, match=r"lacks 2 weights .* the first model\.layers\.1\.mlp\.fc1\.bias"):
        load(config, stores["phi"], CPU)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DataError, match="Download it again"):
        load(config, stores["phi"], CPU)
    (base / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"torn is not complete: .* --base-model embedded"):
        load(config, stores["phi"], CPU)


def test_a_vocabulary_beyond_the_embedding_is_refused_before_training(tmp_path, bases):
    store = make_store(tmp_path / "wide", bases["phi"], vocab_tokens=900)
    with pytest.raises(DataError, match=r"900 tokens and the embedding of .* 768 rows"):
        load(settings(bases["phi"]), store, CPU)


def test_the_embedded_model_is_the_same_for_the_same_seed(stores):
    first, again, other = (load(embedded(run__seed=seed), stores["phi"], CPU) for seed in (1, 1, 2))
    assert first.kind == "model"
    assert all(torch.equal(first.trainable[n], again.trainable[n]) for n in first.trainable)
    name = "model.embed_tokens.weight"
    assert not torch.equal(first.trainable[name], other.trainable[name])
    assert "lm_head.weight" not in first.trainable  # tied
    config = first.model.config
    assert (config.vocab_size, config.max_position_embeddings, config.pad_token_id) == (768, 96, 0)


def test_the_embedded_model_learns_padding_and_end_tokens_too(stores):
    loaded = load(embedded(), stores["phi"], CPU)
    ids = torch.tensor([[5, 0, 7, 8]])
    causal_loss(loaded.model, ids, torch.tensor([[-100, -100, -100, 8]]), None, 0)[0].backward()
    assert loaded.trainable["model.embed_tokens.weight"].grad[0].abs().max() > 1e-6


def test_yarn_is_set_and_in_effect_beyond_the_native_context(bases, stores):
    wanted = {"dataset__context_tokens": 256, "model__rope_factor": 2.0, "model__quantization": "none"}
    for family in TARGETS:
        plain = load(settings(bases[family], family, model__quantization="none"), stores[family], CPU)
        loaded = load(settings(bases[family], family, **wanted), stores[family], CPU)
        assert loaded.notes == ("YaRN factor 2 on the rotary embedding: the context of 256 tokens is beyond "
                                "the model's own 128.",)
        old, new = (causal_lm(m.model).model.rotary_emb for m in (plain, loaded))
        assert old.inv_freq.shape == new.inv_freq.shape
        assert not torch.equal(old.inv_freq, new.inv_freq)
        assert new.attention_scaling == pytest.approx(1.0693, abs=1e-4)  # 0.1 ln 2 + 1
        ids, _ = windows(stores[family], 1)
        with held_still(plain.model), held_still(loaded.model):
            assert not torch.allclose(plain.model(ids).logits, loaded.model(ids).logits, atol=1e-3)
        config = causal_lm(loaded.model).config
        assert config.max_position_embeddings == 256
        assert config.rope_parameters["original_max_position_embeddings"] == 128


def test_yarn_needs_a_factor_that_reaches(bases, stores):
    message = r"256 tokens is beyond the 128 .* set model\.rope_factor=2, or use --context 128"
    with pytest.raises(UsageError, match=message):
        load(settings(bases["phi"], dataset__context_tokens=256), stores["phi"], CPU)
    with pytest.raises(UsageError, match=r"rope_factor 1\.5 reaches 192; set model\.rope_factor=2"):
        load(settings(bases["phi"], dataset__context_tokens=256, model__rope_factor=1.5), stores["phi"], CPU)


def test_models_without_a_plain_rotary_embedding_keep_their_context(tmp_path, stores):
    gpt2 = make_tiny_checkpoint(tmp_path / "gpt2", "gpt2", context_tokens=64)
    with pytest.raises(UsageError, match=r"beyond the 64 .* no rotary embedding .* --context 64"):
        load(settings(gpt2, model__rope_factor=4.0), stores["phi"], CPU)
    from transformers import AutoConfig

    scaled = AutoConfig.for_model("llama", max_position_embeddings=64, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UsageError, match=r"already scaled \(linear\)"):
        rope.extend(scaled, 128, 4.0)
    untouched = copy.deepcopy(scaled.rope_parameters)
    assert rope.extend(scaled, 64, 4.0) == ""
    assert scaled.rope_parameters == untouched


def test_conv1d_layers_of_gpt2_can_carry_an_adapter(tmp_path, stores):
    gpt2 = make_tiny_checkpoint(tmp_path / "gpt2", "gpt2", context_tokens=128)
    loaded = load(settings(gpt2, lora__targets=["c_attn"], model__quantization="none"), stores["phi"], CPU)
    assert len(loaded.trainable) == 4


def test_quick_imports_puts_the_collector_back_and_scans_models_once():
    import gc

    assert gc.isenabled()
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    from transformers.utils import import_utils

    models = import_utils.__file__.replace("utils/import_utils.py", "models")
    by_init = import_utils.define_import_structure(models + "/__init__.py")
    assert "llama.modeling_llama" in by_init[frozenset({"torch"})]


def test_the_qwen_tokenizer_of_the_tests_knows_the_infill_tokens(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, FIM, 600, 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [len(tokenizer(word)["input_ids"]) for word in FIM[:3]] == [1, 1, 1]
    text = "def f(x):\n\treturn 'é' * 2\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
