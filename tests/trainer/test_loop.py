import json
import math
import os
import signal
import time

import pytest
import torch
from trainer_fakes import FakeStore, TinyModel, config_of, same, tiny_loss, training_of, weights_of

from training.errors import EliteError, Interrupted, StoppedByUser
from training.rundir import RunDirectory
from training.trainer import pacing
from training.trainer.batches import Layout, collate, deal, place, planned_steps, read_update, targets_of
from training.trainer.engine import PlainEngine
from training.trainer.journal import Heartbeat, Journal, read_lines
from training.trainer.stopping import Watch


def metrics(path):
    return read_lines(path / "metrics.jsonl")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_window_is_trained_on_once_an_epoch_by_any_number_of_ranks(ranks):
    store, layout = FakeStore(23), Layout(windows=23, micro=2, accumulation=2, ranks=ranks)
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * layout.updates_per_epoch, (epoch + 1) * layout.updates_per_epoch):
            at, part = place(step, layout)
            assert at == epoch
            dealt = [deal(store.order(5, at)[part], layout, rank) for rank in range(ranks)]
            assert len({len(batches) for batches in dealt}) == 1
            seen += [index for batches in dealt for batch in batches for index in batch]
        assert sorted(seen) == list(range(23))


def test_an_update_holds_the_same_windows_whether_ranks_or_accumulation_make_it_up():
    store = FakeStore(20)
    one = Layout(windows=20, micro=1, accumulation=4, ranks=1)
    two = Layout(windows=20, micro=1, accumulation=2, ranks=2)
    for step in range(5):
        epoch, part = place(step, one)
        assert (epoch, part) == place(step, two)
        windows = store.order(1, epoch)[part]
        alone = sorted(index for batch in deal(windows, one, 0) for index in batch)
        together = sorted(index for rank in (0, 1) for batch in deal(windows, two, rank) for index in batch)
        assert alone == together


def test_padding_is_on_the_right_and_carries_no_label():
    store = FakeStore()
    windows = [store.window("train", index) for index in range(4)]
    batch = collate(windows, pad_id=9)
    for row, (ids, labels) in enumerate(windows):
        assert batch.ids[row].tolist() == [*ids, *[9] * (batch.ids.shape[1] - len(ids))]
        assert batch.labels[row].tolist() == [*labels, *[-100] * (batch.ids.shape[1] - len(labels))]


def test_a_rank_without_a_window_gets_a_batch_without_targets():
    layout = Layout(windows=3, micro=1, accumulation=1, ranks=2)
    batches, targets = read_update(FakeStore(3), 1, layout, rank=1, seed=1)
    assert (len(batches), targets) == (1, 0)
    assert bool((batches[0].labels == -100).all())


def test_the_first_position_is_no_target():
    store = FakeStore()
    _, labels = store.window("train", 0)
    whole = labels.copy()
    whole[0] = 1
    assert targets_of(whole) == targets_of(labels)


def test_max_steps_ends_before_the_epochs_do_and_never_after():
    layout = Layout(windows=10, micro=2, accumulation=2, ranks=1)
    assert planned_steps(config_of(training__epochs=3), layout) == 9
    assert planned_steps(config_of(training__epochs=3, training__max_steps=4), layout) == 4
    assert planned_steps(config_of(training__epochs=3, training__max_steps=40), layout) == 9


def test_the_gradient_is_the_mean_over_all_target_tokens_of_the_update(tmp_path):
    """Against one backward pass over all windows, in float64."""
    store, model = FakeStore(4), TinyModel(dropout=0.0).double()
    reference = TinyModel(dropout=0.0).double()
    summed, tokens = 0.0, 0
    for index in range(4):
        batch = collate([store.window("train", index)], 0)
        loss, count = tiny_loss(reference, batch.ids, batch.labels, None, 0)
        summed, tokens = summed + loss, tokens + count
    (summed / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    config = config_of(training__max_steps=1, training__micro_batch=1, training__accumulation=4)
    training = training_of(tmp_path, config, store, model)
    training.train()
    line = metrics(tmp_path)[0]
    assert line["grad_norm"] == pytest.approx(float(expected), rel=1e-6)  # the loop divides in float32
    assert line["loss"] == pytest.approx(float(summed.detach() / tokens), rel=1e-6)
    assert line["tokens"] == tokens


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 4), (4, 1), (2, 2)])
def test_micro_batch_times_accumulation_decides_and_not_their_split(tmp_path, micro, accumulation):
    config = config_of(training__micro_batch=micro, training__accumulation=accumulation)
    training = training_of(tmp_path, config, model=TinyModel(dropout=0.0))
    training.train()
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses == pytest.approx(LOSSES_OF_FOUR_WINDOWS, rel=1e-4)


LOSSES_OF_FOUR_WINDOWS: list[float] = []


@pytest.fixture(scope="module", autouse=True)
def _reference_losses(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    training_of(path, config_of(), model=TinyModel(dropout=0.0)).train()
    LOSSES_OF_FOUR_WINDOWS[:] = [line["loss"] for line in metrics(path)]


def test_the_loss_falls_and_each_step_has_one_line(tmp_path):
    training = training_of(tmp_path, config_of(training__epochs=10))
    training.train()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s",
                               "device_bytes", "host_bytes", "time"}
    assert training.progress.tokens_trained == sum(line["tokens"] for line in lines)


