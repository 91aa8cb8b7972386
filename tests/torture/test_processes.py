"""Signals, deaths and hangs of the command and of its trainer: what is left is a run that can go on, and no
process."""

import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import statistics
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import WATCHED, Commands, own, state, wait_for
from run_factory import FAKE, make_run
from test_training_manager import gone, out, trained

from training.errors import EliteError
from training.manager import runs
from training.manager.manager import TrainingManager
from training.manager.monitor import ASLEEP_S, LEARNED_STEPS, Monitor, read_rows
from training.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("nothing_is_left")

IMPATIENT = "from training.manager import monitor; monitor.QUIET_LEAST_S, monitor.LEARNED_STEPS = 2.0, 2\n"


def goes_on(run, monkeypatch, steps):
    """Whether the next start goes on from the newest checkpoint and ends as done."""
    saved = runs.newest_checkpoint(run.path)
    monkeypatch.setenv("FAKE", "done")
    monkeypatch.setenv("FAKE_STEPS", str(saved + steps))
    TrainingManager(run.path, script=FAKE).train()
    return [row["step"] for row in read_rows(run.metrics)] == list(range(1, saved + steps + 1))


def test_ctrl_c_at_a_terminal_saves_and_ends_with_130(tmp_path, matrix, monkeypatch):
    tries, passed, began = matrix.count(2, 20), 0, []
    terminals = [pty.openpty() for _ in range(tries)]
    commands = Commands(tmp_path, 0)
    for index, (_, theirs) in enumerate(terminals):
        run = make_run(tmp_path / str(index))
        commands.runs.append(run)
        commands.all.append(commands.start(
            run, "done", "", {"FAKE_STEPS": 100_000}, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)))
        os.close(theirs)
    told = [drained(ours) for ours, _ in terminals]
    for _, (ours, _) in zip(commands.ready(), terminals, strict=True):
        os.write(ours, b"\x03")
        began.append(time.monotonic())
    for (run, command), start, text in zip(commands.ready(), began, told, strict=True):
        code = command.wait(20)
        wait_for(lambda run=run: not own(run.path), 10)
        in_time = time.monotonic() - start < 10
        saved = runs.newest_checkpoint(run.path)
        passed += (code == 130 and in_time and state(run) == "interrupted" and "StoppedByUser" in text()
                   and not run.stop.exists() and saved is not None and goes_on(run, monkeypatch, 2))
    matrix.record(30, passed, tries, "^C through a pseudo-terminal; gone within 10 s, and it goes on")


def drained(handle):
    """Read a terminal or pipe to its end on a thread; a function that says what came."""
    parts = []

    def read():
        with contextlib.suppress(OSError):
            while part := os.read(handle, 1 << 16):
                parts.append(part)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def text():
        thread.join(10)
        return b"".join(parts).decode(errors="replace")
    return text


def test_sigterm_to_the_command_alone_saves_and_ends_with_75(tmp_path, matrix, monkeypatch):
    tries, passed = matrix.count(2, 50), 0
    for first in range(0, tries, 10):
        commands = Commands(tmp_path / str(first), min(10, tries - first), FAKE_STEPS=100_000)
        begun = []
        for _, command in commands.ready():
            command.send_signal(signal.SIGTERM)
            begun.append(time.monotonic())
        for (run, command), start in zip(commands.ready(), begun, strict=True):
            code, in_time = command.wait(20), time.monotonic() - start < 10
            passed += (code == 75 and in_time and state(run) == "interrupted" and not own(run.path)
                       and runs.newest_checkpoint(run.path) is not None and goes_on(run, monkeypatch, 1))
    matrix.record(32, passed, tries, "0 processes left, and it goes on")


def test_a_third_ctrl_c_ends_a_trainer_that_hears_nothing(tmp_path, matrix):
    tries, passed = matrix.count(1, 10), 0
    commands = Commands(tmp_path, tries, "stubborn", FAKE_STEPS=100_000)
    for run, command in commands.ready():
        for _ in range(2):
            command.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert command.poll() is None
        assert trained(run, 3)()
        command.send_signal(signal.SIGINT)
        start = time.monotonic()
        passed += command.wait(20) == 130 and not own(run.path) and gone(run)
        passed -= time.monotonic() - start > 5
    matrix.record(31, passed, tries, "a third SIGINT kills the group")


