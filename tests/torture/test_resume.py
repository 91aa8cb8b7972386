"""Resuming: what went on is what was never stopped, to the last bit; what changed meanwhile is refused."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_maker import configure, dataset_at
from torch import nn
from trainer_fakes import VOCAB, FakeStore, config_of, same, training_of

from training.command import checks
from training.dataset.store import WindowStore
from training.errors import DataError, EliteError, Interrupted, UsageError
from training.manager import launcher
from training.manager.manager import TrainingManager
from training.records import Result
from training.rundir import RunDirectory, read_record
from training.settings import BY_NAME, Config, contradictions
from training.trainer import checkpoints, identities
from training.trainer.journal import read_lines

PATIENCE_S = 300
COMPARED = ("step", "epoch", "loss", "lr", "grad_norm", "tokens")


def rows(path):
    """What metrics.jsonl says of the course of a training."""
    return [tuple(line[name] for name in COMPARED) for line in read_lines(path / "metrics.jsonl")]


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
def with_dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("dataset"))


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


def flipped(path):
    """One bit of a file, its times kept."""
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


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


def run_at(with_dataset, path, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return configure(path, **{"evaluation__completions": 0, "evaluation__windows": 2, **settings})


def train(run, *arguments, ranks=0):
    """The trainer to its end: exit codes by rank, and what it printed."""
    words = ["--run-dir", str(run), *arguments]
    job = forked.server().start(launcher.SCRIPT, run.parent / f"{run.name}.log", {"arguments": words}, ranks)
    return job.wait(PATIENCE_S), job.text()


def outcome(run):
    return read_record(Result, run / "result.json")


@pytest.fixture(scope="module")
def finished(with_dataset, tmp_path_factory):
    """A run to its end with each of its 12 steps saved."""
    run = run_at(with_dataset, tmp_path_factory.mktemp("finished") / "run", training__save_steps=1,
                 training__keep_checkpoints=20)
    codes, told = train(run)
    assert codes == [0], told
    return run


def as_of(finished, path, step):
    """A copy of the run as if it had been killed after a step's checkpoint."""
    shutil.copytree(finished, path)
    for name in ("result.json", "heartbeat.json"):
        (path / name).unlink()
    checkpoints.drop_after(path, step)
    return path


def ends_the_same(run, finished):
    found, expected = outcome(run), outcome(finished)
    return (found.state == "done" and found.digest == expected.digest and rows(run) == rows(finished)
            and found.tokens_trained == expected.tokens_trained and found.seconds > 0)


@pytest.mark.real
def test_the_trainer_goes_on_from_each_step_to_the_same_digest(tmp_path, matrix, finished):
    steps = matrix.count((5,), range(1, 13))
    passed = 0
    for step in steps:
        run = as_of(finished, tmp_path / str(step), step)
        codes, told = train(run)
        passed += (codes == [0] and f"going on from checkpoint-{step}\n" in told
                   and ends_the_same(run, finished))
    matrix.record(20, passed, len(steps), "the trainer itself")


@pytest.mark.real
def test_a_change_that_is_allowed_by_name_is_made_and_recorded(tmp_path, matrix, finished):
    run = as_of(finished, tmp_path / "run", 11)
    configure(run, training__learning_rate=1e-3, evaluation__completions=0, evaluation__windows=2)
    saved = run / "checkpoint-11"
    (captured, state), identity = checkpoints.load(saved), checkpoints.read_identity(saved)
    state.pop("optimizer", None)
    saved.rename(tmp_path / saved.name)
    identity |= {"versions": {**identity["versions"], "torch": "1.0"}, "data": "0" * 64}
    checkpoints.save(run, captured, state, identity)
    codes, told = train(run)
    assert codes == [2], told
    for problem in ("training.learning_rate was 0.003 in checkpoint-11 and is 0.001 now", "torch was 1.0 in ",
                    "The dataset changed since checkpoint-11 (digest 000000000000, now "):
        assert problem in told
    assert outcome(run).state == "failed"
    assert not (run / "changes.jsonl").exists()
    names = ["training.learning_rate", "versions.torch", "data"]
    codes, told = train(run, *(word for name in names for word in ("--allow-change", name)))
    assert codes == [0], told
    lines = read_lines(run / "changes.jsonl")
    assert sorted(line["key"] for line in lines) == sorted(names)
    assert {line["since"] for line in lines} == {"checkpoint-11"}
    assert next((line["before"], line["after"]) for line in lines if "rate" in line["key"]) == (3e-3, 1e-3)
    matrix.record(23, 4, 4, "refused all at once by the trainer; allowed by name and recorded")


