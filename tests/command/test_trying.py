"""The trial within the command: planned again when it does not fit, and nothing left behind in any case."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "planning"))
from test_trial_plans import FACTS, machine, made

from training import models
from training.command.request import Checked
from training.command.trying import Trying, folder_near, planned
from training.errors import DataError, DoesNotFit, StoppedByUser
from training.manager.trial import TrialManager
from training.records import Request

FAKE = Path(__file__).resolve().parents[1] / "manager" / "fake_trial.py"


def trying(tmp_path, profile, name, **request):
    checked = Checked(request=Request(repo="/r", **request), facts=FACTS, output=tmp_path / "runs" / "new")
    base = models.registry().get(name) or models.resolve(name)
    return Trying(made=checked, profile=profile, base=base, argv=("elite_train.py",), script=FAKE,
                  progress=lambda *_: None)


def tried(tmp_path, monkeypatch, act, profile=None, name="embedded", **request):
    monkeypatch.setenv("FAKE", act)
    profile = profile or machine()
    return trying(tmp_path, profile, name, **request).tried(made(profile, name, **request)[0])


def test_the_plan_holds_the_trial_and_its_figures(tmp_path, monkeypatch):
    plan = tried(tmp_path, monkeypatch, "done")
    assert plan.trial.confirmed
    micro = plan.choices["training.micro_batch"].value
    assert plan.memory.device_bytes == micro * plan.context_tokens << 20  # as the stand-in says
    assert plan.ranges["step_s"].source == "measured"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("speed", "micro", "says"), [
    ("0.5", 4, "8 would take 32.00"), ("1.2", 1, "2 makes 0.87 times its tokens/s")])
def test_on_a_gpu_the_micro_batch_is_what_real_steps_find(tmp_path, monkeypatch, speed, micro, says):
    monkeypatch.setenv("FAKE_SPEED", speed)
    monkeypatch.setenv("FAKE_PEAK", "20")
    plan = tried(tmp_path, monkeypatch, "done", machine(24), "phi-2", context_tokens=4096,
                 settings={"stream.chunk_tokens": 0})
    values = {name: choice.value for name, choice in plan.choices.items()}
    assert (values["training.micro_batch"], values["training.micro_batch"] * values["training.accumulation"]
            ) == (micro, 8)
    assert says in plan.choices["training.micro_batch"].why
    assert plan.memory.device_bytes == micro * 4096 << 20
    assert plan.trial.confirmed
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_ran_out_is_planned_again_for_less(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FAKE_MARK", str(tmp_path_factory.mktemp("mark") / "once"))
    monkeypatch.setenv("FAKE_PEAK", "16")
    card = machine(24)
    first = made(card, "phi-2")[0]
    plan = tried(tmp_path, monkeypatch, "out_once", card, "phi-2")
    assert plan.choices != first.choices
    assert plan.trial.confirmed
    assert plan.memory.device_bytes == plan.context_tokens << 16
    assert plan.notes[-1] == (f"Planned again for less memory: the trial of {first.context_tokens:,} tokens "
                              "ran out of it.")
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_was_asked_for_is_refused_with_a_way_out(tmp_path, monkeypatch):
    with pytest.raises(DoesNotFit) as caught:
        tried(tmp_path, monkeypatch, "out", context_tokens=2048)
    assert str(caught.value).startswith("The trial's step of 2,048 tokens ran out of memory; ")
    assert "Nearest: --context 1024" in str(caught.value)
    plan = tried(tmp_path, monkeypatch, "out", context_tokens=2048, anyway=True)
    assert plan.trial.steps[-1].error
    assert list(tmp_path.iterdir()) == []


def test_without_a_trial_the_formulas_say_how_far_off_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(TrialManager, "take", None)
    settings = {"training.trial": False}
    plan, place = made(machine(), settings=settings)
    checked = Checked(request=Request(repo="/r", settings=settings), facts=FACTS, output=tmp_path / "new")
    found = planned(plan, checked, machine(), place.base, [], lambda *_: None)
    assert found.trial is None
    assert {name: item.source for name, item in found.ranges.items()} == dict.fromkeys(
        ("device_bytes", "step_s", "total_s", "loss"), "derived")
    assert dataclasses.replace(found, ranges={}) == plan


@pytest.mark.parametrize("error", [StoppedByUser("Stopped."), DataError("The trial failed."),
                                   KeyboardInterrupt()])
def test_whatever_ends_a_trial_its_folder_goes(tmp_path, monkeypatch, error):
    seen = []

    def take(self, order, progress):
        seen.append(self.run.path)
        assert self.run.config.is_file()
        raise error
    monkeypatch.setattr(TrialManager, "take", take)
    with pytest.raises(type(error)):
        tried(tmp_path, monkeypatch, "done")
    assert seen[0].parent == tmp_path.resolve()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_leaves_it_to_the_temporary_ones(tmp_path, monkeypatch):
    with folder_near(tmp_path / "a" / "b") as path:
        assert path.parent == tmp_path
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)
    with folder_near(tmp_path / "a") as path:
        assert path.parent != tmp_path
    monkeypatch.setattr("os.access", lambda place, mode: False)
    with folder_near(tmp_path / "a") as path:
        assert path is None
    plan = tried(tmp_path, monkeypatch, "done")
    assert plan.trial.skipped.startswith("neither a folder near ")
