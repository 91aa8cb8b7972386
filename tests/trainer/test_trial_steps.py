"""The trial's own steps: the real subprocess on a tiny model, and what memory that runs out leaves."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_maker import configure

from training.configuration import load_config
from training.errors import StoppedByUser
from training.records import Trial, TrialStep
from training.rundir import (
    TRIAL,
    TRIAL_ORDER,
    RunDirectory,
    TrialLength,
    TrialOrder,
    read_record,
    write_record,
)
from training.trainer import trial
from training.trainer.loop import Training
from training.trainer.resources import peak_resident_bytes, reset_peak
from training.trainer.session import Session

TRAINER = Path(__file__).resolve().parent.parent.parent / "training" / "model_trainer_unified.py"
LENGTHS = tuple(TrialLength(context_tokens=s, target_tokens=s // 2, expected_s=s / 1000)
                for s in (32, 64, 128))
ORDER = TrialOrder(lengths=LENGTHS, vocab_tokens=512, limit_s=30.0, held_out_windows=3, completions=2)


def prepared(path, order=ORDER, **settings):
    path.mkdir()
    configure(path, **settings)
    write_record(path / TRIAL_ORDER, order)
    return path


def tried(path):
    session = Session(run=RunDirectory(path), local_rank=0, start=time.monotonic(), trial=True)
    session.config = load_config(path)
    trial.run(session)
    return read_record(Trial, path / TRIAL)


def failing(monkeypatch, context, error):
    """Training.loss raises on micro-batches of this length; how often it was called before."""
    calls, real = [], Training.loss

    def loss(self, batch):
        if batch.ids.shape[1] == context:
            raise error
        calls.append(batch.ids.shape[1])
        return real(self, batch)
    monkeypatch.setattr(Training, "loss", loss)
    return calls


def test_the_subprocess_takes_every_length_and_leaves_the_rest_alone(tmp_path):
    path = prepared(tmp_path / "trial")
    before = {item.name for item in path.iterdir()}
    done = subprocess.run([sys.executable, str(TRAINER), "--trial", "--run-dir", str(path)], text=True,
                          capture_output=True, cwd="/", timeout=120, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout
    found = read_record(Trial, path / TRIAL)
    assert [step.context_tokens for step in found.steps] == [32, 64, 128]
    assert (found.confirmed, found.skipped) == (True, "")
    assert [len(step.seconds) for step in found.steps[:2]] == [2, 2]
    assert all(0 < second < 10 for step in found.steps for second in (*step.seconds, step.update_s))
    assert all(step.loss == pytest.approx(6.24, abs=0.3) for step in found.steps)  # log 512, untrained
    assert all(step.peak_bytes > 100 << 20 for step in found.steps)
    assert 0 < found.resident_bytes <= found.steps[0].peak_bytes
    assert found.load_s > 0 < found.evaluation_s
    assert found.save_s > 0
    left = {item.name for item in path.iterdir()} - before
    assert left == {TRIAL, "heartbeat.json", ".lock", "checkpoint-1"}


def test_memory_that_runs_out_at_the_planned_length_is_a_result(tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    failing(monkeypatch, 128, error)
    found = tried(prepared(tmp_path / "trial"))
    assert [bool(step.error) for step in found.steps] == [False, False, True]
    assert found.steps[-1].error == f"out of memory: {error}"
    assert (found.steps[-1].seconds, found.confirmed, found.evaluation_s) == ((), False, None)


def test_memory_that_runs_out_at_a_small_length_ends_the_trial(tmp_path, monkeypatch):
    failing(monkeypatch, 64, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert [bool(step.error) for step in tried(prepared(tmp_path / "trial")).steps] == [False, True]


def test_any_other_error_is_raised(tmp_path, monkeypatch):
    failing(monkeypatch, 64, RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        tried(prepared(tmp_path / "trial"))


def test_a_step_that_would_take_too_long_is_left_out_with_the_reason(tmp_path, monkeypatch):
    lengths = (*LENGTHS[:2], TrialLength(context_tokens=128, target_tokens=64, expected_s=1e9))
    calls = failing(monkeypatch, 0, RuntimeError())
    found = tried(prepared(tmp_path / "trial", dataclasses.replace(ORDER, lengths=lengths)))
    assert max(calls) == 64
    assert (len(found.steps), found.confirmed) == (2, False)
    assert found.skipped.startswith("a micro-batch of 128 tokens would take about ")
    assert found.skipped.endswith(" s; the trial has 30 s for it")
    assert found.evaluation_s > 1e3  # scaled from the longest that was tried


def test_a_stop_is_honoured_before_the_next_micro_batch(tmp_path):
    path = prepared(tmp_path / "trial")
    (path / "stop").write_text("SIGINT\n")
    with pytest.raises(StoppedByUser):
        tried(path)


def test_weights_stay_as_they_are(tmp_path, monkeypatch):
    kept, real = [], trial._around

    def around(trying):
        kept.append({name: p.detach().clone() for name, p in trying.loaded.trainable.items()})
        real(trying)
    monkeypatch.setattr(trial, "_around", around)
    for number in range(2):
        tried(prepared(tmp_path / f"trial{number}", ORDER if number else dataclasses.replace(
            ORDER, lengths=LENGTHS[-1:])))
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), 8.0), ((1.0, 1.0), 4.0), ((), 0.0),
                                                   ((1.0,), 8.0)])
def test_the_planned_length_is_judged_along_the_last_two(seconds, expected):
    lengths = [TrialLength(context_tokens=s, target_tokens=s, expected_s=float(s)) for s in (1, 2, 8)]
    steps = tuple(TrialStep(context_tokens=1, target_tokens=1, micro_batch=1, seconds=(each,), update_s=0.0,
                            peak_bytes=1) for each in seconds)
    assert trial.extrapolated(steps, tuple(lengths)) == expected


def test_varied_lengths_ascend_to_the_whole_one():
    store = trial.RandomStore(100, LENGTHS[-1], 0)
    found = [length.context_tokens for length in store.varied(LENGTHS[-1], 6)]
    assert found == sorted(found)
    assert (found[-1], len(found)) == (128, 6)
    assert min(found) >= int(0.96 * 128)
    batch = store.batch(3, LENGTHS[-1])
    assert batch.ids.shape == (3, 128)
    assert int((batch.labels != -100).sum()) == 3 * 64
    assert (batch.labels[:, 64:] == batch.ids[:, 64:]).all()


def test_a_peak_can_be_counted_anew():
    block = torch.ones(80 << 20, dtype=torch.uint8)
    high = peak_resident_bytes()
    del block
    if reset_peak(torch.device("cpu")):
        assert peak_resident_bytes() <= high - (60 << 20)
