import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer_fakes import FakeStore, TinyModel, config_of, same, training_of, weights_of

from training.errors import CannotWrite, DataError, Problems, UsageError
from training.trainer import checkpoints, identities
from training.trainer.engine import Captured

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


@pytest.fixture
def two(tmp_path):
    """A run with checkpoints of steps 8 and 9."""
    training_of(tmp_path, config_of(training__save_steps=1)).train()
    return tmp_path


def test_only_the_newest_are_kept(two):
    assert sorted(path.name for path in two.glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]
    assert not [path for path in two.iterdir() if path.name.startswith((".staging-", "trash-"))]


def kept(path):
    return sorted(int(folder.name.split("-")[1]) for folder in path.glob("checkpoint-*"))


def evaluated(path, losses, **settings):
    """A run of 9 steps whose evaluations find these held-out losses, by step; which checkpoints are there
    after each step."""
    training, there = training_of(path, config_of(**{"training__eval_steps": 1, **settings})), []
    digest, after_step = identities.digest_of(training.identity), training._after_step

    def evaluate(step):
        if step in losses:
            training.journal.evaluation({"step": step, "loss": losses[step], "identity": digest})

    def after():
        after_step()
        there.append(kept(path))
    training.evaluate, training._after_step = evaluate, after
    training.train()
    return [*there[:-1], kept(path)]


def test_the_best_and_the_newest_two_are_kept(tmp_path):
    losses = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 3.4, 6: 3.2, 7: 3.1, 8: 3.9}
    there = evaluated(tmp_path, losses, training__save_steps=1)
    assert there == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7], [3, 7, 8], [3, 8, 9]]


def test_the_best_is_deleted_when_a_better_one_comes(tmp_path):
    losses = {2: 4.0, 4: 4.5, 6: 4.4, 7: 3.0, 8: 4.6}
    there = evaluated(tmp_path, losses, training__save_steps=1, training__keep_checkpoints=1)
    assert there[3:] == [[2, 4], [2, 5], [2, 6], [7], [7, 8], [7, 9]]


def test_of_two_equal_losses_the_newest_is_the_best(tmp_path):
    losses = {2: 4.0, 4: 4.0, 5: 4.1}
    assert evaluated(tmp_path, losses, training__save_steps=1, training__keep_checkpoints=1)[-1] == [4, 9]


def test_without_keep_best_only_the_newest_stay(tmp_path):
    losses = {2: 4.0, 4: 4.5}
    there = evaluated(tmp_path, losses, training__save_steps=1, training__keep_best=False)
    assert there[-1] == [8, 9]


def test_the_best_step_is_saved_where_no_checkpoint_was_due(tmp_path):
    losses = {1: 5.0, 3: 4.0, 5: 4.5, 7: 4.1}
    assert evaluated(tmp_path, losses, training__save_steps=4)[-1] == [3, 8, 9]
    only = evaluated(tmp_path / "only", losses, training__save_steps=4, training__keep_best=False)
    assert only[-1] == [8, 9]


def test_evaluations_of_others_choose_no_checkpoint():
    """Of another configuration, of the untrained weights, of averaged ones, or not finite."""
    lines = [{"step": 0, "loss": 1.0, "identity": "mine"}, {"step": 2, "loss": 1.0, "identity": "other"},
             {"step": 4, "loss": None, "identity": "mine"}]
    assert checkpoints.best(lines, "mine") is None
    assert checkpoints.best([*lines, {"step": 6, "loss": 9.0, "identity": "mine"}], "mine") == 6


def test_an_averages_evaluation_chooses_no_checkpoint(tmp_path):
    training = training_of(tmp_path)
    digest = identities.digest_of(training.identity)
    training.journal.evaluation({"step": 1, "loss": 2.0, "identity": digest})
    training.journal.evaluation({"step": 2, "loss": 1.0, "identity": digest, "weights": "averaged"})
    assert training._best() == 1


def test_the_checkpoint_to_go_back_to_stays_beside_the_newest(two):
    checkpoints.retain(two, 1, {8, None})
    assert kept(two) == [8, 9]
    checkpoints.retain(two, 1)
    assert kept(two) == [9]


