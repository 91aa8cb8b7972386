"""Warm-up, allocator, memory pool, clipping and kernel choice of a run, each a choice with its reason.

What does nothing on a machine is chosen off and says why. `trainer/device.py` applies these inside the
trainer, `manager/allocators.py` before it starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from training.planning.tuning import cards
from training.records import Choice, HardwareProfile

WARMUP_STEPS = 2
WARMUP_S = 60.0                 # a warm-up longer than this costs more than the one step it makes shorter
POOL_SHARE = 0.9                # of the planned bytes: the plan's own error is a few per cent
DEFRAGMENT_STEPS = 50
CLIP_NORM = 1.0


class UltraAdvancedOptimizer:
    """Warm-up, allocator, pool, clipping and kernel choice for a machine. `user`: keys that were set."""

    def __init__(self, profile: HardwareProfile, user: Mapping[str, Any] | None = None):
        self.profile, self.user = profile, dict(user or {})
        self.system = profile.system.lower()
        self.gpus = cards.chosen(profile, self.user)[0]

    def choices(self, values: Mapping[str, Any], window_s: float = math.inf) -> dict[str, Choice]:
        """Every choice of this class, for a configuration so far. `window_s`: a micro-batch's seconds,
        infinite when not known."""
        cuda, streamed = values["device.kind"] == "cuda", bool(values["stream.chunk_tokens"])
        steps = self.warmup(cuda, streamed, window_s)
        warmed = bool(self.user.get("device.warmup_steps", steps.value))
        allocator = self.allocator(cuda)
        kind = str(self.user.get("device.allocator", allocator.value))
        return {"device.warmup_steps": steps, "device.allocator": allocator,
                "device.memory_share": self.memory_share(cuda, kind),
                "device.pool_share": self.pool_share(cuda, streamed, warmed),
                "device.defragment_steps": self.defragment_steps(cuda, kind),
                "device.cudnn_autotune": self.cudnn_autotune(cuda),
                "device.matmul_precision": self.matmul_precision(cuda, str(values["model.dtype"])),
                "training.clip_norm": self.clip_norm()}

    def warmup(self, cuda: bool, streamed: bool, window_s: float) -> Choice:
        """Steps on made-up windows before the first real one."""
        if not cuda:
            return _off(0, "a CPU loads and tunes no kernels at their first call")
        if streamed:
            return _off(0, "the comparison with the plain step before the run calls every kernel once")
        if math.isfinite(window_s) and WARMUP_STEPS * window_s > WARMUP_S:
            return _off(0, f"{WARMUP_STEPS} steps of {window_s:,.0f} s cost more than the first one gains")
        return Choice(WARMUP_STEPS, "derived",
                      "kernels are loaded at their first call, and what does not fit shows at once")

    def allocator(self, cuda: bool) -> Choice:
        """How device memory is taken from the system; on a CPU, how malloc takes it.

        Mapping blocks of 1 MiB and more one by one was measured on a 5 M Llama: a plain step's memory grew by
        275 MiB in place of 416, a streamed one's by 147 in place of 244, each with more CPU time, most of it
        the kernel's, which clears the pages again at every step.
        """
        if not cuda:
            return Choice("default", "preset", "mapping each block by itself (mapped) takes a third less "
                                               "memory and more time")
        if self.system.startswith("windows"):
            return Choice("split", "derived", "expandable segments are not made for Windows; large blocks "
                                              "are kept whole")
        return Choice("expandable", "derived", "segments that grow leave no holes as tensor sizes change")

    def memory_share(self, cuda: bool, allocator: str) -> Choice:
        """The cap on a process's share of its GPU."""
        if not cuda:
            return _off(0.0, "a CPU process is limited by its system (cgroups, ulimit -v)")
        spills = self.system.startswith("windows") or "wsl" in self.system
        if not spills and allocator != "split":
            return _off(0.0, "this system refuses what does not fit by itself")
        share = min((gpu.free_bytes / gpu.total_bytes for gpu in self.gpus if gpu.total_bytes), default=1.0)
        share = max(0.1, math.floor(100 * share) / 100)
        why = ("beyond it Windows would lend host memory without an error" if spills else
               "collecting idle blocks needs a limit to act on")
        return Choice(share, "measured", f"{share:.0%} is free; {why}")

    def pool_share(self, cuda: bool, streamed: bool, warmed: bool) -> Choice:
        """The share of the planned bytes that is taken at the start."""
        if not cuda:
            return _off(0.0, "a CPU's pages belong to a process only once they are written")
        if streamed:
            return _off(0.0, "copies run on streams of their own, which cannot use another stream's pool")
        if warmed:
            return _off(0.0, "the warm-up takes what a step takes, and the allocator keeps it")
        return Choice(POOL_SHARE, "derived", "no warm-up shows what does not fit; this does, at the start")

    def defragment_steps(self, cuda: bool, allocator: str) -> Choice:
        """Updates between two looks at the gap between reserved and allocated memory."""
        if not cuda:
            return _off(0, "malloc gives large blocks back to the system by itself")
        if allocator != "split":
            return _off(0, "expandable segments have no holes that emptying the cache would close")
        return Choice(DEFRAGMENT_STEPS, "preset", "fixed segments leave holes; the cache is emptied when a "
                                                  "fifth of what is reserved lies idle")

    def cudnn_autotune(self, cuda: bool) -> Choice:
        """cuDNN's trial of convolution algorithms."""
        return _off(False, "a decoder has no convolutions to tune" if cuda else "cuDNN runs on GPUs")

    def matmul_precision(self, cuda: bool, dtype: str) -> Choice:
        """What the factors of float32 matrix products are rounded to."""
        lowest = cards.weakest(self.gpus)
        if not cuda:
            return _off("highest", "a CPU has no TF32, and less would be bf16")
        if lowest < 8:
            return _off("highest", f"compute capability {lowest:g} has no TF32 (8.0 has)")
        if dtype == "float32":
            return Choice("highest", "derived", "float32 was asked for, so its products stay float32")
        return Choice("high", "derived", "float32 adapters multiply in TF32, whose mantissa of 10 bits is no "
                                         f"less than {dtype}'s")

    def clip_norm(self) -> Choice:
        """The norm that gradients are scaled down to. Fixed: adaptive clipping (arXiv:2102.06171) was made
        for networks without normalization layers."""
        return Choice(CLIP_NORM, "preset", "GPT-3's (arXiv:2005.14165, appendix B): one bad window cannot "
                                           "undo many good ones")


def _off(value: Any, why: str) -> Choice:
    return Choice(value, "derived", f"not applicable here, because {why}")
