"""A checkpoint that a disk has lost, torn or damaged is never taken for a whole one.

Rows 7, 8, 10 to 14 and 17 of docs/reliability.md.
"""

import errno
import itertools
import logging
import os
import re
import shutil

import pytest
import torch
from crash_power import Disk, Recorder
from crash_tools import leftovers, same, seeded, steps_made, weights_at
from trainer_fakes import config_of, training_of, weights_of
from trainer_fakes import same as same_weights

from training.trainer import checkpoints

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 2 and 3; the newest one."""
    steps_made(tmp_path, steps=3, keep=2)
    return tmp_path / "checkpoint-3"


def falls_back(path):
    """Whether the newest checkpoint is skipped with a reason, and the one before it is taken."""
    newest, skipped = checkpoints.newest_valid(path.parent)
    return newest == path.with_name("checkpoint-2") and [line.startswith("checkpoint-3 is skipped: ")
                                                         for line in skipped] == [True]


@pytest.mark.real
def test_after_a_power_loss_a_whole_checkpoint_is_there_and_no_damaged_one_is_taken(tmp_path, matrix):
    torch.set_num_threads(1)
    recorder, known, saves = Recorder(tmp_path / "run"), {}, 4
    training = training_of(tmp_path / "run", config_of(training__keep_checkpoints=1))
    with recorder.recording():
        for step in range(1, saves + 1):
            training._train_one()
            training.save()
            recorder.done(step)
            known[step], _ = weights_at(tmp_path / "run" / f"checkpoint-{step}")
    (source, note), good, tries = seeded(), 0, matrix.count(500, 10_000)
    kept = 0
    for _ in range(tries):
        disk = Disk(recorder.events[:source.randint(1, len(recorder.events))])
        disk.lay_out(tmp_path / "state", source)
        newest, _ = checkpoints.newest_valid(tmp_path / "state")
        last = max(disk.promises, default=0)
        if newest is None:
            good += last == 0
        else:
            captured, step = weights_at(newest)
            good += step >= last and same(captured, known[step])
            kept += 1
        shutil.rmtree(tmp_path / "state")
    assert kept > tries // 2
    matrix.record(7, good, tries, f"states after {len(recorder.events)} recorded events; {note}")


@pytest.mark.real
def test_an_fsync_that_fails_once_costs_that_checkpoint_and_no_step(tmp_path, matrix, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = config_of(training__save_steps=1, training__epochs=1)
    whole = training_of(tmp_path / "whole", config)
    whole.train()
    fsync, good = os.fsync, 0
    for at in itertools.count(1):
        calls = itertools.count(1)

        def refuse(handle, at=at, calls=calls):
            if next(calls) == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", refuse)
        caplog.clear()
        training = training_of(tmp_path / str(at), config)
        training.train()
        if next(calls) <= at:
            break
        good += (told_and_gone(training.run.path, caplog.text)
                 and same_weights(weights_of(training), weights_of(whole)))
    assert at > 15
    matrix.record(8, good, at - 1, "each fsync of a training of 3 saves")


def told_and_gone(run, log):
    """Whether a refused save was told as that, and just the checkpoints told as saved are there. The last
    one has no next one, and is tried again."""
    saved, again = set(re.findall(r"saved (checkpoint-\d)", log)), "It is tried once more" in log
    kept = {path.name for path in run.glob("checkpoint-*")}
    return ("Input/output error" in log and again != ("The training goes on" in log) and len(kept) == 2
            and kept <= saved and len(saved) == 2 + again
            and checkpoints.newest_valid(run)[1] == [] == leftovers(run))


def test_a_torn_json_file_is_skipped_with_the_reason(two, matrix):
    (source, note), good, tries = seeded(), 0, 0
    for name in ("MANIFEST.json", "state.json"):
        file, whole = two / name, (two / name).read_bytes()
        for cut in {0, len(whole) // 2, *source.sample(range(1, len(whole)), 18)}:
            for text in (whole[:cut], whole[:cut] + bytes(len(whole) - cut), whole[:cut] + bytes(64),
                         whole[:cut] + source.randbytes(len(whole) - cut), whole + bytes(cut + 1)):
                file.write_bytes(text)
                tries, good = tries + 1, good + falls_back(two)
        file.write_bytes(whole)
    matrix.record(10, good, tries, note)


def test_each_flipped_bit_of_each_file_is_found(two, matrix):
    (source, note), good, flips = seeded(), 0, 200
    for name in FILES:
        file, whole = two / name, (two / name).read_bytes()
        for at in source.choices(range(len(whole) * 8), k=flips):
            damaged = bytearray(whole)
            damaged[at // 8] ^= 1 << at % 8
            file.write_bytes(damaged)
            good += falls_back(two)
        file.write_bytes(whole)
    matrix.record(11, good, flips * len(FILES), f"{flips} in each of {len(FILES)} files; {note}")


def test_each_deleted_file_is_found(two, matrix):
    good = 0
    for name in FILES:
        os.rename(two / name, two.parent / name)
        good += falls_back(two)
        os.rename(two.parent / name, two / name)
    matrix.record(12, good, len(FILES))


def test_each_tail_that_is_cut_off_or_zeroed_is_found(two, matrix):
    (source, note), good, cuts = seeded(), 0, 20
    for name in FILES:
        file, whole = two / name, (two / name).read_bytes()
        last = len(whole.rstrip(b"\0")) - 1  # from there on a zeroed tail changes something
        for cut in {0, last, *source.sample(range(1, last), cuts - 2)}:
            for text in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):
                file.write_bytes(text)
                good += falls_back(two)
        file.write_bytes(whole)
    matrix.record(13, good, 2 * cuts * len(FILES), f"{cuts} places a file; {note}")


def test_a_pointer_to_the_latest_checkpoint_is_not_believed(two, tmp_path, matrix):
    """There is none; users and other tools write one."""
    elsewhere = shutil.copytree(two, tmp_path / "elsewhere" / "checkpoint-9")
    pointers = [lambda path: path.write_text(""), lambda path: path.write_text("checkpoint-77\n"),
                lambda path: path.write_text("../../../etc"), lambda path: path.write_text("checkpoint-2"),
                lambda path: path.symlink_to("checkpoint-77"), lambda path: path.symlink_to(elsewhere),
                lambda path: path.symlink_to("checkpoint-2"), lambda path: path.mkdir()]
    names, good = ("latest", "last-checkpoint", "checkpoint-9", "checkpoint-latest"), 0
    for name, point in itertools.product(names, pointers):
        place = tmp_path / name
        point(place)
        good += checkpoints.newest_valid(tmp_path)[0] == two
        (shutil.rmtree if place.is_dir() and not place.is_symlink() else os.unlink)(place)
    matrix.record(14, good, len(names) * len(pointers))


def test_the_step_and_no_time_of_a_file_says_which_checkpoint_is_the_newest(tmp_path, matrix):
    training = steps_made(tmp_path, steps=6, keep=6)
    (source, note), good, tries = seeded(), 0, matrix.count(30, 500)
    for number in range(tries):
        run = shutil.copytree(tmp_path, tmp_path.with_name(f"restored-{number}"))
        for path in run.rglob("*"):
            os.utime(path, (source.uniform(0, 2e9),) * 2)
        keep = source.randint(1, 5)
        checkpoints.retain(run, keep)
        kept = {path.name for path in run.glob("checkpoint-*")}
        good += (checkpoints.newest_valid(run) == (run / "checkpoint-6", [])
                 and kept == {f"checkpoint-{step}" for step in range(7 - keep, 7)})
        shutil.rmtree(run)
    assert training.progress.step == 6
    matrix.record(17, good, tries, note)


