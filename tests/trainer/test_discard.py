"""An update that is discarded under DeepSpeed, and LoRA+ there, on one CPU rank with real engines."""

import json
from pathlib import Path

import forked
import pytest

pytestmark = pytest.mark.real
WORKER = Path(__file__).resolve().parent / "discard_worker.py"
CASES = ("stage 1", "stage 1, offloaded", "stage 2", "stage 2, offloaded", "stage 3", "stage 3, offloaded",
         "stage 1, bfloat16", "stage 2, offloaded, bfloat16", "stage 3, offloaded, bfloat16")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    path = tmp_path_factory.mktemp("discard")
    forked.server().run(WORKER, path / "worker.log", {"path": str(path)})
    return json.loads((path / "outcome.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_updates_around_a_discarded_one_are_those_without_it(outcome, case):
    """The discarded gradients were a thousand times as large once, and not a number once."""
    found = outcome[case]
    assert found["same"]
    assert found["tensors"] == 24  # two moments and a count of eight parameters
    assert found["norms"][0] == found["norms"][1]
    assert None not in found["norms"][0]
    assert (found["scale kept"], found["freed"]) == (True, True)


@pytest.mark.parametrize("case", CASES)
def test_the_b_of_an_adapter_moves_by_its_share_of_the_rate_under_zero(outcome, case):
    moved = outcome[case]["moved"]
    assert moved["lora_A.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["lora_B.weight"] == pytest.approx(8e-3, rel=1e-3)
