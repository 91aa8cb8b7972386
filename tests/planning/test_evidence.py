"""What a ledger of this machine does to a plan: what helped is on, what hurt is off, the user's keys stay."""

import json

import pytest
from test_calculator import FACTS, profile

from training import models
from training.planning import OptimalConfigCalculator, evidence
from training.records import Request

DATE = "2026-11-20"
HERE = profile()


def figure(mean, verdict):
    return {"mean": mean, "low": mean - 0.002, "high": mean + 0.002, "verdict": verdict}


def row(name, keys, off, verdict="helped", gain=0.02, **more):
    word = {"helped": "better", "mixed": "better", "hurt": "worse"}.get(verdict, "no difference")
    sign = 1 if word == "worse" else -1
    changes = {"loss_at_time": figure(sign * gain, word), "tokens_per_s": figure(-0.003, "no difference")}
    return {"id": name, "name": name, "date": DATE, "verdict": verdict, "model": "embedded", "device": "cpu",
            "auto": True, "conflicts": [], "on_keys": keys, "off_keys": off, "changes": changes, **more}


EMA = row("ema", {"training.averaging": "ema"}, {"training.averaging": "none"}, conflicts=["swa"])
SWA = row("swa", {"training.averaging": "swa"}, {"training.averaging": "none"}, gain=0.03, conflicts=["ema"])
LOOK = row("lookahead", {"optimizer.lookahead_steps": 5}, {"optimizer.lookahead_steps": 0}, gain=0.01)


def ledger(folder, *rows, machine=HERE, date=DATE):
    path = folder / f"ledger-{date}-{evidence.slug(evidence.machine_of(machine))}.json"
    path.write_text(json.dumps({"date": date, "machine": evidence.machine_of(machine), "entries": rows}))


def choices(folder, *rows, name="embedded", machine=HERE, **request):
    if rows:
        ledger(folder, *rows)
    found = evidence.read(machine, folder)
    base = models.registry()[name]
    made = OptimalConfigCalculator(machine, found).calculate(Request(repo="/r", **request), base, FACTS)
    return made.choices


def test_what_helped_here_is_on_with_its_figures_as_the_reason(tmp_path):
    choice = choices(tmp_path, EMA)["training.averaging"]
    assert (choice.value, choice.source) == ("ema", "measured")
    assert choice.why == ("ledger of 2026-11-20 on this machine: held-out loss at equal time -2.0 % (-2.2 to "
                          "-1.8), tokens/s -0.3 %")


def test_without_a_ledger_of_this_machine_the_plan_is_the_same(tmp_path):
    before = choices(tmp_path)
    ledger(tmp_path, EMA, machine=profile(24))
    assert choices(tmp_path) == before
    assert before["training.averaging"].why == "off: not measured to help (docs/optimizations.md)"


def test_a_described_machine_has_no_evidence(tmp_path):
    import dataclasses
    ledger(tmp_path, EMA)
    assert evidence.read(dataclasses.replace(HERE, source="preset"), tmp_path) == ()


def test_what_the_user_set_stays(tmp_path):
    choice = choices(tmp_path, EMA, settings={"training.averaging": "none"})["training.averaging"]
    assert (choice.value, choice.source) == ("none", "user")


def test_what_hurt_is_off_where_it_would_be_on(tmp_path):
    packing = row("sequence-packing", {"dataset.packing": True}, {"dataset.packing": False}, "hurt")
    made = choices(tmp_path, packing, row("ema", EMA["on_keys"], EMA["off_keys"], "hurt"))
    assert (made["dataset.packing"].value, made["dataset.packing"].source) == (False, "measured")
    assert "+2.0 %" in made["dataset.packing"].why
    assert (made["training.averaging"].value, made["training.averaging"].source) == ("none", "measured")


def test_of_a_value_that_was_not_tried_nothing_is_known(tmp_path):
    eight = row("adamw-8bit", {"optimizer.name": "adamw_8bit"}, {"optimizer.name": "adamw"})
    assert choices(tmp_path, eight)["optimizer.name"].value == "muon"


