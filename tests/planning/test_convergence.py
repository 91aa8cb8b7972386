"""The decay of the loss: its interval holds the truth, its prior says where it comes from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from training.planning import convergence
from training.shapes import shape_from_config

CURVE = json.loads((Path(__file__).with_name("embedded_curve.json")).read_text())
SHAPE = shape_from_config({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4,
                           "num_attention_heads": 4, "intermediate_size": 704, "vocab_size": 4096})


def noisy(seed, steps, noise, share=1.0, floor=3.0, start=8.0):
    """Points of the first `share` of a decaying run, its tokens, and the true loss at its end."""
    tokens = np.arange(1, steps + 1) * 1000.0
    true = floor + (start - floor) * np.exp(-tokens / (0.35 * tokens[-1]))
    seen = true + np.random.default_rng(seed).normal(0, noise, steps)
    count = int(share * steps)
    return list(zip(tokens[:count], seen[:count], strict=True)), tokens[-1], true[-1]


@pytest.mark.parametrize(("steps", "noise", "share"), [(20, 0.1, 1.0), (200, 0.05, 1.0), (40, 0.1, 0.5),
                                                       (200, 0.2, 0.5)])
def test_the_interval_holds_the_truth_in_nine_of_ten_runs(steps, noise, share):
    held = 0
    for seed in range(200):
        points, tokens, truth = noisy(seed, steps, noise, share)
        low, high = convergence.fit(points).between(tokens)
        held += low <= truth <= high
    assert held >= 180


def test_an_exact_curve_gives_its_constants_back():
    points, tokens, truth = noisy(0, 50, 0.0)
    found = convergence.fit(points)
    assert (found.floor, found.start) == (pytest.approx(3.0, abs=0.01), pytest.approx(8.0, abs=0.02))
    assert found.tau_tokens == pytest.approx(0.35 * tokens, rel=0.01)
    assert found.expected(tokens) == pytest.approx(truth, abs=1e-3)


def test_the_interval_narrows_as_the_run_goes_on():
    def width(share):
        points, tokens, _ = noisy(3, 200, 0.1, share)
        found = convergence.at_end(points, tokens)
        return found.high - found.low
    assert width(0.9) < width(0.6) < width(0.3)


def test_nothing_is_said_of_too_few_or_broken_points():
    points, tokens, _ = noisy(0, 40, 0.1)
    assert convergence.fit(points[:7]) is None
    assert convergence.fit([(x, math.nan) for x, _ in points]) is None
    assert convergence.fit([(5.0, y) for _, y in points]) is None
    assert convergence.at_end([], tokens) is None


def test_a_real_run_ends_within_what_its_first_half_expected():
    points = list(zip(np.cumsum(CURVE["tokens"]).tolist(), CURVE["loss"], strict=True))
    end = float(np.mean(CURVE["loss"][-8:]))
    for share in (0.25, 0.5, 0.75):
        expected = convergence.at_end(points[:int(share * len(points))], points[-1][0])
        assert expected.low <= end <= expected.high
        assert expected.expected == pytest.approx(end, rel=0.15)
    prior = convergence.before(SHAPE, True, None, points[-1][0])
    assert prior.low <= end <= prior.high


def test_the_prior_says_what_is_measured_and_what_is_assumed():
    small = convergence.before(SHAPE, True, None, 0.0)
    assert small.expected == pytest.approx(math.log(4096))
    later = convergence.before(SHAPE, True, None, 100_000.0)
    assert later.low < later.expected < later.high < small.expected
    assert later.why.startswith("one measured run of the embedded model: ")
    base = convergence.before(SHAPE, False, 1.5, 1e6)
    assert (base.low < base.expected < base.high, base.high) == (True, 1.5)
    assert base.why.startswith("assumed, not measured")


def test_epochs_are_recommended_until_one_gains_less_than_a_hundredth():
    points, tokens, _ = noisy(0, 50, 0.0)
    decay = convergence.fit(points)
    epochs, why = convergence.recommended_epochs(decay, tokens / 2)
    gains = [1 - decay.expected(tokens / 2 * n) / decay.expected(tokens / 2 * (n - 1))
             for n in (epochs, epochs + 1)]
    assert gains[0] >= 0.01 > gains[1]
    assert why == f"epoch {epochs + 1} would lower the loss by {gains[1]:.1%}, less than 1%"
    assert convergence.recommended_epochs(decay, 1000 * tokens)[0] == 1
    assert convergence.recommended_epochs(decay, tokens / 20, most=3) == (
        3, "each of 3 epochs still lowers the loss by 1% or more")


def test_what_is_expected_at_the_end_says_how_many_epochs_are_worth_it():
    points = [(1000.0 * n, 2.0 + 3.0 * math.exp(-n / 20)) for n in range(1, 60)]
    found = convergence.at_end(points, 100_000.0, epoch_tokens=30_000.0)
    epochs, why = convergence.recommended_epochs(convergence.fit(points), 30_000.0)
    assert found.why.endswith(f"; {epochs} epochs recommended: {why}")
    assert "epoch" not in convergence.at_end(points, 100_000.0).why
