"""The expected final loss: in the progress line, kept at half, and beside what was measured."""

import json

from training.manager import facts, forecast
from training.manager.forecast import LossForecast
from training.manager.monitor import Monitor
from training.records import Range
from training.rundir import RunDirectory


def rows(first, last):
    return [{"step": step, "loss": 10.0 - step, "tokens": 100, "tokens_per_s": 50.0}
            for step in range(first, last + 1)]


class Expecting:
    """Says what it was asked with; remembers every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, points, tokens, epoch_tokens):
        self.calls.append((len(points), points[-1], tokens))
        if len(points) < 2:
            return None
        return Range(low=1.0, expected=float(len(points)), high=9.0, source="measured")


def test_the_tokens_of_an_epoch_come_from_the_rows_own_epochs(tmp_path):
    asked = []

    def expecting(points, tokens, epoch_tokens):
        asked.append(epoch_tokens)

    found = LossForecast(tmp_path, expecting, lambda: 0.0)
    found.add([{"step": 1, "tokens": 100, "loss": 9.0, "epoch": 0.0}])
    found.add([{"step": 2, "tokens": 100, "loss": 8.0, "epoch": 0.25}])
    assert found.text(8) == ""
    assert asked == [400.0]


def test_it_is_refitted_every_few_seconds_only(tmp_path):
    now, expecting = [0.0], Expecting()
    found = LossForecast(tmp_path, expecting, lambda: now[0])
    assert found.text(8) == ""
    found.add(rows(1, 2))
    assert found.text(8) == "at end 2.00 (1.00-9.00)"
    assert expecting.calls == [(2, (200.0, 8.0), 800.0)]
    found.add(rows(3, 3))
    assert found.text(8) == "at end 2.00 (1.00-9.00)"
    now[0] = forecast.REFIT_S
    assert found.text(8) == "at end 3.00 (1.00-9.00)"
    assert len(expecting.calls) == 2


def test_what_half_of_the_steps_said_is_kept_once(tmp_path):
    found = LossForecast(tmp_path, Expecting(), lambda: 0.0)
    found.add(rows(1, 3))
    found.text(8)
    assert not (tmp_path / forecast.NAME).exists()
    found.add(rows(4, 7))
    found.text(8)
    assert json.loads((tmp_path / forecast.NAME).read_text())["expected"] == 4.0  # of 4 points, not of 7
    again = LossForecast(tmp_path, Expecting(), lambda: 0.0)
    again.add(rows(1, 8))
    again.text(16)
    assert json.loads((tmp_path / forecast.NAME).read_text())["expected"] == 4.0


def test_a_loss_that_is_not_finite_is_no_point(tmp_path):
    found, expecting = LossForecast(tmp_path, None, lambda: 0.0), Expecting()
    found.add([{"step": 1, "loss": None, "tokens": 5}, {"loss": 3.0}])
    assert found.text(4) == ""
    found = LossForecast(tmp_path, expecting, lambda: 0.0)
    found.add([{"step": 1, "loss": None, "tokens": 5}, *rows(2, 3)])
    found.text(4)
    assert expecting.calls[-1][1] == (200.0, 7.0)


def test_the_monitor_shows_it_while_training(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows(1, 3)))
    run.heartbeat.write_text(json.dumps({"phase": "train", "step": 3, "steps": 8, "done": 3, "total": 8,
                                         "detail": "", "time": 1.0}))
    assert Monitor(run, forecast=Expecting()).poll().detail.endswith(" · at end 3.00 (1.00-9.00)")
    assert "at end" not in Monitor(run).poll().detail


def test_expected_losses_stand_beside_the_measured_one(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows(1, 8)))
    run.plan.write_text(json.dumps({"ranges": {"loss": {"low": 1.0, "expected": 4.0, "high": 5.0}}}))
    (tmp_path / forecast.NAME).write_text(json.dumps({"low": 1.5, "expected": 2.5, "high": 3.0}))
    run.result.write_text(json.dumps({"state": "interrupted"}))
    assert [row["name"] for row in facts.compared(facts.gather(tmp_path))] == ["memory", "time"]
    run.result.write_text(json.dumps({"state": "done"}))
    assert facts.compared(facts.gather(tmp_path))[2:] == [
        {"name": "loss, planned", "predicted": "4.00 (1.00-5.00)", "measured": "2.00", "off": "-50 %"},
        {"name": "loss, at half", "predicted": "2.50 (1.50-3.00)", "measured": "2.00", "off": "-20 %"}]
