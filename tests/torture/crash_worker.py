"""A save, or a whole training, that is killed or refused at a chosen call. Runs in forks: tests/forked.py."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "trainer"), str(HERE.parents[1])]
from trainer_fakes import config_of, training_of  # noqa: E402

from training import model_trainer_unified  # noqa: E402

PR_SET_PTRACER = 0x59616D61
PEER = "rank-1.pid"
# Calls that do the same are counted as one.
CALLS = {"fsync": ("fsync",), "rename": ("rename", "replace"), "mkdir": ("mkdir",), "unlink": ("unlink",),
         "rmdir": ("rmdir",)}


def main(task, path, fault=None, traced=False, cwd="/"):
    """Do a task on a folder. `traced`: it begins once strace is attached; `fault`: see `arm`."""
    os.chdir(cwd)
    if os.environ.get("RANK") == "1":
        (Path(path) / PEER).write_text(str(os.getpid()))
    elif fault and task == "train":
        arm(path, **fault)
    begin = wait_for_tracer if traced else lambda: None
    if task == "train":
        begin()
        return model_trainer_unified.main(["--run-dir", path])
    return save(Path(path), fault, begin)


def save(path, fault, begin):
    """One update more than the newest checkpoint has, saved; older checkpoints go."""
    training = training_of(path, config_of(training__keep_checkpoints=1))
    training._train_one()
    if fault:
        arm(path, **fault)
    begin()
    training.save()
    return 0


def arm(path, call, at, then):
    """At the `at`-th call (from 1) of a kind: `kill` this process, its `group` or the `peer` rank, or fail
    with an error number. `at` 0: at every call on a checkpoint."""
    made = [0]

    def wrap(real):
        def called(*arguments, **named):
            made[0] += 1
            if made[0] == at or (not at and "checkpoint-" in str(arguments[-1])):
                strike(then, path)
            return real(*arguments, **named)
        return called

    for name in CALLS[call]:
        setattr(os, name, wrap(getattr(os, name)))


def strike(then, path):
    if isinstance(then, int):
        raise OSError(then, os.strerror(then))
    if then == "peer":
        os.kill(int((Path(path) / PEER).read_text()), signal.SIGKILL)
        return
    (os.killpg if then == "group" else os.kill)(os.getpgid(0) if then == "group" else os.getpid(),
                                                signal.SIGKILL)


def wait_for_tracer():
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.005)
