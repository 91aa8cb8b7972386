"""What ranks do together, whichever engine steps them: start, agree on values, let rank 0 work, leave."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from training.errors import EliteError, Problems
from training.trainer.engine import Returned

log = logging.getLogger(__name__)

# Other ranks wait while rank 0 evaluates or exports; NCCL's own limit of 10 minutes is too short for that.
WAIT = datetime.timedelta(hours=6)
# What DeepSpeed's launcher leaves a rank between SIGTERM and SIGKILL; a save under way may end in it.
ALONE_S = 30.0


def backend_of(device: torch.device) -> str:
    """The library that carries tensors between ranks on such devices."""
    return "nccl" if device.type == "cuda" else "gloo"


def join(device: torch.device) -> tuple[int, int]:
    """Join the process group that the launcher's environment describes; (rank, ranks). Together."""
    torch.distributed.init_process_group(backend_of(device), timeout=WAIT)
    watch_ranks(device)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def watch_ranks(device: torch.device) -> None:
    """End this process `ALONE_S` seconds after another rank has ended before it. Together, once; on Linux.

    An exchange with a rank that was killed mostly fails at once. At times gloo waits on (torch 2.13: once in
    602 kills), and only the process group's limit of hours would end that.
    """
    ranks = torch.distributed.get_world_size()
    if ranks == 1 or not hasattr(os, "pidfd_open"):
        return
    own = torch.tensor([os.getpid()], device=device)
    pids = [torch.zeros_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(pids, own)
    others = {}
    with contextlib.suppress(OSError):  # an older kernel; a rank that has ended fails the next exchange
        for rank, pid in enumerate(pids):
            if int(pid) != os.getpid():
                others[os.pidfd_open(int(pid))] = rank
    if others:
        threading.Thread(target=_end_alone, args=(others,), name="watch-ranks", daemon=True).start()


def _end_alone(others: dict[int, int]) -> None:
    ended, _, _ = select.select(list(others), [], [])
    time.sleep(ALONE_S)
    log.error("Rank %d ended %.0f s ago and this rank still waits for it, so it ends, too.",
              others[ended[0]], ALONE_S)
    logging.shutdown()
    os._exit(EliteError.exit_code)


class Together:
    """The part of the `Engine` protocol that is talk between ranks, over torch's default process group."""

    rank: int
    ranks: int
    device: torch.device

    def on_main(self, work: Callable[[], Returned]) -> Returned | None:
        """Run on rank 0; when that ends in an EliteError, such as a stop, every rank raises it. Together."""
        value: Returned | None = None
        failure: EliteError | None = None
        if self.rank == 0:
            try:
                value = work()
            except EliteError as error:
                failure = error
        kind = type(failure.problems[0] if isinstance(failure, Problems) else failure)
        told = self.share(None if failure is None else (kind, str(failure)))
        if told is not None:
            raise told[0](told[1])
        return value

    def close(self) -> None:
        """Leave the process group, which complains when it is merely dropped."""
        torch.distributed.barrier()  # rank 0 has the store through which the others leave
        torch.distributed.destroy_process_group()

    def total(self, value: float) -> float:
        """Summed over ranks in float64."""
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)

    def share(self, value: Any) -> Any:
        """Rank 0's value everywhere."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
