"""What ranks do together, whichever engine steps them: start, agree on values, let rank 0 work, leave."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch

from training.errors import EliteError, Problems
from training.trainer.engine import Returned

# Other ranks wait while rank 0 evaluates or exports; NCCL's own limit of 10 minutes is too short for that.
WAIT = datetime.timedelta(hours=6)


def backend_of(device: torch.device) -> str:
    """The library that carries tensors between ranks on such devices."""
    return "nccl" if device.type == "cuda" else "gloo"


def join(device: torch.device) -> tuple[int, int]:
    """Join the process group that the launcher's environment describes; (rank, ranks). Together."""
    torch.distributed.init_process_group(backend_of(device), timeout=WAIT)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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
