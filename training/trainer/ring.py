"""Training with windows that a ring of devices shares: the loss in the loop's own shape.

Shapes: B batch, S sequence, P tokens of one rank (see `longcontext.ring`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.errors import UsageError
from training.longcontext.errors import Unsupported
from training.longcontext.ring import Mount, Ring, shared
from training.settings import Config
from training.trainer.loss import IGNORED, _chunked, _summed, causal_loss, parts, verify_chunked

log = logging.getLogger(__name__)


class RingLoss:
    """The loop's loss function on parallel.ring devices: each gives the loss of its own tokens' targets.

    Ranks of a ring are given the same windows. Without gradients, as in an evaluation, which rank 0 makes
    alone, a window is one device's. Made once the engine has the model, by all ranks together. Raises
    UsageError for a model that cannot be shared.
    """

    def __init__(self, model: nn.Module, config: Config):
        size = config["parallel.ring"]
        try:
            self._ring = Ring(size, longest=config["dataset.context_tokens"])
            self._mount = Mount(model)
            plain, found = self._mount.verify(model, self._ring)
        except Unsupported as error:
            text = " ".join(str(error).split()).removesuffix(".")
            raise UsageError(f"parallel.ring is {size} and cannot share {config['model.base']}'s windows: "
                             f"{text}. Set parallel.ring=1.") from error
        self._mount.on()
        if torch.distributed.get_rank() == 0:
            log.info("ring of %d: on a short sequence its loss is %.6f and one device's %.6f", size, found,
                     plain)

    def __call__(self, model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None,
                 chunk_tokens: int, smoothing: float = 0.0) -> tuple[Tensor, int]:
        """As `causal_loss` of (B, S) ids and labels: over the ranks of a ring both results add up to its."""
        if not torch.is_grad_enabled():
            with self.aside():
                return causal_loss(model, input_ids, labels, attention_mask, chunk_tokens, smoothing)
        part = shared(input_ids, labels, self._ring.rank, self._ring.size, IGNORED)
        wanted = part.targets != IGNORED
        expected, tokens = part.targets[wanted], int(wanted.sum())
        with self._ring.sharing():
            if not verify_chunked(model):
                logits = model(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
                return _summed(logits[wanted], expected, smoothing), tokens
            decoder, head = parts(model)
            hidden = decoder(input_ids=part.ids, position_ids=part.positions,
                             use_cache=False).last_hidden_state
        return _chunked(hidden[wanted], expected, head, chunk_tokens or max(tokens, 1), smoothing), tokens

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model can be called as it is, by one rank alone."""
        self._mount.off()
        try:
            yield
        finally:
            self._mount.on()
