"""Resuming: what went on is what was never stopped, to the last bit; what changed meanwhile is refused."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resumes import flipped, rows, run_at
from run_maker import dataset_at
from torch import nn
from trainer_fakes import VOCAB, FakeStore, config_of, same, training_of

from training.command import checks
from training.dataset.store import WindowStore
from training.errors import DataError, EliteError, Interrupted, UsageError
from training.manager.manager import TrainingManager
from training.rundir import RunDirectory
from training.settings import BY_NAME, Config, contradictions
from training.trainer import checkpoints, identities


def stop_in(training, step, part=0):
    """Write the stop file right before micro-batch `part` of the update after `step`."""
    poll, calls = training.watch.poll, []

    def asked():
        calls.extend([step] * (training.progress.step == step))
        if len(calls) == part + 1:
            training.run.stop.write_text("SIGTERM")
        return poll()
    training.watch.poll = asked


def in_two(make, path, step, part=0):
    """A training that was stopped after `step` updates and went on; None if that update has no such part."""
    first = make(path)
    stop_in(first, step, part)
    try:
        first.train()
        return None
    except Interrupted:
        first.run.stop.unlink()
    second = make(path)
    assert second.progress.step == step
    second.train()
    return second


def equal(whole, other):
    """Whether weights, optimizer state and each row of the metrics are the same."""
    one, two = whole.engine.capture(), other.engine.capture()
    return (same(one.weights, two.weights) and same(one.optimizer, two.optimizer)
            and one.numbers == two.numbers and rows(whole.run.path) == rows(other.run.path))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_stop_in_any_micro_batch_of_any_update_changes_no_bit(tmp_path, matrix, accumulation):
    epochs = matrix.count(2, 8)
    config = config_of(training__accumulation=accumulation, training__epochs=epochs)
    whole = training_of(tmp_path / "whole", config)
    whole.train()
    ends = [in_two(lambda at: training_of(at, config), tmp_path / f"{step}-{part}", step, part)
            for step in range(1, whole.steps) for part in range(accumulation)]
    ends = [each for each in ends if each]
    assert len(ends) > (whole.steps - 1) * (accumulation - 1) / 2
    passed, tried = sum(equal(whole, each) for each in ends), len(ends)
    matrix.record(20, passed, tried, f"stopped in each micro-batch of {accumulation}")


class Reader(nn.Module):
    """A model of a real dataset's tokens, with dropout."""

    def __init__(self, tokens, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(tokens, 8), nn.Linear(8, 16)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(16, tokens, bias=False)

    def forward(self, ids):
        return self.head(self.drop(F.gelu(self.mix(self.embed(ids)))))


def summed_loss(model, ids, labels, mask, chunk):
    logits, expected = model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, expected, reduction="sum"), int((expected != -100).sum())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("unpacked"), **{"dataset.packing": False})


@pytest.mark.real
def test_dropout_accumulation_and_packing_resume_bit_for_bit(tmp_path, matrix, with_dataset, unpacked):
    passed = tried = 0
    for packing, run in ((True, with_dataset), (False, unpacked)):
        store = WindowStore.open(run / "dataset")
        for accumulation in (1, 4):
            for dropout in (0.0, 0.2):
                config = config_of(training__accumulation=accumulation, training__micro_batch=1,
                                   training__max_steps=7, dataset__packing=packing)

                def make(path, config=config, store=store, dropout=dropout):
                    model = Reader(store.vocab_tokens, dropout)
                    return training_of(path, config, store, model, loss=summed_loss)
                cell = tmp_path / f"{packing}-{accumulation}-{dropout}"
                cell.mkdir()
                whole = make(cell / "whole")
                whole.train()
                ended = [in_two(make, cell / str(step), step) for step in matrix.count([4], range(1, 7))]
                tried, passed = tried + 1, passed + all(equal(whole, each) for each in ended)
    matrix.record(21, passed, tried, "dropout 0 and 0.2, accumulation 1 and 4, packing on and off")


class Masking(FakeStore):
    """Draws masked tokens by (seed, epoch, window), and one more from each global generator."""

    def window(self, split, index, seed=0, epoch=0, context_limit=None):
        ids, labels = super().window(split, index)
        hidden = np.random.default_rng((seed, epoch, index)).random(len(ids)) < 0.3
        places = int(torch.randint(len(ids), ())), random.randrange(len(ids)), np.random.randint(len(ids))
        hidden[list(places)] = True
        return np.where(hidden, VOCAB - 1, ids), labels


def test_windows_that_are_drawn_on_the_way_are_the_same_after_a_resume(tmp_path, matrix, with_dataset):
    config = config_of(training__epochs=matrix.count(2, 8))

    def make(path):
        return training_of(path, config, Masking())
    whole, plain = make(tmp_path / "whole"), training_of(tmp_path / "plain", config)
    whole.train()
    plain.train()
    assert rows(whole.run.path) != rows(plain.run.path)
    steps = range(1, whole.steps)
    passed = sum(equal(whole, in_two(make, tmp_path / str(step), step)) for step in steps)
    store = WindowStore.open(with_dataset / "dataset")
    asked = [(epoch, index) for epoch in range(3) for index in range(store.count("train"))]
    first = {at: store.window("train", at[1], 7, at[0]) for at in asked}
    random.Random(3).shuffle(asked)
    again = {at: WindowStore.open(store.path).window("train", at[1], 7, at[0]) for at in asked[:40]}
    assert all(np.array_equal(first[at], again[at]) for at in again)
    assert any(not np.array_equal(first[0, i], first[1, i]) for i in range(store.count("train")))
    matrix.record(22, passed, len(steps), "masks from the window's place and from all global generators")


