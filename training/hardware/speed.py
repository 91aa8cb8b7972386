"""Timing bounded by a time limit, and the two measurements that need no torch: numpy matmul and the disk."""

from __future__ import annotations

import errno
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from training.records import Figure

FLOPS = "FLOP/s"
BYTES_PER_S = "bytes/s"
WEIGHTS_PER_S = "weights/s"
MIB = 1 << 20


def seconds_of(work: Callable[[], object], limit_s: float, repeats: int = 7) -> list[float]:
    """Seconds of each call of `work` after one warm-up call, as many as fit in `limit_s`, at most `repeats`,
    at least two: a first call also starts threads and fills caches.

    A warm-up that alone uses up the limit is the measurement: slow work is not run twice.
    """
    end_s = time.perf_counter() + limit_s
    start_s = time.perf_counter()
    work()
    warm_s = time.perf_counter() - start_s
    least = 2 if warm_s < limit_s else 0
    times: list[float] = []
    while len(times) < repeats and (len(times) < least
                                    or time.perf_counter() + min([warm_s, *times]) < end_s):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return times or [warm_s]


def rate(amount: float, times: list[float], unit: str, method: str) -> Figure:
    """`amount` per second as a figure: the median over the repeats, with its spread (None for one).

    >>> rate(100.0, [1.0, 2.0, 4.0], "bytes/s", "example")
    Figure(value=50.0, unit='bytes/s', method='example', repeats=3, spread=1.5)
    """
    median_s = max(statistics.median(times), 1e-9)
    spread = round((max(times) - min(times)) / median_s, 4) if len(times) > 1 else None
    return Figure(value=amount / median_s, unit=unit, method=method, repeats=len(times), spread=spread)


def not_measured(unit: str, reason: str) -> Figure:
    """A figure without a value; `method` says why there is none."""
    return Figure(value=None, unit=unit, method=f"not measured: {' '.join(reason.split())[:200]}", repeats=0)


def matmul_numpy(limit_s: float = 0.2, n: int = 1024) -> Figure:
    """Rate of an (n, n) x (n, n) fp32 product in numpy's BLAS, 2 n^3 FLOP."""
    import numpy

    a = numpy.random.default_rng(0).standard_normal((n, n), dtype=numpy.float32)
    return rate(2.0 * n**3, seconds_of(lambda: a @ a, limit_s), FLOPS, f"numpy matmul, fp32, n={n}")


def disk(folder: Path, limit_s: float = 0.5, size_bytes: int = 32 * MIB) -> dict[str, Figure]:
    """`disk.write` and `disk.read` of the disk under `folder`, through one nameless or removed file.

    Written with fsync; read after the system was asked to drop the pages. A full or read-only disk gives
    figures without a value.
    """
    figures = {name: not_measured(BYTES_PER_S, "no time left") for name in ("disk.write", "disk.read")}
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".elite-speed-") as file:
            block = os.urandom(4 * MIB)
            times = seconds_of(lambda: _write(file.fileno(), block, size_bytes), limit_s, repeats=3)
            figures["disk.write"] = rate(float(size_bytes), times, BYTES_PER_S,
                                         f"{size_bytes // MIB} MiB written with fsync")
            figures["disk.read"] = _read_rate(file.fileno(), size_bytes, limit_s / 2)
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
        if error.errno == errno.ENOSPC:
            reason = f"{folder} has no {size_bytes // MIB} MiB free"
        return {name: not_measured(BYTES_PER_S, reason) for name in figures}
    return figures


def _write(handle: int, block: bytes, size_bytes: int) -> None:
    os.lseek(handle, 0, os.SEEK_SET)
    for _ in range(size_bytes // len(block)):
        done = 0
        while done < len(block):
            done += os.write(handle, block[done:])
    os.fsync(handle)


def _read_rate(handle: int, size_bytes: int, limit_s: float) -> Figure:
    if not hasattr(os, "posix_fadvise"):
        return not_measured(BYTES_PER_S, "this system cannot drop its page cache for one file")

    def read() -> None:
        os.posix_fadvise(handle, 0, size_bytes, os.POSIX_FADV_DONTNEED)
        os.lseek(handle, 0, os.SEEK_SET)
        while os.read(handle, 4 * MIB):
            pass

    return rate(float(size_bytes), seconds_of(read, limit_s, repeats=3), BYTES_PER_S,
                f"{size_bytes // MIB} MiB read after its pages were dropped")
