"""Loss spikes: what counts as one, the skipped update, and the return to a checkpoint with other windows."""

import json
import math
import statistics
from pathlib import Path

import forked
import pytest
import torch
from trainer_fakes import FakeStore, TinyModel, config_of, same, tiny_loss, training_of, weights_of

from training.errors import EliteError, StoppedByUser
from training.trainer import checkpoints, guard, identities
from training.trainer.journal import read_lines

HERE = Path(__file__).resolve().parent
TIMES = ("tokens_per_s", "time", "device_bytes", "host_bytes")
WINDOWS = 12  # three updates of two micro-batches an epoch
SETTINGS = {"training__epochs": 16, "training__spike_window": 8, "training__save_steps": 5}
EVEN = [2.0, 2.2] * 8
DEVIATION = statistics.stdev(EVEN)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """A model of 1,800 parameters has nothing to share out, and waiting threads cost more than its steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    """The process is gone: nothing may catch this."""


class SeenStore(FakeStore):
    """Notes which windows are read, as (epoch, index)."""

    def __init__(self):
        super().__init__(WINDOWS)
        self.seen = []

    def window(self, split, index, seed=0, epoch=0, context_limit=None):
        self.seen.append((epoch, index))
        return super().window(split, index, seed, epoch, context_limit)


def bad_windows(*places):
    """Updates of the data whose loss is 30 times what it should be."""
    return lambda training: training.progress.place in places


def bad_weights(first_step):
    """From a step on every loss is, whatever the windows are."""
    return lambda training: training.progress.step >= first_step


def made(path, bad=lambda training: False, store=None, after_batches=None, **settings):
    """A training that goes on from what lies in `path`; after so many micro-batches its process is killed."""
    training = training_of(path, config_of(**SETTINGS | settings), store or FakeStore(WINDOWS))
    batches = iter(range(10 ** 9 if after_batches is None else after_batches))

    def loss(model, ids, labels, mask, chunk):
        if next(batches, None) is None:
            raise Killed
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        return (summed * 30 if bad(training) else summed), tokens

    training.loss_function = loss
    trainable = dict(training.engine.model.named_parameters())
    training.put_back = lambda captured: checkpoints.put_back(captured, trainable, training.engine)
    return training


def trained(path, bad=lambda training: False, **settings):
    training = made(path, bad, **settings)
    training.train()
    return training


def rows(path):
    return [{name: value for name, value in line.items() if name not in TIMES}
            for line in read_lines(path / "metrics.jsonl")]


def test_a_loss_is_a_spike_beyond_sigma_deviations_and_not_before():
    assert guard.judge(EVEN, 2.1 + 5.9 * DEVIATION, 6.0, 16) is None
    found = guard.judge(EVEN, 2.1 + 6.1 * DEVIATION, 6.0, 16)
    assert (found.mean, found.deviation, found.values) == pytest.approx((2.1, DEVIATION, 16))


def test_mean_and_deviation_are_torchs_over_the_window_alone():
    losses = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 5
    deviation, mean = torch.std_mean(losses[-128:])
    found = guard.judge(losses.tolist(), 50.0, 6.0, 128)
    assert (found.mean, found.deviation) == pytest.approx((float(mean), float(deviation)), rel=1e-12)


def test_losses_that_are_not_finite_enter_no_statistics_and_are_no_spikes():
    poisoned = [*EVEN[:8], math.nan, math.inf, *EVEN[8:]]
    assert guard.judge(poisoned, 9.0, 6.0, 18) == guard.judge(EVEN, 9.0, 6.0, 18)
    assert [guard.judge(EVEN, loss, 6.0, 16) for loss in (math.nan, math.inf)] == [None, None]
    assert guard.remembered(EVEN, math.nan, 16) == EVEN
    assert guard.remembered(EVEN, 3.0, 16) == [*EVEN[1:], 3.0]


@pytest.mark.parametrize(("window", "least"), [(8, 8), (16, 8), (128, 32)])
def test_too_few_losses_judge_nothing(window, least):
    assert guard.judge((EVEN * 8)[:least - 1], 1e9, 6.0, window) is None
    assert guard.judge((EVEN * 8)[:least], 1e9, 6.0, window)


def test_no_loss_is_a_spike_for_a_sigma_of_zero():
    assert guard.judge(EVEN, 1e9, 0.0, 16) is None


def test_on_a_steady_curve_a_harder_window_is_no_spike():
    steady = [0.011, 0.010] * 8
    assert statistics.fmean(steady) + 400 * statistics.stdev(steady) < 0.25
    assert guard.judge(steady, 0.25, 6.0, 16) is None
    assert guard.judge(steady, 0.32, 6.0, 16)


def test_a_run_without_spikes_is_the_same_with_and_without_the_guard(tmp_path):
    guarded, free = trained(tmp_path / "guarded"), trained(tmp_path / "free", training__spike_sigma=0.0)
    assert same(weights_of(guarded), weights_of(free))
    assert rows(tmp_path / "guarded") == rows(tmp_path / "free")


def test_a_spike_is_skipped_and_the_curve_goes_on(tmp_path, caplog):
    training = made(tmp_path, bad_windows(20))
    while training.progress.step < 20:
        training._train_one()
    before = weights_of(training), training.engine.capture().optimizer
    training._train_one()
    assert same(before[0], weights_of(training))
    assert same(before[1], training.engine.capture().optimizer)
    training.train()
    lines = rows(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 49))
    assert (lines[20]["grad_norm"], lines[20]["skipped"]) == (None, "spike")
    assert lines[20]["loss"] > 20 * lines[19]["loss"]
    assert [line["step"] for line in lines if "skipped" in line] == [21]
    assert lines[-1]["loss"] < lines[19]["loss"]
    assert (training.progress.spikes, training.progress.rollbacks, training.progress.skipped) == (1, 0, 0)
    assert training.progress.tokens_trained == sum(line["tokens"] for line in lines if line["grad_norm"])
    assert "step 21: the loss " in caplog.text
    assert "mean of the last 8; the update is skipped" in caplog.text


def test_the_gradient_of_a_skipped_update_does_not_reach_the_next_one(tmp_path):
    """The same as a run that never computed it."""
    def without(path):
        training = made(path)
        while training.progress.step < 21:
            if training.progress.step == 20:
                training.progress.step, training.progress.spikes = 21, 1
            else:
                training._train_one()
        training.train()
        return training

    bad, none = trained(tmp_path / "bad", bad_windows(20)), without(tmp_path / "none")
    assert same(weights_of(bad), weights_of(none))


def test_two_spikes_with_an_update_between_them_are_two_skipped_updates(tmp_path):
    training = trained(tmp_path, bad_windows(20, 22))
    assert (training.progress.spikes, training.progress.rollbacks) == (2, 0)


def test_an_update_that_is_not_finite_between_two_spikes_does_not_part_them(tmp_path):
    training = made(tmp_path, bad_windows(20, 22))
    loss = training.loss_function

    def broken(*arguments):
        summed, tokens = loss(*arguments)
        return (summed * math.nan if training.progress.place == 21 else summed), tokens

    training.loss_function = broken
    training.train()
    assert training.progress.rollbacks == 1


def test_the_second_spike_in_a_row_goes_back_to_the_checkpoint_and_on_with_other_windows(tmp_path, caplog):
    store, put = SeenStore(), []
    training = made(tmp_path, bad_windows(22, 23), store)
    put_back = training.put_back

    def spied(captured):
        put_back(captured)
        put.append((len(store.seen), same(captured.weights, weights_of(training)),
                    same(captured.optimizer, training.engine.capture().optimizer)))

    training.put_back = spied
    training.train()
    [(at, *equal)] = put
    assert equal == [True, True]
    assert (training.progress.rollbacks, training.progress.spikes) == (1, 2)
    assert training.progress.passed_over == 4  # updates 21 and 22, which were good, and the two that were not
    assert [line["step"] for line in rows(tmp_path)] == list(range(1, 49))
    assert not any("skipped" in line for line in rows(tmp_path))
    assert len(store.seen) > at
    assert not set(store.seen[at:]) & set(store.seen[:at])
    assert "step 24: the loss " in caplog.text
    assert "back to checkpoint-20, and on with windows" in caplog.text


def test_after_the_return_the_run_is_the_one_that_starts_there_with_those_windows(tmp_path):
    whole = trained(tmp_path / "whole", bad_windows(22, 23))
    first = made(tmp_path / "other")
    while first.progress.step < 20:
        first._train_one()
    first.progress.passed_over = 4
    first.train()
    assert same(weights_of(whole), weights_of(first))
    last = [row["loss"] for row in rows(tmp_path / "whole")]
    assert last == [row["loss"] for row in rows(tmp_path / "other")]


def test_evaluations_and_checkpoints_after_the_one_gone_back_to_are_made_anew(tmp_path):
    made_at = []

    def evaluating(training):
        digest = identities.digest_of(training.identity)

        def evaluate(step):
            made_at.append(step)
            training.journal.evaluation({"step": step, "loss": 9.0 - step / 100, "identity": digest})
        training.evaluate = evaluate
        return training

    evaluating(made(tmp_path, bad_windows(24, 25), training__eval_steps=12, training__save_steps=7,
                    training__keep_checkpoints=9)).train()
    assert made_at == [12, 24, 36]
    evaluating(made(tmp_path / "next", bad_windows(25, 26), training__eval_steps=13,
                    training__save_steps=100)).train()
    assert made_at[3:] == [13, 26, 26, 39]  # the one amid the spikes was of weights that were given up
    assert [line["step"] for line in read_lines(tmp_path / "next" / "evaluations.jsonl")] == [13, 26, 39]


def test_the_third_return_ends_the_run_with_the_loss_the_step_and_what_to_change(tmp_path):
    training = made(tmp_path, bad_weights(22))
    with pytest.raises(EliteError, match=r"The loss \d+\.\d+ is \d+\.\d deviations of 0\.\d+ above \d\.\d+, "
                                         r"the mean of the last 8 \(update 24\), and the run went back to a "
                                         r"checkpoint 2 times before\. Lower training\.learning_rate \(now "
                                         r"0\.01\), or raise training\.spike_sigma \(now 6; 0: never\)"):
        training.train()
    assert checkpoints.newest_valid(tmp_path)[0].name == "checkpoint-20"


def test_without_a_checkpoint_the_third_spike_in_a_row_ends_the_run(tmp_path):
    training = made(tmp_path, bad_weights(22), training__save_steps=0)
    with pytest.raises(EliteError, match=r"update 25.*3 updates in a row were such, with no checkpoint"):
        training.train()
    two = trained(tmp_path / "two", bad_windows(20, 21), training__save_steps=0)
    assert (two.progress.spikes, two.progress.rollbacks) == (2, 0)


SHORT = {"training__epochs": 11, "training__keep_checkpoints": 1}
KINDS = {"one": bad_windows(22), "across a checkpoint": bad_windows(24, 25),
         "at once again": bad_windows(22, 23, 24, 25)}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Uninterrupted runs of each kind: weights, optimizer, rows."""
    found = {}
    for name, bad in KINDS.items():
        path = tmp_path_factory.mktemp("whole")
        training = trained(path, bad, **SHORT)
        found[name] = weights_of(training), training.engine.capture().optimizer, rows(path), training.progress
    return found


