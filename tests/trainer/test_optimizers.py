import copy
import logging

import pytest
import torch
from torch import nn
from trainer_fakes import TinyModel, config_of, same

from training.trainer import optimizers


def named(model):
    return dict(model.named_parameters())


def one_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(named(model).items()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_only_matrices_decay():
    model = TinyModel()
    decayed, rest = optimizers.groups(named(model), 0.25)
    names = {id(parameter): name for name, parameter in named(model).items()}
    assert {names[id(p)] for p in decayed["params"]} == {"embed.weight", "mix.weight", "head.weight"}
    assert {names[id(p)] for p in rest["params"]} == {"mix.bias", "norm.weight", "norm.bias"}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)


def test_lora_matrices_alone_make_one_group():
    model = nn.Linear(4, 4, bias=False)
    assert len(optimizers.groups(named(model), 0.1)) == 1


def test_a_zero3_parameter_counts_by_its_whole_shape():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size([4, 4])
    assert optimizers.dimensions(parameter) == 2


def test_adamw_takes_its_settings_and_is_fused():
    config = config_of(optimizer__beta1=0.8, optimizer__beta2=0.9, optimizer__eps=1e-6,
                       training__learning_rate=0.02)
    optimizer = optimizers.build(named(TinyModel()), config)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.02, (0.8, 0.9), 1e-6, True)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name):
    config = config_of(optimizer__name=name)
    wide = nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96))  # above 4,096 elements, so in 8 bits
    optimizer = optimizers.build(named(wide), config)
    for seed in range(3):
        one_step(wide, optimizer, seed)
    again = copy.deepcopy(wide)
    tensors, numbers = optimizers.state_of(optimizer, named(wide))
    restored = optimizers.build(named(again), config)
    optimizers.restore(restored, named(again), tensors, numbers)
    one_step(wide, optimizer, 3)
    one_step(again, restored, 3)
    assert same(dict(wide.state_dict()), dict(again.state_dict()))


def test_eight_bit_state_is_eight_bit():
    wide = nn.Linear(96, 96)
    optimizer = optimizers.build(named(wide), config_of(optimizer__name="adamw_8bit"))
    one_step(wide, optimizer, 0)
    tensors, _ = optimizers.state_of(optimizer, named(wide))
    assert tensors["state1/weight"].dtype == torch.uint8


def test_paging_on_the_cpu_falls_back_with_a_reason(caplog):
    caplog.set_level(logging.INFO)
    optimizer = optimizers.build(named(TinyModel()), config_of(optimizer__name="paged_adamw_8bit"))
    assert type(optimizer).__name__ == "AdamW8bit"
    assert "paging needs a GPU; adamw_8bit makes the same updates" in caplog.text


def test_where_deepspeeds_adam_does_not_build_torchs_is_used_and_the_reason_is_told(caplog, monkeypatch):
    import deepspeed.ops.adam

    def refuse(*arguments, **options):
        raise RuntimeError("Unable to JIT load") from OSError("no compiler named c++")

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", refuse)
    optimizer = optimizers.build_offloaded(named(TinyModel()), config_of())
    assert type(optimizer) is torch.optim.AdamW
    assert "no compiler named c++" in caplog.text


def test_the_rate_is_set_in_every_group():
    optimizer = optimizers.build(named(TinyModel()), config_of())
    optimizers.set_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
