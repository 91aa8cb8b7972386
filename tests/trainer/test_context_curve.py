"""The context curve: what is read, what is reported of it, and that looking changes nothing."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.checkpoints import make_tiny_checkpoint
from tests.stores import make_store
from training.curve import KINDS, context_lengths, curve_tokens, interval
from training.errors import StoppedByUser
from training.records import Quality, from_data, to_data
from training.rundir import RunDirectory
from training.settings import Config
from training.trainer import context_curve, phases
from training.trainer.evaluation import evaluate
from training.trainer.journal import Journal
from training.trainer.loading import load

CPU = torch.device("cpu")
TARGETS = (9, 14, 6)
ROOMS = {"composed": (150, 40, 120), "random": (150, 150, 150), "foreign": (0, 150, 150)}
PATHS = ("a.py", "b.py", "a.py")


class CurveOnly:
    """Three targets of two files; each kind has so many tokens of context as ROOMS says."""

    def __init__(self, ids, held_out=None):
        self.ids, self.held_out = np.asarray(ids, dtype=np.int64), held_out

    def __getattr__(self, name):
        return getattr(self.held_out, name)

    def curve(self):
        return {"kinds": list(KINDS), "items": len(TARGETS), "paths": list(PATHS), "targets": list(TARGETS),
                "foreign": "another library"}

    def window(self, split, index, *, context_limit=None):
        if split != "curve":
            return self.held_out.window(split, index)
        item, kind = divmod(index, len(KINDS))
        room = ROOMS[KINDS[kind]][item]
        room = room if context_limit is None else min(room, context_limit)
        first = 40 * item
        target = self.ids[first:first + 3 + TARGETS[item]]            # a header of 3 tokens
        context = self.ids[400 * (kind + 1):][:200][200 - room:] if room else self.ids[:0]
        ids = np.concatenate([context, target])
        labels = np.full(len(ids), -100)
        labels[room + 3:] = ids[room + 3:]
        return ids, labels

    def target_bytes(self, split, index):
        return (self.held_out.target_bytes(split, index) if split != "curve"
                else 4 * TARGETS[index // len(KINDS)])


def scored(ids, labels):
    """A loss that falls with the length of the window, per token of its target."""
    tokens = int((labels != -100).sum())
    return tokens * (2 + 30 / len(ids)), tokens


def ignore(*_):
    pass


def measured(curve, score=scored, tell=ignore):
    return context_curve.measure(CurveOnly(np.arange(2_000)), curve, score, 1, tell)


def test_each_kind_and_length_has_the_mean_loss_of_its_windows_a_target_token():
    found = measured(context_curve.whole([0, 1, 2], KINDS, 160))
    assert (found["items"], found["files"], found["target_tokens"]) == (3, 2, 29)
    assert found["foreign"] == "another library"
    rows = {(row["kind"], row["length"]): row for row in found["rows"]}
    assert list(rows) == [(kind, length) for kind in KINDS for length in (0, 64, 128, 160)]
    for (kind, length), row in rows.items():
        present = [min(room, length) for room in ROOMS[kind]]
        nats = [count * (2 + 30 / (room + 3 + count)) for room, count in zip(present, TARGETS, strict=True)]
        bare = [count * (2 + 30 / (3 + count)) for count in TARGETS]
        assert row["loss"] == pytest.approx(sum(nats) / 29)
        assert row["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / (4 * 29))
        assert row["change"] == pytest.approx((sum(nats) - sum(bare)) / 29, abs=1e-12)
        assert row["context_tokens"] == round(sum(present) / 3, 1)
        assert row["low"] <= row["change"] <= row["high"]


def test_no_text_is_read_twice():
    read = []

    def score(ids, labels):
        read.append(tuple(ids))
        return scored(ids, labels)

    told = []
    curve = context_curve.whole([0, 1, 2], KINDS, 160)
    measured(curve, score, told.append)
    assert len(read) == len(set(read))
    assert told == list(range(len(told)))
    assert len(read) < len(told) == curve.reads == 30


def test_a_length_without_more_context_has_no_row():
    rows = measured(context_curve.whole([1, 2], ("composed",), 4_096))["rows"]
    assert [row["length"] for row in rows] == [0, 64, 128]


def test_before_training_only_the_ends_are_read():
    told = []
    found = measured(context_curve.ends([0, 2], 160), tell=told.append)
    assert [(row["kind"], row["length"]) for row in found["rows"]] == [("composed", 0), ("composed", 160)]
    assert len(told) == 4
    assert (found["files"], found["rows"][0]["low"], found["rows"][0]["loss"]) == (1, None, pytest.approx(
        (9 * (2 + 30 / 12) + 6 * (2 + 30 / 9)) / 15))


def test_a_loss_that_is_not_finite_is_written_as_none(tmp_path):
    found = measured(context_curve.ends([0, 1], 160), lambda ids, labels: (math.nan, 3))
    assert {row["loss"] for row in found["rows"]} == {row["high"] for row in found["rows"]} == {None}
    json.dumps(found, allow_nan=False)


def test_nothing_is_measured_without_targets():
    assert measured(context_curve.whole([], KINDS, 160)) is None
    assert measured(context_curve.whole([0], KINDS, 160), lambda ids, labels: (0.0, 0)) is None


def test_the_interval_draws_whole_files():
    """Two files, drawn with replacement: their means are 1, 2 and 3 in a quarter, half and a quarter."""
    many = np.r_[np.full(50, 1.0), np.full(50, 3.0)]
    assert interval(many, np.ones(100), ["a"] * 50 + ["b"] * 50, 5) == (1.0, 3.0)
    low, high = interval(many, np.ones(100), [str(place) for place in range(100)], 5)
    assert 1.7 < low < 1.9 < 2.1 < high < 2.3
    assert interval(many, np.ones(100), ["a"] * 100, 5) is None
    assert interval(np.array([2.0, 30.0]), np.array([1.0, 10.0]), ["a", "b"], 5) == (2.0, 3.0)
    numbers = np.random.default_rng(1).normal(size=60)
    files = [str(place % 20) for place in range(60)]
    assert interval(numbers, np.ones(60), files, 5) == interval(numbers, np.ones(60), files, 5)
    low, high = interval(numbers, np.ones(60), files, 5)
    spread = numbers.reshape(3, 20).mean(axis=0).std(ddof=1) / math.sqrt(20)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("context_tokens", [1, 63, 64, 65, 100, 513, 4_096, 4_097, 65_537, 1 << 22])
def test_lengths_grow_from_nothing_to_the_whole_window(context_tokens):
    lengths = context_lengths(context_tokens)
    assert lengths[0] == 0
    assert lengths[-1] == min(context_tokens, 65_536)
    assert list(lengths) == sorted(set(lengths))
    assert len(lengths) <= 8


def test_no_more_tokens_are_read_than_the_cost_says():
    class Roomy(CurveOnly):
        def window(self, split, index, *, context_limit=None):
            context = min(160 - 80, 160 if context_limit is None else context_limit)
            return np.zeros(context + 80, dtype=np.int64), np.zeros(context + 80, dtype=np.int64)

    read = []
    for curve in (context_curve.ends([0, 1, 2], 160), context_curve.whole([0, 1, 2], KINDS, 160)):
        context_curve.measure(Roomy([0]), curve, lambda ids, labels: (1.0, read.append(len(ids)) or 1), 1,
                              ignore)
    assert 0.5 * curve_tokens(160, 3) < sum(read) <= curve_tokens(160, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    held_out = make_store(folder / "store", make_tiny_checkpoint(folder / "phi", "phi", context_tokens=256))
    ids = np.concatenate([held_out.window("train", index)[0] for index in range(12)] * 2)
    return CurveOnly(ids, held_out)


def settings(**more):
    return Config({"model.base": "embedded", "embedded.hidden": 64, "embedded.layers": 2, "embedded.mlp": 128,
                   "dataset.target_tokens": 32, "dataset.context_tokens": 160, "evaluation.windows": 2,
                   "evaluation.completions": 0, **more})


def test_an_evaluation_holds_the_curve_of_the_models_own_logits(store):
    model = load(settings(), store, CPU).model.eval()
    found = evaluate(model, store, settings(), CPU, ignore, curve="whole")["context_curve"]
    rows = {(row["kind"], row["length"]): row["loss"] for row in found["rows"]}
    for kind, length in (("composed", 0), ("random", 64), ("foreign", 160)):
        nats = 0.0
        for item in range(3):
            ids, labels = store.window("curve", 3 * item + KINDS.index(kind), context_limit=length)
            with torch.no_grad():
                chances = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
            nats -= sum(float(chances[place - 1, ids[place]]) for place in range(len(ids))
                        if labels[place] != -100)
        assert rows[kind, length] == pytest.approx(nats / sum(TARGETS), rel=1e-5)


def test_how_much_of_the_curve_is_read_is_asked_for(store):
    model = load(settings(), store, CPU).model
    kinds = {}
    for asked in ("", "ends", "whole"):
        curve = evaluate(model, store, settings(), CPU, ignore, curve=asked)["context_curve"]
        kinds[asked] = curve and [row["kind"] for row in curve["rows"]]
    assert kinds == {"": None, "ends": ["composed"] * 2, "whole": [kind for kind in KINDS for _ in range(4)]}
    none = evaluate(model, store, settings(**{"evaluation.context_targets": 0}), CPU, ignore, curve="whole")
    assert none["context_curve"] is None
    two = evaluate(model, store, settings(**{"evaluation.context_targets": 2}), CPU, ignore, curve="whole")
    assert two["context_curve"]["items"] == 2


def test_a_stop_within_the_curve_puts_everything_back(store):
    model = load(settings(), store, CPU).model.train()
    state = torch.get_rng_state()
    seen = []

    def stop(phase, done, total, detail):
        seen.append((done, total))
        if detail == "context curve" and done == 7:
            raise StoppedByUser("stopped")

    with pytest.raises(StoppedByUser):
        evaluate(model, store, settings(), CPU, stop, curve="whole")
    assert seen == [(done, 32) for done in range(8)]
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


def test_the_loss_function_of_training_reads_the_curve(store):
    model = load(settings(), store, CPU).model
    lengths = []

    def loss(model, ids, labels, mask, chunk):
        lengths.append(ids.shape[1])
        return torch.tensor(6.0), 3

    found = evaluate(model, store, settings(), CPU, ignore, loss, curve="ends")
    assert lengths[-6:] == [12, 162, 17, 57, 9, 129]
    assert [row["loss"] for row in found["context_curve"]["rows"]] == [2.0, 2.0]


def test_a_run_reads_the_ends_before_training_and_the_whole_curve_after_it(monkeypatch):
    asked = {}

    def evaluate_(model, store, config, device, progress, loss_function, curve):
        asked[model] = curve
        return {"loss": 1.0, "bits_per_byte": 1.0}

    monkeypatch.setattr(phases.evaluation, "evaluate", evaluate_)
    for phase in ("evaluate_before", "train", "evaluate_after"):
        engine = SimpleNamespace(share=lambda value: value, device=CPU, evaluates_together=False,
                                 captures_alone=False,
                                 on_model=lambda work, phase=phase: work(phase))
        journal = SimpleNamespace(evaluation_at=lambda step, weights: None, evaluation=ignore)
        training = SimpleNamespace(engine=engine, journal=journal, store=None, loss_function=None,
                                   identity={})
        heartbeat = SimpleNamespace(beat=ignore, progress=lambda phase, check: ignore)
        session = SimpleNamespace(training=training, heartbeat=heartbeat, config=None, rank=0,
                                  watch=SimpleNamespace(check=ignore))
        phases._evaluate(session, None, 3, phase)
    assert asked == {"evaluate_before": "ends", "train": "", "evaluate_after": "whole"}


def test_the_curve_goes_through_the_journal_and_the_record(tmp_path):
    curve = measured(context_curve.whole([0, 1, 2], KINDS, 160))

    run = RunDirectory(tmp_path)
    Journal(run).evaluation({"step": 3, "context_curve": curve})
    assert Journal(run).evaluation_at(3)["context_curve"] == curve
    quality = Quality(loss=1.0, bits_per_byte=1.0, context_curve=curve)
    assert from_data(Quality, json.loads(json.dumps(to_data(quality)))) == quality
    assert from_data(Quality, {"loss": 1.0, "bits_per_byte": 1.0}).context_curve is None
