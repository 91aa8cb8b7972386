"""Signals to the real trainer in each of its phases, and to a command that has it as its child."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
from commands import PATIENCE_S, own, wait_for
from run_factory import FAKE, make_run
from run_maker import configure
from slow_trainer import REACHED
from test_training_manager import COMMAND, ROOT

from training.errors import EliteError
from training.manager import launcher, runs
from training.manager.manager import TrainingManager
from training.manager.monitor import read_rows
from training.records import Result
from training.rundir import read_record
from training.trainer import checkpoints, stopping
from training.trainer.stopping import Watch

pytestmark = pytest.mark.usefixtures("nothing_is_left")


SLOW = Path(__file__).with_name("slow_trainer.py")


def real_run(with_dataset, path, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return configure(path, **{"evaluation__completions": 0, "evaluation__windows": 2, **settings})


def slowed(run, at="", seconds=60.0, skip=0, ranks=0):
    """The real trainer, forked, with one place in it that takes long."""
    arguments = {"arguments": ["--run-dir", str(run)], "at": at, "seconds": seconds, "skip": skip}
    (run / REACHED).unlink(missing_ok=True)
    return forked.server().start(SLOW, run.parent / f"{run.name}.log", arguments, ranks)


@pytest.fixture(scope="module")
def digest(with_dataset, tmp_path_factory):
    run = real_run(with_dataset, tmp_path_factory.mktemp("finished") / "run")
    assert slowed(run).wait() == [0]
    return read_record(Result, run / "result.json").digest


def ends_with(run, digest):
    """Whether the next start of the trainer ends with these weights."""
    return slowed(run).wait() == [0] and read_record(Result, run / "result.json").digest == digest


SHORT_PHASES = {"save": 0, "import": 0, "load": 0, "warm-up": 0, "train": 9, "evaluate": 0, "export": 0,
                "evaluate between": 1}


@pytest.mark.real
def test_sigterm_is_honoured_within_ten_seconds_in_every_phase(tmp_path, matrix, with_dataset, digest):
    passed, tries = 0, matrix.count(1, 10)
    for turn in range(tries):
        jobs = {}
        for name, skip in SHORT_PHASES.items():
            more = {"training__eval_steps": 3, "training__save_steps": 0} if "between" in name else {}
            run = real_run(with_dataset, tmp_path / f"{turn}-{name}", device__warmup_steps=1, **more)
            jobs[run] = slowed(run, name.split()[0], 3.0 if name == "save" else 60.0, skip)
            if "between" in name:
                evaluated_first = run
        for run, job in jobs.items():
            wait_for((run / REACHED).exists, what=f"{run.name}: {job.text()[-500:]}")
        for run, job in jobs.items():
            start = time.monotonic()
            job.kill(signal.SIGTERM)
            codes, took_s = job.wait(), time.monotonic() - start
            found = read_record(Result, run / "result.json")
            good = (codes, found.state, took_s < 10) == ([75], "interrupted", True)
            assert good, (run.name, codes, found.state, took_s, job.text()[-1500:])
            saved = runs.newest_checkpoint(run) or 0
            assert saved == found.steps, run.name
            assert saved or found.error == "Stopped by SIGTERM before the first step; resume continues there."
            passed += good
        assert runs.newest_checkpoint(evaluated_first) in (3, 6)
        for run in matrix.count([run for run in jobs if "eval" in run.name], jobs):
            assert ends_with(run, digest), run.name
    matrix.record(33, passed, tries * len(SHORT_PHASES), ", ".join(SHORT_PHASES))


@pytest.mark.real
def test_a_second_interrupt_in_a_save_ends_at_once_and_tears_nothing(tmp_path, matrix, with_dataset, digest):
    passed, tries = 0, matrix.count(1, 10)
    for turn in range(tries):
        run = real_run(with_dataset, tmp_path / str(turn))
        job = slowed(run, "save", skip=1)
        wait_for((run / REACHED).exists)
        job.kill(signal.SIGINT)
        time.sleep(stopping.SECOND_SIGNAL_S + 0.2)
        assert job.poll() == [None]
        start = time.monotonic()
        job.kill(signal.SIGINT)
        good = job.wait() == [130] and time.monotonic() - start < 2
        newest, skipped = checkpoints.newest_valid(run)
        passed += good and newest.name == "checkpoint-4" and not skipped and ends_with(run, digest)
    matrix.record(31, passed, tries, "a second SIGINT in the middle of a save")


@pytest.mark.real
def test_sigterm_to_every_rank_at_once_still_saves(tmp_path, matrix, with_dataset):
    passed, tries = 0, matrix.count(1, 20)
    for turn in range(tries):
        run = real_run(with_dataset, tmp_path / str(turn), device__count=2, training__micro_batch=2,
                       training__save_steps=0)
        job = slowed(run, "train", 2.0, 6, ranks=2)
        wait_for((run / REACHED).exists, what=job.text())
        os.killpg(job.pids[0], signal.SIGTERM)
        codes, found = job.wait(), read_record(Result, run / "result.json")
        newest, _ = checkpoints.newest_valid(run)
        rows = read_rows(run / "metrics.jsonl")
        passed += (codes == [75, 75] and found.state == "interrupted" and newest is not None
                   and checkpoints.step_of(newest) == found.steps == rows[-1]["step"])
    matrix.record(34, passed, tries, "two ranks, signalled as one group")


REAL_COMMAND = COMMAND.replace("script=Path(fake)", "script=Path(fake), grace_s=60.0")
WAYS = {"trainer": 0, "SIGTERM": 75, "SIGINT": 130, "SIGKILL": -9}


@pytest.mark.real
def test_the_real_trainer_under_the_command_ends_with_the_same_weights(tmp_path, matrix, with_dataset,
                                                                       digest):
    """SIGTERM, SIGINT and SIGKILL of the command, and SIGKILL of the trainer, which is started again."""
    passed, tries = dict.fromkeys(WAYS, 0), matrix.count(1, 5)
    for turn in range(tries):
        for way, expected in list(WAYS.items())[:matrix.count(1, 4)]:
            run = real_run(with_dataset, tmp_path / f"{turn}-{way}", training__save_steps=2)
            env = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW_AT": "train", "SLOW_S": "1.5",
                   "SLOW_SKIP": "9"}
            command = subprocess.Popen([sys.executable, "-c", REAL_COMMAND, str(run), str(SLOW)], env=env,
                                       stdout=(run / "command.out").open("wb"), stderr=subprocess.STDOUT)
            wait_for((run / REACHED).exists)
            if way == "trainer":
                os.kill(next(pid for pid in own(run) if pid != command.pid), signal.SIGKILL)
            else:
                command.send_signal(signal.Signals[way])
            code = command.wait(PATIENCE_S)
            wait_for(lambda run=run: not own(run), 15)
            good = code == expected and runs.newest_checkpoint(run) is not None
            if way == "trainer":
                line = read_rows(run / "recovery.jsonl")
                good = good and [row["kind"] for row in line] == ["killed"]
                good = good and read_record(Result, run / "result.json").digest == digest
            else:
                good = good and ends_with(run, digest)
            assert good, (way, code, (run / "command.out").read_text()[-2000:])
            passed[way] += good
    for row, way in matrix.count((), ((30, "SIGINT"), (32, "SIGTERM"), (35, "SIGKILL"))):
        matrix.record(row, passed[way], tries, "the real trainer")
    matrix.record(36, passed["trainer"], tries, "SIGKILL of the real trainer: started again, same digest")


PORT = """
import os, runpy, socket
if os.environ["RANK"] == "0":
    held = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