def other_value(name, values):
    """Another valid value of a key, or None when only one is."""
    key, now = BY_NAME[name], values[name]
    if key.choices:
        offered = [choice for choice in key.choices if choice != now]
    elif key.kind is bool:
        offered = [not now]
    elif key.kind is int:
        offered = [now * 2 or 8, now + 1, now - 1, 1]
    elif key.kind is float:
        offered = [now / 2, now + 0.25, now + 1.5, 0.1, 1.0]
    else:
        offered = [["other"]] if key.kind is list else ["/other"]
    for value in offered:
        try:
            if value != now and not contradictions(dict(Config({name: value})) | values | {name: value}):
                return value
        except EliteError:
            continue
    return None


def test_every_key_that_decides_is_refused_by_its_name(tmp_path, matrix):
    path, config = tmp_path / "run", config_of(training__max_steps=2)
    training_of(path, config).train()
    deciding = [name for name in identities.identity(config, "")["config"] if name in BY_NAME]
    assert len(deciding) > 50
    passed, tried, alone = 0, 0, []
    saved = checkpoints.read_identity(path / "checkpoint-2")
    for name in deciding:
        value = other_value(name, dict(config))
        if value is None:  # it takes a second key: compared without a configuration
            alone.append(name)
            now = {**saved, "config": {**saved["config"], name: "other"}}
            with pytest.raises(UsageError, match=name):
                identities.refuse_changes(saved, now, "checkpoint-2")
        else:
            said = rf"{name} was .* in checkpoint-2 and is .* now; .* allow it with --allow-change {name}"
            with pytest.raises(UsageError, match=said):
                training_of(path, Config({**config, name: value}))
        tried, passed = tried + 1, passed + 1
    for before, after in (("training.micro_batch", 4), ("training.accumulation", 1), ("device.count", 2)):
        tried += 1
        with pytest.raises(UsageError, match="windows per update was 4 in checkpoint-2"):
            training_of(path, Config({**config, before: after}))
        passed += 1
    dealt = Config({**config, "training.micro_batch": 1, "training.accumulation": 4})
    assert training_of(path, dealt).progress.step == 2
    assert len(alone) < len(deciding) / 4, alone
    matrix.record(23, passed, tried, f"every key that decides; {len(alone)} of them without a run")


def test_one_changed_bit_of_tokens_tokenizer_or_base_model_is_refused(tmp_path, matrix, with_dataset):
    passed = tried = 0
    for name in ("tokens.bin", "tokenizer/tokenizer.json", "train_windows.bin", "spans.bin"):
        run = run_at(with_dataset, tmp_path / name.replace("/", "-"))
        manager = TrainingManager(run, checks=checks.ALL)
        manager.preflight()
        flipped(run / "dataset" / name)
        tried += 1
        with pytest.raises(DataError, match="was changed: its content hash is"):
            manager.train()
        assert not (run / "train.log").exists()
        passed += 1
    base, run = tmp_path / "base", RunDirectory(tmp_path)
    base.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (base / name).write_bytes(name.encode() * 9)
    config = config_of(model__base=str(base))
    for path in sorted(base.iterdir()):
        then = identities.identity(config, "d", identities.base_digest(config, run))
        flipped(path)
        now = identities.identity(config, "d", identities.base_digest(config, run))
        tried += 1
        with pytest.raises(DataError, match=r"The base model's files changed .* --allow-change base"):
            identities.refuse_changes(then, now, "checkpoint-2")
        passed += 1
    matrix.record(23, passed, tried, "one bit of each kind of file")


def test_the_best_and_the_newest_checkpoint_outlive_every_rotation(tmp_path, matrix):
    passed, tries = 0, matrix.count(6, 50)
    for turn in range(tries):
        source = random.Random(turn)
        config = config_of(training__save_steps=source.randint(1, 5), training__keep_checkpoints=1,
                           training__eval_steps=source.randint(1, 5), training__epochs=4)
        training, losses, wrong = training_of(tmp_path / str(turn), config), {}, []
        digest, after = identities.digest_of(training.identity), training._after_step

        def evaluate(step, training=training, losses=losses, source=source, digest=digest):
            losses[step] = source.random()
            training.journal.evaluation({"step": step, "loss": losses[step], "identity": digest})

        def look(training=training, losses=losses, wrong=wrong, after=after):
            after()
            valid = {step for step, path in checkpoints._by_step(training.run.path)
                     if not checkpoints.fault(path, step)}
            best = min(losses, key=losses.get, default=None)
            wrong.extend([training.progress.step] * (best is not None and best not in valid))
        training.evaluate, training._after_step = evaluate, look
        training.train()
        newest, _ = checkpoints.newest_valid(training.run.path)
        passed += not wrong and checkpoints.step_of(newest) == training.progress.step
    matrix.record(27, passed, tries, "save_steps and eval_steps drawn from 1 to 5, one kept")
