"""A trial within the real command: a dry run ends after it, and a stop or a kill leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer
from measured import PROFILE

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "elite_train.py"), "--auto", "--repo", str(Path(typer.__file__).parent),
           "--base-model", "embedded", "--context", "256", "--output", "runs/new",
           "--set", "evaluation.completions=0", "--set", "evaluation.context_targets=0"]
ENVIRONMENT = {**os.environ, **PROFILE, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
pytestmark = pytest.mark.real


def started(folder):
    """The command once its trial's subprocess has told something."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               stdin=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob(".elite-trial-*/heartbeat.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def wait_until_empty(folder, limit_s=40):
    deadline = time.monotonic() + limit_s
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(folder.iterdir()) == []
    named = [p.info["pid"] for p in psutil.process_iter(["pid", "cmdline"])
             if any(str(folder) in word for word in p.info["cmdline"] or [])]
    assert named == []


def test_ctrl_c_during_the_trial_ends_with_130_and_nothing_left(tmp_path):
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "Stopped by Ctrl+C during the trial. Nothing was written.\n")
    wait_until_empty(tmp_path)


def test_a_killed_command_takes_its_trial_along(tmp_path):
    process = started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    wait_until_empty(tmp_path)


def test_a_dry_run_tries_and_writes_nothing(tmp_path):
    done = subprocess.run([*COMMAND, "--dry-run", "--json"], cwd=tmp_path, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["trial"]["confirmed"]
    assert [step["context_tokens"] for step in plan["trial"]["steps"]][-1] == 256
    assert plan["ranges"]["total_s"]["source"] == "measured"
    assert list(tmp_path.iterdir()) == []
