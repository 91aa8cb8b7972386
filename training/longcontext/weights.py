"""Frozen weights that visit the device one decoder layer at a time.

A layer is visited once forward and once (with recomputation: twice) backward per step, so at long context the
copies are nothing beside the attention, and device memory stops depending on the model's size. The next layer
travels while one is worked on. Trainable parameters and quantization constants stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.longcontext.transfer import Event, Transfer


class StreamedWeights:
    """Takes the frozen weights of `layers` to the host. The layers work only inside `on_device`."""

    def __init__(self, layers: list[nn.Module], device: torch.device, transfer: Transfer):
        self._device, self._transfer = device, transfer
        self._homes: list[list[tuple[nn.Parameter, Tensor]]] = []
        self._coming: dict[int, list[tuple[Tensor, Event]]] = {}
        self.bytes_streamed = 0
        for layer in layers:
            home = [(p, self._to_host(p.data)) for p in layer.parameters() if not p.requires_grad]
            for parameter, host in home:
                parameter.data = host
            self._homes.append(home)

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = self._transfer.empty(tuple(tensor.shape), tensor.dtype)
        host.copy_(tensor)
        return host

    def fetch(self, layer: int) -> None:
        """Begin to bring a layer's weights, unless they are under way or there is no such layer."""
        if not 0 <= layer < len(self._homes) or layer in self._coming:
            return
        self._coming[layer] = []
        for _, host in self._homes[layer]:
            target = torch.empty_like(host, device=self._device, pin_memory=False)
            self._coming[layer].append((target, self._transfer.load(host, target)))
            self.bytes_streamed += host.numel() * host.element_size()

    @contextmanager
    def on_device(self, layer: int, following: int) -> Iterator[None]:
        """The layer's weights in place; `following` is the one to fetch meanwhile, if copies overlap."""
        self.fetch(layer)
        for (parameter, _), (target, event) in zip(self._homes[layer], self._coming.pop(layer), strict=True):
            self._transfer.wait(event)
            parameter.data = target
        if self._transfer.overlap:
            self.fetch(following)
        try:
            yield
        finally:
            for parameter, host in self._homes[layer]:
                parameter.data = host

    def restore(self) -> None:
        """Put all weights back on the device for good."""
        for home in self._homes:
            for parameter, host in home:
                parameter.data = host.to(self._device)
        self._homes = []
