"""Trainings over DistributedDataParallel on the fake dataset, one after the other; argv is JSON."""

import json
import logging
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]
import forked  # noqa: E402
from trainer_fakes import FakeStore, TinyModel, config_of, tiny_loss, training_of  # noqa: E402

from training.errors import EliteError, StoppedByUser  # noqa: E402
from training.trainer import checkpoints  # noqa: E402
from training.trainer.parallel import DistributedEngine  # noqa: E402
from training.trainer.processes import join  # noqa: E402


class WideModel(TinyModel):
    """With a matrix that is worth compressing, and an expert that only some windows reach."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.wide = nn.Linear(33, 400, bias=False)
        self.back = nn.Linear(400, 33, bias=False)
        self.expert = nn.Linear(33, 33)

    def forward(self, ids):
        hidden = self.norm(self.mix(self.embed(ids)))
        hidden = hidden + self.back(torch.tanh(self.wide(hidden)))
        if ids.shape[1] % 2:  # the fake windows differ in length, so ranks differ here
            hidden = hidden + self.expert(hidden)
        return self.head(hidden)


@contextmanager
def counting_sent():
    """By update: float32 numbers that go to all_reduce in Python, hence from PowerSGD's hook."""
    exchange, sent = torch.distributed.all_reduce, []

    def counted(tensor, *args, **kwargs):
        if tensor.dtype == torch.float32:
            sent[-1] += tensor.numel()
        return exchange(tensor, *args, **kwargs)
    torch.distributed.all_reduce = counted
    try:
        yield sent
    finally:
        torch.distributed.all_reduce = exchange


@contextmanager
def telling(path):
    """What is logged goes to a file."""
    handler, root = logging.FileHandler(path), logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)


def poisoned_loss(bad_call):
    """Not finite at one call on rank 0 only: every rank must skip that update."""
    calls = []

    def loss(model, ids, labels, mask, chunk, *rest):
        calls.append(1)
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        bad = len(calls) == bad_call and torch.distributed.get_rank() == 0
        return summed * float("nan") if bad else summed, tokens
    return loss


def refusals(engine):
    """What each rank gets when the work on rank 0 is refused."""
    def refuse(*_):
        raise StoppedByUser("enough")
    found = []
    for call in (lambda: engine.on_model(refuse), lambda: engine.with_whole_weights(refuse, False)):
        try:
            call()
        except EliteError as error:
            found.append([type(error).__name__, str(error)])
    return found


def train(path, max_steps=0, bad_call=0, wide=False, discard_at=0, settings=None):
    """Train to the end or to `max_steps`, and write what came out on each rank."""
    path.mkdir(exist_ok=True)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = config_of(**{"training__micro_batch": 1, "training__accumulation": 4 // ranks,
                          "device__count": ranks, "training__clip_norm": 0.5, **(settings or {})})
    model = WideModel() if wide else TinyModel(dropout=0.0)
    trainable = dict(model.named_parameters())
    newest, _ = checkpoints.newest_valid(path)
    torch.distributed.barrier()  # before one rank saves the next
    if newest:
        checkpoints.put_weights(checkpoints.load(newest)[0].weights, trainable)
    engine = DistributedEngine(model, trainable, config, torch.device("cpu"))
    with telling(path / f"log-{rank}"), counting_sent() as sent:
        training = training_of(path, config, FakeStore(11), model, engine, poisoned_loss(bad_call))
        while training.progress.step < (max_steps or training.steps):
            sent.append(0)
            if training.progress.step + 1 == discard_at:
                engine.step, step = (lambda rate: engine.discard()), engine.step
                training._train_one()
                engine.step = step
            else:
                training._train_one()
    training.save()
    value = engine.on_model(lambda inner: float(inner(torch.arange(6)[None]).sum()))
    outcome = {"value": value, "sent": sent, "skipped": training.progress.skipped,
               "refusals": refusals(engine), "summed": engine.total(engine.rank + 1.0),
               "weights": {name: p.detach().flatten().tolist() for name, p in trainable.items()}}
    (path / f"outcome-{engine.rank}.json").write_text(json.dumps(outcome))
    torch.distributed.barrier()
    return engine


def train_all(jobs):
    torch.set_num_threads(1)
    join(torch.device("cpu"))
    for job in jobs:
        last = train(Path(job.pop("path")), **job)
    last.close()


if __name__ == "__main__":
    for number, listed in json.loads(sys.argv[1]):
        forked.run(number, train_all, listed)
