"""Plain Python behind the small interface that the loop drives; `zero.py` has DeepSpeed behind the same one.

An engine owns the model's placement, the optimizer, and the talk between processes. The loop hands it the
summed loss of a micro-batch, already divided by the target tokens of the whole update, and gets a gradient
norm back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from training.trainer import gradients, optimizers
from training.trainer.device import Defragmenter

log = logging.getLogger(__name__)

Returned = TypeVar("Returned")
Gather = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]
# A float16 loss scale starts at 2^16 and halves at each overflow, so a healthy run may skip 16 updates in a
# row.
FLOAT16_PATIENCE = 20
PATIENCE = 3
UPDATES = "engine/updates"


@dataclass(kw_only=True)
class Captured:
    """What a checkpoint keeps: fp32 weights and optimizer state by parameter name. Empty off rank 0."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """What the loop needs. Methods marked *together* must be called by all ranks in the same order."""

    rank: int
    ranks: int
    device: torch.device
    patience: int
    evaluates_together: bool
    captures_alone: bool  # rank 0 needs no other for `capture`, also when a step was broken off

    def loss(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Run `work(model, *tensors)`. Together."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of this rank's share of the update; `last`: its last micro-batch. Together."""

    def step(self, rate: float) -> float | None:
        """Clip, update and clear; the norm before clipping, or None when it was not finite. Together."""

    def discard(self) -> None:
        """In place of `step`: drop the gradients of this update; nothing else of it remains. Together."""

    def on_model(self, work: Callable[[Module], Returned]) -> Returned | None:
        """Run `work(model)` in evaluation mode: on rank 0, or on all if `evaluates_together`. Together."""

    def with_whole_weights(self, work: Callable[[], Returned], everything: bool) -> Returned | None:
        """Run `work` on rank 0 with the trainable (or all) weights in place. Together."""

    def capture(self) -> Captured:
        """Weights and optimizer state for a checkpoint. Together."""

    def restore(self, captured: Captured) -> None:
        """Put an optimizer state back; the weights were loaded into the model before. Together."""

    def streamed(self) -> Gather | None:
        """Get ready for decoder layers that are called chunk by chunk, in forward and backward.

        Returns what makes parameters whole for a while; None where they always are. Together.
        """

    def aside(self) -> AbstractContextManager[Any]:
        """After `streamed`: inside, the model can be called as it is. Together, if partitioned."""

    def close(self) -> None:
        """Leave the other processes. Together."""

    def total(self, value: float) -> float:
        """The sum of `value` over ranks. Together."""

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank. Together."""


class PlainEngine:
    """One process, one device, no DeepSpeed."""

    rank = 0
    ranks = 1
    evaluates_together = False
    captures_alone = True

    def __init__(self, model: Module, trainable: Mapping[str, Parameter], config: Mapping[str, Any],
                 device: torch.device):
        self.device = device
        self.model = model
        self._trainable = trainable
        self._clip_norm = config["training.clip_norm"]
        self._clip_units = config["training.adaptive_clip"]
        self._inputs_first = gradients.inputs_first(model, trainable) if self._clip_units else frozenset()
        self._noise = config["training.gradient_noise"]
        self._seed = config["run.seed"]
        self._updates = 0  # calls of `step` in the whole run: what the noise is drawn from
        self._optimizer = optimizers.build(trainable, config)
        self._defragmenter = Defragmenter(config, device)
        scaled = config["model.dtype"] == "float16"
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.patience = FLOAT16_PATIENCE if scaled else PATIENCE

    def loss(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`work(model, *tensors)`; the loader has set the type the model computes in."""
        return work(self.model, *tensors)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients."""
        self._scaler.scale(loss).backward()

    def step(self, rate: float) -> float | None:
        """One update, or none when the norm is not finite."""
        optimizers.set_rate(self._optimizer, rate)
        self._scaler.unscale_(self._optimizer)
        norm = self._shape_gradients()
        finite = torch.isfinite(torch.tensor(norm)).item()
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)  # skips by itself on inf or NaN, which it saw in `unscale_`
            self._scaler.update()
        elif finite:
            self._optimizer.step()
        self._updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        self._defragmenter.after_update()
        return norm if finite else None

    def _shape_gradients(self) -> float:
        """Noise, clipping by unit, then by the norm of all; that norm before its clipping."""
        if self._noise:
            gradients.add_noise(self._trainable, self._noise, self._updates, self._seed)
        if self._clip_units:
            gradients.clip_units(self._trainable, self._clip_units, self._inputs_first)
        limit = self._clip_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self._trainable.values(), limit))

    def discard(self) -> None:
        """Drop the gradients; the loss scale is only moved by `step`."""
        self._optimizer.zero_grad(set_to_none=True)

    def on_model(self, work: Callable[[Module], Returned]) -> Returned | None:
        """Run `work(model)` without gradients, in evaluation mode."""
        self.model.eval()
        try:
            with torch.no_grad():
                return work(self.model)
        finally:
            self.model.train()

    def with_whole_weights(self, work: Callable[[], Returned], everything: bool) -> Returned | None:
        """Run `work`."""
        return work()

    def capture(self) -> Captured:
        """Copies on the CPU."""
        weights = {name: parameter.detach().to("cpu", copy=True).contiguous()
                   for name, parameter in self._trainable.items()}
        tensors, numbers = optimizers.state_of(self._optimizer, self._trainable)
        if self._scaler.is_enabled():
            numbers |= {f"scaler/{key}": value for key, value in self._scaler.state_dict().items()}
        if self._noise:
            numbers[UPDATES] = self._updates
        return Captured(weights=weights, optimizer=tensors, numbers=numbers)

    def restore(self, captured: Captured) -> None:
        """Put the optimizer's, the loss scale's and the noise's state back."""
        numbers = dict(captured.numbers)
        self._updates = numbers.pop(UPDATES, 0)
        scaler = {name.split("/", 1)[1]: numbers.pop(name) for name in captured.numbers
                  if name.startswith("scaler/")}
        optimizers.restore(self._optimizer, self._trainable, captured.optimizer, numbers)
        if scaler and self._scaler.is_enabled():
            self._scaler.load_state_dict(scaler)

    def streamed(self) -> Gather | None:
        """Nothing to gather."""
        return None

    def aside(self) -> AbstractContextManager[Any]:
        """Nothing to do."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to leave."""

    def total(self, value: float) -> float:
        """The value itself."""
        return value

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value
