"""A dataset in memory, a model of a few thousand parameters, and a training made of them."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.rundir import RunDirectory
from training.settings import Config
from training.trainer import checkpoints, identities
from training.trainer.engine import PlainEngine
from training.trainer.journal import Heartbeat, Journal
from training.trainer.loop import Progress, Training
from training.trainer.stopping import Watch

VOCAB = 37


class FakeStore:
    """Windows of 5 to 16 tokens of a learnable sequence; a third of each window's labels is trained on."""

    pad_id = 0
    vocab_tokens = VOCAB

    def __init__(self, windows=10, digest="d" * 64):
        self.digest = digest
        self._windows = []
        source = np.random.default_rng(7)
        for _ in range(windows):
            length = int(source.integers(5, 17))
            ids = (np.arange(length) * 3 + int(source.integers(VOCAB))) % VOCAB
            labels = np.where(np.arange(length) >= length // 3, ids, -100)
            self._windows.append((ids.astype(np.int64), labels.astype(np.int64)))

    def count(self, split):
        return len(self._windows)

    def window(self, split, index, seed=0, epoch=0, context_limit=None):
        return self._windows[index]

    def order(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(len(self._windows))

    def written_to(self):
        return ""


class TinyModel(nn.Module):
    """Next-token prediction with dropout, so that a wrong generator state shows."""

    def __init__(self, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 15)
        self.mix = nn.Linear(15, 33)
        self.norm = nn.LayerNorm(33)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(33, VOCAB, bias=False)

    def forward(self, ids):
        return self.head(self.drop(self.norm(F.gelu(self.mix(self.embed(ids))))))


def tiny_loss(model, ids, labels, mask, chunk):
    logits = model(ids)[:, :-1].reshape(-1, VOCAB)
    expected = labels[:, 1:].reshape(-1)
    summed = F.cross_entropy(logits, expected, ignore_index=-100, reduction="sum")
    return summed, int((expected != -100).sum())


BASE = {"training.micro_batch": 2, "training.accumulation": 2, "training.epochs": 3,
        "training.learning_rate": 1e-2, "training.save_steps": 0, "dataset.context_tokens": 16,
        "dataset.target_tokens": 16, "device.threads": 1}


def config_of(**settings):
    return Config(BASE | {name.replace("__", "."): value for name, value in settings.items()})


def training_of(path: Path, config=None, store=None, model=None, engine=None, loss=tiny_loss):
    """A plain-engine training that goes on from the newest checkpoint in `path`, as a session would."""
    path.mkdir(exist_ok=True)
    run, config, store = RunDirectory(path), config or config_of(), store or FakeStore()
    model = model or TinyModel()
    trainable = dict(model.named_parameters())
    identity = identities.identity(config, store.digest)
    checkpoint, _ = checkpoints.newest_valid(path)
    progress = Progress()
    captured = None
    if checkpoint:
        identities.refuse_changes(checkpoints.read_identity(checkpoint), identity, checkpoint.name)
        captured, state = checkpoints.load(checkpoint)
        progress = Progress.of(state, checkpoint.name)
        if engine is None:  # who brings an engine has loaded the weights before making it
            checkpoints.put_weights(captured.weights, trainable)
    engine = engine or PlainEngine(model, trainable, config, torch.device("cpu"))
    if captured:
        engine.restore(captured)
    journal = Journal(run)
    journal.rewind(progress.step, identities.digest_of(identity))
    return Training(run=run, config=config, store=store, engine=engine, loss_function=loss,
                    heartbeat=Heartbeat(run),
                    journal=journal, watch=Watch(run.stop), identity=identity, session_start=time.monotonic(),
                    progress=progress)


def weights_of(training):
    return training.engine.capture().weights


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
