"""Pooled key and value heads: what is written, what it computes, what healing gives back, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_tiny_checkpoint
from run_maker import configure, dataset_at
from safetensors.torch import load_file, save_file
from stores import make_store

from training import weights
from training.errors import CannotWrite, MissingInput, StoppedByUser, UsageError
from training.longcontext.costs import page_bytes
from training.longcontext.geometry import Geometry
from training.longcontext.pages import Resident
from training.longcontext.policy import StreamPolicy
from training.longcontext.step import StreamedStep
from training.longcontext.verification import verify
from training.rundir import RunDirectory
from training.settings import Config
from training.shapes import shape_from_config
from training.trainer import grouped, healing, weightfiles
from training.trainer.batches import Layout, read_update
from training.trainer.export import export
from training.trainer.loading import load
from training.trainer.loss import causal_lm, causal_loss, held_still
from training.trainer.session import Session

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
TARGETS = ["q_proj", "k_proj", "v_proj"]


class Repeats:
    """Windows of one phrase over and over: only attention to the phrase before tells how it goes on."""

    pad_id, eos_id, vocab_tokens = 0, 0, 768

    def count(self, split):
        return 512 if split == "train" else 8

    def order(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(512)

    def written_to(self):
        return ""

    def window(self, split, index, seed=0, epoch=0, context_limit=None):
        source = np.random.default_rng((split == "train", index))
        period = int(source.integers(3, 9))
        ids = np.tile(source.integers(1, 40, period), 12)[:32].astype(np.int64)
        return ids, np.where(np.arange(32) < period, -100, ids)


def settings(base, **more):
    return Config({"model.base": str(base), "model.kv_heads": 2, "dataset.context_tokens": 32,
                   "dataset.target_tokens": 16, "training.micro_batch": 2, "training.accumulation": 2,
                   "training.checkpointing": False}
                  | {name.replace("__", "."): value for name, value in more.items()})


def logits(folder):
    loaded = load(settings(folder, model__kv_heads=0, model__attention="eager"), Repeats(), CPU)
    with held_still(loaded.model):
        return loaded.model(IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Llama with 4 key/value heads that has learned to repeat."""
    base = make_tiny_checkpoint(tmp_path_factory.mktemp("trained") / "llama", "llama", context_tokens=64,
                                initializer_range=0.02)
    model = load(settings(base, model__kv_heads=0), Repeats(), CPU).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    layout = Layout(windows=512, micro=8, accumulation=1, ranks=1)
    for step in range(120):
        batch = read_update(Repeats(), step, layout, 0, 1)[0][0]
        total, tokens = causal_loss(model, batch.ids, batch.labels, None, 0)
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
    return base


def made_alike(folder, family, groups):
    """A base of 4 heads whose key/value heads are alike within each group of indices."""
    base = make_tiny_checkpoint(folder, family, context_tokens=64, num_key_value_heads=4)
    held = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in held.items():
        if weightfiles.PROJECTION.search(name):
            heads = 0.3 * torch.randn(4, len(tensor) // 4, *tensor.shape[1:], generator=generator)
            for first, *others in groups:
                heads[others] = heads[first].clone()
            held[name] = heads.reshape(tensor.shape)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("family", ["phi", "llama", "qwen2", "qwen3"])
def test_pooling_heads_that_are_alike_changes_nothing(tmp_path, family):
    base = made_alike(tmp_path / "base", family, [(0, 1), (2, 3)])
    grouped.convert(base, 2, tmp_path / "pooled", config=settings(base))
    torch.testing.assert_close(logits(tmp_path / "pooled"), logits(base), rtol=1e-5, atol=1e-5)
    apart = made_alike(tmp_path / "apart", family, [(0, 2), (1, 3)])  # alike, but not next to each other
    grouped.convert(apart, 2, tmp_path / "other", config=settings(apart))
    assert (logits(tmp_path / "other") - logits(apart)).abs().max() > 0.1


def test_each_pooled_head_is_the_mean_of_its_group_and_the_rest_is_copied(tmp_path):
    base = make_tiny_checkpoint(tmp_path / "base", "phi", context_tokens=64)
    before = load_file(base / "model.safetensors")
    before |= {name: torch.randn_like(tensor) for name, tensor in before.items() if "bias" in name}
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    record = grouped.convert(base, 2, tmp_path / "pooled", config=settings(base))
    after = load_file(tmp_path / "pooled" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == 2 * 2 * 2  # layers, keys and values, weights and biases
    for name in changed:
        first, second, third, fourth = before[name].split(16)
        wanted = torch.cat([(first + second) / 2, (third + fourth) / 2])
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-7)
    assert (record.heads_before, record.heads_after) == (4, 2)
    assert (record.bytes_before, record.bytes_after) == (2 * 2 * 64 * 4, 2 * 2 * 32 * 4)
    names = {path.name for path in (tmp_path / "pooled").iterdir()}
    assert names == {path.name for path in base.iterdir()} | {"pooled.json"}
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "pooled"))
    assert new == old | {"num_key_value_heads": 2}


