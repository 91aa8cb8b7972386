"""Verdicts of the ledger: intervals, thresholds, and losses at equal time."""

import math
import statistics

import pytest

from training.ledger import judging
from training.ledger.judging import Arm


def arm(memory=100.0, rate=100.0, loss=5.0, seconds=10.0, curve=(), disk=100.0):
    return Arm(memory_bytes=memory, tokens_per_s=rate, loss=loss, seconds=seconds, curve=curve,
               disk_bytes=disk)


@pytest.mark.parametrize(("on", "expected"), [
    ([arm(memory=80), arm(memory=81), arm(memory=82)], "helped"),
    ([arm(rate=80), arm(rate=81), arm(rate=82)], "hurt"),
    ([arm(memory=80, rate=80)] * 3, "mixed"),
    ([arm(rate=80), arm(rate=120), arm(rate=90)], "no difference"),      # the interval holds 0
    ([arm(loss=4.99)] * 3, "no difference"),                             # certain and too small
    ([arm(loss=4.9)] * 3, "helped"),
    ([arm(disk=10)] * 3, "no difference"),                               # not what it claims to change
])
def test_a_change_counts_when_its_interval_holds_no_0_and_it_is_noticeable(on, expected):
    assert judging.verdict(judging.changes(on, [arm()] * 3)) == expected


def test_disk_counts_for_what_claims_to_change_it():
    found = judging.changes([arm(disk=10)] * 2, [arm()] * 2, ("disk",))
    assert found["disk_bytes"].verdict == "better"


def test_the_change_is_the_mean_over_the_pairs_and_pairs_are_compared_by_seed():
    on, off = [arm(loss=4.5), arm(loss=3.6), arm(loss=2.7)], [arm(loss=5), arm(loss=4), arm(loss=3)]
    found = judging.changes(on, off)["loss"]
    assert found.mean == pytest.approx(-0.1)
    assert (found.low, found.high) == (pytest.approx(-0.1), pytest.approx(-0.1))


def test_intervals_equal_the_formula_with_the_tables_quantiles():
    values = [0.1, 0.12, 0.07, 0.2]
    mean, low, high = judging.interval(values)
    half = 3.182 * statistics.stdev(values) / 2
    assert (mean, low, high) == pytest.approx((0.1225, 0.1225 - half, 0.1225 + half))
    assert judging.interval([0.3])[1:] == (-math.inf, math.inf)


def test_the_tables_quantiles_are_students():
    """By simulation: 95 % of the intervals of normal samples hold the true mean."""
    import random
    draw = random.Random(5)
    for count in (2, 3, 8):
        held = 0
        for _ in range(4000):
            _, low, high = judging.interval([draw.gauss(1, 1) for _ in range(count)])
            held += low <= 1 <= high
        assert held / 4000 == pytest.approx(0.95, abs=0.012)


CURVE = ((0.0, 8.0), (10.0, 6.0), (20.0, 5.0))


@pytest.mark.parametrize(("seconds", "loss"), [(0, 8), (5, 7), (10, 6), (12.5, 5.75), (20, 5), (30, 5)])
def test_a_loss_lies_on_the_line_between_the_evaluations_around_it(seconds, loss):
    assert judging.loss_at(CURVE, seconds) == pytest.approx(loss)


def test_at_equal_time_the_slower_arm_is_read_when_the_faster_one_ended():
    slow = arm(loss=5.0, seconds=20.0, curve=CURVE)
    fast = arm(loss=5.5, seconds=15.0, curve=((0.0, 8.0), (7.5, 6.5), (15.0, 5.5)))
    assert judging.at_equal_time(slow, fast) == (5.5, 5.5)
    found = judging.changes([slow] * 3, [fast] * 3, ("quality",))
    assert found["loss"].verdict == "better"
    assert found["loss_at_time"].verdict == "no difference"


def test_without_a_curve_there_is_no_loss_at_equal_time():
    assert "loss_at_time" not in judging.changes([arm()] * 3, [arm()] * 3, ("quality",))


def test_a_loss_that_is_no_number_is_left_out():
    assert "loss" not in judging.changes([arm(loss=math.nan)] * 2, [arm()] * 2)
