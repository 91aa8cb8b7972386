"""One rank of a training whose loss spikes on rank 1 alone; argv is one JSON object (see `main`)."""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from trainer_fakes import FakeStore, TinyModel, config_of, tiny_loss, training_of  # noqa: E402

from training.configuration import deepspeed_config  # noqa: E402
from training.model_trainer_unified import leave  # noqa: E402
from training.trainer import checkpoints  # noqa: E402

BAD_PLACES = (22, 23, 31)


def engine_of(model, config, path, stage):
    """The plain engine over ranks, or DeepSpeed's."""
    trainable, device = dict(model.named_parameters()), torch.device("cpu")
    if not stage:
        from training.trainer.parallel import DistributedEngine
        from training.trainer.processes import join

        join(device)
        return DistributedEngine(model, trainable, config, device)
    from training.trainer.zero import ZeroEngine, start_processes

    start_processes(device, lambda detail: None)
    ds_config = path / f"ds_config-{torch.distributed.get_rank()}.json"
    ds_config.write_text(json.dumps(deepspeed_config(config)))
    return ZeroEngine(model, trainable, config, device, ds_config, lambda detail: None)


def main(path, ranks, stage):
    """Train to the end and write what the rank went through."""
    path = Path(path)
    torch.set_num_threads(1)
    config = config_of(deepspeed__stage=stage, training__micro_batch=1, training__accumulation=4 // ranks,
                       device__count=ranks, training__epochs=12, training__spike_window=8,
                       training__save_steps=5)
    model = TinyModel(dropout=0.0)
    engine = engine_of(model, config, path, stage)
    training = training_of(path, config, FakeStore(10), model, engine)

    def loss(model, ids, labels, mask, chunk):
        summed, tokens = tiny_loss(model, ids, labels, mask, chunk)
        bad = training.progress.place in BAD_PLACES and engine.rank == 1
        return (summed * 60 if bad else summed), tokens

    training.loss_function = loss
    trainable = dict(model.named_parameters())
    training.put_back = lambda captured: checkpoints.put_back(captured, trainable, engine)
    training.train()
    progress = training.progress
    outcome = {"spikes": progress.spikes, "rollbacks": progress.rollbacks,
               "passed_over": progress.passed_over, "losses": progress.losses}
    (path / f"outcome-{engine.rank}.json").write_text(json.dumps(outcome))
    engine.close()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    leave(0)
