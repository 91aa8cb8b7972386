"""Compiled decoder layers: they are compiled, compute the same, and take new lengths without a new graph."""

import os

import pytest
import torch
from torch._dynamo.utils import counters

from training.errors import UsageError
from training.settings import Config
from training.trainer import compilation, recompute
from training.trainer.imports import quick_imports
from training.trainer.loss import causal_loss

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
         "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 1024, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
QUICK = "eager"      # graphs as for TorchInductor, run by PyTorch: no C++ is compiled


def make(family="llama", **more):
    with quick_imports():
        from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **more})).train()


def compiled(model, kept_layers=2, kept_inputs=0, backend=QUICK):
    layers = recompute.select(model, kept_layers, kept_inputs)
    return layers, compilation.compile_layers(model, layers, backend)


def learned(model, tokens=40, rows=1):
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    ids = torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    total, _ = causal_loss(model, ids, ids, None, 16)
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, rel=1e-5):
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= rel * max(gradient.norm(), 1e-3), name


def graphs():
    return counters["stats"]["unique_graphs"]


def runs(monkeypatch):
    """Counts calls of code that the compiler made."""
    made, count = [], graphs()
    call = compilation._call

    def traced(*args, **kwargs):
        if not torch.compiler.is_compiling():
            made.append(1)
        return call(*args, **kwargs)
    monkeypatch.setattr(compilation, "_call", traced)
    return made, count


@pytest.mark.parametrize(("family", "graphs_made"), [("llama", 1), ("gpt2", 1)])
def test_layers_are_compiled_and_learn_the_same(family, graphs_made, monkeypatch):
    eager, count = runs(monkeypatch)
    model = make(family)
    names = list(model.state_dict())
    _, note = compiled(model)
    assert_close(learned(model), learned(make(family)))
    with torch.no_grad():
        for each in model.parameters():
            each -= 0.1 * each.grad           # an update is seen by what was compiled before it
    plain = make(family)
    plain.load_state_dict(model.state_dict())
    assert_close(learned(model), learned(plain))
    assert graphs() > count
    assert eager == []                        # nothing ran as it is written
    assert list(model.state_dict()) == names
    assert note.startswith(f"Decoder layers are compiled: {graphs_made} graphs for 2 layers in ")


def test_inductors_own_code_learns_the_same_at_every_length():
    model, plain = make(), make()
    compiled(model, backend="inductor")
    assert_close(learned(model), learned(plain))
    count = graphs()
    for tokens in (24, 72, 57):
        assert_close(learned(model, tokens), learned(plain, tokens))
    assert graphs() == count


@pytest.mark.parametrize("kept", [(1, 0), (0, 1)], ids=str)
def test_recomputed_layers_are_compiled_too(kept, monkeypatch):
    eager, _ = runs(monkeypatch)
    model = make(num_hidden_layers=3)
    layers, _ = compiled(model, *kept)
    calls, own = [], list(layers.own)
    for index, each in enumerate(own):
        layers.own[index] = lambda *given, each=each, **named: calls.append(1) or each(*given, **named)
    learned(model)
    calls.clear()
    assert_close(learned(model), learned(make(num_hidden_layers=3)))
    assert len(calls) == 3 + layers.forwards
    assert eager == []


def test_dropout_leaves_the_comparison_to_evaluation_mode():
    model = make(attention_dropout=0.5)
    modes = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    compiled(model)
    assert modes == [True] * 4 + [False] * 4
    assert all(module.training for module in model.modules())


def test_an_adapter_over_a_frozen_input_is_compiled():
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(1)
        return get_peft_model(make().requires_grad_(False), LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model = adapted()
    compiled(model, 0, 0)
    assert_close(learned(model), learned(adapted()))


def test_evaluation_is_compiled_and_generation_with_a_cache_is_not(monkeypatch):
    eager, _ = runs(monkeypatch)
    model, plain = make(), make().eval()
    layers, _ = compiled(model)
    model.eval()
    ids = torch.arange(30)[None] % 64
    with torch.no_grad():
        found, expected = (float(causal_loss(each, ids, ids, None, 16)[0]) for each in (model, plain))
    assert found == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(layers, "own", None)          # would fail if it were called
    written = [each.generate(ids[:, :8], max_new_tokens=4, do_sample=False) for each in (model, plain)]
    assert torch.equal(*written)
    assert eager == []


def test_without_a_compiler_the_run_ends_before_it_begins(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"^training\.compile is true and there is no C\+\+ compiler here "
                                         r"\(no-such-compiler\); install g\+\+, or set "
                                         r"training\.compile=false\.$"):
        compiled(make(), backend="inductor")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(os, "environ", {"PATH": ""})
    with pytest.raises(UsageError, match=r"no C\+\+ compiler here \(g\+\+\)"):
        compiled(make(), backend="inductor")


def broken(graph, inputs):
    raise RuntimeError("no such operator.")


def doubling(graph, inputs):
    return lambda *given: tuple(value * 2 for value in graph(*given))


def test_a_compiler_that_fails_is_told_in_one_line():
    with pytest.raises(UsageError, match=r"^training\.compile is true and torch\.compile fails on these "
                                         r"layers: .*no such operator\..* Set training\.compile=false\.$"):
        compiled(make(), backend=broken)


def test_compiled_layers_that_compute_something_else_are_refused():
    with pytest.raises(UsageError, match=r"^training\.compile is true and compiled layers compute something "
                                         r"else: hidden states \d\.\de[+-]\d\d off"):
        compiled(make(), backend=doubling)


def test_layers_that_nothing_was_compiled_of_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    with pytest.raises(UsageError, match=r"^training\.compile is true and torch\.compile made no graph"):
        compiled(make())


def test_stage_3_is_refused():
    config = Config({"training.compile": True, "deepspeed.stage": 3})
    with pytest.raises(UsageError, match=r"^training\.compile is true and deepspeed\.stage is 3, whose"):
        compilation.arrange(make(), config)
