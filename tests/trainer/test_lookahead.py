import copy

import pytest
import torch
from torch import nn
from trainer_fakes import TinyModel, config_of, same, training_of, weights_of

from training.trainer import checkpoints, optimizers
from training.trainer.engine import PlainEngine
from training.trainer.lookahead import Lookahead
from training.trainer.muon import Muon


class Layered(nn.Module):
    """A matrix above 4,096 elements in a numbered layer, so that 8 bits and Muon both have their kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 72)
        self.layers = nn.ModuleList([nn.Linear(72, 72), nn.LayerNorm(72)])


def named(model):
    return dict(model.named_parameters())


def one_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(named(model).items()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


INNER = {"adamw": "AdamW", "adamw_8bit": "AdamW8bit", "muon": "Muon"}


@pytest.mark.parametrize("name", INNER)
def test_the_slow_weights_follow_the_papers_formula_every_third_update(name):
    looking, plain = Layered(), Layered()
    config = {"optimizer__name": name, "optimizer__lookahead_share": 0.3}
    ahead = optimizers.build(named(looking), config_of(optimizer__lookahead_steps=3, **config))
    fast = optimizers.build(named(plain), config_of(**config))
    assert type(ahead) is Lookahead
    assert {type(ahead.inner).__name__, type(fast).__name__} == {INNER[name]}
    slow = copy.deepcopy(dict(plain.state_dict()))
    for step in range(1, 8):
        one_step(looking, ahead, step)
        one_step(plain, fast, step)
        if step % 3 == 0:
            with torch.no_grad():
                for key, parameter in named(plain).items():
                    slow[key] = slow[key] + 0.3 * (parameter - slow[key])
                    parameter.copy_(slow[key])
        for key, parameter in named(plain).items():
            torch.testing.assert_close(named(looking)[key], parameter, rtol=1e-5, atol=1e-6)


def test_no_share_keeps_the_first_weights_and_a_whole_share_is_the_inner_optimizer():
    ends = {}
    for share in (0.0, 1.0):
        model = Layered()
        optimizer = optimizers.build(named(model), config_of(optimizer__lookahead_steps=2,
                                                             optimizer__lookahead_share=share))
        for seed in range(4):
            one_step(model, optimizer, seed)
        ends[share] = dict(model.state_dict())
    plain = Layered()
    inner = optimizers.build(named(plain), config_of())
    for seed in range(4):
        one_step(plain, inner, seed)
    assert same(ends[0.0], dict(Layered().state_dict()))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ends[1.0][key], value, rtol=1e-6, atol=1e-7)


def test_a_rate_that_is_set_reaches_the_inner_optimizer():
    optimizer = optimizers.build(named(Layered()), config_of(optimizer__lookahead_steps=2))
    optimizers.set_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.inner.param_groups} == {0.125}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("taken", [2, 4])
def test_a_restored_optimizer_goes_on_bit_for_bit_between_two_moves(name, taken):
    config = config_of(optimizer__name=name, optimizer__lookahead_steps=3)
    model = Layered()
    optimizer = optimizers.build(named(model), config)
    for seed in range(taken):
        one_step(model, optimizer, seed)
    tensors, numbers = optimizers.state_of(optimizer, named(model))
    assert {name for name in tensors if name.startswith("slow/")} == {f"slow/{key}" for key in named(model)}
    assert numbers["lookahead/updates"] == taken
    again = copy.deepcopy(model)
    restored = optimizers.build(named(again), config)
    optimizers.restore(restored, named(again), tensors, numbers)
    for seed in range(taken, taken + 4):
        one_step(model, optimizer, seed)
        one_step(again, restored, seed)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_going_back_to_a_state_before_the_first_update_forgets_the_slow_weights():
    model = Layered()
    optimizer = optimizers.build(named(model), config_of(optimizer__lookahead_steps=2))
    before = optimizers.state_of(optimizer, named(model))
    one_step(model, optimizer, 0)
    optimizers.restore(optimizer, named(model), *before)
    assert optimizer.updates == 0
    assert not optimizer.state
    assert not optimizer.inner.state


def test_a_skipped_float16_update_is_not_counted():
    model = TinyModel()
    config = config_of(model__dtype="float16", optimizer__lookahead_steps=2)
    engine = PlainEngine(model, named(model), config, torch.device("cpu"))
    for factor in (1.0, float("inf"), 1.0):
        engine.backward(model(torch.arange(6)[None]).square().mean() * factor, last=True)
        assert (engine.step(1e-3) is None) == (factor != 1.0)
    assert engine._optimizer.updates == 2


@pytest.mark.parametrize("name", INNER)
def test_a_stopped_run_ends_in_the_weights_of_an_uninterrupted_one(tmp_path, name):
    settings = {"optimizer__name": name, "optimizer__lookahead_steps": 4, "training__save_steps": 3}
    whole = training_of(tmp_path / "whole", config_of(**settings))
    whole.train()
    first = training_of(tmp_path / "halves", config_of(**settings))
    for _ in range(3):
        first._train_one()
    first.save()
    path, _ = checkpoints.newest_valid(tmp_path / "halves")
    captured, _ = checkpoints.load(path)
    assert captured.numbers["lookahead/updates"] == 3
    assert not torch.equal(captured.optimizer["slow/head.weight"], captured.weights["head.weight"])
    again = training_of(tmp_path / "halves", config_of(**settings))
    again.train()
    assert same(weights_of(whole), weights_of(again))


def test_muon_alone_is_no_lookahead():
    assert type(optimizers.build(named(Layered()), config_of(optimizer__name="muon"))) is Muon
