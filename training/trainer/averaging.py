"""An average of the weights of the run's last updates, which is evaluated beside the last weights at its end.

ema  each applied update keeps `training.ema_decay` of the average and adds the rest of the new weights
     (Polyak averaging with exponential weights, as Tarvainen & Valpola 2017, arXiv:1703.01780, section 2)
swa  all updates count the same (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1; there the learning rate
     stays high meanwhile, here it follows its schedule down)

The arithmetic is torch's own (torch.optim.swa_utils).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from training.settings import Config
from training.trainer.engine import Captured

PREFIX = "average/weights/"   # what follows is no parameter's name, so that no optimizer takes it for its own
COUNT = "average/updates"


class Average:
    """A running average of the trainable weights, by parameter name, on the host.

    In float32 or wider, 4 bytes a weight; on the host because a device's memory is planned to the last GiB
    and averaging begins when most of a run is over. Under ZeRO-1 and 2 rank 0's module has whole weights
    after each step, of `model.dtype`: in 16 bits the average is the float32 one of those.
    """

    def __init__(self, trainable: Mapping[str, Parameter], kind: str, decay: float, start: float):
        """`kind`: ema or swa. `decay`: of ema. `start`: share of the updates before averaging begins."""
        self._trainable, self._start = trainable, start
        self._add: Callable[..., None] = (
            get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn())
        self.updates = 0
        self.weights: dict[str, Tensor] = {}

    def update(self, step: int, steps: int) -> None:
        """After update `step` (from 1) of `steps` was applied: take its weights in, if averaging has begun.

        Once begun it goes on, even where `steps` grew meanwhile. The first weights are taken as they are.
        """
        if not self.updates and step <= self._start * steps:
            return
        for name, parameter in self._trainable.items():
            kind = torch.promote_types(parameter.dtype, torch.float32)
            if self.updates:
                now = parameter.detach().to("cpu", kind)
                self._add([self.weights[name]], [now], self.updates)
            else:
                self.weights[name] = parameter.detach().to("cpu", kind, copy=True)
        self.updates += 1

    def capture(self, captured: Captured) -> None:
        """Add copies to a checkpoint: tensors `average/weights/<name>` and the number `average/updates`."""
        captured.optimizer |= {PREFIX + name: value.clone() for name, value in self.weights.items()}
        captured.numbers[COUNT] = self.updates

    def restore(self, captured: Captured) -> None:
        """Go on from a checkpoint, bit for bit; from one before averaging began, not begun."""
        self.updates = int(captured.numbers.get(COUNT, 0))
        self.weights = {name: captured.optimizer[PREFIX + name].clone()
                        for name in (self._trainable if self.updates else ())}


def build(trainable: Mapping[str, Parameter], config: Config) -> Average | None:
    """The average that training.averaging asks for; None where it asks for none."""
    kind = config["training.averaging"]
    if kind == "none":
        return None
    return Average(trainable, kind, config["training.ema_decay"], config["training.averaging_start"])
