"""Restarts after memory that ran out, hangs, kills and crash loops: a stand-in trainer, real processes."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import FAKE, make_run

from training.errors import CannotWrite, DataError, DoesNotFit, EliteError, Interrupted, StoppedByUser
from training.manager import monitor, outcome
from training.manager.manager import TrainingManager
from training.manager.monitor import read_rows
from training.manager.outcome import Ending
from training.manager.recovery import FAULT, HUNG, KILLED, MEMORY, Failure, Recovery, failure_of
from training.settings import read_yaml
from training.trainer.failing import is_out_of_memory


def train(run, act, pauses=(0.0,), **extra):
    wanted = {"FAKE": act, **{name: str(value) for name, value in extra.items()}}
    before = dict(os.environ)
    os.environ.update(wanted)
    seen = []
    try:
        manager = TrainingManager(run.path, script=FAKE, pauses_s=pauses)
        result = manager.train(lambda *told: seen.append(told))
        return result, [detail for phase, _, _, detail in seen if phase == "restart"]
    finally:
        os.environ.clear()
        os.environ.update(before)


def starts(run):
    return len((run.path / "starts").read_text())


def recorded(run):
    return read_rows(run.recovery)


def test_memory_that_runs_out_shrinks_the_micro_batch_and_the_run_ends(tmp_path):
    run = make_run(tmp_path / "run", {"training.micro_batch": 4, "training.accumulation": 2})
    result, told = train(run, "oom")
    assert result.state == "done"
    assert told == ["memory ran out in train: on with micro-batches of 2 in place of 4",
                    "memory ran out in train: on with micro-batches of 1 in place of 2"]
    values = read_yaml(run.config)
    assert (values["training.micro_batch"], values["training.accumulation"]) == (1, 8)
    assert "memory ran out after step 3 (train): micro-batches of 1 in place of 2" in run.config.read_text()
    assert json.loads(run.deepspeed.read_text())["train_micro_batch_size_per_gpu"] == 1
    assert [(row["kind"], row["step"], row["peak_bytes"]) for row in recorded(run)] == [
        ("out_of_memory", 3, 3 << 30)] * 2


def test_where_nothing_helps_the_attempts_are_told_with_their_peaks(tmp_path):
    run = make_run(tmp_path / "run", {"training.micro_batch": 2, "dataset.context_tokens": 4096,
                                      "dataset.target_tokens": 4096})
    with pytest.raises(DoesNotFit) as caught:
        train(run, "always_oom")
    text = str(caught.value)
    assert starts(run) == 6
    assert "Memory ran out 6 times:" in text
    assert text.count("after step 3, train, peak 3.00 GiB: memory ran out in train: on with ") == 5
    assert "peak 3.00 GiB: nothing is left to change" in text
    assert "The same command with --fresh and a smaller --context trains shorter windows, anew." in text
    assert json.loads(run.result.read_text())["exit_code"] == 71


def test_a_killed_trainer_is_started_again(tmp_path):
    run = make_run(tmp_path / "run")
    result, told = train(run, "killed_once")
    assert result.state == "done"
    assert told == ["the trainer was killed after step 3; restart 1 of 3 without progress"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, StoppedByUser), (signal.SIGTERM, Interrupted)])
def test_a_stop_before_a_restart_ends_the_wait_and_the_run(tmp_path, monkeypatch, number, error):
    run = make_run(tmp_path / "run")
    manager = TrainingManager(run.path, script=FAKE, pauses_s=(60.0,))
    began, handler = time.monotonic(), signal.getsignal(number)

    def asked(phase, *told):
        if phase == "restart":
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()

    monkeypatch.setenv("FAKE", "killed_once")
    with pytest.raises(error, match="after step 3"):
        manager.train(asked)
    assert time.monotonic() - began < 15
    assert starts(run) == 1
    assert json.loads(run.result.read_text())["state"] == "interrupted"
    assert signal.getsignal(number) is handler
    assert train(run, "done")[0].state == "done"


def test_a_crash_loop_ends_after_exactly_three_restarts(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(EliteError) as caught:
        train(run, "fail_at_3", FAKE_FAIL="fault")
    assert starts(run) == 4
    assert caught.value.exit_code == 70
    assert "3 restarts did not help: RuntimeError: it broke" in str(caught.value)
    assert [row["action"] for row in recorded(run)][-1] == "given up"


def test_a_hang_leaves_its_stacks_in_the_log_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "QUIET_LEAST_S", 2.0)
    monkeypatch.setattr(monitor, "LEARNED_STEPS", 2)
    run = make_run(tmp_path / "run")
    result, told = train(run, "hang")
    assert result.state == "done"
    assert told == ["the trainer gave no sign of life after step 3; restart 1 of 3 without progress"]
    log = run.log.read_text()
    assert "most recent call first" in log
    assert "in act_at" in log


def test_progress_gives_new_restarts_and_none_takes_them(tmp_path):
    recovering = Recovery(run=make_run(tmp_path / "run"))
    for step in (5, 9, 14):
        for _ in range(3):
            assert recovering.after(Failure(kind=KILLED, phase="train", step=step, error="killed"))
    assert not recovering.after(Failure(kind=KILLED, phase="train", step=14, error="killed"))


@pytest.mark.parametrize(("error", "ending", "told", "kind"), [
    (EliteError("x"), Ending(returncode=-9), {}, KILLED),
    (EliteError("x"), Ending(returncode=-9, asked="SIGINT"), {}, None),
    (DoesNotFit("x"), Ending(returncode=-9, oom_kills=1), {}, MEMORY),
    (EliteError("x"), Ending(returncode=-9, hung=True), {}, HUNG),
    (EliteError("x"), Ending(returncode=1), {"kind": "fault"}, FAULT),
    (EliteError("x"), Ending(returncode=1), {}, FAULT),
    (EliteError("x"), Ending(returncode=-11), {}, KILLED),
    (DoesNotFit("x"), Ending(returncode=71), {"kind": "out_of_memory"}, MEMORY),
    (DataError("x"), Ending(returncode=65), {}, None),
    (CannotWrite("x"), Ending(returncode=73), {}, None),
    (Interrupted("x"), Ending(returncode=75), {}, None),
    (Interrupted("x"), Ending(returncode=-15), {}, None)])
def test_what_a_restart_may_mend(tmp_path, error, ending, told, kind):
    run = make_run(tmp_path / "run")
    if told:
        run.failure.write_text(json.dumps(told))
    found = failure_of(run, ending, error)
    assert (found.kind if found else None) == kind


@pytest.mark.parametrize(("text", "memory"), [
    ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "device"),
    ("RuntimeError: CUDA error: out of memory", "device"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "device"),
    ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "device"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory", "host"),
    ("RuntimeError: std::bad_alloc", "host"), ("MemoryError: ", "host"),
    ("OSError: [Errno 12] Cannot allocate memory", "host")])
def test_whose_memory_ran_out_is_told_by_the_eight_texts_that_libraries_use(tmp_path, text, memory):
    kind, _, words = text.partition(": ")
    error = {"MemoryError": MemoryError}.get(kind, RuntimeError)(words)
    assert is_out_of_memory(error)
    run = make_run(tmp_path / "run")
    run.failure.write_text(json.dumps({"kind": "out_of_memory", "error": text}))
    assert failure_of(run, Ending(returncode=71), DoesNotFit("x")).memory == memory


def test_memory_that_ran_out_while_the_model_was_loaded_is_told_at_once(tmp_path):
    recovering = Recovery(run=make_run(tmp_path / "run"))
    assert recovering.after(Failure(kind=MEMORY, phase="load", step=0, error="x", memory="device")) == ""


def test_a_checkpoint_that_ends_the_trainer_twice_while_it_loads_is_set_aside(tmp_path):
    run = make_run(tmp_path / "run")
    for step in (4, 8):
        (run.path / f"checkpoint-{step}").mkdir()
        (run.path / f"checkpoint-{step}" / "MANIFEST.json").write_text("{}")
    recovering = Recovery(run=run)
    failing = Failure(kind=FAULT, phase="load", step=8, error="x")
    assert recovering.after(failing) == "the trainer failed while it loaded; checkpoint-8 is tried once more"
    assert "checkpoint-8 ended the trainer twice; it is kept as set-aside-" in recovering.after(failing)
    assert outcome.newest_checkpoint(run.path) == 4
    assert len(list(run.path.glob("set-aside-checkpoint-8-*"))) == 1


def test_what_fails_before_any_checkpoint_while_it_loads_is_not_tried_again(tmp_path):
    recovering = Recovery(run=make_run(tmp_path / "run"))
    assert recovering.after(Failure(kind=FAULT, phase="load", step=0, error="x")) == ""
