"""Memory of this process: now, and at most."""

from __future__ import annotations

import os
from pathlib import Path

import torch


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
    """What stands beside the prediction: the GPU allocator's peak reserve, or the peak resident memory."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident_bytes()