def test_shards_in_16_bits_keep_their_type_their_index_and_their_bytes(tmp_path):
    from transformers import AutoModelForCausalLM

    base = make_tiny_checkpoint(tmp_path / "base", "llama", context_tokens=64)
    model = AutoModelForCausalLM.from_pretrained(base).bfloat16()
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    grouped.convert(base, 1, tmp_path / "pooled", config=settings(base))
    assert len(weightfiles.shards(tmp_path / "pooled")) == len(weightfiles.shards(base)) > 2
    assert weights.folder_problems(tmp_path / "pooled") == []
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pooled", dtype="auto").state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    held = model.state_dict()
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(found[name], held[name].reshape(4, 16, 64).double().mean(0).bfloat16())
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], held["model.layers.1.mlp.up_proj.weight"])
    index = json.loads((tmp_path / "pooled" / weightfiles.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        load_file(path)[name].numel() * 2 for path in weightfiles.shards(tmp_path / "pooled")
        for name in load_file(path))


@pytest.mark.parametrize(("family", "more", "kv_heads", "why"), [
    ("gpt2", {}, 2, "its configuration has no num_key_value_heads"),
    ("phi3", {}, 2, "0 k_proj and v_proj weights in 2 layers, where two each are known"),
    ("olmo2", {}, 2, r"k_norm\.weight has the shape \[64\], so each head has a norm of its own"),
    ("phi", {}, 3, "it has 4; set model.kv_heads to one of 1, 2, or"),
    ("qwen2", {}, 2, "it has 2; set model.kv_heads to one of 1, or"),
    ("llama", {"num_key_value_heads": 1}, 1, "it has 1; there are no fewer;")])
def test_a_base_that_cannot_be_pooled_so_is_refused(tmp_path, family, more, kv_heads, why):
    base = make_tiny_checkpoint(tmp_path / "base", family, context_tokens=64, **more)
    with pytest.raises(UsageError, match=rf"^model\.kv_heads is {kv_heads} and the key/value heads of this "
                                         rf"{family} base cannot be pooled to that: .*{why}.* leave "
                                         r"model\.kv_heads out\.$"):
        grouped.convert(base, kv_heads, tmp_path / "pooled", config=settings(base))
    assert not (tmp_path / "pooled").exists()


def test_other_formats_a_base_that_is_not_here_and_a_full_disk_are_told(tmp_path, monkeypatch):
    base = make_tiny_checkpoint(tmp_path / "base", "llama", context_tokens=64)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingInput, match=r"nobody/none is not on this machine.*`hf download nobody/none`"):
        grouped.source_of(settings("nobody/none"))

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(weightfiles, "publish", full)
    with pytest.raises(CannotWrite, match=r"pooled: No space left on device\.$"):
        grouped.convert(base, 2, tmp_path / "pooled", config=settings(base))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"the weights are a pickle, .*; convert them to model"):
        grouped.convert(base, 2, tmp_path / "pooled", config=settings(base))


