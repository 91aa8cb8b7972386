import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from repositories import EMAIL_PACKAGE, FUNCTION, JSON_PACKAGE, make, settings, small_project, write_tree

from training.dataset import DatasetGenerator, WindowStore, making, staging
from training.dataset import corpus as corpora
from training.dataset.sources.repository import list_repository
from training.dataset.structure.edges import parse_python
from training.dataset.structure.syntax import Import
from training.dataset.tokenizer import open_folder, train_embedded
from training.errors import CannotWrite, DataError, UsageError
from training.records import BaseModel, ModelShape
from training.texts import without_password

SHAPE = ModelShape(family="llama", hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, intermediate=8,
                   vocab=500,
                   native_context=64, rope=True, tied=True, parameters={})
REGIMES = [{"context_tokens": 256, "target_tokens": 256}, {"context_tokens": 512, "target_tokens": 64},
           {"context_tokens": 512, "target_tokens": 128, "fim_share": 0.4, "fim_rate": 0.7,
            "whole_share": 0.2},
           {"context_tokens": 128, "target_tokens": 128, "fim_share": 0.5}]


def trained_places(store: WindowStore, split_name: str) -> np.ndarray:
    """How often each stored token is a target in one pass."""
    counts = np.zeros(10_000_000, dtype=np.int64)
    for index in range(store.count(split_name)):
        for segment in store.segments(split_name, index):
            if segment.start >= 0:
                counts[segment.start:segment.start + segment.length] += segment.trained
    return counts


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("package", [JSON_PACKAGE, EMAIL_PACKAGE])
def test_every_file_and_token_of_a_real_package_is_accounted_for(tmp_path, regime, package):
    manifest, store = make(package, tmp_path, **regime)
    files, tokens = manifest["files"], manifest["tokens"]
    assert files["accepted"] + sum(files["dropped"].values()) == files["seen"]
    assert files["train"] + files["held_out"] == files["accepted"]
    assert tokens["lost"] == 0
    assert tokens["trained_per_epoch"] == tokens["train"]
    assert tokens["total"] == tokens["trained_per_epoch"] + tokens["held_out"] + tokens["rejected"]
    lengths = [store.window("train", index) for index in range(store.count("train"))]
    assert max(len(ids) for ids, _ in lengths) <= regime["context_tokens"]
    assert int((trained_places(store, "train") == 1).sum()) == tokens["trained_per_epoch"]
    assert manifest["windows"] == {"train": store.count("train"), "held_out": store.count("held_out")}
    assert store.count("held_out") > 0
    text_bytes = sum(store.target_bytes("train", index) for index in range(store.count("train")))
    assert text_bytes == manifest["bytes"]["train"]
    sentinels = set(manifest["store"]["fim"].values())
    infilled = sum(bool(sentinels & set(ids.tolist())) for ids, _ in lengths)
    assert (infilled > 0) == ("fim_share" in regime)
    kinds = manifest["kinds"]
    assert sum(kind["windows"] for kind in kinds.values()) == store.count("train")
    assert sum(kind["target_tokens"] for kind in kinds.values()) == tokens["trained_per_epoch"]
    assert ("fim" in kinds) == ("fim_share" in regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_windows_are_gathered_from_the_stored_tokens_and_labels_are_the_ids_or_no_loss(tmp_path, regime):
    _, store = make(JSON_PACKAGE, tmp_path, **regime)
    tokens = np.fromfile(store.path / "tokens.bin", dtype=store.manifest["store"]["dtype"])
    for name in ("train", "held_out"):
        for index in range(store.count(name)):
            ids, labels = store.window(name, index)
            parts = [tokens[part.start:part.start + part.length] if part.start >= 0 else [-1 - part.start]
                     for part in store.segments(name, index)]
            assert np.array_equal(ids, np.concatenate(parts))
            assert np.array_equal(labels[labels != -100], ids[labels != -100])
            assert labels[0] == -100, "nothing precedes the first token"
            assert ids.dtype == labels.dtype == np.int64
        assert trained_places(store, name).max() == 1


def test_the_trained_text_is_the_training_files_text(tmp_path):
    repo = small_project(tmp_path / "repo")
    _, store = make(repo, tmp_path / "run", context_tokens=256, target_tokens=32)
    coder = open_folder(store.path / "tokenizer", {})
    pieces: dict[str, dict[int, str]] = {}
    for index in range(store.count("train")):
        for segment in store.segments("train", index):
            if segment.trained:
                origin = store.origin(segment.start)
                text = coder.decode(store.tokens(segment.start, segment.length)).removesuffix("<|endoftext|>")
                pieces.setdefault(origin.path, {})[origin.byte] = text
    held_out = {item["path"] for item in store.completions()}
    names = {path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()}
    assert held_out
    assert set(pieces) == names - held_out
    for name, found in pieces.items():
        assert "".join(found[byte] for byte in sorted(found)) == (repo / name).read_text()


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
    assert not (tmp_path / "run").exists()


def test_stopping_in_the_middle_leaves_nothing_and_leftovers_of_the_dead_are_swept(tmp_path):
    repo = small_project(tmp_path / "repo")

    def stop(phase: str, done: int, total: int, detail: str) -> None:
        if phase == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DatasetGenerator(settings(repo), tmp_path / "run").generate(stop)
    assert not (tmp_path / "run").exists()
    dead = tmp_path / "run" / f"{staging._prefix(tmp_path / 'run' / 'dataset')}999999999-x"
    alive = tmp_path / "run" / f"{staging._prefix(tmp_path / 'run' / 'dataset')}{os.getpid()}-x"
    dead.mkdir(parents=True)
    alive.mkdir()
    make(repo, tmp_path / "run")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_progress_names_each_phase_in_order(tmp_path):
    seen: list[str] = []
    DatasetGenerator(settings(small_project(tmp_path / "repo")), tmp_path / "run").generate(
        lambda phase, done, total, detail: seen.append(phase))
    assert list(dict.fromkeys(seen)) == ["list", "read", "split", "tokenizer", "windows", "write"]


def test_a_base_models_tokenizer_and_sentinels_are_used(tmp_path):
    folder = tmp_path / "base"
    coder = train_embedded(["def f(x):\n    return x\n"] * 9, 300, 1, folder)
    shape = {"name": "b", "location": str(folder), "licence": "", "shape": SHAPE, "lora_targets": ()}
    sentinels = {"prefix": "<|fim_prefix|>", "suffix": "<|fim_suffix|>", "middle": "<|fim_middle|>"}
    config = settings(JSON_PACKAGE, context_tokens=256, target_tokens=64, fim_share=0.5, fim_rate=1.0)
    plain = DatasetGenerator(config, tmp_path / "plain", BaseModel(**shape)).generate()
    infilled = DatasetGenerator(config, tmp_path / "fim", BaseModel(**shape, fim=sentinels)).generate()
    assert (plain["infilled"], infilled["infilled"]) == (False, True)
    store = WindowStore.open(tmp_path / "fim/dataset")
    assert store.vocab_tokens == coder.vocab_tokens
    ids, _ = store.window("train", 0)
    assert set(coder.fim.values()) <= set(ids.tolist())
    assert store.manifest["store"]["fim_order"] == "psm"
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
        assert sample["kind"] == "cross-file"
        assert (repo / sample["path"]).is_file()
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


def test_the_manifest_holds_no_time_and_no_password(tmp_path):
    _, store = make(small_project(tmp_path / "repo"), tmp_path / "run")
    text = (store.path / "manifest.json").read_text()
    assert json.loads(text)["digest"] == store.digest
    assert str(tmp_path / "run") not in text
    assert "seconds" not in text
    config = settings("https://me:pass" + "word@example.org/a.git")
    assert without_password(config["dataset.repo"]) == "https://example.org/a.git"


def test_several_repositories_keep_their_names_and_resolve_their_own_imports_first(tmp_path):
    one = write_tree(tmp_path / "one", {"app/a.py": "from app import b\n" + FUNCTION.format(name="a") * 9,
                                        "app/b.py": FUNCTION.format(name="b") * 9,
                                        "app/__init__.py": "# one\n",
                                        "notes.md": "# One\n\nIt is the first.\n"})
    two = write_tree(tmp_path / "two", {"app/a.py": "from app import b\n" + FUNCTION.format(name="c") * 9,
                                        "app/b.py": FUNCTION.format(name="d") * 9,
                                        "app/__init__.py": "# two\n"})
    manifest, store = make(one, tmp_path / "run", also=[str(two)], context_tokens=2048, target_tokens=64)
    paths = {about["path"] for about in store.documents()}
    assert {"one/app/a.py", "two/app/a.py", "two/app/b.py"} <= paths
    assert [item["name"] for item in manifest["repositories"]] == ["one", "two"]
    facts = [corpora.Entry(path=f"{name}/app/{stem}.py", language="python", kind="code", bytes=1, digest=b"",
                           place=0, spans=(0, 0), skeleton=(0, 0), sketch=np.zeros(0), words=np.zeros(0),
                           structure_imports=(Import(0, "app", ("b",), "import"),) if stem == "a" else ())
             for name in ("one", "two") for stem in ("a", "b", "__init__")]
    places = [corpora.Place(named=name, listing=list_repository(tmp_path / name), prefix=f"{name}/")
              for name in ("one", "two")]
    maker = making.Maker(config=settings(one), base=None, places=places, corpus=None, replay=None,
                         folder=None, coder_of=None, progress=None)
    found = maker._edges(facts)
    assert found["one/app/a.py"][0] == "one/app/b.py"
    assert found["two/app/a.py"][0] == "two/app/b.py"


def test_a_second_corpus_is_mixed_in_by_its_share_and_never_as_context(tmp_path):
    other = write_tree(tmp_path / "other", {f"lib/x{index}.py": f"VALUE_{index} = '{index}'\n" * 30
                                            for index in range(30)})
    manifest, store = make(EMAIL_PACKAGE, tmp_path / "run", replay=str(other), replay_share=0.1,
                           context_tokens=512, target_tokens=128)
    tokens = manifest["tokens"]
    assert tokens["lost"] == 0
    assert 0 < tokens["replay"] <= 0.15 * tokens["trained_per_epoch"]
    assert manifest["kinds"]["replay"]["target_tokens"] == tokens["replay"]
    table = np.fromfile(store.path / "documents.bin", dtype=np.int64).reshape(-1, 4)
    second = [(int(row[0]), int(row[:3].sum())) for row, about in zip(table, store.documents(), strict=True)
              if about["split"] == "replay"]
    low, high = min(start for start, _ in second), max(end for _, end in second)
    for index in range(store.count("train")):
        inside = [low <= part.start < high for part in store.segments("train", index)]
        assert all(inside) if store.kind(index) == "replay" else not any(inside)


def test_a_package_inside_a_package_is_imported_by_its_full_name(tmp_path):
    write_tree(tmp_path / "top", {"__init__.py": "", "sub/__init__.py": "", "plain/a.py": ""})
    assert making.package_name(tmp_path / "top" / "sub") == "top.sub"
    assert making.package_name(tmp_path / "top" / "plain") == "plain"
    assert making.package_name(tmp_path / "top") == "top"


def test_every_file_that_is_left_out_is_listed_with_its_reason(tmp_path):
    repo = small_project(tmp_path / "repo")
    write_tree(repo, {"a\tb.png": b"\0", "web/x.min.js": "var a\n" * 9, "nul.py": b"a = 1\0\n"})
    manifest, store = make(repo, tmp_path / "run")
    rows = [line.split("\t") for line in (store.path / "left_out.tsv").read_text().splitlines()]
    assert sorted(rows) == sorted([["binary", "nul.py"], ["minified", "web/x.min.js"],
                                   ["unknown type", "a\\x09b.png"]])
    assert Counter(reason for reason, _ in rows) == manifest["files"]["dropped"]


def test_of_two_files_one_is_held_out_and_no_note_says_that_one_was_cut(tmp_path):
    text = "".join(FUNCTION.format(name=f"f{index}") for index in range(9))
    repo = write_tree(tmp_path / "repo", {"a.py": text, "b.py": text.replace("value", "count") + "X = 1\n"})
    manifest, _ = make(repo, tmp_path / "run")
    assert (manifest["files"]["train"], manifest["files"]["held_out"]) == (1, 1)
    assert " in 2 files" in " ".join(manifest["notes"])
    assert "its end held out" not in " ".join(manifest["notes"])
    alone = write_tree(tmp_path / "alone", {"a.py": text})
    assert "its end held out" in " ".join(make(alone, tmp_path / "other")[0]["notes"])


def test_repositories_without_code_are_all_named(tmp_path):
    for name in ("one", "two"):
        write_tree(tmp_path / name, {"notes.md": f"# {name}\n\nWords about it, but no code at all.\n"})
    with pytest.raises(DataError, match=r"/one and \S+/two holds no code to train on"):
        DatasetGenerator.survey([str(tmp_path / "one"), str(tmp_path / "two")])
