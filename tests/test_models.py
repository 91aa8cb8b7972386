"""The registry, names, local folders, the cache, and the choice of a base."""

import json
import struct
import subprocess
import sys

import pytest
import yaml

from training import models, weights
from training.errors import DataError, MissingInput
from training.records import GIB, Figure, Gpu, HardwareProfile

TINY = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 256}
QWEN_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def safetensors(path, data_bytes=16, torn=False):
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [data_bytes // 4],
                                                   "data_offsets": [0, data_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data_bytes - 4 * torn))


def folder(path, config=TINY, tokens=QWEN_FIM):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    added = [{"content": token} for token in tokens]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    safetensors(path / "model.safetensors")
    return path


def cached(home, hub_id, **kwargs):
    repository = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    return folder(repository / "snapshots" / "abc123", **kwargs)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


def profile(gpu_gib=None, **figures):
    gpus = () if gpu_gib is None else (Gpu(index=0, name="Card", architecture="Ada", capability="8.9",
                                           total_bytes=gpu_gib * GIB, free_bytes=gpu_gib * GIB),)
    return HardwareProfile(
        name="x", source="measured", date="", system="Linux", cpu_name="c", cpu_cores=2, cpu_flags=(),
        ram_total_bytes=16 * GIB, ram_available_bytes=16 * GIB, gpus=gpus, disk_path="/", disk_free_bytes=GIB,
        figures={name.replace("__", "."): Figure(value=value, unit="FLOP/s", method="test")
                 for name, value in figures.items()})


def test_the_registry_holds_many_code_models_and_the_embedded_one():
    known = models.registry()
    assert len(known) >= 19
    assert {"embedded", "phi-2", "qwen2.5-coder-0.5b", "qwen2.5-coder-32b", "qwen3-coder-30b-a3b",
            "deepseek-coder-v2-lite", "starcoder2-15b", "codellama-13b", "granite-8b-code",
            "codegemma-7b"} <= set(known)
    assert all(base.shape.note == "" and base.licence and base.languages
               for name, base in known.items() if name != "embedded")


@pytest.mark.parametrize("name", [name for name in models.registry() if name != "embedded"])
def test_the_counted_parameters_are_the_published_ones(name):
    published = yaml.safe_load(models.REGISTRY.read_text(encoding="utf-8"))["models"][name]["parameters"]
    assert models.registry()[name].shape.total_parameters == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", ["phi-2", "qwen2.5-coder-7b", "qwen3-coder-30b-a3b",
                                  "deepseek-coder-v2-lite",
                                  "starcoder2-3b", "granite-8b-code", "codegemma-7b", "stable-code-3b",
                                  "starcoderbase-1b", "deepseek-coder-33b"])
