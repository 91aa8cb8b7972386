"""Numbers that are not finite, losses that leap, and a clock that jumps."""

import logging
import random
import re
import time

import pytest
import torch
from run_factory import FAKE, make_run
from trainer_fakes import FakeStore, config_of, same, tiny_loss, training_of, weights_of

from training.errors import EliteError
from training.manager.manager import TrainingManager
from training.trainer import checkpoints
from training.trainer.journal import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")

# Numbers and clocks


def finite(path):
    """Whether every checkpoint in a run directory holds finite numbers only."""
    return all(bool(torch.isfinite(tensor).all()) for found in path.glob("checkpoint-*")
               for part in (checkpoints.load(found)[0].weights, checkpoints.load(found)[0].optimizer)
               for tensor in part.values() if tensor.is_floating_point())


def poisoned(training, kind, value, places):
    """A loss, or only its gradient, that is not finite in the updates of these places."""
    def loss(*arguments):
        summed, tokens = tiny_loss(*arguments)
        if training.progress.place in places:
            if kind == "loss":
                return summed * value, tokens
            summed.register_hook(lambda gradient: gradient * value)
        return summed, tokens
    training.loss_function = loss
    return training


def test_numbers_that_are_not_finite_are_skipped_and_counted_and_in_no_checkpoint(matrix, tmp_path):
    draw, tries, passed, notes = random.Random(55), matrix.count(12, 120), 0, []
    for number in range(tries):
        kind, value = ("loss", "gradient")[number % 2], (float("nan"), float("inf"))[number // 2 % 2]
        always = number % 4 == 3
        first = draw.randrange(9)
        apart = range(first, 9) if always else range(first, 9, 2)
        path = tmp_path / str(number)
        config = config_of(training__save_steps=1, training__keep_checkpoints=9)
        training = poisoned(training_of(path, config), kind, value, set(apart))
        wanted, error = len(apart), None
        try:
            training.train()
        except EliteError as caught:
            error = caught
        persistent = always and len(apart) >= 3
        good = (finite(path) and (error.exit_code if error else 0) == (70 if persistent else 0)
                and training.progress.skipped == (3 if persistent else wanted)
                and all(row["loss"] is None or row["grad_norm"] is not None or kind == "gradient"
                        for row in read_lines(path / "metrics.jsonl")))
        passed += good
        notes += [] if good else [f"{kind} {value} from {first}: {training.progress.skipped} {error!r}"]
    matrix.record(55, passed, tries, "; ".join(notes))


# Each update has all twelve windows: one window alone may have a tenth of the next one's loss, and ten times
# that is within six deviations.
SPIKES = {"training__epochs": 60, "training__accumulation": 6, "training__spike_window": 8,
          "training__save_steps": 5}


def spiking(path, bad, seed):
    training = training_of(path, config_of(**SPIKES, run__seed=seed), FakeStore(12))

    def loss(*arguments):
        summed, tokens = tiny_loss(*arguments)
        return (summed * 10 if bad(training) else summed), tokens
    training.loss_function = loss
    trainable = dict(training.engine.model.named_parameters())
    training.put_back = lambda captured: checkpoints.put_back(captured, trainable, training.engine)
    return training


def test_ten_losses_of_ten_times_as_much_lead_to_two_returns_at_most_and_ordinary_ones_to_none(
        matrix, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    tries, passed, notes = matrix.count(4, 20), 0, []
    for seed in range(tries):
        ordinary = spiking(tmp_path / f"ordinary-{seed}", lambda training: False, seed)
        ordinary.train()
        caplog.clear()
        at = 20 + seed
        spiked = spiking(tmp_path / f"spiked-{seed}",
                         lambda training, at=at: at <= training.progress.place < at + 10, seed)
        error = None
        try:
            spiked.train()
        except EliteError as caught:
            error = caught
        back = re.findall(r"step (\d+): the loss .* back to checkpoint-(\d+)", caplog.text)
        good = (ordinary.progress.spikes == ordinary.progress.rollbacks == 0
                and 1 <= len(back) == spiked.progress.rollbacks <= 2 and finite(tmp_path / f"spiked-{seed}")
                and all(int(to) < int(step) for step, to in back)
                and (error is None or f"went back to a checkpoint {len(back)} times" in str(error)))
        passed += good
        notes += [] if good else [f"seed {seed}: {ordinary.progress.spikes} {back} {error}"]
    matrix.record(56, passed, tries, "; ".join(notes))


JUMPS_S = (-86_400, 0, 3_600, 86_400)


def test_a_clock_that_jumps_by_days_changes_no_weight_and_calls_no_trainer_hung(
        matrix, tmp_path, monkeypatch):
    """Of the trainer's loop in this process, and of the command's beside a stand-in trainer."""
    tries, passed, notes = matrix.count(3, 10), 0, []
    whole = training_of(tmp_path / "whole", config_of())
    whole.train()
    plain_time = time.time
    for number in range(tries):
        draw = random.Random(number)
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda draw=draw: plain_time() + draw.choice(JUMPS_S))
            training = training_of(tmp_path / str(number), config_of(training__save_steps=2))
            training.train()
            run = make_run(tmp_path / f"{number}-managed")
            patched.setenv("FAKE", "done")
            told = []
            result = TrainingManager(run.path, script=FAKE, pauses_s=(0.0,)).train(
                lambda *update, told=told: told.append(update))
        good = (same(weights_of(training), weights_of(whole)) and result.state == "done"
                and not any(update[0] == "restart" or "no sign of life" in update[3] for update in told)
                and 0 <= training.progress.seconds < 60)
        passed += good
        notes += [] if good else [f"{number}: {result} {told[-3:]}"]
    matrix.record(57, passed, tries, "; ".join(notes))