def test_gradients_above_the_limit_are_scaled_down_to_it(tmp_path):
    norms = []

    class Spy(PlainEngine):
        def step(self, rate):
            before = super().step
            original = self._optimizer.step

            def spied():
                norms.append(float(torch.cat([p.grad.flatten() for p in self._trainable.values()]).norm()))
                return original()

            self._optimizer.step = spied
            value = before(rate)
            self._optimizer.step = original
            return value

    model, config = TinyModel(), config_of(training__clip_norm=0.01, training__max_steps=2)
    engine = Spy(model, dict(model.named_parameters()), config, torch.device("cpu"))
    training_of(tmp_path, config, engine=engine).train()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert metrics(tmp_path)[0]["grad_norm"] > 0.01


def poisoned(bad_steps, value=float("nan")):
    calls = {"n": 0}

    def loss(model, ids, labels, mask, chunk):
        calls["n"] += 1
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        return (summed * value if (calls["n"] - 1) // 2 in bad_steps else summed), tokens
    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, value):
    config = config_of(training__epochs=2, training__micro_batch=1, training__accumulation=2)
    training = training_of(tmp_path, config, loss=poisoned({2}, value))
    training.train()
    lines = metrics(tmp_path)
    assert (training.progress.skipped, training.progress.step) == (1, 10)
    assert (lines[2]["loss"], lines[2]["grad_norm"]) == (None, None)
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(training).values())
    assert training.progress.tokens_trained == sum(line["tokens"] for line in lines) - lines[2]["tokens"]


def test_three_in_a_row_that_are_not_finite_end_the_run_with_what_to_change(tmp_path):
    config = config_of(training__epochs=2, training__micro_batch=1, training__accumulation=2)
    training = training_of(tmp_path, config, loss=poisoned({1, 2, 3}))
    with pytest.raises(EliteError, match=r"3 updates in a row were not finite .*up to step 4\)\. Lower "
                                         r"training\.learning_rate \(now 0\.01\)"):
        training.train()


def test_a_stop_file_ends_the_run_with_a_checkpoint_and_a_resume_equals_an_uninterrupted_run(tmp_path):
    whole = training_of(tmp_path / "whole")
    whole.train()
    first = training_of(tmp_path / "parts")

    def stop_at_four(model, ids, labels, mask, chunk):
        if first.progress.step == 4:
            (tmp_path / "parts" / "stop").write_text("SIGINT")
        return tiny_loss(model, ids, labels, mask, chunk)

    first.loss_function = stop_at_four
    with pytest.raises(StoppedByUser, match="Stopped by the user at step 4; resume continues there"):
        first.train()
    assert (tmp_path / "parts" / "checkpoint-4").is_dir()
    (tmp_path / "parts" / "stop").unlink()
    second = training_of(tmp_path / "parts")
    second.train()
    assert same(weights_of(whole), weights_of(second))
    same_keys = ("step", "loss", "lr", "grad_norm", "tokens")
    expected, found = ([[line[key] for key in same_keys] for line in metrics(tmp_path / part)]
                       for part in ("whole", "parts"))
    assert found == expected


def test_a_stop_before_the_first_step_needs_no_checkpoint(tmp_path):
    training = training_of(tmp_path)
    (tmp_path / "stop").write_text("SIGTERM")
    with pytest.raises(Interrupted, match="before the first step"):
        training.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("k", range(1, 9))
def test_a_resume_at_any_step_equals_an_uninterrupted_run_bit_for_bit(tmp_path, k):
    whole = training_of(tmp_path / "whole")
    whole.train()
    first = training_of(tmp_path / "parts", config_of(training__save_steps=1, training__keep_checkpoints=20))
    first.train()
    for step in range(k + 1, 10):
        checkpoint = tmp_path / "parts" / f"checkpoint-{step}"
        checkpoint.rename(tmp_path / f"gone-{step}")
    second = training_of(tmp_path / "parts")
    assert second.progress.step == k
    second.train()
    assert same(weights_of(whole), weights_of(second))
    assert same(whole.engine.capture().optimizer, second.engine.capture().optimizer)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == list(range(1, 10))


def test_steps_are_fitted_to_the_seconds_granted_and_written_before_use(tmp_path):
    def slow(model, ids, labels, mask, chunk):
        time.sleep(0.01)
        return tiny_loss(model, ids, labels, mask, chunk)

    config = config_of(training__epochs=500, training__budget_s=1.0)
    training = training_of(tmp_path, config, loss=slow)
    training.train()
    decision = json.loads((tmp_path / "schedule.json").read_text())
    assert 10 <= decision["steps"] < 60
    assert training.progress.step == decision["steps"] == training.progress.steps_fitted
    assert metrics(tmp_path)[-1]["lr"] == pytest.approx(config["training.learning_rate"] *
                                                       config["training.min_lr_share"])


