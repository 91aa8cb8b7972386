"""Switches that are handed on to other libraries reach them: attention kernels."""

import pytest
import torch

from tests.checkpoints import make_tiny_checkpoint
from training.errors import UsageError
from training.settings import Config
from training.trainer import embedded, loading

IDS = torch.arange(24).reshape(1, 24)
SMALL = {"embedded.hidden": 32, "embedded.layers": 2, "embedded.heads": 2, "embedded.kv_heads": 2,
         "embedded.mlp": 64, "dataset.context_tokens": 32, "dataset.target_tokens": 32}


@pytest.fixture
def calls(monkeypatch):
    """How often torch's fused attention was called."""
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        seen.append(args)
        return plain(*args, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize(("kernel", "expected"), [("sdpa", 2), ("eager", 0)])
def test_the_embedded_model_calls_the_kernel_that_was_chosen_in_each_layer(calls, kernel, expected):
    model = embedded.build(Config(SMALL | {"model.attention": kernel}), 300, 0, None)
    model(IDS)
    assert len(calls) == expected


@pytest.mark.parametrize(("kernel", "expected"), [("sdpa", True), ("eager", False)])
def test_a_base_calls_the_kernel_that_was_chosen(calls, tmp_path, kernel, expected):
    base = make_tiny_checkpoint(tmp_path / "base", "qwen2", context_tokens=128)
    config = Config({"model.base": str(base), "lora.enabled": True, "model.attention": kernel,
                     "dataset.context_tokens": 32, "dataset.target_tokens": 32})
    loading.pretrained(config, torch.device("cpu"), str(base), [])(IDS)
    assert bool(calls) == expected


def test_the_kernels_give_the_same_gradients_up_to_rounding():
    found = []
    for kernel in ("sdpa", "eager"):
        model = embedded.build(Config(SMALL | {"model.attention": kernel}), 300, 0, None).double()
        model(IDS, labels=IDS).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_flash_attention_is_asked_for_by_name_and_never_replaced_in_silence(tmp_path):
    base = make_tiny_checkpoint(tmp_path / "base", "qwen2", context_tokens=128)
    config = Config({"model.base": str(base), "lora.enabled": True, "model.attention": "flash_attention_2",
                     "dataset.context_tokens": 32, "dataset.target_tokens": 32})
    with pytest.raises(UsageError, match=r"[Ff]lash.*model\.attention=sdpa"):
        loading.pretrained(config, torch.device("cpu"), str(base), [])
