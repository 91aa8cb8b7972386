"""The device.* choices inside the trainer: precision, limits, warm-up, memory pool, defragmentation.

None of them changes what is computed on a CPU, or a weight anywhere. Shapes: B windows, S tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from training.records import GIB
from training.settings import most_targets
from training.trainer.loss import IGNORED, causal_loss
from training.trainer.resources import context_bytes

log = logging.getLogger(__name__)

IDLE_SHARE = 0.2                # of reserved memory, from which on emptying the cache is worth its calls
MARGIN_BYTES = 256 << 20        # left free by the pool for what libraries take outside the allocator


def apply(config: Mapping[str, Any], device: torch.device) -> None:
    """Set what holds for the whole process, before a model is loaded."""
    torch.set_float32_matmul_precision(config["device.matmul_precision"])
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = config["device.cudnn_autotune"]
    if config["device.memory_share"]:
        torch.cuda.set_per_process_memory_fraction(config["device.memory_share"], device)


def begin(config: Mapping[str, Any], model: Module, trainable: Mapping[str, Parameter], device: torch.device,
          planned_bytes: int) -> list[str]:
    """Warm up and take the pool, with the model loaded and no engine made yet. What was done, in lines.

    Memory that does not suffice for the warm-up raises here, hours before it would.
    """
    told = [warm_up(config, model, trainable, device), take_pool(config, device, planned_bytes)]
    return [line for line in told if line]


def warm_up(config: Mapping[str, Any], model: Module, trainable: Mapping[str, Parameter],
            device: torch.device) -> str:
    """Forward and backward on windows of the planned shape. Weights, gradients and random state stay."""
    steps = config["device.warmup_steps"]
    if not steps or config["stream.chunk_tokens"]:
        return ""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for step in range(steps):
            ids, labels = _window(config, model, step)
            summed, targets = causal_loss(model, ids.to(device), labels.to(device), None,
                                          config["training.loss_chunk_tokens"])
            (summed / max(1, targets)).backward()
            for parameter in trainable.values():
                parameter.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return f"warmed up with {steps} step{'s' if steps != 1 else ''} on made-up windows"


def _window(config: Mapping[str, Any], model: Module, step: int) -> tuple[Tensor, Tensor]:
    """Random ids (B, S) and labels, as many at the end as the window with the most targets has. Random, since
    experts are chosen by token."""
    shape = (config["training.micro_batch"], config["dataset.context_tokens"])
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(embeddings.num_embeddings, shape, generator=generator)
    labels = ids.clone()
    labels[:, :shape[1] - most_targets(config)] = IGNORED
    return ids, labels


def take_pool(config: Mapping[str, Any], device: torch.device, planned_bytes: int) -> str:
    """Take device.pool_share of the planned bytes in one piece and give it to the allocator's cache.

    Less is taken, and a warning given, where less is free: the plan may still be right, another process's
    memory may come free, and a step that needs more says so itself.
    """
    share = config["device.pool_share"]
    if not share or device.type != "cuda":
        return ""
    held = torch.cuda.memory_reserved(device) + context_bytes(device)
    wanted = int(share * planned_bytes) - held
    free = torch.cuda.mem_get_info(device)[0] - MARGIN_BYTES
    if wanted > free:
        log.warning("The plan takes %.2f GiB more of %s and %.2f GiB is free: another process may hold it.",
                    wanted / GIB, device, max(0, free) / GIB)
    size = min(wanted, free)
    if size <= 0:
        return ""
    try:
        block = torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        log.warning("%.2f GiB cannot be taken in one piece on %s; the allocator grows as it needs.",
                    size / GIB, device)
        return ""
    del block
    return f"took {size / GIB:.2f} GiB of {device} for the steps to come"


class Defragmenter:
    """Empties the allocator's cache every device.defragment_steps updates, if enough of it lies idle."""

    def __init__(self, config: Mapping[str, Any], device: torch.device):
        self._every = config["device.defragment_steps"] if device.type == "cuda" else 0
        self._device = device
        self._updates = 0

    def after_update(self) -> bool:
        """Count one update; whether the cache was emptied."""
        self._updates += 1
        if not self._every or self._updates % self._every:
            return False
        reserved, used = torch.cuda.memory_reserved(self._device), torch.cuda.memory_allocated(self._device)
        if reserved - used < IDLE_SHARE * reserved:
            return False
        torch.cuda.empty_cache()
        log.info("gave back %.2f GiB of idle device memory",
                 (reserved - torch.cuda.memory_reserved(self._device)) / GIB)
        return True
