"""One rank of DeepSpeed without a dataset: updates with and without a discarded one; argv is a folder."""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from trainer_fakes import TinyModel, config_of  # noqa: E402

from training.configuration import deepspeed_config  # noqa: E402
from training.model_trainer_unified import leave  # noqa: E402
from training.trainer.zero import ZeroEngine, start_processes  # noqa: E402

CASES = {f"stage {stage}{', offloaded' * offload}{', ' * bool(dtype)}{dtype}": (stage, offload, dtype)
         for stage, offload, dtype in [(1, False, ""), (1, True, ""), (2, False, ""), (2, True, ""),
                                       (3, False, ""), (3, True, ""), (1, False, "bfloat16"),
                                       (2, True, "bfloat16"), (3, True, "bfloat16")]}


class Adapted(TinyModel):
    """Two parameters with the names that LoRA+ looks for."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.lora_A = torch.nn.Linear(15, 4, bias=False)
        self.lora_B = torch.nn.Linear(4, 15, bias=False)

    def forward(self, ids):
        states = self.embed(ids)
        states = self.mix(states + self.lora_B(self.lora_A(states)))
        return self.head(self.norm(torch.nn.functional.gelu(states)))


def engine_of(path, stage, offload, dtype):
    config = config_of(deepspeed__stage=stage, deepspeed__offload_optimizer=offload, training__micro_batch=1,
                       training__accumulation=3, training__clip_norm=0.5, lora__enabled=True,
                       lora__plus_ratio=8.0, training__weight_decay=0.0, model__dtype=dtype or "float32")
    ds_config = path / f"ds_config-{torch.distributed.get_rank()}.json"
    ds_config.write_text(json.dumps(deepspeed_config(config)))
    model = Adapted()
    if dtype:
        model = model.to(torch.bfloat16)
    return ZeroEngine(model, dict(model.named_parameters()), config, torch.device("cpu"), ds_config,
                      lambda detail: None)


def update(engine, seed, factor=1.0):
    """Three micro-batches, the way the loop gives them."""
    for index in range(3):
        ids = torch.randint(37, (1, 9), generator=torch.Generator().manual_seed(100 * seed + index))
        loss = engine.loss(lambda model, ids: model(ids).float().square().mean() * factor, ids)
        engine.backward(loss, last=index == 2)


def course(path, case, discarding):
    """Norms, captured state and how far A and B moved in the first update."""
    engine = engine_of(path, *case)
    before, found = engine.capture().weights, {"norms": []}
    update(engine, 0)
    found["norms"].append(engine.step(1e-3))
    found["moved"] = {name: float((value - before[name]).abs().max())
                      for name, value in engine.capture().weights.items() if "lora" in name}
    scale = float(engine._zero.loss_scale)
    for seed, factor in ((7, 1e3), (8, float("nan"))) if discarding else ():
        update(engine, seed, factor)
        engine.discard()
        found["freed"] = not any(kept is not None for kept in engine._zero.averaged_gradients.values())
    found["scale kept"] = float(engine._zero.loss_scale) == scale
    for seed in (1, 2):
        update(engine, seed)
        found["norms"].append(engine.step(1e-3))
    return found, engine.capture()


def main(path):
    """Every case twice; what was the same is written to outcome.json."""
    path = Path(path)
    torch.set_num_threads(1)
    start_processes(torch.device("cpu"), lambda detail: None)
    outcome = {}
    for name, case in CASES.items():
        (plain, there), (found, here) = course(path, case, False), course(path, case, True)
        same = all(torch.equal(there.weights[key], here.weights[key]) for key in there.weights) and all(
            torch.equal(there.optimizer[key], here.optimizer[key]) for key in there.optimizer)
        outcome[name] = found | {"norms": [plain["norms"], found["norms"]], "same": same,
                                 "tensors": len(there.optimizer)}
    if torch.distributed.get_rank() == 0:
        (path / "outcome.json").write_text(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