def ends_as_the_whole_run(path, kind, wholes):
    weights, optimizer, lines, progress = wholes[kind]
    ended = trained(path, KINDS[kind], **SHORT)
    assert same(weights, weights_of(ended))
    assert same(optimizer, ended.engine.capture().optimizer)
    assert lines == rows(path)
    assert (ended.progress.losses, ended.progress.passed_over, ended.progress.rollbacks) == (
        progress.losses, progress.passed_over, progress.rollbacks)


@pytest.mark.parametrize("kind", KINDS)
def test_kills_and_stops_around_spikes_change_no_weight_and_no_row(tmp_path, wholes, kind):
    """Amid the spikes, between them and the return, right after it: after 22 to 28 updates made in turn."""
    for made_updates in range(22, 29):
        path, killed = tmp_path / str(made_updates), made_updates % 2 == (kind == "one")
        first = made(path, KINDS[kind], after_batches=2 * made_updates + 1 if killed else None, **SHORT)
        if not killed:
            stop_after(first, path, made_updates)
        with pytest.raises(Killed if killed else StoppedByUser):
            first.train()
        (path / "stop").unlink(missing_ok=True)
        ends_as_the_whole_run(path, kind, wholes)


@pytest.mark.parametrize("call", ["drop_after", "digest_of"])
def test_a_kill_on_the_way_back_changes_nothing(tmp_path, wholes, call, monkeypatch):
    """Weights are in place, and the checkpoint made amid the spikes is there or just deleted."""
    first = made(tmp_path, KINDS["across a checkpoint"], **SHORT)
    put_back = first.put_back

    def spied(captured):
        put_back(captured)
        monkeypatch.setattr(identities if call == "digest_of" else checkpoints, call, lambda *_: [][0])
    first.put_back = spied
    with pytest.raises(IndexError):
        first.train()
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-25").exists() == (call == "drop_after")
    ends_as_the_whole_run(tmp_path, "across a checkpoint", wholes)


