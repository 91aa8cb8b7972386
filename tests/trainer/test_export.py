"""The written result: it loads with plain Transformers and PEFT elsewhere, and is whole or absent."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import modeling_utils

from tests.checkpoints import make_tiny_checkpoint
from tests.stores import make_store
from training.errors import CannotWrite
from training.settings import Config
from training.trainer.export import export, weights_digest
from training.trainer.imports import unwrapped
from training.trainer.loading import load
from training.trainer.loss import held_still

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
FACTS = {"steps": 1200, "before": {"loss": 6.5, "exact_match": None},
         "after": {"loss": 2.25, "identity": "abc", "samples": [{"path": "a.py"}]}}
# Runs each card's own Python, as a reader would, and says what the model answers.
READER = """
import re, sys, torch
answers = {}
for folder in sys.argv[2:]:
    card = open(folder + "/README.md", encoding="utf-8").read()
    exec(re.search(r"```python\\n(.*?)```", card, re.S).group(1))
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 60)[None]).logits.float()
    text = tokenizer.decode(tokenizer("def f(x):\\n    pass")["input_ids"])
    answers[folder] = type(model).__name__, len(tokenizer), text, logits
assert not [name for name in sys.modules if name.split(".")[0] == "training"]
torch.save(answers, sys.argv[1])
"""
YARN = {"dataset.context_tokens": 256, "model.rope_factor": 2.0}
CASES = {"embedded": {}, "adapter": {}, "nf4": {"model.quantization": "nf4"}, "yarn adapter": YARN,
         "yarn model": {**YARN, "lora.enabled": False}}


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "phi", "phi", context_tokens=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory, phi):
    return make_store(tmp_path_factory.mktemp("store"), phi)


def settings(base="embedded", **more):
    adapter = {} if base == "embedded" else {"lora.enabled": True, "lora.targets": ["q_proj", "fc1"]}
    return Config({"run.name": "parser", "model.base": str(base), "embedded.hidden": 64, "embedded.layers": 2,
                   "embedded.mlp": 128, "dataset.repo": "/home/me/parser", "dataset.target_tokens": 32,
                   "dataset.context_tokens": 96, **adapter, **more})


def moved(loaded):
    """Stand-in for training: every trainable weight changed."""
    torch.manual_seed(3)
    for parameter in loaded.trainable.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return loaded


def answers(loaded):
    with held_still(loaded.model):
        return loaded.model(IDS).logits.float()


@pytest.fixture(scope="module")
def exported(store, phi, tmp_path_factory):
    """By case: (folder written, answers of the model that was written, what another process read from it)."""
    place = tmp_path_factory.mktemp("exported")
    written = {}
    for case, more in CASES.items():
        config = settings("embedded" if case == "embedded" else phi, **more)
        loaded = moved(load(config, store, CPU))
        run = place / case.replace(" ", "-")
        written[case] = run / export(loaded, config, store.path, run, FACTS), answers(loaded)
    command = [sys.executable, "-c", READER, str(place / "read.pt"), *(str(f) for f, _ in written.values())]
    process = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    read = torch.load(place / "read.pt")
    return {case: (folder, wanted, read[str(folder)]) for case, (folder, wanted) in written.items()}


@pytest.mark.parametrize(("case", "name", "kind"), [
    ("embedded", "model", "LlamaForCausalLM"), ("adapter", "adapter", "PeftModelForCausalLM"),
    ("yarn adapter", "adapter", "PeftModelForCausalLM"), ("yarn model", "model", "PhiForCausalLM")])
def test_the_cards_python_loads_the_same_model_in_another_process(exported, case, name, kind):
    folder, wanted, (read_kind, tokens, text, logits) = exported[case]
    assert (folder.name, read_kind, tokens, text) == (name, kind, 768, "def f(x):\n    pass")
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_on_nf4_fits_the_unquantized_base(exported):
    _, wanted, (*_, logits) = exported["nf4"]
    assert torch.nn.functional.cosine_similarity(logits, wanted, dim=-1).mean() > 0.9


def test_the_layout_is_hugging_faces(exported, phi):
    folder = exported["embedded"][0]
    names = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    assert names <= {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (0, 0)
    adapter = json.loads((exported["adapter"][0] / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(phi)


def test_an_adapter_made_with_yarn_tells_the_base_its_rope(exported):
    text = (exported["yarn adapter"][0] / "README.md").read_text()
    assert "The base knows 128 tokens; the rest is reached with YaRN." in text
    assert "'factor': 2.0" in text
    assert "YaRN" not in (exported["adapter"][0] / "README.md").read_text()


def test_16_bit_runs_are_written_in_16_bit_and_go_on_in_float32(store, tmp_path):
    from safetensors.torch import load_file

    config = settings(**{"model.dtype": "bfloat16"})
    loaded = load(config, store, CPU)
    export(loaded, config, store.path, tmp_path, FACTS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights  # tied
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in loaded.trainable.values()} == {torch.float32}


def test_the_card_gives_the_figures_and_no_local_path_as_hub_name(store, phi, tmp_path):
    config = settings(phi)
    export(load(config, store, CPU), config, store.path, tmp_path, FACTS)
    text = (tmp_path / "adapter" / "README.md").read_text()
    for row in ("| Repository | parser |", "| Context | 96 tokens |", "| steps | 1,200 |",
                "| before loss | 6.5 |", "| after loss | 2.25 |", "| dataset windows train | 12 |"):
        assert row in text
    assert "exact match" not in text
    assert "identity" not in text
    assert "base_model:" not in text
    assert "/home/me" not in text


def test_a_second_export_replaces_the_first(store, tmp_path):
    loaded = load(settings(), store, CPU)
    export(loaded, settings(), store.path, tmp_path, FACTS)
    (tmp_path / "model" / "left_over").write_text("x")
    export(moved(loaded), settings(), store.path, tmp_path, FACTS)
    assert not (tmp_path / "model" / "left_over").exists()
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_disk_that_refuses_leaves_nothing_half_written(store, tmp_path):
    loaded = load(settings(), store, CPU)
    (tmp_path / "run").write_text("a file where the run directory should be")
    with pytest.raises(CannotWrite, match=re.escape(str(tmp_path / "run" / "model"))):
        export(loaded, settings(), store.path, tmp_path / "run", FACTS)
    with pytest.raises(CannotWrite):
        export(loaded, settings(), tmp_path / "no-dataset", tmp_path / "other", FACTS)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_model_that_nothing_wraps_is_written_without_a_look_for_deepspeeds_wrapper(monkeypatch):
    def look(*_, **__):
        raise AssertionError("this imports DeepSpeed")
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setattr(modeling_utils, "unwrap_model", look)
    model = torch.nn.Linear(1, 1)
    with unwrapped():
        assert modeling_utils.unwrap_model(model) is model
    assert modeling_utils.unwrap_model is look
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    with unwrapped():
        assert modeling_utils.unwrap_model is look


def test_the_digest_depends_on_names_types_shapes_and_bytes_not_on_order():
    a, b = torch.arange(6.0), torch.ones(2, 2, dtype=torch.bfloat16)
    base = weights_digest({"a": a, "b": b})
    assert len(base) == 64
    assert weights_digest({"b": b, "a": a}) == base
    assert weights_digest({"a": torch.nn.Parameter(a.clone()), "b": b}) == base
    changed = a.clone()
    changed[5] = 5.000001
    for other in ({"a": a, "c": b}, {"a": a, "b": b.half()}, {"a": a.reshape(2, 3), "b": b},
                  {"a": changed, "b": b}):
        assert weights_digest(other) != base
    assert weights_digest({"s": torch.tensor(1.0)}) != weights_digest({"s": torch.tensor([1.0])})
