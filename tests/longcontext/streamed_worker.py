"""One rank of a DeepSpeed training through the streamed step, on the fake dataset; argv is JSON."""

import copy
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "trainer")]
from trainer_fakes import VOCAB, FakeStore, config_of, training_of  # noqa: E402

from training.configuration import deepspeed_config  # noqa: E402
from training.model_trainer_unified import leave  # noqa: E402
from training.trainer.loss import causal_loss  # noqa: E402

LAYERS = 3
WINDOW = torch.arange(11)[None] * 5 % VOCAB


def tiny_qwen(tied=False):
    """A Qwen2 of three layers; biases and norms away from their first values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=36, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
            tie_word_embeddings=tied))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def settings(stage=0, ranks=1, offload=False, keep_every=1):
    """Four micro-batches an update on any number of ranks; the last update of an epoch has three."""
    return config_of(deepspeed__stage=stage, deepspeed__offload_optimizer=offload, training__micro_batch=1,
                     training__accumulation=4 // ranks, device__count=ranks, training__clip_norm=0.5,
                     training__epochs=2, stream__chunk_tokens=3, stream__page_tokens=2,
                     stream__keep_every=keep_every, training__loss_chunk_tokens=2)


def counted(model, where):
    """Count how often a gradient reaches each parameter."""
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: where.__setitem__(name, where.get(name, 0) + 1))


def count_gathers(where):
    """Count what is made whole, and DeepSpeed's all-gathers, of whatever part of it."""
    import deepspeed

    enter = deepspeed.zero.GatheredParameters.__enter__

    def entering(self):
        where["whole"].append(sorted(p.ds_id for p in self.params))
        return enter(self)
    deepspeed.zero.GatheredParameters.__enter__ = entering
    backend = type(deepspeed.comm.comm.cdb)
    exchange = backend.all_gather_into_tensor

    def exchanging(self, *args, **kwargs):
        where["exchanges"] += 1
        return exchange(self, *args, **kwargs)
    backend.all_gather_into_tensor = exchanging


def main(path, stage, ranks, offload=False, tied=False, persist=None, keep_every=1):
    """Train to the end, and write curve, sums of weights, and counts."""
    from training.trainer.streaming import StreamedLoss
    from training.trainer.zero import ZeroEngine, start_processes

    path = Path(path)
    torch.set_num_threads(1)
    start_processes(torch.device("cpu"), lambda detail: None)
    config = settings(stage, ranks, offload, keep_every)
    content = deepspeed_config(config)
    if persist is not None:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = persist
    ds_config = path / f"ds_config-{torch.distributed.get_rank()}.json"
    ds_config.write_text(json.dumps(content))
    model = tiny_qwen(tied)
    trainable = dict(model.named_parameters())
    hooks, gathers = {}, {"whole": [], "exchanges": 0}
    counted(model, hooks)
    engine = ZeroEngine(model, trainable, config, torch.device("cpu"), ds_config, lambda detail: None)
    loss = StreamedLoss(model, config, path, engine.device, engine.streamed(), engine.aside)
    training = training_of(path, config, FakeStore(11), model, engine, loss)
    count_gathers(gathers)
    engine.on_model(lambda inner: float(loss(inner, WINDOW, WINDOW, None, 0)[0]))
    outcome = {"evaluated": copy.deepcopy(gathers)}
    gathers.update(whole=[], exchanges=0)
    training._train_one()
    first = copy.deepcopy(gathers)
    training.train()
    outcome |= {"hooks": hooks, "gathers": first, "layers": [
        sorted({p.ds_id for p in layer.parameters()}) if stage == 3 else [] for layer in model.model.layers]}
    inside = {p for layer in model.model.layers for p in layer.parameters()}
    outcome["outside"] = sorted(p.ds_id for p in model.parameters() if p not in inside) if stage == 3 else []
    outcome["held_out"] = engine.on_model(lambda inner: held_out(inner, loss))
    outcome["sums"] = engine.with_whole_weights(
        lambda: {name: float(p.detach().sum()) for name, p in trainable.items()}, everything=True)
    if engine.rank == 0:
        (path / "outcome.json").write_text(json.dumps(outcome))
    engine.close()


def held_out(model, loss):
    """The loss of a window through the streamed step and as the plain one."""
    streamed = float(loss(model, WINDOW, WINDOW, None, 0)[0])
    with loss.aside():
        plain = float(causal_loss(model, WINDOW, WINDOW, None, 4)[0])
    return [streamed, plain, float(loss(model, WINDOW, WINDOW, None, 0)[0])]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    leave(0)