def test_a_snapshot_in_the_hubs_cache_serves_too(tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "models--me--mine"
    snapshot = make_tiny_checkpoint(cached / "snapshots" / "abc", "llama", context_tokens=64)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert grouped.source_of(settings("me/mine")) == snapshot.resolve()


@pytest.fixture
def session(tmp_path):
    def make(base, trial=False, **more):
        (tmp_path / "run").mkdir(exist_ok=True)
        return Session(run=RunDirectory(tmp_path / "run"), local_rank=0, start=0.0, trial=trial,
                       config=settings(base, **more))
    return make


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_pooling_costs_and_healing_gives_back_and_moves_the_projections_alone(trained, session, caplog):
    caplog.set_level("INFO")
    folder = Path(grouped.prepare(session(trained), Repeats(), CPU))
    plain = load_file(folder / "model.safetensors")
    assert "Key/value heads pooled from 4 to 2 in each of 2 layers: 1,024 bytes a token become 512; not " \
           "healed." in caplog.text
    grouped.prepare(session(trained, model__heal_steps=20), Repeats(), CPU)
    found = healing.Healing(**json.loads((folder / "healing.json").read_text()))
    assert found.loss_base + 0.1 < found.loss_pooled
    assert found.loss_healed < found.loss_pooled - 0.3 * (found.loss_pooled - found.loss_base)
    assert (found.steps, found.held_out_windows, found.kept) == (20, 8, True)
    healed = load_file(folder / "model.safetensors")
    moved = {name for name in healed if not torch.equal(healed[name], plain[name])}
    assert moved == {name for name in healed if weightfiles.PROJECTION.search(name)}
    line = (f"held-out loss of the base {found.loss_base:.4f}, pooled {found.loss_pooled:.4f}, after 20 "
            f"updates in {found.seconds:,.0f} s {found.loss_healed:.4f}.")
    assert line in caplog.text
    model = load(settings(trained), Repeats(), CPU, str(folder)).model
    assert healing._held_out(model, Repeats(), settings(trained), CPU) == found.loss_healed


def test_a_whole_base_is_used_again_and_another_number_of_heads_or_updates_makes_a_new_one(trained, session):
    folder = Path(grouped.prepare(session(trained, model__heal_steps=2), Repeats(), CPU))
    first = times(folder)
    grouped.prepare(session(trained, model__heal_steps=2), Repeats(), CPU)
    assert times(folder) == first
    healed = load_file(folder / "model.safetensors")
    grouped.prepare(session(trained, model__heal_steps=3), Repeats(), CPU)
    assert json.loads((folder / "healing.json").read_text())["steps"] == 3
    (folder / "tokenizer.json").unlink()
    grouped.prepare(session(trained, model__heal_steps=2), Repeats(), CPU)
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], healed[name]) for name in healed)
    grouped.prepare(session(trained, model__kv_heads=1), Repeats(), CPU)
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    assert not (folder / "healing.json").exists()


def test_a_stopped_healing_starts_over_and_a_trial_does_not_heal(trained, session):
    made = session(trained, model__heal_steps=3)
    told = []

    def stop():
        told.append(None)
        if len(told) > 6:
            raise StoppedByUser("Stopped by the user before the first step; resume continues there.")
    made.watch.check = stop
    with pytest.raises(StoppedByUser):
        grouped.prepare(made, Repeats(), CPU)
    run = made.run.path
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["base"]
    assert not (run / "base" / "healing.json").exists()
    whole = times(run / "base")
    grouped.prepare(session(trained, model__heal_steps=3, trial=True), Repeats(), CPU)
    assert times(run / "base") == whole
    grouped.prepare(session(trained, model__heal_steps=3), Repeats(), CPU)
    assert (run / "base" / "healing.json").exists()


def test_healing_that_gains_nothing_leaves_the_pooled_weights(trained, session, monkeypatch):
    monkeypatch.setattr(healing, "RATE", 10.0)
    folder = Path(grouped.prepare(session(trained, model__heal_steps=2), Repeats(), CPU))
    assert "which is no gain, so not kept." in grouped.described(folder)
    made = settings(trained)
    grouped.convert(trained, 2, folder.parent / "plain", config=made)
    assert torch.equal(logits(folder), logits(folder.parent / "plain"))