def test_a_full_size_model_counts_as_transformers_builds_it(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    row = yaml.safe_load(models.REGISTRY.read_text(encoding="utf-8"))["models"][name]["config"]
    config = AutoConfig.for_model(**{k: v for k, v in row.items() if k != "rope_scaling"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert models.registry()[name].shape.total_parameters == sum(p.numel() for p in model.parameters())


def test_lora_targets_exist_in_each_model():
    for base in models.registry().values():
        assert set(base.lora_targets) <= {x.name for x in base.shape.linears}, base.name


def test_phi_2_knows_no_sentinels_and_the_others_their_own():
    known = models.registry()
    assert known["phi-2"].fim == {}
    assert known["qwen2.5-coder-7b"].fim["suffix"] == "<|fim_suffix|>"
    assert known["deepseek-coder-1.3b"].fim["suffix"] == "<\uff5cfim\u2581hole\uff5c>"
    assert known["codellama-7b"].fim["prefix"] == "\u2581<PRE>"
    assert known["starcoder2-3b"].fim["middle"] == "<fim_middle>"


def test_the_embedded_model_has_the_size_of_its_settings():
    assert 3e6 < models.registry()["embedded"].shape.total_parameters < 6e6
    wider = models.embedded({"embedded.hidden": 512, "embedded.layers": 2})
    assert (wider.shape.hidden, wider.shape.layers, wider.shape.vocab) == (512, 2, 4096)


@pytest.mark.parametrize("name", ["Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-Coder-0.5B", "qwen2.5-coder-0.5b"])
def test_a_model_is_found_by_name_and_by_hub_id(name):
    assert models.resolve(name).location == "Qwen/Qwen2.5-Coder-0.5B"


def test_an_unknown_name_gets_the_nearest_one_and_where_the_list_is():
    with pytest.raises(MissingInput) as error:
        models.resolve("phi2")
    assert str(error.value) == (f"Unknown base model 'phi2'. Nearest: phi-2. docs/models.md lists the "
                                f"{len(models.registry())} known names; a hub id (org/name) or a local "
                                "folder "
                                "serves too.")


def test_a_local_folder_becomes_a_base_with_its_sentinels_and_layers(tmp_path):
    base = models.resolve(str(folder(tmp_path / "mine")))
    assert (base.name, base.shape.hidden, base.fim["prefix"]) == ("mine", 64, "<|fim_prefix|>")
    assert base.lora_targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert models.available(base, online=False) == ""
    assert models.fetch(base, lambda *told: None) == str(tmp_path / "mine")


def test_a_folder_whose_tokenizer_knows_no_sentinels_gets_none(tmp_path):
    assert models.resolve(str(folder(tmp_path / "mine", tokens=QWEN_FIM[:2]))).fim == {}


def broken(kind, path):
    if kind == "config":
        (path / "config.json").unlink()
    elif kind == "json":
        (path / "config.json").write_text("{")
    elif kind == "tokenizer":
        (path / "tokenizer.json").unlink()
    elif kind == "weights":
        (path / "model.safetensors").unlink()
    elif kind == "torn":
        safetensors(path / "model.safetensors", torn=True)
    elif kind == "header":
        (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    elif kind == "shard":
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors",
                                                                                      "b": "2.safetensors"}}))
        safetensors(path / "1.safetensors")
    elif kind == "pickle":
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
    elif kind == "adapter":
        (path / "adapter_config.json").write_text("{}")
    elif kind == "outside":
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../1.safetensors"}}')
    elif kind == "deep":
        (path / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(("kind", "message"), [
    ("config", "config.json is missing"),
    ("json", "config.json is not valid JSON"),
    ("tokenizer", "the tokenizer is missing (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)"),
    ("weights", "the weights are missing (model.safetensors or model.safetensors.index.json with its "
                "shards)"),
    ("header", "model.safetensors has no valid header"),
    ("shard", "2.safetensors of 2 weight files is missing"),
    ("pickle", "the weights are a pickle, which can run code when it is read; convert them to "
               "model.safetensors"),
    ("adapter", "it holds an adapter of its own (adapter_config.json), which Transformers would load with "
                "it; remove it"),
    ("outside", "model.safetensors.index.json names '../1.safetensors', which is no file of this folder"),
    ("deep", "config.json is not valid JSON"),
])
def test_a_folder_that_is_not_whole_says_what_is_missing(tmp_path, kind, message):
    path = folder(tmp_path / "mine")
    broken(kind, path)
    with pytest.raises(MissingInput) as error:
        models.resolve(str(path))
    assert str(error.value) == f"Base model {path} is not whole: {message}."


def test_a_cut_off_weight_file_is_noticed_by_its_size(tmp_path):
    path = folder(tmp_path / "mine")
    size = (path / "model.safetensors").stat().st_size
    broken("torn", path)
    assert weights.folder_problems(path) == [f"model.safetensors has {size - 4:,} bytes where its header "
                                             f"says {size:,}"]


def test_everything_wrong_with_a_folder_is_said_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput) as error:
        models.resolve(str(tmp_path / "empty"))
    assert all(word in str(error.value) for word in ("config.json", "tokenizer", "weights"))


def test_a_folder_with_a_config_of_something_else_is_bad_data(tmp_path):
    path = folder(tmp_path / "mine", config={"model_type": "vit", "patch_size": 16})
    with pytest.raises(DataError, match=r"config\.json has no hidden_size; ELITE tunes decoder-only language "
                                        "models"):
        models.resolve(str(path))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "a/b/c", "~/nothing"])
def test_a_folder_that_does_not_exist_is_said_to_be_one(name):
    with pytest.raises(MissingInput, match="there is no such folder"):
        models.resolve(name)


def test_a_cached_hub_model_is_available_offline_and_fetched_from_there(empty_cache):
    path = cached(empty_cache, "microsoft/phi-2")
    base = models.registry()["phi-2"]
    assert models.available(base, online=False) == ""
    assert models.fetch(base, lambda *told: None) == str(path)


def test_a_hub_model_that_is_not_cached_is_not_available_offline():
    assert models.available(models.registry()["phi-2"], online=True) == (
        "not in the Hugging Face cache, and this run is offline")


def test_a_half_downloaded_cache_is_not_available(empty_cache):
    path = cached(empty_cache, "microsoft/phi-2")
    (path / "model.safetensors").unlink()
    assert models.available(models.registry()["phi-2"], online=False).startswith("the weights are missing")


