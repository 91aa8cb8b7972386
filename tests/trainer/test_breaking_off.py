"""An update that a stop or missing memory breaks off: saved at once, and the run ends in the same weights."""

import errno
import os
import signal
import threading
import time

import pytest
import torch
from trainer_fakes import FakeStore, TinyModel, config_of, same, tiny_loss, training_of, weights_of

from training.errors import CannotWrite, StoppedByUser
from training.trainer import checkpoints
from training.trainer.journal import read_lines


def whole(tmp_path):
    training = training_of(tmp_path / "whole")
    training.train()
    return weights_of(training), [row["loss"] for row in read_lines(tmp_path / "whole" / "metrics.jsonl")]


def losses(path):
    return [row["loss"] for row in read_lines(path / "metrics.jsonl")]


class Failing:
    """A loss function that acts at one call, counted from 0."""

    def __init__(self, call, act):
        self.call, self.act, self.calls = call, act, 0

    def __call__(self, *arguments):
        self.calls += 1
        found = tiny_loss(*arguments)
        if self.calls == self.call + 1:
            self.act()
        return found


def test_a_stop_in_a_micro_batch_that_takes_minutes_is_honoured_within_a_second(tmp_path):
    """The file is found by a timer in the forward pass; the checkpoint is that before the update."""
    expected, curve = whole(tmp_path)
    path = tmp_path / "stopped"

    def minutes():
        (path / "stop").write_text("SIGINT")
        for _ in range(6000):
            time.sleep(0.01)
    training = training_of(path, loss=Failing(7, minutes))
    began = time.monotonic()
    with pytest.raises(StoppedByUser, match="at step 4"):
        training.train()
    assert time.monotonic() - began < 5
    assert [found.name for found in path.glob("checkpoint-*")] == ["checkpoint-4"]
    (path / "stop").unlink()
    again = training_of(path)
    again.train()
    assert same(weights_of(again), expected)
    assert losses(path) == curve
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    MemoryError()])
def test_memory_that_runs_out_leaves_a_checkpoint_of_the_update_before(tmp_path, error):
    expected, curve = whole(tmp_path)
    path = tmp_path / "short"

    def fail():
        raise error
    with pytest.raises(type(error)):
        training_of(path, loss=Failing(9, fail)).train()
    newest, skipped = checkpoints.newest_valid(path)
    assert (newest.name, skipped) == ("checkpoint-5", [])
    again = training_of(path)
    again.train()
    assert same(weights_of(again), expected)
    assert losses(path) == curve


def test_the_steps_tensors_are_free_before_the_checkpoint_is_made(tmp_path):
    """Where memory ran out there is none for a copy as long as the traceback holds the step's."""
    held = []

    class Large:
        pass

    def fail():
        large = Large()
        held.append(__import__("weakref").ref(large))
        raise torch.OutOfMemoryError("out of memory")
    training = training_of(tmp_path / "run", loss=Failing(5, fail))
    seen = []
    save = training.save

    def saving(regular=False, tries=2):
        seen.append(held[0]() is None)
        save(regular)
    training.save = saving
    with pytest.raises(torch.OutOfMemoryError):
        training.train()
    assert seen == [True]


def test_another_error_leaves_no_checkpoint(tmp_path):
    def fail():
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        training_of(tmp_path / "run", loss=Failing(5, fail)).train()
    assert checkpoints.newest_valid(tmp_path / "run") == (None, [])


def full_until(monkeypatch, enough):
    """A disk that is full as long as `enough()` is false, at each checkpoint's first fsync."""
    sync = checkpoints._sync

    def syncing(path):
        if ".staging-" in str(path) and not enough():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)
    monkeypatch.setattr(checkpoints, "_sync", syncing)


def test_a_full_disk_is_given_the_room_of_older_checkpoints(tmp_path, monkeypatch, caplog):
    path = tmp_path / "run"
    config = config_of(training__save_steps=1, training__keep_checkpoints=4)
    training = training_of(path, config)
    full_until(monkeypatch, lambda: len(list(path.glob("checkpoint-*"))) < 3)
    training.train()
    monkeypatch.undo()
    assert "Older checkpoints were deleted for it." in caplog.text
    newest, skipped = checkpoints.newest_valid(path)
    assert (newest.name, skipped) == (f"checkpoint-{training.progress.step}", [])
    expected, _ = whole(tmp_path)
    assert same(weights_of(training), expected)


def test_a_disk_that_stays_full_ends_the_run_at_its_last_checkpoint_and_says_how_much_it_takes(
        tmp_path, monkeypatch):
    path = tmp_path / "run"
    training = training_of(path, config_of(training__save_steps=2))
    full_until(monkeypatch, lambda: training.progress.step < 5)
    with pytest.raises(CannotWrite, match=r"It takes [\d.,]+ MiB and [\d.,]+ MiB is free") as caught:
        training.train()
    assert caught.value.exit_code == 73
    newest, skipped = checkpoints.newest_valid(path)
    assert (newest.name, skipped) == ("checkpoint-4", [])
    assert not list(path.glob(".staging-*"))
    monkeypatch.undo()
    again = training_of(path, config_of(training__save_steps=2))
    again.train()
    assert same(weights_of(again), whole(tmp_path)[0])


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(tmp_path):
    path = tmp_path / "run"
    training = training_of(path, config_of(training__save_steps=2))
    training.train()
    last = training.progress.step
    weights = path / f"checkpoint-{last}" / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = training_of(path, config_of(training__save_steps=2))
    assert again.progress.step < last
    again.train()
    assert checkpoints.fault(path / f"checkpoint-{last}", last) == ""


def test_no_timer_is_set_where_other_ranks_would_wait(tmp_path):
    training = training_of(tmp_path / "run", loss=Failing(-1, None), store=FakeStore(4), model=TinyModel())
    training.engine.captures_alone = False
    seen = []
    training.loss_function = lambda *arguments: (
        seen.append(signal.getitimer(signal.ITIMER_REAL)), tiny_loss(*arguments))[1]
    training.train()
    assert set(seen) == {(0.0, 0.0)}
    assert threading.current_thread() is threading.main_thread()