def test_healing_in_16_bits_trains_float32_projections_and_stores_them_as_they_were(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    base.mkdir()
    for path in trained.glob("tokenizer*"):
        (base / path.name).write_bytes(path.read_bytes())
    AutoModelForCausalLM.from_pretrained(trained).bfloat16().save_pretrained(base)
    config = settings(base, model__heal_steps=1, model__dtype="bfloat16", lora__enabled=True,
                      lora__targets=TARGETS, training__micro_batch=1, training__checkpointing=True)
    grouped.convert(base, 2, tmp_path / "pooled", config=config)
    seen = []
    projections = healing._projections
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healing, "_projections", lambda *given: seen.append(projections(*given)) or seen[-1])
        patch.setattr(healing, "HELD_OUT_WINDOWS", 1)
        found = healing.heal(config, Repeats(), CPU, base, tmp_path / "pooled")
    assert {parameter.dtype for parameter in seen[0].values()} == {torch.float32}
    assert np.isfinite(found.loss_healed)
    stored = load_file(tmp_path / "pooled" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_other_ranks_wait_and_raise_what_the_first_one_met(trained, session, monkeypatch):
    asked = session(trained)
    asked.rank = 1

    def broadcast(box, src, device):
        box[0] = (UsageError, "the base cannot be pooled")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(UsageError, match=r"^the base cannot be pooled$"):
        grouped.prepare(asked, Repeats(), CPU)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, src, device: None)
    assert grouped.prepare(asked, Repeats(), CPU) == str(asked.run.path / "base")
    assert not (asked.run.path / "base").exists()
    asked.config = settings(trained, model__kv_heads=0)
    assert grouped.prepare(asked, Repeats(), CPU) == ""


def test_an_adapter_on_nf4_names_the_pooled_base_and_loads_beside_it(trained, session, tmp_path):
    from peft import AutoPeftModelForCausalLM

    more = {"lora__enabled": True, "lora__targets": TARGETS}
    folder = grouped.prepare(session(trained, **more), Repeats(), CPU)
    store = make_store(tmp_path / "store", trained, context_tokens=32, target_tokens=16)
    for quantization, close in (("none", 1e-4), ("nf4", None)):
        config = settings(trained, model__quantization=quantization, **more)
        loaded = load(config, store, CPU, folder)
        assert causal_lm(loaded.model).config.num_key_value_heads == 2
        for parameter in loaded.trainable.values():
            parameter.data += 0.01
        written = tmp_path / "run" / export(loaded, config, store.path, tmp_path / "run", {"steps": 1})
        assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
        again = AutoPeftModelForCausalLM.from_pretrained(written)
        if close:
            with held_still(loaded.model), held_still(again):
                torch.testing.assert_close(again(IDS).logits, loaded.model(IDS).logits, atol=close, rtol=1e-4)
    card = (written / "README.md").read_text()
    assert f"from {trained}, its key and value heads pooled to 2 stored in NF4" in card
    assert "The adapter fits the base with 2 key and value heads only" in card
    assert "| key value heads of the base | 4 |" in card


def test_the_streamed_steps_pages_shrink_by_the_factor(trained, tmp_path, monkeypatch):
    grouped.convert(trained, 1, tmp_path / "pooled", config=settings(trained))
    seen, predicted = [], []
    begin = Resident.begin
    monkeypatch.setattr(Resident, "begin", lambda pages, k, v: seen.append(k.shape[1]) or begin(pages, k, v))
    policy = StreamPolicy(chunk_tokens=8)
    for folder in (trained, tmp_path / "pooled"):
        model = load(settings(folder, model__kv_heads=0), Repeats(), CPU).model
        StreamedStep(model, policy)(IDS[:, :32], IDS[:, :32])
        assert verify(model, policy).gradient_distance < 1e-4
        shape = shape_from_config(json.loads((folder / "config.json").read_text()))
        predicted.append(page_bytes(Geometry(
            layers=shape.layers, hidden=shape.hidden, heads=shape.heads, key_heads=shape.kv_heads,
            head_dim=shape.head_dim, inner=shape.intermediate, vocabulary=shape.vocab, element_bytes=4),
            policy, 1024)["keys and values"])
    assert set(seen) == {4, 1}
    assert predicted[0] == 4 * predicted[1]


@pytest.mark.real
def test_a_whole_run_pools_heals_and_trains_an_adapter_on_the_result(trained, tmp_path):
    base = {"model.base": str(trained), "dataset.context_tokens": 64, "dataset.target_tokens": 32}
    run = dataset_at(tmp_path, **base)
    configure(run, **base, **{"model.kv_heads": 2, "model.heal_steps": 2, "lora.enabled": True,
                              "lora.targets": TARGETS, "training.max_steps": 2,
                              "evaluation.completions": 0})
    trainer = Path(grouped.__file__).parent.parent / "model_trainer_unified.py"
    done = subprocess.run([sys.executable, str(trainer), "--run-dir", str(run)], capture_output=True,
                          text=True, cwd="/", timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert re.search(r"Key/value heads pooled from 4 to 2 .* after 2 updates in \d+ s", told)
    assert json.loads((run / "result.json").read_text())["state"] == "done"
    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(run / "base")
