import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from repositories import EMAIL_PACKAGE, FUNCTION, JSON_PACKAGE, make, settings, small_project, write_tree

from training.dataset import DatasetGenerator, WindowStore, staging
from training.dataset.sources.checkout import without_password
from training.dataset.completions import completion_spans
from training.dataset.structure.edges import parse_python
from training.dataset.sources.repository import SourceFile
from training.dataset.split import leakage, split
from training.dataset.tokenizer import train_embedded
from training.errors import CannotWrite, DataError, MissingInput, UsageError
from training.records import BaseModel, ModelShape

SHAPE = ModelShape(family="llama", hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, intermediate=8,
                   vocab=500,
                   native_context=64, rope=True, tied=True, parameters={})
REGIMES = [{"context_tokens": 256, "target_tokens": 256}, {"context_tokens": 512, "target_tokens": 64},
           {"context_tokens": 512, "target_tokens": 128, "fim_share": 0.7},
           {"context_tokens": 128, "target_tokens": 128, "fim_share": 0.5}]


def trained_places(store: WindowStore, split_name: str) -> np.ndarray:
    """How often each stored token is a target in one pass."""
    counts = np.zeros(10_000_000, dtype=np.int64)
    for index in range(store.count(split_name)):
        for start, length, trained in store.segments(split_name, index):
            counts[start:start + length] += trained
    return counts


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("package", [JSON_PACKAGE, EMAIL_PACKAGE])
def test_every_file_and_token_of_a_real_package_is_accounted_for(tmp_path, regime, package):
    manifest, store = make(package, tmp_path, **regime)
    files, tokens = manifest["files"], manifest["tokens"]
    assert files["accepted"] + sum(files["dropped"].values()) == files["seen"]
    assert files["train"] + files["held_out"] == files["accepted"]
    assert tokens["lost"] == 0
    assert tokens["trained_per_epoch"] == tokens["train"] + tokens["infill_ends"]
    lengths = [store.window("train", index) for index in range(store.count("train"))]
    assert max(len(ids) for ids, _ in lengths) <= regime["context_tokens"]
    assert sum(int((labels >= 0).sum()) for _, labels in lengths) == tokens["trained_per_epoch"]
    assert manifest["windows"] == {"train": store.count("train"), "held_out": store.count("held_out")}
    assert store.count("held_out") > 0
    text_bytes = sum(store.target_bytes("train", index) for index in range(store.count("train")))
    assert text_bytes == manifest["bytes"]["train"]
    assert (manifest["tokens"]["infill_ends"] > 0) == ("fim_share" in regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_windows_are_gathered_from_the_stored_tokens_and_labels_are_the_ids_or_no_loss(tmp_path, regime):
    _, store = make(JSON_PACKAGE, tmp_path, **regime)
    tokens = np.fromfile(store.path / "tokens.bin", dtype=store.manifest["store"]["dtype"])
    for name in ("train", "held_out"):
        for index in range(store.count(name)):
            ids, labels = store.window(name, index)
            parts = store.segments(name, index)
            assert np.array_equal(ids,
                                  np.concatenate([tokens[start:start + length] for start, length,
                                                  _ in parts]))
            assert np.array_equal(labels[labels != -100], ids[labels != -100])
            assert labels[0] == -100, "nothing precedes the first token"
            assert ids.dtype == labels.dtype == np.int64
        assert trained_places(store, name)[4:].max() == 1


def test_the_trained_text_is_the_training_files_text(tmp_path):
    repo = small_project(tmp_path / "repo")
    _, store = make(repo, tmp_path / "run", context_tokens=256, target_tokens=32)
    targets = "".join(sample["target"] for sample in DatasetGenerator(
        settings(repo), tmp_path / "run").samples(100_000))
    held_out = {item["path"] for item in store.completions()}
    trained = [path for path in sorted(repo.rglob("*.py"))
               if path.relative_to(repo).as_posix() not in held_out]
    assert held_out
    for path in trained:
        assert path.read_text() in targets
    for name in held_out:
        assert (repo / name).read_text() not in targets


@pytest.mark.parametrize("regime", REGIMES)
def test_two_runs_write_the_same_bytes(tmp_path, regime):
    repo = small_project(tmp_path / "repo")
    for name in ("one", "two"):
        make(repo, tmp_path / name, **regime)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")
                   if path.is_file())
    assert len(files) >= 10
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_dataset_of_the_same_text_and_settings_is_reused_and_only_then(tmp_path):
    repo = small_project(tmp_path / "repo")
    first, store = make(repo, tmp_path / "run", context_tokens=128, target_tokens=128)
    stamp = (store.path / "tokens.bin").stat().st_mtime_ns
    again, _ = make(repo, tmp_path / "run", context_tokens=128, target_tokens=128)
    assert again == first
    assert (store.path / "tokens.bin").stat().st_mtime_ns == stamp
    longer, _ = make(repo, tmp_path / "run", context_tokens=256, target_tokens=256)
    assert longer["fingerprint"] != first["fingerprint"]
    (repo / "app" / "base.py").write_text(FUNCTION.format(name="changed") * 3)
    changed, _ = make(repo, tmp_path / "run", context_tokens=256, target_tokens=256)
    assert changed["digest"] != longer["digest"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dataset"]
    assert not (tmp_path / "run" / "dataset" / ".replaced").exists()


def test_one_small_file_is_cut_in_two(tmp_path):
    text = "".join(FUNCTION.format(name=f"f{index}") for index in range(30))
    repo = write_tree(tmp_path / "repo", {"only.py": text})
    for name, regime in enumerate(REGIMES):
        manifest, store = make(repo, tmp_path / str(name), **regime)
        assert manifest["tokens"]["lost"] == 0
        assert manifest["bytes"]["train"] + manifest["bytes"]["held_out"] == len(text)
        assert 0.08 < manifest["bytes"]["held_out"] / len(text) < 0.2
        assert store.count("held_out") >= 1


@pytest.mark.parametrize("text", ["x = 'one line without an end and some more words in it, quite a few'",
                                  "word " * 13])
def test_the_smallest_file_still_gives_both_sides(tmp_path, text):
    manifest, store = make(write_tree(tmp_path / "repo", {"a.py": text}), tmp_path / "run", context_tokens=64,
                           target_tokens=64)
    assert store.count("train") >= 1
    assert store.count("held_out") >= 1
    assert manifest["tokens"]["lost"] == 0


def test_windows_of_two_tokens_still_train_every_token_and_one_is_refused(tmp_path):
    repo = write_tree(tmp_path / "repo",
                      {"a.py": FUNCTION.format(name="a") * 2, "b.py": FUNCTION.format(name="b")})
    manifest, store = make(repo, tmp_path / "run", context_tokens=2, target_tokens=1)
    assert manifest["tokens"]["lost"] == 0
    assert store.count("train") == manifest["tokens"]["train"]
    with pytest.raises(UsageError, match=r"dataset.context_tokens is 1; the least is 2"):
        make(repo, tmp_path / "other", context_tokens=1, target_tokens=1)


def test_a_repository_without_code_leaves_no_output_behind(tmp_path):
    write_tree(tmp_path / "repo", {"a.png": b"\0"})
    with pytest.raises(DataError, match="1 unknown type"):
        make(tmp_path / "repo", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path):
    repo = small_project(tmp_path / "repo")
    write_tree(tmp_path / "run",
               {"dataset/manifest.json": '{"name": "a browser extension"}', "dataset/mine.txt": "mine"})
    with pytest.raises(CannotWrite, match="exists and is no dataset"):
        make(repo, tmp_path / "run")
    assert (tmp_path / "run/dataset/mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        make(repo, tmp_path / "file")


def test_a_dataset_with_a_file_of_the_users_in_it_is_not_replaced(tmp_path):
    repo = small_project(tmp_path / "repo")
    make(repo, tmp_path / "run", context_tokens=128, target_tokens=128)
    (tmp_path / "run/dataset/notes.txt").write_text("mine")
    with pytest.raises(CannotWrite, match="exists and is no dataset"):
        make(repo, tmp_path / "run", context_tokens=256, target_tokens=256)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CannotWrite, match=r"needs about [\d,]+ bytes in .*; 1 are free"):
        make(small_project(tmp_path / "repo"), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_stopping_in_the_middle_leaves_nothing_and_leftovers_of_the_dead_are_swept(tmp_path):
    repo = small_project(tmp_path / "repo")

    def stop(phase: str, done: int, total: int, detail: str) -> None:
        if phase == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DatasetGenerator(settings(repo), tmp_path / "run").generate(stop)
    assert list((tmp_path / "run").iterdir()) == []
    dead = tmp_path / "run" / f"{staging._prefix(tmp_path / 'run' / 'dataset')}999999999-x"
    alive = tmp_path / "run" / f"{staging._prefix(tmp_path / 'run' / 'dataset')}{os.getpid()}-x"
    dead.mkdir()
    alive.mkdir()
    make(repo, tmp_path / "run")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_progress_names_each_phase_in_order(tmp_path):
    seen: list[str] = []
    DatasetGenerator(settings(small_project(tmp_path / "repo")), tmp_path / "run").generate(
        lambda phase, done, total, detail: seen.append(phase))
    assert list(dict.fromkeys(seen)) == ["read", "redact", "tokenizer", "encode", "windows", "write"]


def test_a_torn_or_missing_store_is_refused(tmp_path):
    with pytest.raises(MissingInput, match="There is no dataset"):
        WindowStore.open(tmp_path)
    _, store = make(small_project(tmp_path / "repo"), tmp_path / "run", context_tokens=128, target_tokens=128)
    store.verify()
    tokens = store.path / "tokens.bin"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-2])
    with pytest.raises(DataError, match="the manifest says"):
        WindowStore.open(store.path)
    tokens.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match="was changed"):
        WindowStore.open(store.path).verify()
    tokens.unlink()
    with pytest.raises(DataError, match=r"lacks tokens.bin"):
        WindowStore.open(store.path)


