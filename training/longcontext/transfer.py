"""Copies between the device and the host on streams of their own, so that they run beside the computation.

On a device without streams (a CPU), and where copies are not to overlap, a copy is done when the call returns
and an event is None.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Event = Any


# One host allocation. Beyond 32 MiB glibc maps memory of its own, so slabs leave no holes in the heap; and
# PyTorch rounds pinned allocations up to powers of two, which slabs are already.
SLAB_BYTES = 64 << 20
ALIGNMENT = 64


class Transfer:
    """One stream towards the device and one from it. `pinned` host buffers copy without the CPU waiting.
    `overlap` False: copies run on the computation's own stream, and nothing is fetched ahead."""

    def __init__(self, device: torch.device, pinned: bool, overlap: bool = True):
        self.device = device
        self.pinned = pinned and device.type == "cuda"
        self.overlap = overlap
        self._streams = device.type == "cuda" and overlap
        self._down = torch.cuda.Stream(device) if self._streams else None
        self._up = torch.cuda.Stream(device) if self._streams else None
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self.bytes_held = 0  # of all buffers cut so far

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A host buffer cut from a slab: to be kept and reused, since slabs are only freed as a whole."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > self._slab.numel():
            self._slab, self._used = self._allocate(max(size, SLAB_BYTES)), 0
        found = self._slab[self._used:self._used + size].view(dtype).view(tuple(shape))
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        self.bytes_held += size
        return found

    def _allocate(self, size: int) -> Tensor:
        """When no more memory can be pinned, ordinary memory from then on, with a warning."""
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self.pinned = False
                log.warning("No more host memory can be pinned (%s); the rest goes to ordinary memory, whose "
                            "copies do not run beside the computation. `ulimit -l` is the usual limit.",
                            str(error).splitlines()[0][:120])
        return torch.empty(size, dtype=torch.uint8)

    def save(self, source: Tensor, target: Tensor) -> Event:
        """Copy device -> host; the event ends it. The source may be dropped at once."""
        if not self._streams:
            target.copy_(source)
            return None
        return self._copy(self._down, source, target, source)

    def load(self, source: Tensor, target: Tensor, after: Event = None) -> Event:
        """Copy host -> device once `after` has happened. Wait for the event before reading `target`."""
        if not self._streams:
            target.copy_(source)
            return None
        if after is not None:
            self._up.wait_event(after)  # type: ignore[union-attr]
        return self._copy(self._up, source, target, target)

    def _copy(self, stream: Any, source: Tensor, target: Tensor, on_device: Tensor) -> Event:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        on_device.record_stream(stream)
        return event

    def wait(self, event: Event) -> None:
        """Let the computation wait for a copy; the CPU goes on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    @staticmethod
    def finish(event: Event) -> None:
        """Let the CPU wait for a copy, before it reads or reuses the host buffer."""
        if event is not None:
            event.synchronize()
