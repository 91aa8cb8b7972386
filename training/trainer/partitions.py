"""Whole parameters of a ZeRO-3 model while a decoder layer is worked on (read against DeepSpeed 0.19.8).

DeepSpeed hooks every module: parameters are gathered before its forward and released after it, and the same
backward; a trace of those calls is used to fetch ahead. The streamed step calls a layer once per chunk, so
the hooks would gather a layer as often as it has chunks, and release what `GatheredParameters` holds. So they
are off while steps are streamed. The hooks on gradients, which reduce and partition them, stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor


class Partitions:
    """`offload`: the DeepSpeedZeRoOffload of the engine's optimizer."""

    def __init__(self, offload: Any):
        self._offload = offload

    def __call__(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Gather those that are not whole, all in one exchange; they are partitioned again at the end.

        Small parameters stay whole between two updates (stage3_param_persistence_threshold) and are left so.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        absent = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
        return GatheredParameters(absent) if absent else nullcontext()

    def detach(self) -> None:
        """Take DeepSpeed's hooks off the modules and release what they hold."""
        self._offload._remove_module_hooks()
        self._offload.forward_hooks.clear()
        self._offload.backward_hooks.clear()
        self._offload.partition_all_parameters()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """DeepSpeed's hooks back for calls of the model as it is."""
        self._offload.setup_zero_stage3_hooks()
        try:
            yield
        finally:
            self.detach()
