"""What a resume compares, refuses with the difference, and allows by name."""

import json

import pytest
from trainer_fakes import config_of

from training.errors import DataError, Problems, UsageError
from training.rundir import RunDirectory
from training.settings import Config
from training.trainer import identities
from training.trainer.journal import Journal, read_lines


def made(**changes):
    found = identities.identity(config_of(), "d" * 64, "b" * 64, {"torch": "2.13.0", "peft": "0.21.0"})
    return found | changes


CHANGES = [
    ("training.learning_rate", {"config": identities.identity(config_of(training__learning_rate=0.5), "")[
        "config"]}, UsageError, "training.learning_rate was 0.01 in checkpoint-9 and is 0.5 now"),
    ("windows per update", {"config": identities.identity(config_of(training__micro_batch=8), "")["config"]},
     UsageError, "windows per update was 4 in checkpoint-9 and is 16 now"),
    ("data", {"data": "e" * 64}, DataError, "The dataset changed since checkpoint-9 (digest dddddddddddd"),
    ("base", {"base": "c" * 64}, DataError, "The base model's files changed since checkpoint-9"),
    ("versions.torch", {"versions": {"torch": "2.14.0", "peft": "0.21.0"}}, UsageError,
     "torch was 2.13.0 in checkpoint-9 and is 2.14.0 now, which may round otherwise; install 2.13.0")]


@pytest.mark.parametrize(("key", "change", "error", "says"), CHANGES)
def test_each_change_is_refused_with_the_difference_and_the_way_on(key, change, error, says):
    with pytest.raises(error) as caught:
        identities.refuse_changes(made(), made(**change), "checkpoint-9")
    assert says in str(caught.value)
    assert f"--allow-change {key!r}" in str(caught.value) or f"--allow-change {key}," in str(caught.value)


@pytest.mark.parametrize(("key", "change", "error", "says"), CHANGES)
def test_each_is_allowed_by_its_name_alone(key, change, error, says):
    found = identities.refuse_changes(made(), made(**change), "checkpoint-9", [key])
    assert [entry["key"] for entry in found] == [key]
    with pytest.raises(error):
        identities.refuse_changes(made(), made(**change), "checkpoint-9", ["run.seed"])


def test_all_changes_are_told_at_once():
    with pytest.raises(Problems) as caught:
        identities.refuse_changes(made(), made(data="e" * 64, base="c" * 64), "checkpoint-9")
    assert len(caught.value.problems) == 2


def test_a_checkpoint_without_base_or_versions_counts_as_unchanged():
    older = {"config": made()["config"], "data": "d" * 64}
    assert identities.refuse_changes(older, made(), "checkpoint-9") == []


def test_allowed_changes_are_recorded(tmp_path):
    run = RunDirectory(tmp_path)
    Journal(run).changes([{"key": "run.seed", "before": 1, "after": 2}], "checkpoint-9")
    (line,) = read_lines(run.changes)
    assert (line["key"], line["before"], line["after"], line["since"]) == ("run.seed", 1, 2, "checkpoint-9")
    Journal(run).changes([], "checkpoint-9")
    assert len(read_lines(run.changes)) == 1


def test_versions_are_those_of_what_the_run_computes_with():
    plain = identities.versions_of(Config({"optimizer.name": "adamw"}))
    assert set(plain) == {"torch", "transformers"}
    assert "+" not in plain["torch"]
    lora = {"lora.enabled": True, "lora.targets": ["q_proj"]}
    eight = identities.versions_of(Config({**lora, "optimizer.name": "adamw_8bit"}))
    assert set(eight) == {"torch", "transformers", "peft", "bitsandbytes"}
    zero = identities.versions_of(Config({"deepspeed.stage": 2}))
    assert set(zero) == {"torch", "transformers", "deepspeed"}


def base_at(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights" * 100)
    (path / "README.md").write_text("words")
    return path


def test_the_bases_digest_follows_weights_and_configuration_and_nothing_else(tmp_path):
    base, run = base_at(tmp_path / "base"), RunDirectory(tmp_path)
    config = Config({"model.base": str(base)})
    first = identities.base_digest(config, run)
    assert len(first) == 64
    (base / "README.md").write_text("other words")
    assert identities.base_digest(config, run) == first
    weights = base / "model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    second = identities.base_digest(config, run)
    assert second != first
    (base / "config.json").write_text("{ }")
    assert identities.base_digest(config, run) != second
    assert identities.base_digest(Config({}), run) == ""


def test_files_that_did_not_change_are_hashed_once(tmp_path, monkeypatch):
    base, run = base_at(tmp_path / "base"), RunDirectory(tmp_path)
    config, read = Config({"model.base": str(base)}), []
    hashed = identities.sha256
    monkeypatch.setattr(identities, "sha256", lambda path: (read.append(path.name), hashed(path))[1])
    first = identities.base_digest(config, run)
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert identities.base_digest(config, run) == first
    assert len(read) == 2
    (run.base_digests).write_text("{")
    assert identities.base_digest(config, run) == first
    assert len(read) == 4
    assert set(json.loads(run.base_digests.read_text())) == {"config.json", "model.safetensors"}
