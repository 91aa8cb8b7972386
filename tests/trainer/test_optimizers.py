import copy
import logging

import pytest
import torch
from torch import nn
from trainer_fakes import TinyModel, config_of, same

from training.trainer import optimizers
from training.trainer.engine import PlainEngine
from training.trainer.muon import Muon


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


def adapted():
    """Adapters on two linear layers, made by PEFT, and their parameters by name."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TinyModel(dropout=0.0), LoraConfig(r=4, target_modules=["mix", "head"]))
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def rates(optimizer, trainable):
    names = {id(parameter): name for name, parameter in trainable.items()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_lora_plus_gives_the_rates_of_pefts_own_optimizer():
    from peft.optimizers import create_loraplus_optimizer

    model, trainable = adapted()
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    ours = optimizers.build(trainable, config_of(lora__enabled=True, lora__plus_ratio=16.0))
    optimizers.set_rate(ours, 1e-3)
    assert rates(ours, trainable) == rates(theirs, trainable)
    assert sorted(set(rates(ours, trainable).values())) == [1e-3, 16e-3]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_b_of_an_adapter_moves_by_its_share_of_the_rate(name):
    model, trainable = adapted()
    config = config_of(lora__enabled=True, lora__plus_ratio=8.0, training__weight_decay=0.0,
                       optimizer__name=name)
    engine = PlainEngine(model, trainable, config, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.normal_()  # B is zero at first, and then A has no gradient
    before = {key: parameter.detach().clone() for key, parameter in trainable.items()}
    engine.backward(model(torch.arange(6)[None]).square().sum(), last=True)
    engine.step(1e-3)
    for key, parameter in trainable.items():  # Adam's first update of each element is the rate
        moved = float((parameter.detach() - before[key]).abs().max())
        assert moved == pytest.approx(8e-3 if "lora_B" in key else 1e-3, rel=1e-3), key


def test_the_b_of_an_embeddings_adapter_and_of_dora_have_their_groups():
    weights = {name: nn.Parameter(torch.zeros(shape)) for name, shape in {
        "embed.lora_embedding_A.default": (2, 3), "embed.lora_embedding_B.default": (3, 2),
        "layers.0.q.lora_A.default.weight": (2, 3), "layers.0.q.lora_B.default.weight": (3, 2),
        "layers.0.q.lora_B.default.bias": (3,),
        "layers.0.q.lora_magnitude_vector.default.weight": (3,)}.items()}
    names = {id(parameter): name for name, parameter in weights.items()}
    found = [(group.get("rate_share", 1.0), group["weight_decay"], [names[id(p)] for p in group["params"]])
             for group in optimizers.groups(weights, 0.1, plus_ratio=4.0)]
    assert found == [
        (1.0, 0.1, ["embed.lora_embedding_A.default", "layers.0.q.lora_A.default.weight"]),
        (4.0, 0.1, ["embed.lora_embedding_B.default", "layers.0.q.lora_B.default.weight"]),
        (1.0, 0.0, ["layers.0.q.lora_magnitude_vector.default.weight"]),
        (4.0, 0.0, ["layers.0.q.lora_B.default.bias"])]


def test_muon_orthogonalizes_the_matrices_of_decoder_layers_only():
    weights = {name: nn.Parameter(torch.zeros(shape)) for name, shape in {
        "model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4), "model.norm.weight": (4,),
        "model.layers.0.mlp.up_proj.weight": (8, 4), "model.layers.0.mlp.up_proj.bias": (8,),
        "model.layers.0.experts.up_proj": (2, 8, 4),
        "model.layers.0.q_proj.lora_A.default.weight": (2, 4)}.items()}
    optimizer = optimizers.build(weights, config_of(optimizer__name="muon"))
    names = {id(parameter): name for name, parameter in weights.items()}
    orthogonal = {names[id(p)] for group in optimizer.param_groups if group["orthogonal"]
                  for p in group["params"]}
    assert type(optimizer) is Muon
    assert orthogonal == {"model.layers.0.mlp.up_proj.weight"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights)


def test_muon_without_a_matrix_of_its_own_says_so(caplog):
    optimizers.build(adapted()[1], config_of(lora__enabled=True, optimizer__name="muon"))
    assert "muon makes AdamW's updates here: no matrix of a decoder layer is trained" in caplog.text


def test_groups_without_any_option_have_no_key_that_an_optimizer_does_not_know():
    assert [group.keys() - {"params", "weight_decay"} for group in
            optimizers.groups(named(TinyModel()), 0.25)] == [set(), set()]


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


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "muon"])
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
    assert (tensors["state1/weight"].dtype, tensors["state2/weight"].dtype) == (torch.uint8, torch.uint8)
    assert tensors["state1/bias"].dtype == torch.float32  # 96 elements: too few for blocks of 8 bits


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
