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


def device_peak_bytes(device: torch.device) -> int:
    """Most bytes allocated on the GPU so far; on the CPU the resident memory now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def measured_bytes(device: torch.device) -> int:
    """What stands beside the prediction: the GPU's reserve and context at most, or the peak resident memory.

    The context is what the GPU holds beyond the allocator's reserve, up to `CONTEXT_BYTES`: more than that is
    another process's.
    """
    if device.type != "cuda":
        return peak_resident_bytes()
    free, total = torch.cuda.mem_get_info(device)
    context = min(max(0, total - free - torch.cuda.memory_reserved(device)), CONTEXT_BYTES)
    return torch.cuda.max_memory_reserved(device) + context
