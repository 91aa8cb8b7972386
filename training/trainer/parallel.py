"""DistributedDataParallel behind the loop's engine interface: whole weights on every rank, mean gradients.

Gradients are exchanged bucket by bucket while the rest of the backward pass runs (Li et al. 2020,
arXiv:2006.15704, section 3.2), in the last micro-batch of an update only. torch's wrapper settles that in its
forward pass; the loop knows it at the backward pass. So the model is called as it is, and the wrapper's
reducer is told before the last backward pass, as its own forward pass would (read against torch 2.13).

That also keeps its buckets as they are: the forward pass would arrange them anew after the first update, by
when gradients came. A resumed run would then add in another order than one that was not interrupted, which
shows in the last bits from three ranks on, and PowerSGD's memory belongs to a bucket.

Averages become the plain engine's sums by multiplying the loss by the number of ranks first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from training.trainer.engine import Captured, PlainEngine, Returned
from training.trainer.powersgd import PowerSGD
from training.trainer.processes import Together


class DistributedEngine(Together, PlainEngine):
    """One of several ranks, each with its own device and all weights. Made after `processes.join`, together.

    Checkpoints are the plain engine's; with parallel.compression=powersgd they also hold what `PowerSGD`
    keeps. The number of ranks may change between two starts.
    """

    captures_alone = False  # the others' exchanges of a step that is broken off would not be met

    def __init__(self, model: Module, trainable: Mapping[str, Parameter], config: Mapping[str, Any],
                 device: torch.device):
        super().__init__(model, trainable, config, device)
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for name in sorted(trainable):  # the same from the seed already; frozen ones are from the same files
            torch.distributed.broadcast(trainable[name].detach(), src=0)
        # An expert may get no token on some rank, or on any, and has no gradient then, as in one process.
        # Finding such parameters is one walk over the last micro-batch's graph.
        self._parallel: Any = DistributedDataParallel(
            model, forward_sync_buffers=False, init_sync=False, find_unused_parameters=True,
            gradient_as_bucket_view=True)
        self._powersgd = PowerSGD(self._parallel, config["parallel.compression_rank"]) \
            if config["parallel.compression"] == "powersgd" else None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; in the last micro-batch they are averaged over ranks on the way."""
        loss = self._scaler.scale(loss * self.ranks)
        if last:
            if self._powersgd:
                self._powersgd.begin()
            with _without_advice():
                self._parallel.reducer.prepare_for_backward([loss])
        loss.backward()

    def step(self, rate: float) -> float | None:
        """One update, the same on every rank."""
        before = self._scaler.get_scale()
        norm = super().step(rate)
        if self._powersgd and norm is None:
            self._powersgd.forget()
        elif self._powersgd and self._scaler.is_enabled():
            self._powersgd.scale(self._scaler.get_scale() / before)
        return norm

    def discard(self) -> None:
        """Drop the gradients, and what compression kept of them and of those before."""
        super().discard()
        if self._powersgd:
            self._powersgd.forget()

    def on_model(self, work: Callable[[Module], Returned]) -> Returned | None:
        """Run `work(model)` on rank 0 while the others wait."""
        return self.on_main(lambda: PlainEngine.on_model(self, work))

    def with_whole_weights(self, work: Callable[[], Returned], everything: bool) -> Returned | None:
        """Run `work` on rank 0."""
        return self.on_main(work)

    def capture(self) -> Captured:
        """Copies on the CPU of rank 0; of the other ranks only what compression keeps there."""
        captured = super().capture() if self.rank == 0 else Captured()
        if self._powersgd:
            self._powersgd.capture(captured, self.rank, self.ranks)
        return captured

    def restore(self, captured: Captured) -> None:
        """Put the optimizer's and the loss scale's state back, and compression's on as many ranks."""
        super().restore(captured)
        if self._powersgd:
            self._powersgd.restore(captured, self.rank, self.ranks)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Where every parameter is used torch advises against looking, once, on the error stream itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