def test_a_killed_command_takes_every_process_along(tmp_path, matrix):
    tries, passed = matrix.count(4, 50), 0
    for first in range(0, tries, 10):
        count = min(10, tries - first)
        commands = [Commands(tmp_path / f"{first}-{act}", count // 2, act, FAKE_STEPS=100_000)
                    for act in ("done", "stubborn")]
        begun = {}
        for each in commands:
            for run, command in each.ready():
                command.kill()
                command.wait()
                begun[run] = time.monotonic()
        for run, start in begun.items():
            wait_for(lambda run=run: not own(run.path), 20, "the trainer to end")
            passed += (time.monotonic() - start < 15 and runs.describe_run(run.path).state == "interrupted"
                       and (not (run.path / "orphan.pid").exists() or gone(run)))
    matrix.record(35, passed, tries, "half of the trainers ignore SIGTERM and have a child that does")


def pipe_that_is_full():
    """(read end, write end): a pipe without room for one byte more, with a blocking write end."""
    ours, theirs = os.pipe()
    aside = os.open(f"/proc/self/fd/{theirs}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(aside, b" " * size)
    os.close(aside)
    return ours, theirs


def test_a_lost_terminal_or_reader_does_not_end_the_training(tmp_path, matrix):
    tries, passed = matrix.count(1, 5), 0
    for turn in range(tries):
        (ours, terminal), (read_end, pipe), commands = pty.openpty(), os.pipe(), Commands(tmp_path, 0)
        given = {"hangup": {"stdin": terminal, "stdout": terminal, "stderr": terminal,
                            "start_new_session": True,
                            "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)},
                 "head": {"stdout": pipe, "stderr": pipe},
                 "closed": {"preexec_fn": lambda: (os.close(1), os.close(2))}}
        # The kernel sends SIGHUP to the command at a terminal; a write to the pipe gets SIGPIPE or EPIPE.
        for (name, how), handles in zip(given.items(), ((terminal, ours), (pipe, read_end), ()), strict=True):
            run = make_run(tmp_path / str(turn) / name)
            command = commands.start(run, "done", "", {"FAKE_STEPS": 150}, **how)
            wait_for(trained(run))
            for handle in handles:
                os.close(handle)
            assert command.poll() is None
            commands.runs.append(run)
            commands.all.append(command)
        for run, command in commands.ready():
            command.wait(60)
            passed += state(run) == "done" and run.log.exists() and not own(run.path)
    matrix.record(37, passed, 3 * tries, "terminal closed, reader gone, standard output closed")


def test_a_pipe_that_nobody_reads_holds_up_neither_training_nor_stop(tmp_path, matrix):
    passed, tries = 0, matrix.count(1, 5)
    for turn in range(tries):
        commands, readers = Commands(tmp_path / str(turn), 0), []
        for name, steps in (("end", 8), ("stop", 100_000)):
            read_end, write_end = pipe_that_is_full()
            run = make_run(tmp_path / str(turn) / name)
            commands.runs.append(run)
            commands.all.append(commands.start(run, "done", "", {"FAKE_STEPS": steps}, stdout=write_end,
                                               stderr=write_end))
            os.close(write_end)
            readers.append(read_end)
        for (run, command), code in zip(commands.ready(), (0, 75), strict=True):
            if code:
                time.sleep(0.5)
                command.send_signal(signal.SIGTERM)
            wait_for(run.result.exists, 10, "the trainer's result while the command is held up")
            assert command.poll() is None
            told = drained(readers[commands.runs.index(run)])
            passed += command.wait(20) == code and (not code or "Interrupted" in told())
    matrix.record(37, passed, 2 * tries, "full pipe: to the end, and stopped")


def test_a_stopped_trainer_or_machine_is_no_hang(tmp_path, matrix):
    stop_s, tries, passed = matrix.count(3.5, 61), matrix.count(1, 5), 0
    before = matrix.count(IMPATIENT + "monitor.ASLEEP_S = 1.0\n", "")
    alone, whole = (Commands(tmp_path / name, tries, before=before, FAKE_STEPS=60, FAKE_STEP_S=0.05)
                    for name in ("trainer", "machine"))
    stopped = []
    for commands in (alone, whole):
        for run, command in commands.ready(6):
            pids = [pid for pid in own(run.path) if commands is whole or pid != command.pid]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            stopped.append(pids)
    made = [run.metrics.read_text() for commands in (alone, whole) for run in commands.runs]
    time.sleep(stop_s)
    assert [run.metrics.read_text() for commands in (alone, whole) for run in commands.runs] == made
    for pids in stopped:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    for commands in (alone, whole):
        for run, command in zip(commands.runs, commands.all, strict=True):
            passed += (command.wait(60) == 0 and not run.recovery.exists()
                       and [row["step"] for row in read_rows(run.metrics)] == list(range(1, 61)))
    matrix.record(38, passed, 2 * tries, f"{stop_s} s: the trainer alone, and with its command")


def test_a_hang_is_found_its_stacks_kept_and_the_run_goes_on(tmp_path, matrix):
    tries, limit_s, passed = matrix.count(2, 20), matrix.count(2.0, 60.0), 0
    commands = Commands(tmp_path, tries, "hang", before=matrix.count(IMPATIENT, ""), FAKE_STEPS=12,
                        FAKE_HANG_AT=matrix.count(4, LEARNED_STEPS + 4), FAKE_STEP_S=0.3)
    for run, command in zip(commands.runs, commands.all, strict=True):
        code = command.wait(limit_s + 120)
        began = (run.path / "hung").stat().st_mtime
        line = read_rows(run.recovery)[0]
        passed += (code == 0 and line["kind"] == "hung" and limit_s <= line["time"] - began < limit_s + 30
                   and "in act_at" in run.log.read_text() and state(run) == "done")
    matrix.record(39, passed, tries, f"detected within {limit_s:.0f} + 30 s")


def test_steps_of_very_different_lengths_are_no_hang(tmp_path, matrix):
    """A clock of the test's own; steps take 1 to 10 times the shortest."""
    passed, tries = 0, matrix.count(8, 50)
    for turn in range(tries):
        source, now, alarms = random.Random(turn), [0.0], []
        run = RunDirectory(tmp_path / str(turn))
        run.path.mkdir()
        monitor = Monitor(run, now=lambda now=now: now[0])
        step_s, slow = source.uniform(0.1, 30), []
        for step in range(1, 40):
            slow.append(step_s * source.uniform(1, 10))
            run.heartbeat.write_text(json.dumps({"phase": "train", "step": step, "steps": 40, "time": step}))
            until = now[0] + slow[-1]
            while now[0] < until:
                now[0] += min(ASLEEP_S - 1, until - now[0])
                monitor.poll()
                alarms.extend([step] * monitor.hung)
            with run.metrics.open("a") as file:
                file.write(json.dumps({"step": step, "tokens": 100, "tokens_per_s": 100 / slow[-1]}) + "\n")
        began, limit_s = now[0], max(60.0, 10 * statistics.median(slow))
        while not monitor.hung:
            now[0] += ASLEEP_S - 1
            monitor.poll()
        assert len(slow) > LEARNED_STEPS
        passed += not alarms and now[0] - began <= limit_s + 30
    matrix.record(39, passed, tries, "no false alarm with tenfold jitter, and the hang after it found")


def stand_in(run, **environment):
    """A file that is the stand-in trainer with an environment of its own."""
    path = run.path / "trainer.py"
    path.write_text(f"import os, runpy\nos.environ.update({environment!r})\n"
                    f"runpy.run_path({str(FAKE)!r}, run_name='__main__')\n")
    return path


def failing(kind):
    return {"FAKE": "fail_at_3", "FAKE_FAIL": kind}


OUTCOMES = {
    "done": ({"FAKE": "done"}, 0), "killed once": ({"FAKE": "killed_once"}, 0),
    "out of memory once": ({"FAKE": "oom"}, 0), "no result": ({"FAKE": "no_result"}, 70),
    "torn result": ({"FAKE": "torn_result"}, 70), "done and another code": ({"FAKE": "bad_end"}, 70),
    "always out of memory": ({"FAKE": "always_oom"}, 71), "Ctrl+C": ({"FAKE_STEPS": "9999"}, 130),
    **{kind: (failing(kind), code) for kind, code in {
        "told": 71, "fault": 70, "1": 70, "2": 70, "65": 65, "66": 66, "70": 70, "71": 71, "73": 73,
        "SIGSEGV": 70, "SIGABRT": 70, "SIGBUS": 70, "SIGILL": 70, "SIGFPE": 70, "SIGKILL": 75, "SIGTERM": 75,
        "CUDA out of memory. Tried to allocate": 71, "DefaultCPUAllocator: can't allocate memory": 71,
        "std::bad_alloc": 71, "[Errno 28] No space left on device": 73, "[Errno 122] Disk quota exceeded": 73,
        "[Errno 30] Read-only file system": 73, "[Errno 24] Too many open files": 70,
        "Address already in use": 75, "ModuleNotFoundError: No module named 'x'": 66,
        "something nobody knows": 70}.items()}}


def code_of(path, name):
    """The code that an outcome ends with, and what result.json says of it."""
    environment, _ = OUTCOMES[name]
    run = make_run(path / str(list(OUTCOMES).index(name)))

    def progress(phase, done, total, detail):
        if name == "Ctrl+C" and phase == "train" and not run.stop.exists():
            raise KeyboardInterrupt
    try:
        TrainingManager(run.path, script=stand_in(run, **environment), pauses_s=(0.0,)).train(progress)
        code = 0
    except EliteError as error:
        code = error.exit_code
    told = json.loads(run.result.read_text())
    return code, told["exit_code"], told["state"]


def test_each_of_thirty_outcomes_has_its_exit_code(tmp_path, matrix):
    chosen = list(OUTCOMES)[::matrix.count(2, 1)]
    with ThreadPoolExecutor(6) as pool:
        found = dict(zip(chosen, pool.map(lambda name: code_of(tmp_path, name), chosen), strict=True))
    states = {0: "done", 75: "interrupted", 130: "interrupted"}
    expected = {name: (code, code, states.get(code, "failed")) for name, (_, code) in OUTCOMES.items()}
    wrong = {name: (found[name], expected[name]) for name in chosen if found[name] != expected[name]}
    matrix.record(44, len(chosen) - len(wrong), len(chosen), str(wrong or "code, result.json and state"))


def test_a_crash_loop_ends_after_three_restarts(tmp_path, matrix):
    passed, ways = 0, matrix.count(("fault", "SIGSEGV"), ("fault", "SIGSEGV", "SIGKILL", "1", "odd"))
    for kind in ways:
        run = make_run(tmp_path / kind)
        with pytest.raises(EliteError) as caught:
            TrainingManager(run.path, script=stand_in(run, **failing(kind)), pauses_s=(0.0,)).train()
        actions = [row["action"] for row in read_rows(run.recovery)]
        passed += (len((run.path / "starts").read_text()) == 4 and actions[-1] == "given up"
                   and all(f"restart {n} of 3" in action for n, action in enumerate(actions[:-1], 1))
                   and "3 restarts did not help" in str(caught.value))
    matrix.record(40, passed, len(ways), "exactly 3 restarts without progress, then told with the reason")


def test_no_test_of_this_file_left_a_process(tmp_path, matrix):
    if not WATCHED:  # run by itself
        commands = Commands(tmp_path, 1, "orphan")
        assert commands.all[0].wait(30) == 0
        WATCHED["alone"] = gone(commands.runs[0])
    assert out  # what a failed command printed is in its folder
    matrix.record(43, sum(WATCHED.values()), len(WATCHED), "tests after each of which nothing was left")
