"""Liger's kernels: what is switched on, what is compared, and what each refusal says.

The kernels themselves need a GPU; a module of the same name and interface stands in for the package here.
"""

import sys
import types

import pytest
import torch
from checkpoints import make_tiny_checkpoint
from stores import make_store

from training.errors import UsageError
from training.settings import Config
from training.trainer import fused
from training.trainer.loading import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama", context_tokens=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory, base):
    return make_store(tmp_path_factory.mktemp("store"), base)


class Stub(types.ModuleType):
    """`liger_kernel.transformers.monkey_patch` of 0.8.0, as far as it is called. `change` is done to the
    model in place of the patches."""

    def __init__(self, change=lambda model: None):
        super().__init__("liger_kernel.transformers.monkey_patch")
        self.calls, self.change = [], change
        self.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": self.to_llama, "qwen2": self.to_nothing}

    def to_llama(self, rope: bool = True, cross_entropy: bool = True, fused_linear_cross_entropy: bool = True,
                 rms_norm: bool = True, swiglu: bool = False, model: object = None):
        raise AssertionError("called through _apply_liger_kernel_to_instance only")

    def to_nothing(self, rope: bool = False, model: object = None):
        raise AssertionError("nothing is on by default")

    def _apply_liger_kernel_to_instance(self, model, **kernels):
        self.calls.append((type(model).__name__, kernels))
        self.change(model)


@pytest.fixture
def liger(monkeypatch):
    """Puts a stub in the package's place."""
    def install(change=lambda model: None):
        stub = Stub(change)
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", stub)
        return stub
    return install


def wanted(base, **more):
    """A configuration that says GPU, so that the key is accepted; the model is loaded on the CPU."""
    return Config({"model.base": str(base), "dataset.context_tokens": 96, "dataset.target_tokens": 32,
                   "model.fused_kernels": True, "device.kind": "cuda"}
                  | {name.replace("__", "."): value for name, value in more.items()})


def test_the_kernels_that_a_family_has_go_into_the_bare_model_and_never_its_losses(base, store, liger):
    stub = liger()
    loaded = load(wanted(base, lora__enabled=True, lora__targets=["q_proj"]), store, CPU)
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert stub.calls == [("LlamaForCausalLM", {"rope": True, "rms_norm": True, **losses})]
    assert loaded.notes == ("Liger's fused kernels: rope, rms_norm; on 16 tokens the logits are 0.0e+00 off "
                            "the model's own, their gradient 0.0e+00.",)


def test_without_the_key_nothing_of_it_is_looked_for(base, store, liger):
    stub = liger()
    load(wanted(base, model__fused_kernels=False), store, CPU)
    assert stub.calls == []


def test_the_embedded_model_takes_them_too(store, liger):
    stub = liger()
    load(wanted("embedded", embedded__hidden=64, embedded__layers=2), store, CPU)
    assert len(stub.calls) == 1


def wrong_activation(model):
    """What Liger does to an MLP whose activation is not SiLU."""
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()


class Backwards(torch.autograd.Function):
    """The right values with a gradient that is too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, given):
        return 1.5 * given


def wrong_gradient(model):
    norm = model.model.norm
    norm.forward = lambda x, plain=norm.forward: Backwards.apply(plain(x))


@pytest.mark.parametrize(("change", "found"), [
    (wrong_activation, r"its logits are \d\.\de[+-]\d\d off"),
    (wrong_gradient, r"its logits are 0\.0e\+00 off, their gradient 5\.0e-01")])
def test_a_kernel_that_computes_something_else_is_refused(base, store, liger, change, found):
    liger(change)
    with pytest.raises(UsageError, match=found + r".*set model\.fused_kernels=false\.$"):
        load(wanted(base), store, CPU)


def test_families_without_a_kernel_are_refused(tmp_path, store, liger):
    stub = liger()
    for family in ("phi", "qwen2"):  # the one unknown, the other with nothing that is on
        folder = make_tiny_checkpoint(tmp_path / family, family, context_tokens=128)
        with pytest.raises(UsageError, match=rf"^model\.fused_kernels is true and Liger has no kernels for "
                                             rf"the {family} family; set model\.fused_kernels=false\.$"):
            load(wanted(folder), store, CPU)
    assert stub.calls == []


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"),
                                   RuntimeError("0 active drivers ([]). There should only be one.")], ids=str)
def test_a_package_that_does_not_load_says_how_to_get_it(monkeypatch, error):
    def fail(name):
        raise error
    monkeypatch.setattr(fused.importlib, "import_module", fail)
    with pytest.raises(UsageError) as caught:
        fused.apply(None)
    assert str(caught.value).startswith(
        f"model.fused_kernels needs liger-kernel and Triton, which do not load here ({error}); install with "
        "`pip install liger-kernel==0.8.0 --no-deps`")
    assert caught.value.exit_code == 2


def test_on_a_cpu_the_key_is_refused_before_anything_is_loaded():
    with pytest.raises(UsageError, match=r"^model\.fused_kernels is for GPUs and device\.kind is cpu"):
        Config({"model.fused_kernels": True})
