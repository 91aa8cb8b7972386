"""Memory of this process: now, and at most."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CONTEXT_BYTES = 1 << 30


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The highest resident memory (VmHWM: `ru_maxrss` would count the parent's from before exec)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return resident_bytes()


def reset_peak(device: torch.device) -> bool:
    """Let `measured_bytes` count from now on; False where the system does not allow it (then it never falls).

    On a GPU cached blocks are given back first. On a CPU Linux sets VmHWM to the resident memory now
    (proc(5), /proc/[pid]/clear_refs, value 5).
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def device_peak_bytes(device: torch.device) -> int:
    """Most bytes allocated on the GPU so far; on the CPU the resident memory now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def context_bytes(device: torch.device) -> int:
    """What a GPU holds beyond the allocator's reserve, up to `CONTEXT_BYTES`: more is another process's."""
    free, total = torch.cuda.mem_get_info(device)
    return min(max(0, total - free - torch.cuda.memory_reserved(device)), CONTEXT_BYTES)


def measured_bytes(device: torch.device, pooled: bool = False) -> int:
    """What stands beside the prediction: the GPU's reserve and context at most, or the peak resident memory.

    `pooled`: the reserve was taken ahead (device.pool_share) and tells nothing, so tensors are counted.
    """
    if device.type != "cuda":
        return peak_resident_bytes()
    peak = torch.cuda.max_memory_allocated if pooled else torch.cuda.max_memory_reserved
    return peak(device) + context_bytes(device)