def test_the_order_is_a_pure_function_of_seed_and_epoch(tmp_path):
    _, store = make(JSON_PACKAGE, tmp_path, context_tokens=128, target_tokens=128)
    first = store.order(1, 0)
    assert sorted(first) == list(range(store.count("train")))
    assert np.array_equal(first, WindowStore.open(store.path).order(1, 0))
    assert not np.array_equal(first, store.order(1, 1))
    assert not np.array_equal(first, store.order(2, 0))


def test_a_base_models_tokenizer_and_sentinels_are_used(tmp_path):
    folder = tmp_path / "base"
    coder = train_embedded(["def f(x):\n    return x\n"] * 9, 300, 1, folder)
    shape = {"name": "b", "location": str(folder), "licence": "", "shape": SHAPE, "lora_targets": ()}
    sentinels = {"prefix": "<|fim_prefix|>", "suffix": "<|fim_suffix|>", "middle": "<|fim_middle|>"}
    config = settings(JSON_PACKAGE, context_tokens=256, target_tokens=64, fim_share=1.0)
    plain = DatasetGenerator(config, tmp_path / "plain", BaseModel(**shape)).generate()
    infilled = DatasetGenerator(config, tmp_path / "fim", BaseModel(**shape, fim=sentinels)).generate()
    assert (plain["infilled"], infilled["infilled"]) == (False, True)
    store = WindowStore.open(tmp_path / "fim/dataset")
    assert store.vocab_tokens == coder.vocab_tokens
    ids, _ = store.window("train", 0)
    assert set(coder.fim.values()) <= set(ids.tolist())
    copied = tmp_path / "fim/dataset/tokenizer/tokenizer.json"
    assert copied.read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_dataset_can_be_written_to_a_folder_of_its_own(tmp_path):
    repo = small_project(tmp_path / "repo")
    DatasetGenerator(settings(repo), tmp_path, folder=tmp_path / "only").generate()
    assert WindowStore.open(tmp_path / "only").count("train") >= 1