def test_a_fit_never_goes_beyond_the_plan_nor_below_ten():
    assert pacing.fit(1e9, 50, 6, [1.0] * 6)["steps"] == 50
    assert pacing.fit(0.1, 50, 6, [1.0] * 6)["steps"] == 10
    assert pacing.fit(0.1, 8, 6, [1.0] * 6)["steps"] == 8


def test_a_fit_is_explained_with_its_numbers():
    decision = pacing.fit(100.0, 500, 6, [3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert pacing.explain(decision) == ("93 of 500 planned steps: a step takes 1.00 s, so they take 93 s of "
                                        "the 100 s granted (training.budget_s).")


def test_a_recorded_fit_is_used_only_by_the_same_run(tmp_path):
    run = RunDirectory(tmp_path)
    pacing.record(run, {"steps": 12, "from_step": 6}, "this")
    assert pacing.recorded(run, "this")["steps"] == 12
    assert pacing.recorded(run, "other") is None


def test_the_journal_drops_torn_lines_and_later_steps(tmp_path):
    journal = Journal(RunDirectory(tmp_path))
    for step in (1, 2, 3):
        journal.metrics({"step": step, "loss": math.inf})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    journal.rewind(2, "same")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert metrics(tmp_path)[0]["loss"] is None


def test_memory_that_runs_out_in_an_evaluation_costs_no_update_and_the_evaluation_is_made_later(tmp_path):
    config, made = config_of(training__eval_steps=2), []

    def evaluate(step):
        made.append(step)
        if made == [2, 4]:
            raise MemoryError("evaluation")
    first = training_of(tmp_path / "cut-off", config)
    first.evaluate = evaluate
    with pytest.raises(MemoryError):
        first.train()
    assert json.loads((tmp_path / "cut-off" / "heartbeat.json").read_text())["phase"] == "evaluate"
    second, whole = training_of(tmp_path / "cut-off", config), training_of(tmp_path / "whole", config)
    assert second.progress.step == 4
    second.evaluate = evaluate
    second.train()
    whole.train()
    assert made[:3] == [2, 4, 4]
    assert made[2:] == list(range(4, second.steps, 2))
    assert same(weights_of(second), weights_of(whole))


def test_evaluations_of_another_configuration_are_dropped(tmp_path):
    journal = Journal(RunDirectory(tmp_path))
    journal.evaluation({"step": 0, "loss": 1.0, "identity": "old"})
    journal.rewind(0, "new")
    assert journal.evaluation_at(0) is None


def test_an_evaluation_that_the_disk_refuses_counts_and_is_written_with_the_next_line(tmp_path):
    run = RunDirectory(tmp_path)
    journal = Journal(run)
    run.evaluations.mkdir()
    journal.evaluation({"step": 1, "loss": float("nan")})
    assert journal.evaluation_at(1) == {"step": 1, "loss": None}
    run.evaluations.rmdir()
    journal.metrics({"step": 2})
    assert read_lines(run.evaluations) == journal.evaluations() == [{"step": 1, "loss": None}]


def test_the_heartbeat_is_whole_json_and_a_phase_change_shows_at_once(tmp_path):
    heartbeat = Heartbeat(RunDirectory(tmp_path))
    for phase in ("import", "load", "train"):
        heartbeat.beat(phase, 1, 2, "x")
        beat = json.loads((tmp_path / "heartbeat.json").read_text())
        assert (beat["phase"], beat["pid"]) == (phase, os.getpid())
    assert beat.keys() == {"pid", "phase", "step", "steps", "done", "total", "detail", "time"}


def test_heartbeats_within_a_quarter_second_are_one(tmp_path):
    heartbeat = Heartbeat(RunDirectory(tmp_path))
    for done in range(100):
        heartbeat.beat("train", done, 100)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["done"] < 99


def test_work_that_reports_progress_is_stopped_by_the_stop_file(tmp_path):
    run = RunDirectory(tmp_path)
    watch = Watch(run.stop)
    progress = Heartbeat(run).progress("evaluate_before", watch.check)
    progress("window", 1, 2)
    run.stop.write_text("SIGTERM")
    with pytest.raises(Interrupted):
        progress("window", 2, 2)


def test_signals_are_noted_and_the_first_one_names_the_stop(tmp_path):
    watch = Watch(tmp_path / "stop")
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        watch.install()
        assert watch.poll() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.poll() == "SIGTERM"
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_slow_work_without_a_stopping_point_is_stopped_and_the_timer_is_put_away(tmp_path):
    watch = Watch(tmp_path / "stop")
    (tmp_path / "stop").write_text("SIGINT")
    begin = time.monotonic()
    with pytest.raises(StoppedByUser), watch.at_once():
        time.sleep(30)
    assert time.monotonic() - begin < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_loss_of_the_parent_stops_only_who_asked_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ELITE_WATCH_PARENT", "1")
    watched = Watch(tmp_path / "stop")
    monkeypatch.delenv("ELITE_WATCH_PARENT")
    plain = Watch(tmp_path / "stop")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert (watched.poll(), plain.poll()) == ("SIGTERM", "")