@pytest.mark.real
def test_two_ranks_then_one_then_two_keep_to_one_curve(tmp_path, matrix, with_dataset):
    def settings(ranks):
        return {"device__count": ranks, "training__micro_batch": 1, "training__accumulation": 4 // ranks,
                "training__max_steps": 6, "training__save_steps": 2, "training__keep_checkpoints": 9}
    whole = run_at(with_dataset, tmp_path / "whole", **settings(1))
    assert train(whole)[0] == [0]
    run = run_at(with_dataset, tmp_path / "run", **settings(2))
    for last, ranks in ((2, 2), (4, 1), (6, 2)):
        configure(run, evaluation__completions=0, evaluation__windows=2, **settings(ranks))
        codes, told = train(run, ranks=0 if ranks == 1 else ranks)
        assert not any(codes), told
        assert f"going on from checkpoint-{last - 2}\n" in told or last == 2
        if last < 6:
            (run / "result.json").unlink()
            checkpoints.drop_after(run, last)
    losses = list(zip(rows(run), rows(whole), strict=True))
    near = [one[2] == pytest.approx(other[2], rel=1e-5) for one, other in losses]
    matrix.record(24, sum(near), 6, "loss of each update within 1e-5 of one process's")


@pytest.mark.real
def test_a_finished_run_is_not_written_to(tmp_path, matrix, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    TrainingManager(run).train()  # the lock's file is made

    def times():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    before = times()
    assert TrainingManager(run).train().state == "done"
    through_the_command = times() == before
    codes, told = train(run)
    assert "holds a finished run already; nothing is done" in told
    matrix.record(25, through_the_command + (codes == [0] and times() == before), 2, "command and trainer")


@pytest.mark.real
def test_without_a_usable_checkpoint_the_training_starts_at_0_and_says_so(tmp_path, matrix, finished):
    passed = 0
    for left in ("none", "damaged"):
        run = as_of(finished, tmp_path / left, 3 if left == "damaged" else 0)
        for path in run.glob("checkpoint-*"):
            flipped(path / "weights.safetensors")
        codes, told = train(run)
        assert codes == [0], told
        assert told.count("is skipped: weights.safetensors is damaged") == (3 if left == "damaged" else 0)
        passed += ("No checkpoint can be used; training starts from step 0." in told
                   and ends_the_same(run, finished))
    matrix.record(26, passed, 2, "all deleted; all damaged")


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


def resident(pid, name="VmHWM"):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def peak_of(run, log, first, then):
    """The most resident memory of a trainer until step `then`; counted anew after step `first` if not 0."""
    process = forked.trainer(run, log)
    peak, counted = 0, first == 0
    while process.poll() is None and (done := steps_made(run)) <= then:
        if not counted and done >= first:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
            counted = True
        elif counted:
            peak = resident(process.pid)
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return peak


def steps_made(run):
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


@pytest.mark.real
def test_a_resume_takes_no_more_memory_than_the_training(tmp_path, matrix, with_dataset):
    """A model of 13 million weights, whose checkpoint is 156 MB."""
    run = run_at(with_dataset, tmp_path / "run", embedded__hidden=512, embedded__layers=4, embedded__mlp=1408,
                 training__micro_batch=1, training__accumulation=1, training__max_steps=12,
                 training__save_steps=6)
    steady = peak_of(run, tmp_path / "log", 2, 5)
    process = forked.trainer(run, tmp_path / "log")
    while process.poll() is None and not (run / "checkpoint-6").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = peak_of(run, tmp_path / "log", 0, 9)
    ratio = resumed / steady
    matrix.record(28, ratio <= 1.10, 1, f"{resumed / 2**20:.0f} MiB in load and three steps, "
           f"{steady / 2**20:.0f} MiB in steps 3 to 5 of an uninterrupted run: {ratio:.2f}")


@pytest.mark.real
def test_three_kills_leave_each_row_once_and_as_it_was(tmp_path, matrix, finished, with_dataset):
    passed, tries = 0, matrix.count(1, 20)
    for turn in range(tries):
        source = random.Random(turn)
        run = run_at(with_dataset, tmp_path / str(turn), training__save_steps=source.randint(1, 3))
        for after in sorted(source.sample(range(1, 11), 3)):
            process = forked.trainer(run, tmp_path / f"{turn}.log")
            while process.poll() is None and steps_made(run) < after:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        codes, _ = train(run)
        before = [line["time"] for line in read_lines(run / "metrics.jsonl")]
        passed += codes == [0] and ends_the_same(run, finished) and before == sorted(before)
    matrix.record(29, passed, tries, "step, epoch, loss, rate, norm and tokens of each row")
