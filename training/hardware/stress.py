"""How much device memory can really be allocated: in one piece and in blocks, never more than is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.records import Figure

MIB = 1 << 20
BLOCK_BYTES = 256 * MIB
SPILLS = ("; on Windows and WSL the driver spills into host memory without an error, so the true limit may "
          "be lower")


def largest_piece(fits: Callable[[int], bool], free_bytes: int, step_bytes: int = 16 * MIB) -> int:
    """The largest multiple of `step_bytes` up to `free_bytes` that `fits`, by halving.

    >>> largest_piece(lambda size: size <= 100 * MIB, 1000 * MIB) // MIB
    96
    """
    low, high = 0, free_bytes // step_bytes
    if high and fits(high * step_bytes):
        return high * step_bytes
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step_bytes) else (low, middle)
    return low * step_bytes


def fill(take: Callable[[int], bool], free_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Bytes held when blocks are taken until one is refused, in falling sizes; never more than `free_bytes`.

    `take` keeps the block and answers whether it got it.
    """
    held = 0
    while block_bytes >= MIB:
        while held + block_bytes <= free_bytes and take(block_bytes):
            held += block_bytes
        block_bytes //= 4
    return held


def device_figures(torch: Any, index: int, spills: bool) -> dict[str, Figure]:
    """`allocatable_bytes` (in blocks) and `allocatable_piece_bytes` of a CUDA device; all is released."""
    free_bytes, _ = torch.cuda.mem_get_info(index)
    held: list[Any] = []

    def take(size: int) -> bool:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}"))
        except torch.OutOfMemoryError:
            return False
        return True

    def fits(size: int) -> bool:
        got = take(size)
        release()
        return got

    def release() -> None:
        held.clear()
        torch.cuda.empty_cache()

    try:
        piece = largest_piece(fits, free_bytes)
        blocks = fill(take, free_bytes, max(BLOCK_BYTES, free_bytes // 256 // MIB * MIB))
    finally:
        release()
    note = SPILLS if spills else ""
    return {"allocatable_bytes": Figure(value=float(blocks), unit="bytes",
                                        method=f"allocated in blocks until refused{note}"),
            "allocatable_piece_bytes": Figure(value=float(piece), unit="bytes",
                                              method=f"largest single allocation{note}")}
