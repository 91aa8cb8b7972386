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
    """Figures of the rows of configs/reliability/*.yaml."""

    def __init__(self):
        self.rows = {}

    def count(self, short, long):
        """How often a row is tried: `long` under `make torture`."""
        return long if LONG else short

    def record(self, row, passed, of, note=""):
        """The figure of a row, and the test fails unless all passed."""
        self.rows[str(row)] = {"passed": passed, "of": of, "note": note}
        assert passed == of, f"row {row}: {passed} of {of}. {note}"


@pytest.fixture(scope="session")
def matrix():
    """The recorder; under `make torture` it writes benchmarks/results/reliability-<date>.json at the end."""
    made = Matrix()
    yield made
    if LONG and made.rows:
        path = RESULTS / f"reliability-{datetime.date.today()}.json"
        known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        known |= {"date": str(datetime.date.today()), "cores": os.cpu_count(), "system": platform.system()}
        known["rows"] |= made.rows
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
