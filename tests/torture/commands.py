"""Several commands at once on runs of their own, and what is left of them."""

import json
import os
import subprocess
import sys
import time

import psutil
from run_factory import FAKE, make_run
from test_training_manager import COMMAND, ROOT, trained

PATIENCE_S = 120
WATCHED = {}                     # run directories of all tests: whether a process was left


def wait_for(truth, limit_s=PATIENCE_S, what="it"):
    end = time.monotonic() + limit_s
    while not (found := truth()):
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)
    return found


def own(path):
    """Living processes that have a folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"{path}/" in f"{line}/" and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


class Commands:
    """Several commands at once, each on a run of its own with the stand-in trainer."""

    def __init__(self, path, count, act="done", before="", **extra):
        self.runs = [make_run(path / str(index)) for index in range(count)]
        self.all = [self.start(run, act, before, extra) for run in self.runs]

    def start(self, run, act, before, extra, **how):
        env = {**os.environ, "FAKE": act, "PYTHONPATH": str(ROOT),
               **{name: str(value) for name, value in extra.items()}}
        how = {"stdout": (run.path / "command.out").open("wb"), "stderr": subprocess.STDOUT} | how
        return subprocess.Popen([sys.executable, "-c", before + COMMAND, str(run.path), str(FAKE)],
                                env=env, **how)

    def ready(self, steps=2):
        for run in self.runs:
            wait_for(trained(run, steps), what="the first steps")
        return zip(self.runs, self.all, strict=True)


def state(run):
    return json.loads(run.result.read_text())["state"]