def test_another_optimizer_gets_its_own_learning_rate(tmp_path):
    planned = choices(tmp_path)["training.learning_rate"].value
    muon = row("muon", {"optimizer.name": "muon"}, {"optimizer.name": "adamw"}, "hurt")
    made = choices(tmp_path, muon)
    assert (made["optimizer.name"].value, made["optimizer.name"].source) == ("adamw", "measured")
    set_by_hand = choices(tmp_path / "none", settings={"optimizer.name": "adamw"})
    assert made["training.learning_rate"].value == set_by_hand["training.learning_rate"].value != planned


@pytest.mark.parametrize("change", [
    row("lookahead", LOOK["on_keys"], LOOK["off_keys"], "no difference"), {"auto": False},
    {"model": "adapter"}, {"device": "cuda"}, {"on_keys": {"training.gone": 1}}])
def test_these_entries_change_nothing(tmp_path, change):
    made = choices(tmp_path, {**LOOK, **change})
    assert made["optimizer.lookahead_steps"].source == "preset"


def test_a_lower_loss_at_equal_time_is_worth_slower_steps_but_not_more_memory(tmp_path):
    changes = LOOK["changes"] | {"tokens_per_s": figure(-0.1, "worse")}
    slower = {**LOOK, "verdict": "mixed", "changes": changes}
    larger = {**slower, "changes": slower["changes"] | {"memory_bytes": figure(0.1, "worse")}}
    assert evidence.helps(slower)
    assert not evidence.helps(larger)


def test_of_two_that_set_one_key_the_larger_gain_is_taken(tmp_path):
    assert choices(tmp_path, EMA, SWA)["training.averaging"].value == "swa"


def test_what_was_beaten_by_what_was_measured_against_it_gives_way_whatever_its_gain(tmp_path):
    cosine = row("cosine-schedule", {"training.schedule": "cosine"}, {"training.schedule": "constant"},
                 gain=0.2)
    cycle = row("one-cycle", {"training.schedule": "one_cycle"}, {"training.schedule": "cosine"}, gain=0.01)
    assert choices(tmp_path, cosine, cycle)["training.schedule"].value == "one_cycle"


def test_conflicting_ids_exclude_each_other_even_with_keys_of_their_own(tmp_path):
    made = choices(tmp_path, EMA, {**LOOK, "conflicts": ["ema"]})
    assert (made["training.averaging"].value, made["optimizer.lookahead_steps"].value) == ("ema", 0)


def test_what_the_rest_of_the_plan_cannot_honour_is_left_out_and_nothing_else(tmp_path):
    made = choices(tmp_path, EMA, LOOK, settings={"deepspeed.stage": 1})
    assert made["optimizer.lookahead_steps"].value == 0
    assert made["training.averaging"].value == "ema"


def test_the_newest_entry_counts_and_files_that_are_none_are_passed_over(tmp_path):
    ledger(tmp_path, EMA, LOOK)
    ledger(tmp_path, row("ema", EMA["on_keys"], EMA["off_keys"], "no difference"), date="2026-11-21")
    (tmp_path / "ledger-2026-11-22.json").write_text('{"torn')
    (tmp_path / "ledger-2026-11-19.json").write_text('{"machine": "words", "entries": []}')
    assert [each.id for each in evidence.read(HERE, tmp_path)] == ["lookahead"]


def test_a_key_that_counts_only_with_another_tells_which_reason_holds(tmp_path):
    assert choices(tmp_path)["training.ema_decay"].why == "unused: no average"
    assert choices(tmp_path, EMA)["training.ema_decay"].why == "an average of about the last 100 updates"


def test_the_variable_names_the_folder_or_turns_evidence_off(tmp_path, monkeypatch):
    ledger(tmp_path, EMA)
    monkeypatch.setenv(evidence.VARIABLE, str(tmp_path))
    assert [each.id for each in evidence.read(HERE)] == ["ema"]
    monkeypatch.setenv(evidence.VARIABLE, "")
    assert evidence.read(HERE) == ()
