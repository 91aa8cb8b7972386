"""What the torture tests share: how often, where figures go, and a trainer's run directory to start from."""

import contextlib
import datetime
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "manager"))
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from commands import WATCHED, own, wait_for
from run_maker import dataset_at

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("ELITE_TORTURE") == "long"
RESULTS = ROOT / "benchmarks" / "results"


class Matrix:
    """Figures of the rows of configs/reliability/*.yaml that one test counts."""

    def __init__(self, test):
        self.test, self.rows = test, {}

    def count(self, short, long):
        """How often a row is tried: `long` under `make torture`."""
        return long if LONG else short

    def record(self, row, passed, of, note=""):
        """The figure of a row, kept at once under `make torture`; the test fails unless all passed."""
        before = self.rows.get(row, {"passed": 0, "of": 0, "note": ""})
        notes = "; ".join(filter(None, (before["note"], note)))
        self.rows[row] = {"passed": before["passed"] + passed, "of": before["of"] + of, "note": notes}
        if LONG:
            keep(row, self.test, self.rows[row])
        assert passed == of, f"row {row}: {passed} of {of}. {note}"


def keep(row, test, figures):
    """Into benchmarks/results/reliability-<date>.json, beside what other tests count of the row."""
    path = RESULTS / f"reliability-{datetime.date.today()}.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    known |= {"date": str(datetime.date.today()), "cores": os.cpu_count(), "system": platform.system()}
    known["rows"].setdefault(str(row), {})[test] = figures
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def matrix(request):
    """The recorder."""
    return Matrix(request.node.name)


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory):
    """A run directory with a small dataset."""
    return dataset_at(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def one_thread():
    """Sums of floats in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """Every attempt to reach a network, which fails."""
    made = []

    def refuse(*arguments, **_):
        made.append(arguments[1:])
        raise OSError("there is no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return made


@pytest.fixture
def started(monkeypatch):
    """The command line of every process that is started."""
    lines, popen = [], subprocess.Popen

    class Noted(popen):
        def __init__(self, line, *rest, **more):
            lines.append(" ".join(map(str, line)))
            super().__init__(line, *rest, **more)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return lines


@pytest.fixture
def nothing_is_left(tmp_path):
    """After each test: no process of its runs, nothing in /dev/shm, no file for a temporary name."""
    shared = set(os.listdir("/dev/shm"))
    yield
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not own(tmp_path), 15)
    left = own(tmp_path)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    more = sorted(name for name in set(os.listdir("/dev/shm")) - shared if name.startswith(("torch", "sem.")))
    asides = [path.name for path in tmp_path.rglob(".stop-*")]
    WATCHED[tmp_path.name] = not left and not more and not asides
    assert (left, more, asides) == ([], [], [])
