"""Runs and saves that are killed or refused, from the side of the tests."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import forked
import pytest
import torch
from run_maker import configure
from trainer_fakes import config_of, training_of

from training.manager.launcher import SCRIPT
from training.records import Result
from training.rundir import read_record
from training.trainer import checkpoints
from training.trainer.journal import read_lines

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("crash_worker.py")
STEPS = 8
TINY = {"embedded__hidden": 32, "training__micro_batch": 1, "training__accumulation": 1,
        "training__max_steps": STEPS, "training__save_steps": 1, "evaluation__completions": 0,
        "evaluation__windows": 2}
TWO = TINY | {"device__count": 2, "deepspeed__stage": 2, "deepspeed__offload_optimizer": True,
              "training__max_steps": 3}


def run_at(dataset, path, **settings):
    """A run directory that was not trained yet."""
    path.mkdir(parents=True)
    shutil.copytree(dataset / "dataset", path / "dataset")
    return configure(path, **(settings or TINY))


def log_of(run):
    return run.with_name(run.name + ".log")


def trained(run, ranks=0):
    """Train, or go on, to the end; the digest of the weights, after checks of what is left behind."""
    job = forked.server().start(SCRIPT, log_of(run), {"arguments": ["--run-dir", str(run)]}, ranks)
    codes = job.wait()
    assert not any(codes), job.text()[-3000:]
    result = read_record(Result, run / "result.json")
    assert (result.state, result.error) == ("done", "")
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, result.steps + 1))
    assert not leftovers(run)
    return result.digest


def unfinished(finished, path, last=STEPS):
    """A copy of a finished run as it was before its last step."""
    shutil.copytree(finished, path)
    (path / "result.json").unlink()
    for name in (f"checkpoint-{last}", "model"):
        shutil.rmtree(path / name)
    return path


def leftovers(run):
    """What only a process that was killed leaves."""
    return [path.name for path in run.iterdir() if path.name.startswith((".staging", "trash-"))
            or (path.name.startswith(".") and path.name not in (".lock", ".command.lock"))]


def killed_after(run, seconds):
    """Start the trainer and SIGKILL it; whether it was still there."""
    process = forked.trainer(run, log_of(run))
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def killed(new_run, kills, source, lasts_s):
    """A run after so many SIGKILLs at random moments of it. One that ended before its kill is made anew.

    `lasts_s`: how long a start lasts, [the first of a run, a later one]; kept up with.
    """
    run, made = new_run(), 0
    while made < kills:
        later, began = int(made > 0), time.monotonic()
        if killed_after(run, source.uniform(0, lasts_s[later])):
            made += 1
            continue
        lasts_s[later] = (lasts_s[later] + time.monotonic() - began) / 2
        shutil.rmtree(run)
        run, made = new_run(), 0
    return run


def worker(log, task, path, fault=None, ranks=0, **more):
    arguments = {"task": task, "path": str(path), "fault": fault, **more}
    return forked.server().start(WORKER, log, arguments, ranks)


def traced(log, task, path, calls, action):
    """A task of the worker under strace, which does `action` at one of `calls`; its exit code and output."""
    job = worker(log, task, path, traced=True)
    names = ",".join(f"?{call}" for call in calls)
    tracer = subprocess.Popen(["strace", "-qq", "-o", os.devnull, "-p", str(job.pids[0]), "-e",
                               f"trace={names}", "-e", f"inject={names}:{action}"])
    [code] = job.wait()
    tracer.wait()
    return code, job.text()


@functools.cache
def can_trace():
    """Whether strace is here and may attach to other processes."""
    if not shutil.which("strace"):
        return False
    code = ("import ctypes, time; ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0); "
            "print(flush=True); time.sleep(60)")
    sleeper = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    sleeper.stdout.readline()
    tracer = subprocess.Popen(["strace", "-qq", "-o", os.devnull, "-p", str(sleeper.pid)],
                              stderr=subprocess.DEVNULL)
    with suppress(subprocess.TimeoutExpired):
        tracer.wait(0.3)
    attached = tracer.poll() is None
    sleeper.kill()
    sleeper.communicate()
    tracer.wait()
    return attached


def need_strace():
    if not can_trace():
        pytest.skip("strace is not installed, or may not attach here")


def seeded():
    """A generator, and the number that makes it again."""
    seed = time.time_ns() % 10 ** 9
    return random.Random(seed), f"random seed {seed}"


def weights_at(path):
    """The tensors and numbers of a checkpoint, and its step."""
    captured, state = checkpoints.load(path)
    return captured, state["step"]


def same(one, other):
    pairs = [(one.weights, other.weights), (one.optimizer, other.optimizer)]
    return all(left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
               for left, right in pairs) and one.numbers == other.numbers


def steps_made(path, *, steps, keep=1):
    """Train a fake model, with a checkpoint at each step; the last `keep` of them stay."""
    training = training_of(path, config_of(training__keep_checkpoints=keep))
    for _ in range(steps):
        training._train_one()
        training.save()
    return training


class OneSave:
    """A save of step 3 beside checkpoints 1 and 2, which are to go: the same one again and again, killed."""

    def __init__(self, folder):
        self.folder, self.tries = folder, 0
        torch.set_num_threads(1)
        steps_made(folder / "before", steps=2, keep=2)
        shutil.copytree(folder / "before", folder / "after")
        assert worker(folder / "log", "save", folder / "after").wait() == [0]
        self.known = {step: weights_at(folder / place / f"checkpoint-{step}")[0]
                      for place, step in (("before", 1), ("before", 2), ("after", 3))}

    def again(self):
        """A folder as it is before the save."""
        self.tries += 1
        path = self.folder / f"try-{self.tries}"
        shutil.copytree(self.folder / "before", path)
        return path

    def problem(self, path):
        """What is wrong with a folder that a killed save has left, or nothing; it is removed."""
        newest, _ = checkpoints.newest_valid(path)
        torn = [each.name for each in path.glob("checkpoint-*")
                if checkpoints.fault(each, checkpoints.step_of(each))]
        if newest is None or torn:
            return f"{newest} is the newest whole one, {torn} are torn"
        captured, step = weights_at(newest)
        if step not in (2, 3) or not same(captured, self.known[step]):
            return f"{newest} holds something else"
        checkpoints.remove_leftovers(path)
        others = [each.name for each in path.iterdir() if not checkpoints.NAME.match(each.name)]
        if not {*others} <= {"heartbeat.json", "metrics.jsonl"}:
            return f"{others} are left after the next start"
        shutil.rmtree(path)
        return ""

    def swept(self, kill):
        """`kill(path, n)` for n from 1 on, until a save is not killed: how often it was, and problems."""
        problems, n = [], 0
        while True:
            path = self.again()
            code = kill(path, n + 1)
            problems += [f"at {n + 1}: {found}"] if (found := self.problem(path)) else []
            if code == 0:
                return n, problems
            assert code == -signal.SIGKILL, (self.folder / "log").read_text()[-3000:]
            n += 1


def manifest_of(path):
    return json.loads((path / "MANIFEST.json").read_text())
