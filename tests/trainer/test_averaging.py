"""The average of the weights: torch's own arithmetic, where it begins, resumes, and which weights win."""

import json
import logging
import shutil
import time
from pathlib import Path

import forked
import pytest
import torch
from run_maker import configure, dataset_at
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainer_fakes import TinyModel, config_of, same, tiny_loss, training_of, weights_of

from training.configuration import load_config
from training.records import Result
from training.rundir import RunDirectory, read_record
from training.trainer import averaging, checkpoints, identities, pacing, phases
from training.trainer.engine import Captured
from training.trainer.export import weights_digest
from training.trainer.journal import read_lines
from training.trainer.session import Session, result

TRAINER = Path(__file__).resolve().parent.parent.parent / "training" / "model_trainer_unified.py"
PATIENCE_S = 300
KINDS = [{"training__averaging": "ema", "training__ema_decay": 0.8}, {"training__averaging": "swa"}]
EMA = {"training__averaging": "ema", "training__ema_decay": 0.8, "training__averaging_start": 0.4}
named = pytest.mark.parametrize("settings", KINDS, ids=["ema", "swa"])


def averaged(path, config, **more):
    """A training with its average, going on from the newest checkpoint as a session would."""
    model = more.pop("model", None) or TinyModel()
    training = training_of(path, config, model=model, **more)
    training.average = averaging.build(dict(model.named_parameters()), config)
    newest, _ = checkpoints.newest_valid(path)
    if newest and training.average:
        training.average.restore(checkpoints.load(newest)[0])
    return training


