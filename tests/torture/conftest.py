"""What the torture tests share: how often, where figures go, and a trainer's run directory to start from."""

import datetime
import json
import os
import platform
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "trainer"), str(HERE.parent / "manager")]
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