def test_samples_show_context_and_target_apart(tmp_path):
    repo = small_project(tmp_path / "repo")
    make(repo, tmp_path / "run", context_tokens=512, target_tokens=48)
    samples = DatasetGenerator(settings(repo), tmp_path / "run").samples(3)
    assert len(samples) == 3
    for sample in samples:
        assert sample["target_tokens"] <= 48
        assert sample["context"].startswith("# repository: repo\n")
        assert "# path: " in sample["context"]
        assert "".join(piece["text"] for piece in sample["pieces"] if piece["trained"]) == sample["target"]


def test_completions_are_spans_of_held_out_files_and_python_ones_parse(tmp_path):
    manifest, store = make(EMAIL_PACKAGE, tmp_path, context_tokens=256, target_tokens=256)
    spans = store.completions()
    assert 8 <= len(spans) <= 64
    assert manifest["completions"] == len(spans)
    for span in spans:
        text = (Path(EMAIL_PACKAGE) / span["path"]).read_text()
        assert span["middle"].strip()
        assert len(span["middle"].split("\n")) <= 3
        assert len(span["prefix"]) <= 2_000
        assert span["prefix"].rstrip("\n").split("\n")[-1] in text
        assert span["header"] == f"# path: {span['path']}\n"
        if span["parses"]:
            assert parse_python(span["prefix"] + span["middle"] + span["suffix"]) is not None
    assert sum(bool(span["parses"]) for span in spans) >= len(spans) / 2


