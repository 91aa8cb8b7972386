"""Whether the streamed step gives a model's own loss and gradients, on one short sequence.

Run before training: a family whose forward does something that the chunks do not see is found here, not in a
model that learned the wrong thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from training.longcontext.errors import StreamError, Unsupported
from training.longcontext.policy import StreamPolicy

TOKENS = 96
CHUNK = 40  # does not divide TOKENS
# By type: largest difference of the loss, relative, and of the gradients' direction (1 - cosine).
TOLERANCES = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-4, 1e-3), torch.bfloat16: (3e-2, 3e-2),
              torch.float16: (3e-2, 3e-2)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was compared: losses, and one minus the cosine of all trainable gradients."""

    plain_loss: float
    streamed_loss: float
    gradient_distance: float
    tokens: int


def verify(model: nn.Module, policy: StreamPolicy | None = None, *, tokens: int = TOKENS,
           step: Any = None) -> Verdict:
    """Compare one sequence of `tokens` with the model's own forward and backward; random state and modes stay.

    Compared in evaluation mode, since the two draw dropout differently. `step`: the StreamedStep to check,
    with its own chunk size when that is smaller than the sequence; one is made otherwise. Raises Unsupported
    when they differ, or when the model has a feature that cannot be exact.
    """
    from training.longcontext.step import StreamedStep

    step = step or StreamedStep(model, replace(policy or StreamPolicy(), chunk_tokens=CHUNK, page_tokens=0))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise StreamError("No parameter is trainable.")
    modes = [(module, module.training) for module in model.modules()]
    generator = torch.Generator().manual_seed(0)
    vocabulary = step._machine.anatomy.config.vocab_size
    ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(trained[0].device)
    try:
        model.eval()
        plain, expected = _gradients(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, trained)
        streamed, found = _gradients(lambda: step(ids, ids), trained)
    finally:
        for module, mode in modes:
            module.training = mode
    verdict = Verdict(plain_loss=plain, streamed_loss=streamed, gradient_distance=_distance(found, expected),
                      tokens=tokens)
    _judge(verdict, model, trained[0].dtype)
    return verdict


def _gradients(loss: Any, parameters: list[nn.Parameter]) -> tuple[float, list[Tensor | None]]:
    """A loss and its gradients; those that parameters had are put back."""
    held = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.enable_grad():
            value = loss()
            value.backward()
        return float(value.detach()), [p.grad for p in parameters]
    finally:
        for parameter, grad in zip(parameters, held, strict=True):
            parameter.grad = grad


def _distance(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """1 - cosine; 0 when both are zero."""
    dot = a = b = 0.0
    for one, other in zip(found, expected, strict=True):
        x = one.double().flatten() if one is not None else None
        y = other.double().flatten() if other is not None else None
        a += float(x @ x) if x is not None else 0.0
        b += float(y @ y) if y is not None else 0.0
        dot += float(x @ y) if x is not None and y is not None else 0.0
    if not a and not b:
        return 0.0
    size = (a * b) ** 0.5
    ratio = (a / b) ** 0.5 if b else float("inf")
    return max(1 - dot / size, abs(ratio - 1)) if size else 1.0


def _judge(verdict: Verdict, model: nn.Module, dtype: torch.dtype) -> None:
    by_loss, by_gradient = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    off = abs(verdict.streamed_loss - verdict.plain_loss) > by_loss * max(1.0, abs(verdict.plain_loss))
    if off or not verdict.gradient_distance <= by_gradient:
        raise Unsupported(
            f"{type(model).__name__}: on {verdict.tokens} tokens the streamed step's loss is "
            f"{verdict.streamed_loss:.6f} and the model's own {verdict.plain_loss:.6f}, its gradient "
            f"{verdict.gradient_distance:.2e} off. Train it with the plain step (stream.chunk_tokens=0)")