def manifest_of(path, change):
    """Let `change` edit the manifest, and seal it again."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (path / "MANIFEST.json").write_text(checkpoints.sealed(manifest))


def state_of(path, **changes):
    """Change state.json and the manifest with it."""
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps(state))
    facts = {"bytes": (path / "state.json").stat().st_size, "sha256": identities.sha256(path / "state.json")}
    manifest_of(path, lambda manifest: manifest["files"].update({"state.json": facts}))


def test_to_go_back_to_is_the_anchor_else_the_newest_that_is_whole_and_not_amid_spikes(two):
    assert checkpoints.before_spikes(two, 8) == "checkpoint-8"
    assert checkpoints.before_spikes(two, 0) == "checkpoint-9"
    state_of(two / "checkpoint-9", spikes_in_a_row=1)
    assert checkpoints.before_spikes(two, 9) == "checkpoint-8"
    (two / "checkpoint-8" / "weights.safetensors").write_bytes(b"")
    assert checkpoints.before_spikes(two, 8) == ""


def test_a_checkpoint_holds_named_tensors_and_plain_json(two):
    captured, state = checkpoints.load(two / "checkpoint-9")
    assert captured.weights.keys() == dict(TinyModel().named_parameters()).keys()
    assert {"exp_avg/head.weight", "exp_avg_sq/head.weight", "step/head.weight"} <= captured.optimizer.keys()
    assert (state["step"], state["skipped"]) == (9, 0)
    assert sorted(path.name for path in (two / "checkpoint-9").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_makes_an_older_checkpoint_win_with_the_reason(two, name):
    (two / "checkpoint-9" / name).unlink()
    path, skipped = checkpoints.newest_valid(two)
    assert path == two / "checkpoint-8"
    assert skipped == ["checkpoint-9 is skipped: No such file or directory."]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(two, name):
    target = two / "checkpoint-9" / name
    whole = target.read_bytes()
    source = random.Random(3)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        target.write_bytes(damaged)
        assert checkpoints.newest_valid(two)[0] == two / "checkpoint-8"


def test_a_manifest_of_an_older_version_has_no_seal_and_is_taken(two):
    manifest = json.loads((two / "checkpoint-9" / "MANIFEST.json").read_text())
    del manifest["sha256"]
    (two / "checkpoint-9" / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    assert checkpoints.newest_valid(two)[0] == two / "checkpoint-9"


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_zero_filled_file_is_found(two, name):
    target = two / "checkpoint-9" / name
    whole = target.read_bytes()
    for cut in {0, 1, len(whole) // 2, len(whole) - 2}:
        for tail in (b"", bytes(len(whole) - cut)):
            target.write_bytes(whole[:cut] + tail)
            assert checkpoints.newest_valid(two)[0] == two / "checkpoint-8"


def test_a_checkpoint_under_another_steps_name_is_not_taken(two):
    os.rename(two / "checkpoint-9", two / "checkpoint-12")
    path, skipped = checkpoints.newest_valid(two)
    assert path == two / "checkpoint-8"
    assert skipped == ["checkpoint-12 is skipped: its MANIFEST.json is not that of step 12."]


def test_the_step_decides_and_not_the_time_of_the_file(two):
    os.utime(two / "checkpoint-8")
    assert checkpoints.newest_valid(two)[0] == two / "checkpoint-9"


def test_leftovers_of_a_killed_process_are_removed(two):
    for name in (".staging-10-77", "trash-checkpoint-7-77"):
        (two / name).mkdir()
        (two / name / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.remove_leftovers(two) == [".staging-10-77", "trash-checkpoint-7-77"]
    assert checkpoints.newest_valid(two)[0] == two / "checkpoint-9"


def test_files_that_a_killed_process_did_not_rename_are_removed_and_no_others(two):
    left = [".heartbeat-77", ".metrics.jsonl-77", ".base-digests.json-x_0a1b2c", ".result.json-ab12cd34"]
    kept = [".lock", ".command.lock", ".stop-ab12cd34", ".gitignore", "metrics.jsonl", "my-notes.json"]
    for name in (*left, *kept):
        (two / name).touch()
    assert checkpoints.remove_leftovers(two) == sorted(left)
    assert all((two / name).exists() for name in kept)


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert checkpoints.newest_valid(tmp_path) == (None, [])


def test_a_changed_key_is_refused_by_name_and_all_at_once(two):
    with pytest.raises(Problems) as caught:
        training_of(two, config_of(training__learning_rate=0.5, run__seed=5))
    text = str(caught.value)
    assert ("run.seed was 1234 in checkpoint-9 and is 5 now; set it back, allow it with "
            "--allow-change run.seed, or start a new run with --fresh.") in text
    assert "training.learning_rate was 0.01 in checkpoint-9 and is 0.5 now" in text
    assert caught.value.exit_code == UsageError.exit_code


def test_changed_data_is_refused(two):
    with pytest.raises(DataError, match=r"changed since checkpoint-9 \(digest d{12}, now e{12}\)"):
        training_of(two, config_of(), FakeStore(digest="e" * 64))


@pytest.mark.parametrize("change", [{"training__keep_checkpoints": 7}, {"training__save_steps": 5},
                                    {"training__eval_steps": 5}, {"device__threads": 2},
                                    {"training__keep_best": False}, {"training__compile": True},
                                    {"training__kept_layers": 1}, {"training__kept_inputs": 2},
                                    {"device__kind": "cuda", "model__fused_kernels": True},
                                    {"stream__overlap": False},
                                    {"training__micro_batch": 4, "training__accumulation": 1}])
def test_what_does_not_change_the_training_may_change(two, change):
    assert training_of(two, config_of(**change)).progress.step == 9


@pytest.mark.parametrize("change", [{"training__spike_sigma": 5.0}, {"training__spike_window": 64},
                                    {"training__label_smoothing": 0.1}, {"training__clip_norm": 0.5}])
def test_what_changes_the_training_is_refused(two, change):
    [name] = change
    with pytest.raises(UsageError, match=f"^{name.replace('__', '.')} was "):
        training_of(two, config_of(**change))


def without(path, *names):
    """The identity in a manifest as it was before these keys were made."""
    def change(manifest):
        for name in names:
            del manifest["identity"]["config"][name]
    manifest_of(path, change)


def test_a_key_that_a_checkpoint_is_older_than_counts_as_its_default(two):
    without(two / "checkpoint-9", "training.label_smoothing", "optimizer.lookahead_steps", "dataset.also",
            "training.spike_sigma")
    assert training_of(two).progress.step == 9
    with pytest.raises(UsageError, match=r"label_smoothing was 0\.0 in checkpoint-9 and is 0\.1 now"):
        training_of(two, config_of(training__label_smoothing=0.1))


def test_devices_that_share_windows_count_once_in_the_windows_of_an_update():
    one, two = config_of(device__count=2), config_of(device__count=4, parallel__ring=2)
    assert identities.identity(one, "d") == identities.identity(two, "d")
    assert identities.identity(one, "d")["config"]["windows per update"] == 2 * 2 * 2
    with pytest.raises(UsageError, match="windows per update was 8 in here and is 16 now"):
        identities.refuse_changes(identities.identity(one, "d"),
                                   identities.identity(config_of(device__count=4), "d"), "here")


def test_a_key_that_became_harmless_since_is_not_compared(two):
    since = {"training.compile": True, "parallel.ring": 2}
    manifest_of(two / "checkpoint-9", lambda manifest: manifest["identity"]["config"].update(since))
    assert training_of(two).progress.step == 9


def test_another_number_of_windows_an_update_is_refused(two):
    with pytest.raises(UsageError, match="windows per update was 4 in checkpoint-9 and is 8 now"):
        training_of(two, config_of(training__micro_batch=4))


def test_weights_of_another_model_are_refused():
    with pytest.raises(DataError, match="differ in 1 trainable parameters, the first being b"):
        checkpoints.put_weights({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_disk_that_refuses_leaves_the_older_checkpoint_and_no_part_of_the_new(two, call, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CannotWrite, match="checkpoint-10: No space left on device"):
        checkpoints.save(two, Captured(weights={"w": torch.zeros(2)}), {"step": 10}, {})
    assert checkpoints.newest_valid(two)[0] == two / "checkpoint-9"
    assert not list(two.glob(".staging-*"))


def test_a_checkpoint_that_fails_on_the_way_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    rename = os.rename

    def refuse(old, new):
        if str(new).endswith("checkpoint-3"):
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    training = training_of(tmp_path, config_of(training__save_steps=3))
    training.train()
    assert training.progress.step == 9
    assert "checkpoint-3: Input/output error. The training goes on" in caplog.text
    assert checkpoints.newest_valid(tmp_path)[0] == tmp_path / "checkpoint-9"


def test_seconds_and_tokens_go_on_over_sessions(tmp_path):
    training_of(tmp_path, config_of(training__epochs=3)).train()
    path, _ = checkpoints.newest_valid(tmp_path)
    _, state = checkpoints.load(path)
    again = training_of(tmp_path)
    assert again.seconds() >= state["seconds"] > 0
    assert again.progress.tokens_trained == state["tokens_trained"] > 0


CHILD = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
from pathlib import Path
from trainer_fakes import config_of, training_of
training_of(Path({path!r}), config_of(training__save_steps=1, training__epochs=40)).train()
"""


def start(path):
    here = Path(__file__).resolve().parent
    code = CHILD.format(root=str(here.parent.parent), tests=str(here), path=str(path))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code], **quiet)


def test_kills_at_random_moments_and_resumes_end_in_the_same_weights(tmp_path):
    config = config_of(training__save_steps=1, training__epochs=40)
    torch.set_num_threads(1)
    whole = training_of(tmp_path / "whole", config)
    whole.train()
    source, path = random.Random(time.time_ns()), tmp_path / "killed"
    for _ in range(3):
        process = start(path)
        while process.poll() is None and not list(path.glob("checkpoint-*")):
            time.sleep(0.01)
        time.sleep(source.uniform(0.0, 0.4))
        process.kill()
        process.wait()
    assert start(path).wait(60) == 0
    checkpoints.remove_leftovers(path)
    ended = training_of(path, config)
    assert ended.progress.step == 120
    assert same(weights_of(whole), weights_of(ended))
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