def moved(parameters, updates, seed=3):
    """Each update's weights in turn, set in place."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        yield


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_average_is_torchs_own_of_the_same_updates(kind):
    model = TinyModel()
    trainable = dict(model.named_parameters())
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
    average = averaging.Average(trainable, kind, 0.9, 0.0)
    for step, _ in enumerate(moved(trainable.values(), 7)):
        average.update(step + 1, 7)
        reference.update_parameters(model)
    assert average.updates == 7
    expected = dict(reference.module.named_parameters())
    for name, value in average.weights.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(value, trainable[name])


def test_swa_is_the_mean_of_all_weights_and_ema_the_papers_recursion():
    weight = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    swa = averaging.Average({"w": weight}, "swa", 0.9, 0.0)
    ema = averaging.Average({"w": weight}, "ema", 0.9, 0.0)
    seen = []
    for step, _ in enumerate(moved([weight], 6)):
        seen.append(weight.detach().clone())
        for average in (swa, ema):
            average.update(step + 1, 6)
    torch.testing.assert_close(swa.weights["w"], torch.stack(seen).mean(0))
    expected = seen[0]
    for now in seen[1:]:
        expected = 0.9 * expected + 0.1 * now
    torch.testing.assert_close(ema.weights["w"], expected)


def test_sixteen_bit_weights_are_averaged_in_float32():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = averaging.Average({"w": weight}, "swa", 0.9, 0.0)
    for step, value in enumerate((1.0, 1.0, 1.0078125), start=1):   # 1 and the next bfloat16
        weight.data.fill_(value)
        average.update(step, 3)
    assert average.weights["w"].dtype == torch.float32
    torch.testing.assert_close(average.weights["w"], torch.full((4,), 1 + 0.0078125 / 3))


def test_averaging_begins_after_its_share_of_the_updates_and_then_goes_on():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = averaging.Average({"w": weight}, "swa", 0.9, 0.75)
    for step in range(1, 13):
        weight.data.fill_(step)
        average.update(step, 12)
        assert average.updates == max(0, step - 9)
    assert average.weights["w"].item() == 11.0     # of 10, 11 and 12
    average.update(13, 1000)
    assert average.updates == 4


def test_there_is_none_unless_it_is_asked_for(tmp_path):
    training = averaged(tmp_path, config_of())
    assert training.average is None
    training.train()
    captured, _ = checkpoints.load(tmp_path / "checkpoint-9")
    assert not [name for name in (*captured.optimizer, *captured.numbers) if name.startswith("average")]


@named
def test_the_loop_averages_the_weights_after_each_update_and_changes_none_of_them(tmp_path, settings):
    plain = training_of(tmp_path / "plain")
    plain.train()
    training = averaged(tmp_path / "run", config_of(training__averaging_start=0.5, **settings))
    history, update = [], training.average.update

    def spied(step, steps):
        update(step, steps)
        history.append((step, steps, weights_of(training)))

    training.average.update = spied
    training.train()
    assert same(weights_of(plain), weights_of(training))
    assert [(step, steps) for step, steps, _ in history] == [(step, 9) for step in range(1, 10)]
    taken = [weights for step, _, weights in history if step > 4]     # 4 of 9 are less than half
    for name, value in training.average.weights.items():
        if settings["training__averaging"] == "swa":
            expected = torch.stack([weights[name] for weights in taken]).mean(0)
        else:
            expected = taken[0][name]
            for weights in taken[1:]:
                expected = 0.8 * expected + 0.2 * weights[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_an_update_that_is_skipped_is_not_averaged(tmp_path):
    calls = []

    def loss(model, ids, labels, mask, chunk):
        calls.append(1)
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        return summed * (float("nan") if len(calls) in (11, 12) else 1.0), tokens

    config = config_of(training__averaging="swa", training__averaging_start=0.0)
    training = averaged(tmp_path, config, loss=loss)
    training.train()
    assert (training.progress.step, training.progress.skipped, training.average.updates) == (9, 1, 8)


@named
@pytest.mark.parametrize("k", [2, 5, 8])
def test_a_resume_has_the_same_average_bit_for_bit(tmp_path, settings, k):
    config = config_of(training__averaging_start=0.4, training__save_steps=1, training__keep_checkpoints=20,
                       **settings)
    whole = averaged(tmp_path / "whole", config)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in range(k + 1, 10):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}")
    parts = averaged(tmp_path / "parts", config)
    assert (parts.progress.step, parts.average.updates) == (k, max(0, k - 3))
    parts.train()
    assert parts.average.updates == whole.average.updates == 6
    assert same(parts.average.weights, whole.average.weights)
    one, other = (load_file(tmp_path / run / "checkpoint-9" / "optimizer.safetensors")
                  for run in ("whole", "parts"))
    assert same(one, other)
    kept = {name.removeprefix("average/weights/") for name in one if name.startswith("average/")}
    assert kept == whole.average.weights.keys()


def test_the_optimizer_takes_no_average_for_its_own_state(tmp_path):
    config = config_of(training__averaging="swa", training__averaging_start=0.0)
    averaged(tmp_path, config).train()
    again = averaged(tmp_path, config)
    assert not [name for name in again.engine.capture().optimizer if "average" in name]


def test_steps_fitted_to_a_budget_begin_the_average_where_they_did_before_a_kill(tmp_path):
    """A resume from before the decision knows it already; the updates before it did not."""
    config = config_of(training__averaging="swa", training__averaging_start=0.5, training__epochs=4,
                       training__budget_s=1000.0, training__save_steps=1, training__keep_checkpoints=20)
    whole = averaged(tmp_path / "whole", config)
    fitted = {"steps": 10, "planned": 12, "budget_s": 1.0, "step_s": 0.1}
    original, pacing.fit = pacing.fit, lambda *_: dict(fitted)
    try:
        whole.train()
    finally:
        pacing.fit = original
    assert whole.progress.step == 10
    # Half of 12 planned steps are 6, so nothing begins at update 6 (which is more than half of 10).
    assert whole.average.updates == 4
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in range(4, 11):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}")
    parts = averaged(tmp_path / "parts", config)
    parts.adopt(json.loads((tmp_path / "parts" / "schedule.json").read_text()))
    parts.train()
    assert (parts.progress.step, parts.average.updates) == (10, 4)
    assert same(parts.average.weights, whole.average.weights)


def test_going_back_to_a_checkpoint_takes_its_average_or_none():
    weight = torch.nn.Parameter(torch.ones(3))
    average = averaging.Average({"w": weight}, "swa", 0.9, 0.0)
    before, later = Captured(), Captured()
    average.capture(before)
    average.update(1, 4)
    average.capture(later)
    weight.data.fill_(5.0)
    average.update(2, 4)
    assert later.optimizer["average/weights/w"].tolist() == [1.0] * 3     # a copy
    average.restore(later)
    assert (average.updates, average.weights["w"].tolist()) == (1, [1.0] * 3)
    average.restore(before)
    assert (average.updates, average.weights) == (0, {})


# -- the end of a run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("averaged"))


def run_at(with_dataset, path, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return configure(path, training__max_steps=8, evaluation__completions=1, embedded__layers=1, **settings)


def finished(path):
    """All phases in this process; the session."""
    session = Session(run=RunDirectory(path), local_rank=0, start=time.monotonic())
    session.config = load_config(path)
    phases.run(session)
    return session


def exported(path):
    return load_file(path / "model" / "model.safetensors")


def average_of(path):
    found = load_file(path / "checkpoint-8" / "optimizer.safetensors")
    return {name.removeprefix("average/weights/"): value for name, value in found.items()
            if name.startswith("average/")}


def is_exported(weights, path):
    """Whether these are the weights in model/; a tied head stands there once."""
    found = exported(path)
    return all(torch.equal(weights[name], value) for name, value in found.items()) and bool(found)


# An equal mean over all updates is behind where they lead; with a rate that is far too high the last weights
# are far from what all of them swing about.
LAST_WINS = {"training__averaging": "swa", "training__averaging_start": 0.0}
AVERAGE_WINS = {"training__averaging": "swa", "training__averaging_start": 0.25,
                "training__schedule": "constant", "training__learning_rate": 5e-2}


@pytest.mark.parametrize(("settings", "winner"), [(LAST_WINS, "last"), (AVERAGE_WINS, "averaged")],
                         ids=["last", "averaged"])
def test_the_better_weights_are_the_result_and_a_killed_run_ends_the_same(with_dataset, tmp_path, caplog,
                                                                          settings, winner):
    caplog.set_level(logging.INFO)
    run = run_at(with_dataset, tmp_path / "run", **settings)
    session = finished(run)
    rows = read_lines(run / "evaluations.jsonl")
    assert sorted((row["step"], row.get("weights", "last")) for row in rows) == [
        (0, "last"), (8, "averaged"), (8, "last")]
    losses = {row.get("weights", "last"): row["loss"] for row in rows if row["step"] == 8}
    assert losses[winner] == min(losses.values()) < max(losses.values())
    after = result(session, "done").quality["after"]
    assert after.loss == losses[winner]
    assert (f"averaged weights: held-out loss {losses['averaged']:.4f}, the last ones: {losses['last']:.4f}; "
            f"the {winner} ones are the result") in caplog.text
    last = load_file(run / "checkpoint-8" / "weights.safetensors")
    assert is_exported(average_of(run) if winner == "averaged" else last, run)
    assert not is_exported(last if winner == "averaged" else average_of(run), run)
    assert session.facts["digest"] == weights_digest(average_of(run) if winner == "averaged" else last)

    killed = tmp_path / "killed"        # after the evaluation of the last weights
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "model")
    (killed / "evaluations.jsonl").write_text("".join(
        json.dumps(row) + "\n" for row in rows if "weights" not in row))
    again = finished(killed)
    assert again.facts["digest"] == session.facts["digest"]
    assert again.facts["after"]["loss"] == losses[winner]
    assert again.facts["samples"] == session.facts["samples"]


def test_a_streamed_run_ends_with_the_better_weights_too(with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run", stream__chunk_tokens=48, **AVERAGE_WINS)
    session = finished(run)
    assert session.facts["after"]["weights"] == "averaged"
    assert is_exported(average_of(run), run)


@pytest.mark.real
def test_two_ranks_under_zero_2_export_rank_0s_average(with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run", deepspeed__stage=2, device__count=2,
                 training__accumulation=1, **AVERAGE_WINS)
    forked.server().run(TRAINER, tmp_path / "ranks.log", {"arguments": ["--run-dir", str(run)]}, ranks=2)
    found = read_record(Result, run / "result.json")
    assert found.state == "done"
    averaged_row = read_lines(run / "evaluations.jsonl")[-1]
    assert (averaged_row["weights"], averaged_row["loss"]) == ("averaged", found.quality["after"].loss)
    assert is_exported(average_of(run), run)
    assert found.digest == weights_digest(average_of(run))


def test_an_average_that_never_began_leaves_the_last_weights(tmp_path):
    """Where no update was applied since it was due."""
    training = averaged(tmp_path, config_of(**EMA))
    training.progress.step = 9
    row = {"step": 9, "loss": 1.0, "bits_per_byte": 2.0, "identity": identities.digest_of(training.identity)}
    training.journal.evaluation(row)
    session = Session(run=training.run, local_rank=0, start=0.0, config=training.config, training=training)
    assert phases._evaluate_end(session, None) == row


def test_losses_that_are_not_finite_are_never_the_better_ones():
    for loss in (None, float("nan"), float("inf")):
        assert phases._held_out_loss({"loss": loss}) == float("inf")
    assert phases._held_out_loss({"loss": 2.5}) == 2.5


