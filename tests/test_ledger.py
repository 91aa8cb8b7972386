"""The ledger: both arms of every optimization are valid, and a verdict needs pairs that agree."""

import dataclasses
import json
from pathlib import Path

import pytest

from training import ledger
from training.errors import UsageError
from training.ledger import Arm, Entry
from training.records import HardwareProfile, Support
from training.settings import Config

ROOT = Path(__file__).resolve().parent.parent
PROFILE = HardwareProfile(name="box", source="measured", date="d", system="s", cpu_name="c", cpu_cores=2,
                          cpu_flags=(), ram_total_bytes=1, ram_available_bytes=1, gpus=(), disk_path="/",
                          disk_free_bytes=1,
                          supports={"deepspeed": Support(works=False, why="it is not installed")})


def arm(memory=100.0, rate=100.0, loss=5.0):
    return Arm(memory_bytes=memory, tokens_per_s=rate, loss=loss)


@pytest.mark.parametrize("item", ledger.catalogue(), ids=lambda item: item.id)
def test_both_arms_are_configurations_that_differ_and_the_code_is_there(item):
    on, off = Config({**ledger.BASE, **item.on}), Config({**ledger.BASE, **item.off})
    assert dict(on) != dict(off)
    assert item.on.keys() == item.off.keys()
    assert (ROOT / item.code).is_file()


@pytest.mark.parametrize(("on", "off", "expected"), [
    ([arm(memory=80), arm(memory=82)], [arm(), arm()], "helped"),
    ([arm(rate=80), arm(rate=82)], [arm(), arm()], "hurt"),
    ([arm(memory=80, rate=80), arm(memory=80, rate=80)], [arm(), arm()], "mixed"),
    ([arm(rate=80), arm(rate=120)], [arm(), arm()], "no difference"),
    ([arm(loss=4.99), arm(loss=4.99)], [arm(), arm()], "no difference"),
])
def test_a_difference_counts_when_every_pair_agrees_and_it_is_noticeable(on, off, expected):
    assert ledger.verdict(on, off) == expected


def test_the_change_is_the_median_over_the_pairs():
    on, off = [arm(rate=110), arm(rate=130), arm(rate=120)], [arm(), arm(), arm()]
    assert ledger.changes(on, off)["tokens_per_s"] == pytest.approx(0.2)


def test_what_this_machine_lacks_is_said_instead_of_measured():
    item = ledger.catalogue(["zero-2-offload"])[0]
    assert ledger.missing_needs(item, PROFILE) == "needs deepspeed: it is not installed"
    assert ledger.missing_needs(dataclasses.replace(item, needs=()), PROFILE) == ""


def test_an_unknown_id_gets_the_nearest():
    with pytest.raises(UsageError, match=r"No optimization one-cycl\. Nearest: one-cycle\."):
        ledger.catalogue(["one-cycl"])


def test_entries_measured_again_the_same_day_replace_the_old_ones(tmp_path):
    def entry(name, verdict):
        return Entry(id=name, name=name, date="d", verdict=verdict, why="", change={}, on=(arm(),), off=())

    ledger.save([entry("a", "helped"), entry("b", "hurt")], PROFILE, folder=tmp_path)
    path = ledger.save([entry("b", "mixed")], PROFILE, folder=tmp_path)
    found = json.loads(path.read_text())
    assert {row["id"]: row["verdict"] for row in found["entries"]} == {"a": "helped", "b": "mixed"}
    assert found["machine"] == "c, 2 cores, no GPU"