def stop_after(training, path, updates):
    """Ask for a stop at the first micro-batch after so many updates, those before a return counted too."""
    count, loss = iter(range(2 * updates)), training.loss_function

    def asking(*arguments):
        if next(count, None) is None:
            (path / "stop").write_text("SIGINT")
        return loss(*arguments)
    training.loss_function = asking


def test_kinds_of_spikes_are_what_their_names_say(wholes):
    assert {name: found[3].rollbacks for name, found in wholes.items()} == {
        "one": 0, "across a checkpoint": 1, "at once again": 2}


def test_a_state_of_an_older_checkpoint_starts_with_an_empty_window(tmp_path):
    trained(tmp_path, training__epochs=16)
    path, _ = checkpoints.newest_valid(tmp_path)
    state = json.loads((path / "state.json").read_text())
    older = {name: state[name] for name in ("step", "tokens_trained", "seconds", "skipped",
                                            "skipped_in_a_row", "steps_fitted", "fitted_from")}
    from training.trainer.loop import Progress

    progress = Progress(**older)
    assert (progress.step, progress.losses, progress.rollbacks, progress.place) == (48, [], 0, 48)


def together(path, ranks, **options):
    """Run guard_worker.py in `ranks` processes; what each of them wrote."""
    path.mkdir()
    arguments = {"path": str(path), "ranks": ranks, **options}
    forked.server().run(HERE / "guard_worker.py", path / "worker.log", arguments, ranks)
    return [json.loads((path / f"outcome-{rank}.json").read_text()) for rank in range(ranks)]


