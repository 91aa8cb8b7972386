"""Whether the streamed step gives a model's own loss and gradients, on one short sequence.

Run before training: a family whose forward does something that the chunks do not see is found here, not in a
model that learned the wrong thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from training.longcontext.errors import StreamError, Unsupported
from training.longcontext.policy import StreamPolicy

TOKENS = 96
CHUNK = 40  # does not divide TOKENS
# By type: largest relative difference of the loss and of a parameter's gradient. Rounding alone was measured
# at 4e-6 (float32) and 0.08 (bfloat16) on random models of four to eight layers; a lost share of a gradient
# gives about 1.
TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-4, 1e-2), torch.bfloat16: (3e-2, 0.25),
              torch.float16: (3e-2, 0.25)}
# Gradients below this share of the whole one's norm are held against that share: they are rounding.
SMALL = 1e-2


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was compared: losses, and how far off, relative to its norm, the worst gradient is: `parameter`'s.
    """

    plain_loss: float
    streamed_loss: float
    gradient_distance: float
    parameter: str
    tokens: int


def verify(model: nn.Module, policy: StreamPolicy | None = None, *, tokens: int = TOKENS) -> Verdict:
    """Compare one sequence with the model's own forward and backward; gradients, modes, random state stay.

    Compared in evaluation mode, since the two draw dropout differently, with exact inputs and resident
    weights whatever the policy says; its other choices are taken. Raises Unsupported when the two differ or
    when the model has a feature that cannot be exact, StreamError when no parameter is trainable.
    """
    from training.longcontext.step import StreamedStep

    step = StreamedStep(model, replace(policy or StreamPolicy(), chunk_tokens=CHUNK, page_tokens=0,
                                       encoding="exact", weights="resident"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise StreamError("No parameter is trainable.")
    ids = _sequence(model, tokens)
    with _evaluating(model):
        plain, expected = _gradients(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, trained)
        with _telling(model, tokens):
            streamed, found = _gradients(lambda: step(ids, ids), trained)
    distance, parameter = _distance(found, expected)
    verdict = Verdict(plain_loss=plain, streamed_loss=streamed, gradient_distance=distance,
                      parameter=parameter, tokens=tokens)
    _judge(verdict, model, _computed_in(model))
    return verdict


def _sequence(model: nn.Module, tokens: int) -> Tensor:
    """The same random ids (1, tokens) at every call."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.num_embeddings, (1, tokens), generator=generator)
    return ids.to(embeddings.weight.device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode and the random state come back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _telling(model: nn.Module, tokens: int) -> Iterator[None]:
    """What fails in the streamed step alone is a feature that it does not know."""
    try:
        yield
    except (StreamError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise Unsupported(f"{type(model).__name__}: the streamed step fails on {tokens} tokens "
                          f"({str(error).splitlines()[0][:120]})") from error


def _computed_in(model: nn.Module) -> torch.dtype:
    """The least precise type of the computation: a float32 adapter is as exact as its 16-bit base."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    named = (getattr(module, "compute_dtype", None) for module in model.modules())
    found |= {dtype for dtype in named if isinstance(dtype, torch.dtype)}
    for kind in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(kind):
            found.add(torch.get_autocast_dtype(kind))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


Gradients = dict[str, Tensor | None]


def _gradients(loss: Callable[[], Tensor], trained: dict[str, nn.Parameter]) -> tuple[float, Gradients]:
    """A loss and its gradients; those that parameters had are put back."""
    held = {name: p.grad for name, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    try:
        with torch.enable_grad():
            value = loss()
            value.backward()
        return float(value.detach()), {name: p.grad for name, p in trained.items()}
    finally:
        for name, parameter in trained.items():
            parameter.grad = held[name]


def _distance(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient, and which one's it is."""
    norms = {name: _norm(grad) for name, grad in expected.items()}
    least = SMALL * sum(norm ** 2 for norm in norms.values()) ** 0.5
    off = {name: _norm(_less(found[name], grad)) for name, grad in expected.items()}
    relative = {name: off[name] / max(norms[name], least) if off[name] else 0.0 for name in off}
    worst = max(relative, key=lambda name: (relative[name] != relative[name], relative[name]))  # NaN first
    return relative[worst], worst


def _norm(grad: Tensor | None) -> float:
    return 0.0 if grad is None else float(torch.linalg.vector_norm(grad, dtype=torch.float64))


def _less(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.to(b.dtype) - b


def _judge(verdict: Verdict, model: nn.Module, dtype: torch.dtype) -> None:
    by_loss, by_gradient = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    off = abs(verdict.streamed_loss - verdict.plain_loss)
    if off <= by_loss * max(1.0, abs(verdict.plain_loss)) and verdict.gradient_distance <= by_gradient:
        return
    raise Unsupported(
        f"{type(model).__name__}: on {verdict.tokens} tokens the streamed step's loss is "
        f"{verdict.streamed_loss:.6f} and the model's own {verdict.plain_loss:.6f}, its gradient of "
        f"{verdict.parameter} {verdict.gradient_distance:.2e} off. Train it with the plain step "
        "(stream.chunk_tokens=0)")
