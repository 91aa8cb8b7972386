"""Stages of growing context: the fixed schedule, and stages that end once their loss no longer falls."""

import json
import random

import numpy as np
import pytest
import torch
from trainer_fakes import VOCAB, config_of, same, tiny_loss, training_of, weights_of

from training.errors import StoppedByUser
from training.trainer.batches import Curriculum, Layout, read_update
from training.trainer.journal import read_lines
from training.trainer.pacing import HALF, levelled
from training.trainer.progress import Progress

CONTEXT, TARGET = 512, 16
LAYOUT = Layout(windows=200, micro=1, accumulation=1, ranks=1)
COURSE = Curriculum(stages=4, share=0.6, context_tokens=CONTEXT, target_tokens=TARGET)
# Of 200 updates, the first 40 see 64 tokens, then 128, then 256; from the 121st on all 512.
LENGTHS = [64] * 40 + [128] * 40 + [256] * 40 + [512] * 80


class LongStore:
    """Windows of CONTEXT tokens of which the last TARGET are trained on; shortened as asked."""

    pad_id, vocab_tokens, digest = 0, VOCAB, "d" * 64

    def count(self, split):
        return 200

    def order(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(200)

    def written_to(self):
        return ""

    def window(self, split, index, seed=0, epoch=0, context_limit=None):
        ids = (np.arange(CONTEXT) * 3 + index) % VOCAB
        labels = np.where(np.arange(CONTEXT) >= CONTEXT - TARGET, ids, -100)
        first = 0 if context_limit is None else CONTEXT - TARGET - context_limit
        return ids[first:], labels[first:]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(pace="dynamic", **settings):
    return config_of(dataset__curriculum_stages=4, dataset__curriculum_share=0.6,
                     dataset__curriculum_pace=pace, dataset__context_tokens=CONTEXT,
                     dataset__target_tokens=TARGET, training__micro_batch=1, training__accumulation=1,
                     training__epochs=1, training__max_steps=150, **settings)


def made(path, settings, lengths=None):
    training = training_of(path, settings, LongStore())

    def loss(model, ids, labels, mask, chunk):
        if lengths is not None:
            lengths.append(ids.shape[1])
        return tiny_loss(model, ids, labels, mask, chunk)
    training.loss_function = loss
    return training


def lengths_of(path, settings):
    """The windows' lengths, update by update, and the training that saw them."""
    found = []
    training = made(path, settings, found)
    training.train()
    return found, training


def test_the_fixed_pace_takes_each_stage_to_its_share(tmp_path):
    limits = [COURSE.limit_of(step, LAYOUT) for step in (0, 39, 40, 80, 119, 120)]
    assert limits == [48, 48, 112, 240, 240, None]
    found, training = lengths_of(tmp_path, config("fixed"))
    assert found == LENGTHS[:150]
    assert (training.progress.ahead, training.progress.stage_losses) == (0, [])


@pytest.mark.parametrize(("windows", "stages", "share"), [(200, 4, 0.6), (37, 2, 0.3), (1000, 5, 1.0),
                                                          (9, 3, 0.5)])
def test_the_fixed_schedule_divides_the_share_of_the_first_epoch_evenly(windows, stages, share):
    layout = Layout(windows=windows, micro=2, accumulation=2, ranks=1)
    course = Curriculum(stages=stages, share=share, context_tokens=8192, target_tokens=512)
    for step in range(2 * layout.updates_per_epoch):
        done = step * 4 / windows
        stage = int(done / share * (stages - 1))
        full = step >= layout.updates_per_epoch or done >= share
        assert course.limit_of(step, layout) == (None if full else 8192 // 2 ** (stages - 1 - stage) - 512)


def test_a_loss_that_falls_and_one_that_does_not_are_told_apart():
    noise = [random.Random(3).gauss(0, 0.05) for _ in range(2 * HALF)]
    falling = [3.0 - 0.03 * update for update in range(2 * HALF)]
    assert not levelled([value + more for value, more in zip(falling, noise, strict=True)])
    assert levelled([3.0 + more for more in noise])
    assert levelled(falling[::-1])
    assert not levelled([3.0] * (2 * HALF - 1))


def test_the_difference_is_judged_by_welchs_standard_error():
    source = np.random.default_rng(5)
    for _ in range(200):
        losses = 2 + 0.1 * source.standard_normal(2 * HALF)
        before, last = losses[:HALF], losses[HALF:]
        error = np.sqrt(before.var(ddof=1) / HALF + last.var(ddof=1) / HALF)
        assert levelled(list(losses)) == (before.mean() - last.mean() <= error)


def lengths_by(losses):
    """The course of a progress that meets these losses, update by update."""
    progress, found = Progress(), []
    for loss in losses:
        limit = progress.course(COURSE).limit_of(progress.place, LAYOUT)
        found.append(CONTEXT if limit is None else limit + TARGET)
        progress.pace(loss, COURSE, LAYOUT)
        progress.step += 1
    return found, progress


def test_a_falling_loss_keeps_the_fixed_schedule():
    found, progress = lengths_by([5.0 - 0.01 * step for step in range(200)])
    assert (found, progress.ahead) == (LENGTHS, 0)


def test_a_level_loss_ends_each_stage_after_16_updates_and_all_the_rest_has_full_context():
    found, progress = lengths_by([2.0] * 200)
    assert found == [64] * 16 + [128] * 16 + [256] * 16 + [512] * 152
    assert (progress.ahead, progress.stage_losses) == (3 * 24, [])


def test_a_stage_after_one_that_ended_early_lasts_as_long_as_it_was_to():
    found, _ = lengths_by([2.0] * 16 + [2.0 - 0.01 * step for step in range(184)])
    assert found == [64] * 16 + [128] * 40 + [256] * 40 + [512] * 104


def test_losses_of_one_stage_do_not_judge_the_next():
    """The loss falls with more context, then lies still: 16 updates of it must be seen."""
    found, _ = lengths_by([5.0 - 0.01 * step for step in range(40)] + [1.0] * 160)
    assert found == [64] * 40 + [128] * 16 + [256] * 16 + [512] * 128


def test_windows_that_were_passed_over_move_the_data_and_not_the_course():
    progress = Progress(step=30, passed_over=25, ahead=5)
    assert progress.place == 55
    assert progress.course(COURSE).stage_of(progress.place, LAYOUT) == 0
    assert progress.course(COURSE).stage_of(progress.place + 5, LAYOUT) == 1


def test_the_dynamic_pace_reads_longer_windows_earlier_in_a_real_run(tmp_path, caplog):
    with caplog.at_level("INFO"):
        found, training = lengths_of(tmp_path, config())
    assert training.progress.ahead > 0
    assert sum(found) > sum(LENGTHS[:150])
    assert found == sorted(found)
    assert set(found) == {64, 128, 256, 512}
    assert "the loss no longer falls; the next stage of growing context begins" in caplog.text


def test_a_resume_anywhere_in_a_stage_sees_the_same_windows_and_ends_in_the_same_weights(tmp_path):
    lengths, whole = lengths_of(tmp_path / "whole", config())
    for step in (5, lengths.index(128) - 1, lengths.index(128), lengths.index(256) + 7):
        path, found = tmp_path / str(step), []
        first = made(path, config(), found)
        while first.progress.step < step:
            first._train_one()
        (path / "stop").write_text("SIGINT")
        with pytest.raises(StoppedByUser):
            first.train()
        (path / "stop").unlink()
        second = made(path, config(), found)
        second.train()
        assert found == lengths
        assert same(weights_of(whole), weights_of(second))
        assert [line["step"] for line in read_lines(path / "metrics.jsonl")] == list(range(1, 151))
        state = json.loads((path / "checkpoint-150" / "state.json").read_text())
        assert (state["ahead"], state["stage_losses"]) == (whole.progress.ahead, [])


def test_every_rank_shortens_its_windows_alike():
    two = Layout(windows=200, micro=1, accumulation=1, ranks=2)
    course = Curriculum(stages=4, share=0.6, context_tokens=CONTEXT, target_tokens=TARGET, ahead=7)
    for step in (0, 12, 13, 14, 60):
        shapes = [read_update(LongStore(), step, two, rank, 7, course)[0][0].ids.shape for rank in (0, 1)]
        assert shapes[0] == shapes[1]
        assert shapes[0][1] == LENGTHS[2 * (step + 7)]
