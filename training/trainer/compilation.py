"""Decoder layers compiled by torch.compile, one graph for all layers that are alike.

Each layer is compiled by itself and not the whole model (torch's "regional compilation"): the same graph
serves all layers of a kind, so compiling takes as long for 64 layers as for two, and what lies between them
(recomputed groups, hooks, the cache of a generation) stays as it is. Sizes are symbols, so that windows of
another length need no other graph.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import UsageError
from training.trainer.loss import causal_lm, held_still
from training.trainer.recompute import Layers, decoder_layers, select

PROBE_TOKENS = 16
# Graphs of one kind of code: training, evaluation, with and without a mask or a gradient of the input, one
# window or several, times the kinds of layers that a family mixes. At torch's own limit of 8 the rest would
# run uncompiled with only a warning.
GRAPHS = 64
# Largest distance from the layers' own hidden states and from their gradient, relative to their norms:
# float32, 16 bits. Fused operations round less often.
TOLERANCES = {4: (1e-4, 1e-3), 2: (5e-2, 0.25)}


def arrange(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Which activations the plain step keeps, by training.kept_layers and training.kept_inputs, and whether
    its layers are compiled; notes. Raises UsageError as `select` and `compile_layers` do."""
    count = len(decoder_layers(model))
    recomputed = config["training.checkpointing"]
    layers = select(model, config["training.kept_layers"] if recomputed else count,
                    config["training.kept_inputs"] if recomputed else 0)
    notes = []
    if config["training.kept_layers"] or config["training.kept_inputs"]:
        kept = (f"{config['training.kept_inputs']} inputs" if config["training.kept_inputs"] else
                f"{config['training.kept_layers']} layers")
        notes.append(f"Recomputed: {layers.forwards} forward computations of a layer beside the first "
                     f"{count}; kept: {kept}.")
    if config["training.compile"]:
        if config["deepspeed.stage"] == 3:
            raise UsageError("training.compile is true and deepspeed.stage is 3, whose hooks gather weights "
                             "inside every layer and break its graph; set deepspeed.stage=2.")
        notes.append(compile_layers(model, layers))
    return notes


def compile_layers(model: nn.Module, layers: Layers, backend: str = "inductor") -> str:
    """Let `layers` call compiled decoder layers; what was found, in one line.

    Names of parameters stay. A few tokens go through the layers before and after. Raises UsageError when
    there is no compiler, when nothing was compiled, or when the outcome differs by more than rounding.
    """
    from torch._dynamo.utils import counters

    inner = causal_lm(model)
    device = inner.get_input_embeddings().weight.device
    if backend == "inductor":
        _look_for_compiler(device)
    # A training step's own graph, unless dropout, which compiled code draws in another way, is in it.
    training = all(map(torch.equal, _answers(inner, True, seed=0), _answers(inner, True, seed=1)))
    before = _answers(inner, training)
    make: Any = torch.compile  # whose stubs lack two arguments
    compiled = make(_call, dynamic=True, backend=backend, recompile_limit=GRAPHS,
                    isolate_recompiles=True)  # another model's graphs would be taken for these
    graphs, start = counters["stats"]["unique_graphs"], time.perf_counter()
    for index, layer in enumerate(layers.layers):
        layers.own[index] = partial(compiled, layer)
    try:
        after = _answers(inner, training)
    except Exception as error:  # the compiler's own, and those of any operator's tracing
        raise UsageError(f"training.compile is true and torch.compile fails on these layers: "
                         f"{_line(error)} Set training.compile=false.") from error
    made = counters["stats"]["unique_graphs"] - graphs
    if not made:
        raise UsageError("training.compile is true and torch.compile made no graph of these layers; set "
                         "training.compile=false.")
    hidden, gradient = (_distance(a, b) for a, b in zip(after, before, strict=True))
    by_hidden, by_gradient = TOLERANCES[min(4, before[0].element_size())]
    if not (hidden <= by_hidden and gradient <= by_gradient):  # NaN is no agreement
        raise UsageError("training.compile is true and compiled layers compute something else: hidden states "
                         f"{hidden:.1e} off, their gradient {gradient:.1e}; set training.compile=false.")
    return (f"Decoder layers are compiled: {made} graphs for {len(layers.layers)} layers in "
            f"{time.perf_counter() - start:.0f} s; on {PROBE_TOKENS} tokens hidden states are {hidden:.1e} "
            f"off, their gradient {gradient:.1e}.")


def _call(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What is compiled. The layer is an argument, and its weights are inputs of the graph."""
    return type(layer).forward(layer, hidden_states, *args, **kwargs)


def _look_for_compiler(device: torch.device) -> None:
    """Raise UsageError without a C++ compiler, which TorchInductor needs; on a GPU also without Triton."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UsageError("training.compile is true and Triton, which compiles for GPUs, does not load "
                             "here; install torch with it, or set training.compile=false.")
    named = os.environ.get("CXX", "")
    if not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"])):
        raise UsageError(f"training.compile is true and there is no C++ compiler here ({named or 'g++'}); "
                         "install g++, or set training.compile=false.")


def _answers(model: Any, training: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Final hidden states (1, P, H) of made-up tokens, and the gradient of their mean square by the input."""
    embeddings = model.get_input_embeddings()
    ids = torch.arange(PROBE_TOKENS, device=embeddings.weight.device)[None] * 7 % embeddings.weight.shape[0]
    with held_still(model), torch.enable_grad():  # which puts modes and the random state back
        model.train(training)
        torch.manual_seed(seed)
        given = embeddings(ids).detach().requires_grad_()
        hidden = model.get_decoder()(inputs_embeds=given, use_cache=False)[0]
        gradient, = torch.autograd.grad(hidden.float().square().mean(), given)
    return hidden.detach(), gradient


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."
