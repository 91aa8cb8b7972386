"""TrainingManager on a stand-in trainer: real processes, real signals."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import FAKE, make_run

from training.errors import (
    CannotWrite,
    DataError,
    DoesNotFit,
    EliteError,
    Interrupted,
    MissingInput,
    StoppedByUser,
)
from training.manager import group, preflight, runs
from training.manager.manager import Stop, TrainingManager, due_signal

ROOT = Path(__file__).resolve().parents[2]
# The command as another process, so that it can be signalled and killed.
COMMAND = """
import sys
from pathlib import Path
from training.errors import EliteError
from training.manager.manager import TrainingManager
run, fake = sys.argv[1:3]
try:
    TrainingManager(run, script=Path(fake), pauses_s=(0.0,)).train(lambda *seen: print(*seen, flush=True))
except EliteError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(error.exit_code)
"""


def wait_for(truth, limit_s=10.0, what="it"):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if truth():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited {limit_s} s for {what}")


def train(run, act="done", **extra):
    env = {"FAKE": act, **{name: str(value) for name, value in extra.items()}}
    before = dict(os.environ)
    os.environ.update(env)
    try:
        seen = []
        return TrainingManager(run.path, script=FAKE, pauses_s=(0.0,)).train(
            lambda *update: seen.append(update)), seen
    finally:
        os.environ.clear()
        os.environ.update(before)


def start_command(run, act="done", **extra):
    env = {**os.environ, "FAKE": act, "PYTHONPATH": str(ROOT),
           **{name: str(value) for name, value in extra.items()}}
    out = (run.path / "command.out").open("w")
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(run.path), str(FAKE)], env=env, stdout=out,
                            stderr=subprocess.STDOUT)


def trained(run, steps=2):
    return lambda: run.metrics.exists() and run.metrics.read_text().count("\n") >= steps


def trainers(run):
    """Living trainers of this run, by their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "--run-dir" in line and str(run.path) in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def gone(run):
    """Whether the trainer's child ended; where no init reaps it, it stays as a zombie."""
    pid = int((run.path / "orphan.pid").read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def out(run):
    return (run.path / "command.out").read_text()


def test_a_run_to_the_end_returns_the_result_and_tells_progress(tmp_path):
    run = make_run(tmp_path / "run")
    result, seen = train(run, FAKE_STEP_S=0.1)
    assert result.state == "done"
    assert result.quality["after"].loss == 2.0
    phases = [phase for phase, *_ in seen]
    assert "train" in phases
    assert seen[-1][:3] == ("train", 8, 8)
    assert "1,000 tokens/s" in seen[-1][3]
    assert run.report.exists()
    assert not run.stop.exists()


def test_a_finished_run_is_returned_and_nothing_is_written_again(tmp_path):
    run = make_run(tmp_path / "run")
    train(run)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    result, _ = train(run, "fail_at_1", FAKE_FAIL="1")
    assert result.state == "done"
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_files_of_an_earlier_attempt_are_not_taken_for_this_one(tmp_path):
    run = make_run(tmp_path / "run")
    run.stop.write_text("SIGTERM")
    run.heartbeat.write_text('{"phase": "done", "step": 99, "steps": 99, "time": 1}')
    run.result.write_text('{"state": "interrupted"}')
    result, seen = train(run)
    assert result.state == "done"
    assert all(done <= 8 for _, done, _, _ in seen)


@pytest.mark.parametrize("act", ["no_result", "torn_result"])
def test_code_0_without_a_valid_result_is_a_failure(tmp_path, act):
    run = make_run(tmp_path / "run")
    with pytest.raises(EliteError, match=r"code 0 but left no valid result\.json") as caught:
        train(run, act)
    assert caught.value.exit_code == 70
    stored = json.loads(run.result.read_text())
    assert (stored["state"], stored["exit_code"], stored["steps"]) == ("failed", 70, 8)


def test_a_done_result_with_another_code_is_not_trusted(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(EliteError, match="ended with code 3, so the result is not trusted"):
        train(run, "bad_end")
    assert json.loads(run.result.read_text())["state"] == "failed"


@pytest.mark.parametrize(("kind", "error", "says"), [
    ("told", DoesNotFit, "A step needs 9 GiB; 8 GiB is free."),
    ("65", DataError, "ended with code 65"),
    ("66", MissingInput, "ended with code 66"),
    ("73", CannotWrite, "ended with code 73"),
    ("1", EliteError, "ended with code 1"),
    ("SIGSEGV", EliteError, "ended with SIGSEGV"),
    ("SIGKILL", Interrupted, "Something outside ended the trainer with SIGKILL after step 3"),
    ("CUDA out of memory. Tried to allocate 2.00 GiB", DoesNotFit, "the GPU's memory ran out"),
    ("[Errno 28] No space left on device", CannotWrite, "the disk is full"),
    ("something nobody knows", EliteError, "something nobody knows"),
])
def test_each_way_to_fail_has_its_class_and_is_kept(tmp_path, kind, error, says):
    run = make_run(tmp_path / "run")
    with pytest.raises(EliteError) as caught:
        train(run, "fail_at_3", FAKE_FAIL=kind)
    assert type(caught.value) is error
    assert says in str(caught.value)
    assert "resume" in str(caught.value)
    stored = json.loads(run.result.read_text())
    assert stored["exit_code"] == error.exit_code
    assert stored["state"] == ("interrupted" if error is Interrupted else "failed")
    assert run.report.exists()


def test_a_kill_by_the_kernel_for_memory_is_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    counts = itertools.count()
    monkeypatch.setattr(group, "oom_kills", lambda: next(counts))
    with pytest.raises(DoesNotFit, match=r"memory \(RAM\) ran out"):
        train(run, "fail_at_3", FAKE_FAIL="SIGKILL")


def test_a_failed_run_is_continued_by_the_next_start(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(EliteError):
        train(run, "fail_at_3", FAKE_FAIL="1")
    assert train(run)[0].state == "done"


def test_children_that_the_trainer_left_behind_are_ended(tmp_path):
    run = make_run(tmp_path / "run")
    train(run, "orphan")
    assert gone(run)


def test_ctrl_c_stops_by_file_saves_and_leaves_130(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, FAKE_STEPS=1000)
    wait_for(trained(run))
    command.send_signal(signal.SIGINT)
    assert command.wait(10) == 130
    saved = runs.newest_checkpoint(run.path)
    assert f"resume {run.path}` continues from step {saved}" in out(run)
    assert json.loads(run.result.read_text())["state"] == "interrupted"
    assert not run.stop.exists()
    assert trainers(run) == []
    assert train(run, FAKE_STEPS=saved + 2)[0].state == "done"


def test_sigterm_to_the_command_leaves_75_and_no_process(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, FAKE_STEPS=1000)
    wait_for(trained(run))
    command.send_signal(signal.SIGTERM)
    assert command.wait(10) == 75
    assert "Interrupted Stopped by SIGTERM after step" in out(run)
    assert trainers(run) == []


def test_a_closed_terminal_does_not_end_the_training(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, FAKE_STEPS=30)
    wait_for(trained(run))
    command.send_signal(signal.SIGHUP)
    assert command.wait(15) == 0


def test_a_stop_during_the_import_does_not_wait_for_it(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, "slow_import")
    wait_for(run.heartbeat.exists)
    began = time.monotonic()
    command.send_signal(signal.SIGTERM)
    assert command.wait(15) == 75
    assert time.monotonic() - began < 10
    assert "Stopped by SIGTERM before the first step" in out(run)


def test_the_third_ctrl_c_kills_a_trainer_that_does_not_listen(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, "stubborn", FAKE_STEPS=1000)
    wait_for(trained(run))
    for _ in range(3):
        assert command.poll() is None
        command.send_signal(signal.SIGINT)
        time.sleep(0.4)
    assert command.wait(10) == 130
    assert trainers(run) == []
    assert gone(run)


@pytest.mark.parametrize("act", ["done", "stubborn"])
def test_a_killed_command_takes_its_trainer_along(tmp_path, act):
    run = make_run(tmp_path / "run")
    command = start_command(run, act, FAKE_STEPS=1000)
    wait_for(trained(run))
    command.kill()
    command.wait()
    wait_for(lambda: not trainers(run), 5, "the trainer to end")
    if act == "stubborn":
        wait_for(lambda: gone(run), 3, "the trainer's child to end")
    wait_for(lambda: runs.describe_run(run.path).state == "interrupted", 5, "the lock")
    assert train(run)[0].state == "done"


def test_the_kernel_ends_a_trainer_that_does_not_watch_its_command(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, "unwatched", FAKE_STEPS=1000)
    wait_for(trained(run))
    command.kill()
    command.wait()
    wait_for(lambda: not trainers(run), 3, "the trainer to end")


def test_a_second_start_is_refused_with_the_first_ones_process(tmp_path):
    run = make_run(tmp_path / "run")
    command = start_command(run, FAKE_STEPS=1000)
    try:
        wait_for(trained(run))
        assert runs.describe_run(run.path).state == "running"
        with pytest.raises(CannotWrite, match=f"in use by process {command.pid}"):
            train(run)
        with pytest.raises(CannotWrite, match="in use by another process, so --fresh cannot"):
            preflight.check_output(run.path, resume=False, fresh=True)
    finally:
        command.send_signal(signal.SIGINT)
        command.wait(10)
    assert runs.describe_run(run.path).state == "interrupted"


def test_ctrl_c_that_comes_out_of_the_progress_display_counts(tmp_path):
    run = make_run(tmp_path / "run")

    def progress(phase, done, total, detail):
        if phase == "train" and not run.stop.exists():
            raise KeyboardInterrupt

    os.environ["FAKE_STEPS"] = "1000"
    try:
        with pytest.raises(StoppedByUser):
            TrainingManager(run.path, script=FAKE).train(progress)
    finally:
        del os.environ["FAKE_STEPS"]


def test_a_broken_pipe_does_not_end_the_training(tmp_path):
    run = make_run(tmp_path / "run")

    def progress(*update):
        raise BrokenPipeError

    assert TrainingManager(run.path, script=FAKE).train(progress).state == "done"


def test_problems_are_told_together_before_anything_starts(tmp_path):
    run = make_run(tmp_path / "run")
    (run.dataset / "manifest.json").unlink()
    run.plan.write_text("{")
    with pytest.raises(EliteError) as caught:
        train(run)
    assert "manifest.json" in str(caught.value)
    assert "plan.json is not valid JSON" in str(caught.value)
    assert not run.log.exists()


@pytest.mark.parametrize(("interrupts", "phase", "waited_s", "number"), [
    (1, "train", 1, 0), (1, "train", 61, signal.SIGTERM), (1, "train", 121, signal.SIGKILL),
    (1, "load", 6, signal.SIGTERM), (1, "load", 11, signal.SIGKILL), (2, "train", 1, signal.SIGINT),
    (3, "train", 1, signal.SIGKILL), (1, "save", 30, 0)])
def test_what_a_stop_sends_and_when(interrupts, phase, waited_s, number):
    stop = Stop()
    for _ in range(interrupts):
        stop.ask("SIGINT")
    assert due_signal(stop, phase, waited_s, grace_s=60) == number


def test_nothing_is_sent_unasked():
    assert due_signal(Stop(), "train", 1e9) == 0
