"""The store of what the backward pass needs again: layer inputs, attention outputs, the running gradient.

Entries are tensors under a key. Places: on the device, in host memory (pinned or not), or in one unnamed
file, which disappears with the process however it ends. Host buffers and file ranges are reused, so that
after one step nothing is allocated any more (pinning 16 GB takes seconds).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from training.longcontext.errors import StoreFull, StreamError
from training.longcontext.transfer import Event, Transfer

Key = Hashable
# Writes under way at once: each holds a host copy until it is in the file.
WRITES_AHEAD = 4


class Store(Protocol):
    """What a step needs of a place."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a copy (on the device: the tensor itself)."""

    def fetch(self, key: Key) -> None:
        """Begin to bring it to the device, if it is there and not under way."""

    def get(self, key: Key) -> Tensor:
        """The tensor on the device; it stays in the store."""

    def drop(self, key: Key) -> None:
        """Forget it."""

    def clear(self) -> None:
        """Forget everything."""

    def __contains__(self, key: Key) -> bool: ...


class DeviceStore:
    """Keeps references."""

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep the tensor."""
        self._held[key] = tensor

    def fetch(self, key: Key) -> None:
        """It is there already."""

    def get(self, key: Key) -> Tensor:
        """The tensor itself."""
        return self._held[key]

    def drop(self, key: Key) -> None:
        """Let go."""
        self._held.pop(key, None)

    def clear(self) -> None:
        """Let go of all."""
        self._held.clear()

    def __contains__(self, key: Key) -> bool:
        return key in self._held


class _Entry(NamedTuple):
    buffer: Tensor
    saved: Event


class HostStore:
    """Copies in host memory; a fetched entry travels on its own stream."""

    def __init__(self, device: torch.device, transfer: Transfer):
        self._device, self._transfer = device, transfer
        self._entries: dict[Key, _Entry] = {}
        self._coming: dict[Key, tuple[Tensor, Event]] = {}
        self._free: dict[tuple[Any, ...], list[_Entry]] = defaultdict(list)

    def put(self, key: Key, tensor: Tensor) -> None:
        """Copy down."""
        self.drop(key)
        tensor = tensor.contiguous()
        shelf = self._free[(tuple(tensor.shape), tensor.dtype)]
        buffer = shelf.pop().buffer if shelf else self._transfer.empty(tuple(tensor.shape), tensor.dtype)
        self._entries[key] = _Entry(buffer, self._transfer.save(tensor, buffer))

    def fetch(self, key: Key) -> None:
        """Copy up, if copies overlap."""
        if self._transfer.overlap:
            self._bring(key)

    def _bring(self, key: Key) -> None:
        if key in self._entries and key not in self._coming:
            buffer, saved = self._entries[key]
            target = torch.empty(buffer.shape, dtype=buffer.dtype, device=self._device)
            self._coming[key] = target, self._transfer.load(buffer, target, saved)

    def get(self, key: Key) -> Tensor:
        """The copy on the device."""
        self._bring(key)
        target, event = self._coming.pop(key)
        self._transfer.wait(event)
        return target

    def drop(self, key: Key) -> None:
        """Its buffer is free for the next entry: copies into it wait for the computation that read it."""
        self._coming.pop(key, None)
        if key in self._entries:
            entry = self._entries.pop(key)
            self._free[(tuple(entry.buffer.shape), entry.buffer.dtype)].append(entry)

    def clear(self) -> None:
        """Free all buffers for reuse."""
        for key in list(self._entries):
            self.drop(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries


class MainStore(HostStore):
    """For a CPU, whose memory is the device: entries are handed out as they lie.

    Copies, not references: kept among a step's short-lived tensors they would tear holes into the heap (317
    MiB of growth instead of 266 for 16,384 tokens of a small model).
    """

    def fetch(self, key: Key) -> None:
        """It is there already."""

    def get(self, key: Key) -> Tensor:
        """The entry itself; its memory is reused once it is dropped."""
        return self._entries[key].buffer.data  # with a version of its own: views of a slab share theirs


class _Range(NamedTuple):
    start: int
    size: int
    shape: torch.Size
    dtype: torch.dtype
    written: Future[None]


class DiskStore:
    """Ranges of one unlinked file, written and read ahead by a thread; without `overlap` each write and each
    read is waited for. Raises StoreFull when the disk is."""

    def __init__(self, device: torch.device, directory: str, overlap: bool = True):
        self._device, self._folder = device, directory or None
        self._ahead = WRITES_AHEAD if overlap else 0
        self._directory = directory or tempfile.gettempdir()
        self._open()

    def _open(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="streamed-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StreamError(f"The input store cannot be opened in {self._directory}: "
                              f"{error.strerror}.") from error
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="input-store")
        self._ranges: dict[Key, _Range] = {}
        self._coming: dict[Key, Future[Tensor]] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._writing: deque[Future[None]] = deque()

    def put(self, key: Key, tensor: Tensor) -> None:
        """Copy to host memory now, to the file soon; an earlier write's failure is raised here."""
        self.drop(key)
        host = tensor.detach().to("cpu").contiguous()
        size = host.numel() * host.element_size()
        start = self._room(size)
        raw = _bytes_of(host)
        written = self._worker.submit(self._write, start, raw)
        self._ranges[key] = _Range(start, size, host.shape, host.dtype, written)
        self._writing.append(written)
        if len(self._writing) > self._ahead:
            self._done(self._writing.popleft())

    def _room(self, size: int) -> int:
        if self._free[size]:
            return self._free[size].pop()
        start, self._end = self._end, self._end + size
        try:
            os.posix_fallocate(self._file.fileno(), start, max(size, 1))
        except OSError as error:
            self._fail(error)
        return start

    def _fail(self, error: OSError) -> NoReturn:
        self.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StreamError(f"The input store in {self._directory} failed: {error.strerror}.") from error
        raise StoreFull(f"No space is left in {self._directory} for layer inputs: {self._end:,} bytes were "
                        "asked for so far. Free some, name another folder, or keep fewer layer "
                        "inputs.") from error

    def _write(self, start: int, raw: memoryview) -> None:
        done = 0
        while done < len(raw):
            done += os.pwrite(self._file.fileno(), raw[done:], start + done)

    def fetch(self, key: Key) -> None:
        """Read ahead, if copies overlap."""
        if self._ahead:
            self._begin(key)

    def _begin(self, key: Key) -> None:
        if key in self._ranges and key not in self._coming:
            self._coming[key] = self._worker.submit(self._read, self._ranges[key])

    def _read(self, held: _Range) -> Tensor:
        host = torch.empty(held.shape, dtype=held.dtype)
        raw, done = _bytes_of(host), 0
        while done < len(raw):
            count = os.preadv(self._file.fileno(), [raw[done:]], held.start + done)
            if not count:
                raise OSError(errno.EIO, "the file is shorter than it was")
            done += count
        return host

    def get(self, key: Key) -> Tensor:
        """Wait for the write, then for the read."""
        self._done(self._ranges[key].written)
        self._begin(key)
        found: Tensor = self._done(self._coming.pop(key))
        return found.to(self._device)

    def _done(self, work: Future[Any]) -> Any:
        try:
            return work.result()
        except OSError as error:
            self._fail(error)

    def drop(self, key: Key) -> None:
        """Free its range, once nothing is under way in it: the one thread works in order."""
        self._coming.pop(key, None)
        if key in self._ranges:
            held = self._ranges.pop(key)
            self._free[held.size].append(held.start)

    def clear(self) -> None:
        """Free all ranges for reuse; a store that failed begins a new file."""
        if self._file.closed:
            self._open()
        for key in list(self._ranges):
            self.drop(key)

    def close(self) -> None:
        """Remove the file."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._ranges


def _bytes_of(host: Tensor) -> memoryview:
    raw: Any = host.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def build(place: str, device: torch.device, transfer: Transfer, directory: str) -> Store:
    """The store of a policy's place."""
    if place == "disk":
        return DiskStore(device, directory, transfer.overlap)
    if place == "device":
        return DeviceStore() if device.type != "cpu" else MainStore(device, transfer)
    return HostStore(device, transfer)
