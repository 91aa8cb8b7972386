"""Listing runs and their state."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import make_run

from training.errors import MissingInput
from training.manager import lock, runs


def at(run, time_s):
    for path in run.path.rglob("*"):
        os.utime(path, (time_s, time_s))


def make_all(root):
    """A run in each state, each newer than the one before."""
    prepared = make_run(root / "prepared")
    interrupted = make_run(root / "interrupted")
    interrupted.metrics.write_text('{"step": 3, "loss": 2.5}\n{"step": 4, "lo')
    interrupted.heartbeat.write_text('{"phase": "train", "step": 3, "steps": 20, "time": 1}')
    failed = make_run(root / "failed")
    failed.result.write_text(json.dumps({"state": "failed", "steps": 7, "error": "no room"}))
    done = make_run(root / "done")
    done.result.write_text(json.dumps({"state": "done", "steps": 8}))
    torn = make_run(root / "torn")
    torn.result.write_text('{"state": "do')
    for number, run in enumerate((prepared, interrupted, failed, done, torn)):
        at(run, 1_790_000_000 + 1000 * number)
    (root / "no run").mkdir()
    (root / ".trash-1").mkdir()
    (root / "file").write_text("")


def test_every_run_is_listed_newest_first_with_its_state(tmp_path):
    make_all(tmp_path)
    found = runs.list_runs(tmp_path)
    assert [(info.name, info.state) for info in found] == [
        ("torn", "interrupted"), ("done", "done"), ("failed", "failed"), ("interrupted", "interrupted"),
        ("prepared", "prepared")]
    stopped = found[3]
    assert (stopped.step, stopped.steps, stopped.loss) == (3, 20, 2.5)
    assert (stopped.tier, stopped.context_tokens, stopped.base_model) == (1, 256, "embedded")
    assert (found[2].step, found[2].steps, found[2].error) == (7, 8, "no room")


def test_a_locked_run_is_running_whatever_its_files_say(tmp_path):
    run = make_run(tmp_path / "run")
    run.result.write_text(json.dumps({"state": "failed"}))
    guard = lock.RunLock(run.path)
    guard.take()
    assert runs.describe_run(run.path).state == "running"
    assert runs.latest_resumable(tmp_path) is None
    guard.release()
    assert runs.latest_resumable(tmp_path).state == "failed"


def test_a_folder_without_runs_lists_none(tmp_path):
    assert runs.list_runs(tmp_path / "absent") == []
    assert runs.latest_resumable(tmp_path) is None


def test_the_newest_checkpoint_goes_by_its_step_and_must_be_complete(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "MANIFEST.json").write_text("{}")
    (tmp_path / "checkpoint-99").mkdir()
    assert runs.newest_checkpoint(tmp_path) == 10
    assert runs.newest_checkpoint(tmp_path / "absent") is None


def test_a_run_is_found_by_path_or_name_and_the_others_are_named(tmp_path):
    make_all(tmp_path)
    assert runs.find_run(str(tmp_path / "done"), tmp_path) == tmp_path / "done"
    assert runs.find_run("done", tmp_path) == tmp_path / "done"
    with pytest.raises(MissingInput, match=r"No run at nope\. Runs in .*: torn, done, failed"):
        runs.find_run("nope", tmp_path)