def test_any_cached_hub_id_works_by_its_own_config(empty_cache):
    cached(empty_cache, "someone/own-coder")
    base = models.resolve("someone/own-coder")
    assert (base.name, base.location, base.shape.vocab) == ("own-coder", "someone/own-coder", 300)


def test_a_hub_that_answers_makes_a_model_available(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weights, "_ask", lambda hub_id, revision, method: b"")
    assert models.available(models.registry()["phi-2"], online=True) == ""


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def refuse(hub_id, revision, method):
        raise OSError("no route")
    monkeypatch.setattr(weights, "_ask", refuse)
    assert models.available(models.registry()["phi-2"], online=True) == (
        "not in the Hugging Face cache, and the hub does not answer (no route)")


def test_without_a_gpu_auto_is_the_embedded_model_with_the_arithmetic():
    chosen = models.choose("auto", profile(cpu__matmul_fp32=1.2e11), online=False)
    assert chosen.base.name == "embedded"
    assert chosen.fallback == ""
    assert chosen.why == ("no GPU was found; on this CPU (48 GFLOP/s, 0.4 of the measured matmul rate) "
                          "phi-2 would "
                          "take 6 x 2.78e9 / 4.8e+10 = 0.35 s a token, 4 days for a million tokens")


def test_without_a_gpu_a_base_that_cannot_be_loaded_is_replaced_and_says_why():
    chosen = models.choose("phi-2", profile(), online=False)
    assert chosen.base.name == "embedded"
    assert chosen.fallback == ("Base model microsoft/phi-2 cannot be loaded: not in the Hugging Face "
                               "cache, and this "
                               "run is offline. Training the embedded model instead.")
    assert models.choose("someone/unknown", profile(), online=False).base.name == "embedded"


def test_without_a_gpu_a_cached_base_is_kept(empty_cache):
    cached(empty_cache, "microsoft/phi-2")
    assert models.choose("phi-2", profile(), online=False).base.name == "phi-2"


def test_with_a_gpu_nothing_is_replaced_in_silence():
    for name in ("phi-2", "auto", "someone/unknown"):
        with pytest.raises(MissingInput):
            models.choose(name, profile(24), online=False)
    with pytest.raises(MissingInput) as error:
        models.choose("phi-2", profile(24), online=False)
    assert str(error.value) == (
        "Base model microsoft/phi-2 cannot be loaded: not in the Hugging Face cache, and this run is "
        "offline. Connect "
        "and run `hf download microsoft/phi-2`, give a local folder, or ask for the small built-in model "
        "with "
        "`--base-model embedded`.")
    assert models.choose("embedded", profile(24), online=False).base.name == "embedded"


def test_a_local_folder_that_is_torn_is_never_replaced(tmp_path):
    path = folder(tmp_path / "mine")
    broken("torn", path)
    with pytest.raises(MissingInput, match=r"is not whole: model\.safetensors has"):
        models.choose(str(path), profile(), online=False)


@pytest.mark.parametrize(("gpu_gib", "name"), [(8, "qwen2.5-coder-0.5b"), (24, "qwen2.5-coder-7b"),
                                               (139, "qwen2.5-coder-32b")])
def test_auto_on_a_gpu_takes_the_largest_that_fits(empty_cache, gpu_gib, name):
    for hub_id in ("0.5B", "1.5B", "7B", "14B", "32B"):
        cached(empty_cache, f"Qwen/Qwen2.5-Coder-{hub_id}")
    chosen = models.choose("auto", profile(gpu_gib, gpu0__matmul_bf16=3e14), online=False)
    assert chosen.base.name == name
    assert "the largest that fits with NF4 and LoRA at 16,384 tokens" in chosen.why


def test_auto_on_a_gpu_takes_a_smaller_one_that_is_there(empty_cache):
    cached(empty_cache, "Qwen/Qwen2.5-Coder-1.5B")
    assert models.choose("auto", profile(139), online=False).base.name == "qwen2.5-coder-1.5b"


def test_auto_on_a_slow_gpu_stays_within_the_hours(empty_cache):
    for hub_id in ("0.5B", "1.5B", "7B", "14B", "32B"):
        cached(empty_cache, f"Qwen/Qwen2.5-Coder-{hub_id}")
    chosen = models.choose("auto", profile(139, gpu0__matmul_fp16=1e13), online=False)
    # 6 x 1.54e9 x 1e7 / 4e12 = 6.4 h; 7 B would take 32 h
    assert chosen.base.name == "qwen2.5-coder-1.5b"


def test_the_rows_for_the_documentation_cover_the_registry():
    assert [row["name"] for row in models.rows()] == list(models.registry())


def test_models_import_neither_torch_nor_the_hub_client():
    code = ("import sys; from training import models; models.registry(); "
            "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
