"""Cross-entropy of final hidden states, a few positions at a time: the logits of one piece are all that
exists.

Shapes: B batch, C positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
Head = Callable[[Tensor, slice], Tensor]


class Sums:
    """Gradients of parameters, added up over chunks in fp32 or better."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """One chunk's share."""
        for index, new in enumerate(grads):
            held = self._sums[index]
            if new is not None and held is None:
                self._sums[index] = new.to(torch.promote_types(new.dtype, torch.float32), copy=True)
            elif new is not None:
                held += new  # type: ignore[operator]

    def result(self, scale: Tensor | float = 1.0) -> list[Tensor | None]:
        """In the parameters' own types."""
        return [None if held is None else (held * scale).to(parameter.dtype)
                for held, parameter in zip(self._sums, self.parameters, strict=True)]


def shifted(labels: Tensor) -> Tensor:
    """Each position's own target: labels (B, S) moved left by one, the last position without one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _pieces(targets: Tensor, size: int) -> Iterator[slice]:
    """Parts of a chunk with a target in them."""
    for start in range(0, targets.shape[1], size):
        part = slice(start, min(start + size, targets.shape[1]))
        if bool((targets[:, part] != IGNORED).any()):
            yield part


def summed(head: Head, hidden: Tensor, targets: Tensor, size: int, smoothing: float = 0.0) -> Tensor:
    """Summed loss of a chunk in fp32 or better: hidden (B, C, H), targets (B, C). No gradients.

    `smoothing`: share of each target's probability that the whole vocabulary divides among it
    (arXiv:1512.00567 section 7).
    """
    total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
    with torch.no_grad():
        for part in _pieces(targets, size):
            total += _cross_entropy(head(hidden[:, part], part), targets[:, part], smoothing)
    return total


def with_gradients(head: Head, hidden: Tensor, targets: Tensor, size: int, sums: Sums,
                   scale: Tensor | None, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its gradient by `hidden`; gradients of parameters are added to `sums`.

    `scale` multiplies the gradient before it passes through the head, where fp16 would lose small values.
    """
    total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
    by_hidden = torch.zeros_like(hidden)
    for part in _pieces(targets, size):
        piece = hidden[:, part].detach().requires_grad_()
        with torch.enable_grad():
            loss = _cross_entropy(head(piece, part), targets[:, part], smoothing)
        found = torch.autograd.grad(loss, (piece, *sums.parameters), scale, allow_unused=True)
        total += loss.detach()
        by_hidden[:, part] = found[0]
        sums.add(found[1:])
    return total, by_hidden


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """As Transformers computes it: logits in fp32 or better."""
    return F.cross_entropy(logits.flatten(0, 1).to(wide(logits.dtype)), targets.flatten(),
                           ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that losses are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