def by_one_process(path):
    """The same spikes in the plain engine."""
    training = made(path, bad_windows(22, 23, 31), FakeStore(10), training__micro_batch=1,
                    training__accumulation=4, training__epochs=12)
    training.engine.model.load_state_dict(TinyModel(dropout=0.0).state_dict())
    training.engine.model.drop.p = 0.0
    training.train()
    return rows(path)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.real) for stage in (2, 3))])
def test_two_ranks_skip_and_go_back_together_as_one_process_does(tmp_path, stage):
    """Spikes that only rank 1 computes; without DeepSpeed, and with whole and partitioned weights."""
    found = together(tmp_path / "two", ranks=2, stage=stage)
    assert [(one["spikes"], one["rollbacks"], one["passed_over"]) for one in found] == [(3, 1, 4)] * 2
    assert found[0]["losses"] == found[1]["losses"]
    alone = by_one_process(tmp_path / "one")
    lines = rows(tmp_path / "two")
    assert [line["step"] for line in lines] == [line["step"] for line in alone]
    assert [line.get("skipped") for line in lines] == [line.get("skipped") for line in alone]
    assert [line["loss"] for line in lines if "skipped" not in line] == pytest.approx(
        [line["loss"] for line in alone if "skipped" not in line], rel=1e-3)
