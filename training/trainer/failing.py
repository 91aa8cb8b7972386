"""What an error that ends a step is. Without torch, whose classes are known by their texts."""

from __future__ import annotations

# torch.OutOfMemoryError; CUDA's runtime, cuBLAS and cuDNN; torch's and glibc's allocators of host memory;
# NCCL; bitsandbytes.
OUT_OF_MEMORY = ("out of memory", "outofmemory", "alloc_failed", "can't allocate memory",
                 "cannot allocate memory", "bad_alloc", "defaultcpuallocator", "out_of_memory",
                 "cuda_error_out_of_memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the host's memory ran out. Without torch's own classes,
    whose texts it knows."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)
