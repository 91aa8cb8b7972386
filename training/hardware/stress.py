"""How much device memory can really be allocated: in one piece and in blocks, never more than is free.

All of it is released again, and the free memory before and after is compared. On Windows and WSL the driver
serves an allocation from host memory when the device's is used up, without an error: there the test stays
below the total, and a block whose fill takes SPILLED_TIMES as long as the first one's counts as refused.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from training.records import Figure

MIB = 1 << 20
BLOCK_BYTES = 256 * MIB
ROUNDS = 2
# Left free: a display driver or another process that asks meanwhile must not be refused.
RESERVE_BYTES = 128 * MIB
# Of the total, kept back by WDDM for the desktop (assumed; free memory it reports may count spilled pages).
WDDM_MARGIN_BYTES = 512 * MIB
# Device memory is filled at 200 GB/s and more, host memory over PCIe at 6-50.
SPILLED_TIMES = 4.0
TIMED_BYTES = 64 * MIB      # a smaller block's fill is mostly its launch
SPILLS = "; the driver here spills into host memory without an error, so each block was timed"


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


def room(free_bytes: int, total_bytes: int, spills: bool) -> int:
    """Bytes the test may take of what is free: a reserve stays, and where memory spills a part of the total.

    >>> room(1000 * MIB, 8192 * MIB, False) // MIB, room(8192 * MIB, 8192 * MIB, True) // MIB
    (984, 7560)
    """
    if spills:
        free_bytes = min(free_bytes, total_bytes - WDDM_MARGIN_BYTES)
    return max(0, free_bytes - min(RESERVE_BYTES, free_bytes // 64))


class Device:
    """One CUDA device while it is tested. `held`: the blocks taken; `spilled`: one was slow to fill."""

    def __init__(self, torch: Any, index: int, spills: bool):
        self.torch, self.index, self.spills = torch, index, spills
        self.held: list[Any] = []
        self.best_s = math.inf
        self.spilled = False

    def free(self) -> tuple[int, int]:
        """Free and total bytes as CUDA tells them."""
        free_bytes, total_bytes = self.torch.cuda.mem_get_info(self.index)
        return int(free_bytes), int(total_bytes)

    def take(self, size: int) -> bool:
        """Allocate `size` bytes and keep them; False when refused, no longer free, spilled, or too small to
        tell where memory spills."""
        if size > self.free()[0] or (self.spills and size < TIMED_BYTES):
            return False
        try:
            self.held.append(self.torch.empty(size, dtype=self.torch.uint8, device=f"cuda:{self.index}"))
        except self.torch.OutOfMemoryError:
            return False
        if self.spills and self._slow(size):
            self.spilled = True
            self.held.pop()
            return False
        return True

    def _slow(self, size: int) -> bool:
        per_byte_s = min(self._fill_s() for _ in range(2)) / size
        self.best_s = min(self.best_s, per_byte_s)
        return per_byte_s > SPILLED_TIMES * self.best_s

    def _fill_s(self) -> float:
        start_s = time.perf_counter()
        self.held[-1].fill_(1)
        self.torch.cuda.synchronize(self.index)
        return time.perf_counter() - start_s

    def fits(self, size: int) -> bool:
        """Whether one piece of `size` bytes can be had; it is given back."""
        got = self.take(size)
        self.release()
        return got

    def release(self) -> None:
        """Give everything back to the driver."""
        self.held.clear()
        self.torch.cuda.empty_cache()


def device_figures(torch: Any, index: int, spills: bool) -> dict[str, Figure]:
    """`allocatable_bytes` (in blocks) and `allocatable_piece_bytes` of a CUDA device; all is released.

    Each is taken twice and the lower counts. `unreleased_bytes`: how much less is free after than before.
    """
    device = Device(torch, index, spills)
    before, _ = device.free()
    pieces, blocks = [], []
    try:
        if spills:
            device.fits(min(BLOCK_BYTES, before // 4))  # how fast memory that is surely the device's fills
        for _ in range(ROUNDS):
            limit_bytes = room(*device.free(), spills)
            pieces.append(largest_piece(device.fits, limit_bytes))
            blocks.append(fill(device.take, limit_bytes, max(BLOCK_BYTES, limit_bytes // 256 // MIB * MIB)))
            device.release()
    finally:
        device.release()
    after, _ = device.free()
    note = f"{SPILLS}; it did spill" if device.spilled else SPILLS if spills else ""
    return {"allocatable_bytes": _lower(blocks, f"allocated in blocks until refused, {_kept()}{note}"),
            "allocatable_piece_bytes": _lower(pieces, f"largest single allocation, {_kept()}{note}"),
            "unreleased_bytes": Figure(value=float(max(0, before - after)), unit="bytes",
                                       method="free memory before the test less free memory after it")}


def _kept() -> str:
    return f"up to {RESERVE_BYTES // MIB} MiB left free, the lower of {ROUNDS}"


def _lower(sizes: list[int], method: str) -> Figure:
    middle = statistics.median(sizes) or 1.0
    return Figure(value=float(min(sizes)), unit="bytes", method=method, repeats=len(sizes),
                  spread=round((max(sizes) - min(sizes)) / middle, 4))


def pinned_limit(torch: Any, ram_total_bytes: int, ram_available_bytes: int) -> Figure:
    """`host.pinned_limit` by trial: all RAM when CUDA pins min(1 GiB, a sixteenth of the free RAM) in one
    piece, else the largest half, quarter ... of it that could be pinned. It is given back at once."""
    size, refused = min(1 << 30, ram_available_bytes // 16) // MIB * MIB, 0
    while size >= MIB:
        try:
            torch.empty(size, dtype=torch.uint8, pin_memory=True)
            break
        except (RuntimeError, MemoryError):
            size, refused = size // 2, size
    if not refused:
        return Figure(value=float(ram_total_bytes), unit="bytes",
                      method=f"all RAM: CUDA pinned {size // MIB:,} MiB of it in a test")
    return Figure(value=float(size if size >= MIB else 0), unit="bytes",
                  method=f"CUDA refused to pin {refused // MIB:,} MiB")
