"""TrialManager on a stand-in trainer: what comes back, what raises, and that no process stays."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import make_run

from training.errors import CannotWrite, DataError, Interrupted, MissingInput, StoppedByUser, UsageError
from training.manager.outcome import Ending
from training.manager.trial import TrialManager, concluded
from training.rundir import RunDirectory, TrialLength, TrialOrder, write_record

FAKE = Path(__file__).with_name("fake_trial.py")
ORDER = TrialOrder(lengths=tuple(TrialLength(context_tokens=s, target_tokens=s, expected_s=s / 100)
                                 for s in (64, 128, 512)),
                   vocab_tokens=100, limit_s=30.0, held_out_windows=4, completions=2)


def take(tmp_path, monkeypatch, act, script=FAKE, **extra):
    for name, value in {"FAKE": act, **extra}.items():
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path / "trial")
    return TrialManager(run.path, script=script).take(ORDER)


def test_a_trial_comes_back_as_it_was_written(tmp_path, monkeypatch):
    found = take(tmp_path, monkeypatch, "done")
    assert [step.context_tokens for step in found.steps] == [64, 128, 512]
    assert (found.confirmed, found.evaluation_s, found.load_s, found.skipped) == (True, 1.0, 3.0, "")


def test_memory_that_ran_out_is_a_step_with_an_error(tmp_path, monkeypatch):
    found = take(tmp_path, monkeypatch, "out")
    assert found.steps[-1].error == "out of memory: tried 9 GiB"
    assert not found.confirmed


@pytest.mark.parametrize("text", ["[enforce fail at alloc_cpu.cpp] can't allocate memory: you tried",
                                  "CUDA out of memory. Tried to allocate 2.00 GiB"])
def test_an_allocation_that_ends_the_process_is_the_step_it_was_in(tmp_path, monkeypatch, text):
    found = take(tmp_path, monkeypatch, "raise", FAKE_FAIL=text)
    assert [step.error != "" for step in found.steps] == [False, False, True]
    assert found.steps[-1].context_tokens == 512
    assert "memory" in found.steps[-1].error


def test_a_kill_for_want_of_memory_is_too(tmp_path, monkeypatch):
    take(tmp_path, monkeypatch, "done")
    run = RunDirectory((tmp_path / "trial").resolve())
    write_record(run.path / "trial.json", concluded(run, ORDER, Ending(returncode=0)))
    partial = run.path / "trial.json"
    partial.write_text(partial.read_text().replace('"confirmed": true', '"confirmed": false'))
    found = concluded(run, ORDER, Ending(returncode=-9, oom_kills=1))
    assert found.skipped.startswith("the kernel killed it")  # all three steps are there: in the evaluation
    run.path.joinpath("trial.json").unlink()
    found = concluded(run, ORDER, Ending(returncode=-9, oom_kills=1))
    assert (found.steps[0].context_tokens, found.steps[0].error) == (
        64, "the kernel killed it: the machine's memory (RAM) ran out")


@pytest.mark.parametrize(("code", "error"), [(2, UsageError), (65, DataError), (66, MissingInput),
                                             (73, CannotWrite)])
def test_what_the_training_would_stumble_over_ends_the_command_now(tmp_path, monkeypatch, code, error):
    with pytest.raises(error) as caught:
        take(tmp_path, monkeypatch, f"told_{code}")
    assert str(caught.value) == "The trial failed: the base is torn."
    assert caught.value.exit_code == code


def test_a_trial_that_fails_for_reasons_of_its_own_is_left_out_and_says_so(tmp_path, monkeypatch):
    found = take(tmp_path, monkeypatch, "raise", FAKE_FAIL="a fault")
    assert found.skipped == "the trial failed: it ended with code 1 (RuntimeError: a fault)"
    assert [step.context_tokens for step in found.steps] == [64, 128]
    assert not found.confirmed


def test_a_killed_trial_is_left_out(tmp_path, monkeypatch):
    assert take(tmp_path, monkeypatch, "killed").skipped == "the trial failed: it ended with SIGKILL"


def test_a_trainer_that_cannot_start_is_left_out(tmp_path, monkeypatch):
    found = take(tmp_path, monkeypatch, "done", script=tmp_path / "absent.py")
    assert found.steps == ()
    assert "absent.py" in found.skipped


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, StoppedByUser), (signal.SIGTERM, Interrupted)])
def test_a_stop_ends_the_trial_soon_and_leaves_no_process(tmp_path, monkeypatch, number, error):
    folder = (tmp_path / "trial").resolve()

    def stop():
        while not (folder / "heartbeat.json").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        os.kill(os.getpid(), number)
    sender = threading.Thread(target=stop)
    sender.start()
    before, start = signal.getsignal(number), time.monotonic()
    with pytest.raises(error) as caught:
        take(tmp_path, monkeypatch, "hang")
    sender.join()
    asked = "Ctrl+C" if number == signal.SIGINT else "SIGTERM"
    assert str(caught.value) == f"Stopped by {asked} during the trial. Nothing was written."
    assert time.monotonic() - start < 15
    assert signal.getsignal(number) == before
    alive = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    assert alive == []
