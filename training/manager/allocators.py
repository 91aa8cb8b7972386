"""Environment variables by which allocators are told how to take memory, read once when a process starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# torch 2.13 reads PYTORCH_ALLOC_CONF; the CUDA name is the older one and would win.
GPU_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
GPU = {
    "default": "expandable_segments:True",
    "expandable": "expandable_segments:True",
    # Blocks above 512 MiB (activations of a whole window) are not cut up, so they can be given back. Idle
    # ones are collected from 80 % of device.memory_share on (PyTorch's own example); without it, never.
    "split": "max_split_size_mb:512,garbage_collection_threshold:0.8",
}
# glibc's own threshold starts at 128 KiB and rises to 32 MiB with what is freed; a set one stays.
CPU = {"mapped": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}


def allocator_environment(config: Mapping[str, Any], base_env: Mapping[str, str]) -> dict[str, str]:
    """The variables for `device.allocator`. What the user has set in the shell stays.

    >>> allocator_environment({"device.kind": "cuda", "device.allocator": "expandable"}, {})
    {'PYTORCH_ALLOC_CONF': 'expandable_segments:True'}
    >>> allocator_environment({"device.kind": "cpu", "device.allocator": "default"}, {})
    {}
    """
    kind = config["device.allocator"]
    if config["device.kind"] == "cpu":
        wanted = CPU.get(kind, {})
    elif any(name in base_env for name in GPU_VARIABLES):
        wanted = {}
    else:
        wanted = {"PYTORCH_ALLOC_CONF": GPU[kind]}
    return {name: value for name, value in wanted.items() if name not in base_env}
