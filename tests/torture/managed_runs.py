"""Runs of the real manager whose trainers, with a fault in them, are forked: seconds of imports once."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import forked
import pytest
from run_maker import configure

from training.errors import EliteError
from training.manager import launcher, watchdog
from training.manager.manager import TrainingManager
from training.records import Result
from training.rundir import RunDirectory, read_record
from training.settings import read_yaml
from training.trainer.journal import read_lines

FAULTY = Path(__file__).resolve().with_name("faulty_trainer.py")


class Forked:
    """A forked trainer in place of a Popen."""

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def poll(self):
        return self.process.poll()

    def wait(self, timeout=forked.PATIENCE_S):
        limit = time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = limit - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("trainer", timeout)
            self.process.job.server.read(left)
        return code


def start_forked(argv, env, log_path, lock_handle):
    """`launcher.start` with the imports made before."""
    at = argv.index(str(FAULTY))
    given = {name: value for name, value in env.items() if name != watchdog.VARIABLE}
    job = forked.server().start(FAULTY, log_path, {"arguments": list(argv[at + 1:])}, environment=given)
    return Forked(forked.Process(job, argv)), os.open(os.devnull, os.O_RDONLY)


class Job:
    """One run: its directory, what the command told, and how it ended."""

    def __init__(self, with_dataset, path, fault, **settings):
        path.mkdir(parents=True)
        shutil.copytree(with_dataset / "dataset", path / "dataset")
        settings = {"evaluation__completions": 0, "training__save_steps": 0} | settings
        self.run, self.fault = RunDirectory(configure(path, **settings)), fault
        self.restarts, self.error = [], None

    def train(self, fault=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "start", start_forked)
            patch.setenv("ELITE_TEST_FAULT", json.dumps(self.fault if fault is None else fault))
            try:
                TrainingManager(self.run.path, script=FAULTY, pauses_s=(0.0,)).train(self.told)
            except EliteError as error:
                self.error = error
        return self

    def told(self, phase, done, total, detail):
        if phase == "restart":
            self.restarts.append(detail)

    @property
    def result(self):
        return read_record(Result, self.run.result)

    @property
    def values(self):
        return read_yaml(self.run.config)

    @property
    def rows(self):
        return [(row["step"], row["tokens"]) for row in read_lines(self.run.metrics)]

    def log(self):
        return self.run.log.read_text()[-3000:]
