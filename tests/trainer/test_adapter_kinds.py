"""rsLoRA and DoRA: the scale, the magnitudes, what is written and loaded, NF4, and the streamed step."""

import json
import math

import pytest
import torch
from checkpoints import make_tiny_checkpoint
from safetensors.torch import load_file
from stores import make_store

from training.longcontext.verification import verify
from training.settings import Config
from training.trainer import checkpoints
from training.trainer.engine import PlainEngine
from training.trainer.export import export
from training.trainer.loading import load
from training.trainer.loss import causal_lm, causal_loss, held_still
from training.trainer.streaming import policy_of

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "qwen2", "qwen2", context_tokens=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory, base):
    return make_store(tmp_path_factory.mktemp("store"), base)


def settings(base, **more):
    return Config({"model.base": str(base), "lora.enabled": True, "lora.targets": TARGETS, "lora.rank": 4,
                   "lora.alpha": 6, "dataset.context_tokens": 96, "dataset.target_tokens": 32,
                   "training.checkpointing": False}
                  | {name.replace("__", "."): value for name, value in more.items()})


def moved(loaded):
    """Stand-in for training: every trainable weight changed."""
    torch.manual_seed(3)
    for parameter in loaded.trainable.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return loaded


def answers(model):
    with held_still(model):
        return model(IDS).logits.float()


def layer_of(model):
    return causal_lm(model).model.layers[1].mlp.down_proj


def passed_through(layer, given):
    """A layer's output (S, O) without its bias, float64."""
    with torch.no_grad():
        found = layer(given).double()
    return found if layer.base_layer.bias is None else found - layer.base_layer.bias.double()


@pytest.mark.parametrize(("stabilized", "divisor"), [(False, 4.0), (True, math.sqrt(4))])
def test_the_update_is_multiplied_by_alpha_over_the_rank_or_its_root(base, store, stabilized, divisor):
    loaded = moved(load(settings(base, lora__rank_stabilized=stabilized), store, CPU))
    layer, given = layer_of(loaded.model), torch.randn(5, 256)
    down, up = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    wanted = given.double() @ (layer.base_layer.weight.double() + 6 / divisor * up @ down).T
    torch.testing.assert_close(passed_through(layer, given), wanted, rtol=1e-4, atol=1e-4)


def test_dora_scales_each_output_to_a_magnitude_of_its_own(base, store):
    """W' = m (W + s B A) / |W + s B A|, the norm by output (arXiv:2402.09353, equation 5)."""
    plain = load(settings(base), store, CPU)
    loaded = load(settings(base, lora__dora=True), store, CPU)
    torch.testing.assert_close(answers(loaded.model), answers(plain.model), rtol=1e-4, atol=1e-4)
    layer = layer_of(moved(loaded).model)
    down, up = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    direction = layer.base_layer.weight.double() + 6 / 4 * up @ down
    magnitude = layer.lora_magnitude_vector["default"].weight.double()
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    given = torch.randn(5, 256)
    torch.testing.assert_close(passed_through(layer, given), given.double() @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_update_moves_magnitudes_too_and_a_checkpoint_gives_them_back(base, store, tmp_path, quantization):
    config = settings(base, lora__dora=True, lora__rank_stabilized=True, model__quantization=quantization)
    loaded = load(config, store, CPU)
    magnitudes = {name for name in loaded.trainable if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 2 * len(TARGETS)
    assert all(loaded.trainable[name].dim() == 1 for name in magnitudes)  # hence without weight decay
    assert {parameter.dtype for parameter in loaded.trainable.values()} == {torch.float32}
    frozen = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in loaded.trainable.items()}
    engine = PlainEngine(loaded.model, loaded.trainable, config, CPU)
    for _ in range(2):  # at the first B is 0, and A has no gradient
        total, tokens = causal_loss(loaded.model, IDS, IDS, None, 0)
        engine.backward(total / tokens, last=True)
        assert engine.step(1e-2) is not None
    assert all(not torch.equal(p, before[name]) for name, p in loaded.trainable.items())
    assert all(torch.equal(p, frozen[n]) for n, p in loaded.model.named_parameters() if n in frozen)
    path = checkpoints.save(tmp_path, engine.capture(), {"step": 2}, {})
    captured, _ = checkpoints.load(path)
    assert captured.weights.keys() == loaded.trainable.keys()
    again = load(config, store, CPU)
    checkpoints.put_weights(captured.weights, again.trainable)
    torch.testing.assert_close(answers(again.model), answers(loaded.model), rtol=0, atol=0)


@pytest.mark.parametrize("more", [{"lora__dora": True}, {"lora__rank_stabilized": True},
                                  {"lora__dora": True, "lora__rank_stabilized": True}], ids=str)
def test_the_written_adapter_says_what_it_is_and_peft_loads_the_same_model(base, store, tmp_path, more):
    from peft import AutoPeftModelForCausalLM

    config = settings(base, **more)
    loaded = moved(load(config, store, CPU))
    folder = tmp_path / export(loaded, config, store.path, tmp_path, {})
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["use_dora"], written["use_rslora"]) == (more.get("lora__dora", False),
                                                            more.get("lora__rank_stabilized", False))
    found = sum("lora_magnitude_vector" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert found == (2 * len(TARGETS) if "lora__dora" in more else 0)
    again = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(answers(again), answers(loaded.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"stream__mlp_tokens": 5}, {"model__quantization": "nf4"},
                                  {"lora__rank_stabilized": True}], ids=str)
def test_the_streamed_step_computes_doras_gradients(base, store, tmp_path, more):
    config = settings(base, lora__dora=True, stream__chunk_tokens=8, **more)
    loaded = moved(load(config, store, CPU))
    found = verify(loaded.model, policy_of(config, tmp_path))
    assert found.gradient_distance < 1e-3
    assert found.streamed_loss == pytest.approx(found.plain_loss, rel=1e-5)
