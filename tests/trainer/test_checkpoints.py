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
from training.trainer import checkpoints
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
    """A flip in the manifest may hit white space or something that is not read: then its files must agree."""
    target = two / "checkpoint-9" / name
    whole = target.read_bytes()
    source = random.Random(3)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        target.write_bytes(damaged)
        if checkpoints.newest_valid(two)[0] != two / "checkpoint-8":
            assert name == "MANIFEST.json"
            assert json.loads(bytes(damaged))["files"] == json.loads(whole)["files"]


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


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert checkpoints.newest_valid(tmp_path) == (None, [])


def test_a_changed_key_is_refused_by_name_and_all_at_once(two):
    with pytest.raises(Problems) as caught:
        training_of(two, config_of(training__learning_rate=0.5, run__seed=5))
    text = str(caught.value)
    assert ("run.seed was 1234 in checkpoint-9 and is 5 now; set it back, or start a new run with "
            "--fresh.") in text
    assert "training.learning_rate was 0.01 in checkpoint-9 and is 0.5 now" in text
    assert caught.value.exit_code == UsageError.exit_code


def test_changed_data_is_refused(two):
    with pytest.raises(DataError, match=r"changed since checkpoint-9 \(digest d{12}, now e{12}\)"):
        training_of(two, config_of(), FakeStore(digest="e" * 64))


@pytest.mark.parametrize("change", [{"training__keep_checkpoints": 7}, {"training__save_steps": 5},
                                    {"training__eval_steps": 5}, {"device__threads": 2},
                                    {"training__micro_batch": 4, "training__accumulation": 1}])
def test_what_does_not_change_the_training_may_change(two, change):
    assert training_of(two, config_of(**change)).progress.step == 9


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
