"""One rank of a DeepSpeed training on the fake dataset; argv is one JSON object (see `main`)."""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from trainer_fakes import FakeStore, TinyModel, config_of, tiny_loss, training_of  # noqa: E402

from training.configuration import deepspeed_config  # noqa: E402
from training.errors import EliteError  # noqa: E402
from training.model_trainer_unified import leave  # noqa: E402
from training.trainer import checkpoints, optimizers  # noqa: E402
from training.trainer.zero import ZeroEngine, start_processes  # noqa: E402


def poisoned_loss(bad_call):
    """Not finite at one call on rank 0 only: every rank must skip that update."""
    calls = []

    def loss(model, ids, labels, mask, chunk):
        calls.append(1)
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        bad = len(calls) == bad_call and torch.distributed.get_rank() == 0
        return summed * float("nan") if bad else summed, tokens
    return loss


class NativeEngine(ZeroEngine):
    """Takes DeepSpeed's CPU Adam, as beside a GPU."""

    def _optimizer(self, config, tell):
        built = optimizers.build_offloaded(self._trainable, config)
        assert type(built).__name__ == "DeepSpeedCPUAdam"
        return built


def main(path, stage, ranks, offload=False, max_steps=0, bad_call=0, native=False):
    """Train to the end or to `max_steps`, and write what came out."""
    path = Path(path)
    torch.set_num_threads(1)
    start_processes(torch.device("cpu"), lambda detail: None)
    config = config_of(deepspeed__stage=stage, deepspeed__offload_optimizer=offload, training__micro_batch=1,
                       training__accumulation=4 // ranks, device__count=ranks, training__clip_norm=0.5)
    ds_config = path / f"ds_config-{torch.distributed.get_rank()}.json"
    ds_config.write_text(json.dumps(deepspeed_config(config)))
    model = TinyModel(dropout=0.0)
    newest, _ = checkpoints.newest_valid(path)
    if newest:
        checkpoints.put_weights(checkpoints.load(newest)[0].weights, dict(model.named_parameters()))
    engine = (NativeEngine if native else ZeroEngine)(
        model, dict(model.named_parameters()), config, torch.device("cpu"), ds_config, lambda detail: None)
    training = training_of(path, config, FakeStore(11), model, engine, poisoned_loss(bad_call))
    try:
        finish(training, max_steps)
    except EliteError as error:
        outcome = {"error": str(error)}
    else:
        value = engine.on_model(lambda inner: float(inner(torch.arange(6)[None]).sum()))
        sums = engine.with_whole_weights(
            lambda: {name: float(p.detach().sum()) for name, p in model.named_parameters()}, everything=True)
        outcome = {"value": value, "sums": sums, "skipped": training.progress.skipped}
    if engine.rank == 0:
        (path / "outcome.json").write_text(json.dumps(outcome))
    engine.close()


def finish(training, max_steps):
    """Go on to the end, or to `max_steps` and a checkpoint there."""
    while max_steps and training.progress.step < max_steps:
        training._train_one()
    if max_steps:
        training.save()
    else:
        training.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    leave(0)