def test_lines_of_other_languages_are_completed_too():
    text = "package main\n\nfunc main() {\n\tprintln(\"hello\")\n\tprintln(\"world\")\n}\n"
    spans = completion_spans([SourceFile(path="a.go", language="go", kind="code", text=text)], 1)
    assert spans
    assert all(span["prefix"] + span["middle"] in text and span["parses"] is None for span in spans)


def source(path: str, text: str) -> SourceFile:
    return SourceFile(path=path, language="python", kind="code", text=text)


def test_copies_and_same_stems_stay_on_one_side():
    body = "".join(FUNCTION.format(name=f"f{index}") + f"UNIQUE_{index} = {index}\n" for index in range(20))
    other = [source(f"lib/m{index}.py",
                    "".join(f"value_{index}_{line} = compute({line})\n" for line in range(30)))
             for index in "abcdefghijklmnop"]
    files = [source("a/x.py", body), source("b/y.py", body + "EXTRA = 1\n"),
             source("c/x_old.py", "# other\n" * 60),
             source("c/x.py", "# another\n" * 60), *other]
    for seed in range(60):
        _, held_out = split(files, 0.2, seed)
        names = {item.path for item in held_out}
        assert names
        assert len(names & {"a/x.py", "b/y.py"}) != 1
        assert len(names & {"c/x_old.py", "c/x.py"}) != 1


def test_the_larger_part_is_never_held_out():
    files = [source("big.py", "x = 1\n" * 5_000), source("small.py", "print(2)\n" * 60)]
    for seed in range(8):
        train, held_out = split(files, 0.05, seed)
        assert [item.path for item in train] == ["big.py"]
        assert [item.path for item in held_out] == ["small.py"]


def test_leakage_is_the_share_of_runs_of_thirteen_tokens_seen_in_training():
    ours = np.arange(100, dtype=np.int32)
    assert leakage([ours], [np.arange(200, 400, dtype=np.int32)]) == 0.0
    assert leakage([ours], [np.arange(0, 400, dtype=np.int32)]) == 1.0
    assert leakage([ours], [np.arange(50, 400, dtype=np.int32)]) == round((100 - 50 - 12) / 88, 6)
    assert leakage([np.arange(5, dtype=np.int32)], [ours]) is None


def test_the_manifest_holds_no_time_and_no_password(tmp_path):
    _, store = make(small_project(tmp_path / "repo"), tmp_path / "run")
    text = (store.path / "manifest.json").read_text()
    assert json.loads(text)["digest"] == store.digest
    assert str(tmp_path / "run") not in text
    assert "seconds" not in text
    config = settings("https://me:pass" + "word@example.org/a.git")
    assert without_password(config["dataset.repo"]) == "https://example.org/a.git"