runpy.run_path({fake!r}, run_name="__main__")
"""


def alone(config, run_path, python, *, script, arguments, port, devices):
    return ["/usr/bin/env", "RANK=0", f"MASTER_PORT={port}", python, str(script), "--run-dir", str(run_path)]


@pytest.mark.real
def test_a_port_that_was_taken_meanwhile_is_another_one_at_the_next_start(tmp_path, matrix, monkeypatch):
    """`env` stands in for DeepSpeed's launcher, which takes seconds to start; the long form begins with one
    start of the real one."""
    free, passed, tries = launcher.free_port, 0, matrix.count(1, 50)
    with ThreadPoolExecutor(8) as pool:
        ports = [free() for _ in range(matrix.count(50, 500))]
        drawn = list(pool.map(lambda _: free(), ports))
    assert all(1024 <= port < 65536 for port in (*ports, *drawn))
    for turn in range(tries):
        run = make_run(tmp_path / str(turn) / "run", {"deepspeed.stage": 2, "device.count": 2})
        script = run.path / "trainer.py"
        script.write_text(PORT.format(fake=str(FAKE)))
        if turn == matrix.count(0, 1):
            monkeypatch.setattr(launcher, "command", alone)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            given = iter([taken.getsockname()[1]])
            monkeypatch.setattr(launcher, "free_port", lambda given=given: next(given, None) or free())
            result = TrainingManager(run.path, script=script, pauses_s=(0.0,)).train()
        kinds = [row["kind"] for row in read_rows(run.recovery)]
        passed += (result.state, kinds) == ("done", ["killed"])
    matrix.record(42, passed, tries, "taken at the first start")


def test_an_alarm_at_the_very_end_of_slow_work_leaves_no_timer_behind(tmp_path, monkeypatch):
    """The alarm comes between the work's last line and the line that puts the timer away."""
    file = tmp_path / "stop"
    watch, before, setitimer = Watch(file), signal.getsignal(signal.SIGALRM), signal.setitimer
    watch.step = 3

    def late(which, seconds, interval=0.0):
        if not seconds and not watch.poll():
            file.write_text("SIGTERM")
            signal.raise_signal(signal.SIGALRM)
        return setitimer(which, seconds, interval)
    monkeypatch.setattr(signal, "setitimer", late)
    with pytest.raises(EliteError, match="Stopped by SIGTERM at step 3"), watch.at_once():
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
