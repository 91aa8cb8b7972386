"""PowerSGD gradient compression (Vogels et al. 2019, arXiv:1905.13727) as torch's communication hook has it.

Of a gradient matrix (n, m), summed over micro-batches, two factors travel, P (n, r) and Q (m, r): r (n + m)
numbers in place of n m. Each rank adds what its last matrix lost to the next one (error feedback, algorithm
1) and Q begins where it ended (warm start, section 4.2). Matrices that would gain less than a factor of 2,
and vectors, travel whole.

    2,048 x 2,048, r = 4: 16,384 of 4,194,304 numbers, a 256th

The hook keeps flat tensors by bucket, and a bucket is the same parameters in every session (`parallel`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hook

from training.trainer.engine import Captured

log = logging.getLogger(__name__)

# Gradients of the first updates travel whole: torch takes no less, and they are the least like their
# successors.
WHOLE_UPDATES = 2
LEAST_GAIN = 2
# A matrix without any gradient, as LoRA's A has in the first update, gives a P of zeros. This is added to a
# column's norm before dividing by it; nothing that is not zero notices.
EPSILON = 1e-30
ITERATION, RANKS = "powersgd/iteration", "powersgd/ranks"


class PowerSGD:
    """The hook on a DistributedDataParallel module, and the state that a checkpoint needs of it."""

    def __init__(self, parallel: Any, matrix_rank: int):
        logging.getLogger(hook.__name__).setLevel(logging.WARNING)
        self.state = hook.PowerSGDState(
            None, matrix_approximation_rank=matrix_rank, start_powerSGD_iter=WHOLE_UPDATES,
            min_compression_rate=LEAST_GAIN, orthogonalization_epsilon=EPSILON)
        self._gloo = torch.distributed.get_backend() == "gloo"
        self._device = next(p.device for p in parallel.module.parameters() if p.requires_grad)
        # torch compares annotations with its own classes, and here they are text.
        parallel.register_comm_hook(self.state, lambda state, bucket: self._exchange(state, bucket))

    def _exchange(self, state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """One bucket. The hook's later exchanges start from callbacks, which gloo runs on worker threads: two
        buckets at once could swap them between ranks, or wait for each other on all of its threads."""
        future = hook.powerSGD_hook(state, bucket)
        if self._gloo:
            future.wait()
        return future

    def begin(self) -> None:
        """Before the backward pass that exchanges: a new Q is drawn from the count of updates alone, so that
        no generator's state has to be kept."""
        self.state.rng.seed(self.state.iter)

    def forget(self) -> None:
        """Drop errors and factors: a gradient that was not finite, or is not wanted, is in all of them."""
        for kept in (self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict):
            kept.clear()

    def scale(self, factor: float) -> None:
        """Errors are in units of the scaled loss (float16), whose scale has changed by `factor`."""
        if factor != 1.0:
            for error in self.state.error_dict.values():
                error.mul_(factor)

    def capture(self, captured: Captured, rank: int, ranks: int) -> None:
        """Add `powersgd/...` to rank 0's. Factors are the same on all ranks, errors are each rank's own: as
        many fp32 copies of the gradient as there are ranks, of which one bucket at a time is on the device.
        Together."""
        for bucket, error in sorted(self.state.error_dict.items()):
            gathered = [torch.empty_like(error) for _ in range(ranks)] if rank == 0 else None
            torch.distributed.gather(error, gathered, dst=0)
            for owner, value in enumerate(gathered or ()):
                captured.optimizer[f"powersgd/{owner}/error/{bucket}"] = _copy(value)
        if rank == 0:
            for bucket, factors in self.state.q_memory_dict.items():
                captured.optimizer[f"powersgd/q/{bucket}"] = _copy(factors)
            for bucket, factors in self.state.p_memory_dict.items():
                captured.optimizer[f"powersgd/p/{bucket}"] = _copy(factors)
            captured.numbers |= {ITERATION: self.state.iter, RANKS: ranks}

    def restore(self, captured: Captured, rank: int, ranks: int) -> None:
        """Put this rank's part back; where the number of ranks has changed, begin anew and say so."""
        self.forget()
        then = captured.numbers.get(RANKS)
        if then is None:
            return
        self.state.iter = captured.numbers[ITERATION]
        if then != ranks:
            if rank == 0:
                log.info("parallel.compression: the checkpoint has the errors of %d ranks and there are %d; "
                         "error feedback starts from zero.", then, ranks)
            return
        for kept, prefix in ((self.state.error_dict, f"powersgd/{rank}/error/"),
                             (self.state.q_memory_dict, "powersgd/q/"),
                             (self.state.p_memory_dict, "powersgd/p/")):
            kept.update({int(name.removeprefix(prefix)): value.to(self._device, copy=True)
                         for name, value in captured.optimizer.items() if name.startswith(prefix)})


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
