"""Keys and values of the one layer being worked on, and their gradients in fp32.

Shapes: B batch, G key heads, S sequence, P keys of a page, D head dimension.

`Resident` holds them on the device as one tensor each, so that a block of keys is a view. `Ring` holds pages
on the host: the next page travels to the device while the current one is computed with, and changed
gradients travel back: the device holds two blocks of keys at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from training.longcontext.blocks import Block
from training.longcontext.transfer import Event, Transfer


class Keys(NamedTuple):
    """One block's keys and values (B, G, p, D) and, in a backward pass, sums to add their gradients to."""

    k: Tensor
    v: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None


class Pages(Protocol):
    """What attention needs of either kind."""

    def begin(self, like_k: Tensor, like_v: Tensor) -> None:
        """Make room for a layer whose keys and values look like these (B, G, *, D)."""

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """A chunk's keys and values (B, G, C, D)."""

    def sweep(self, blocks: Sequence[Block], gradients: bool) -> Iterator[tuple[Block, Keys]]:
        """Each block with its keys; what is added to `dk`, `dv` before the next one is asked for stays."""

    def gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Sums of dk, dv (B, G, stop - start, D) so far; ends this range's life."""


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Resident:
    """Everything on the device."""

    def __init__(self, length: int, device: torch.device):
        self._length, self._device = length, device
        self._k = self._v = self._dk = self._dv = torch.empty(0)
        self._zeroed = False

    def begin(self, like_k: Tensor, like_v: Tensor) -> None:
        """Take (or reuse) the layer's tensors; gradient sums start at 0 when the backward pass asks."""
        self._k, self._v = self._room(self._k, like_k), self._room(self._v, like_v)
        self._zeroed = False

    def _room(self, held: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        shape, dtype = (*like.shape[:2], self._length, like.shape[3]), dtype or like.dtype
        if held.shape == shape and held.dtype == dtype:
            return held
        return torch.empty(shape, dtype=dtype, device=self._device)

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Copy a chunk in."""
        stop = start + k.shape[2]
        self._k[:, :, start:stop], self._v[:, :, start:stop] = k, v

    def _begin_gradients(self) -> None:
        if not self._zeroed:
            self._dk = self._room(self._dk, self._k, _sum_type(self._k.dtype)).zero_()
            self._dv = self._room(self._dv, self._v, _sum_type(self._v.dtype)).zero_()
            self._zeroed = True

    def sweep(self, blocks: Sequence[Block], gradients: bool) -> Iterator[tuple[Block, Keys]]:
        """Views."""
        if gradients:
            self._begin_gradients()
        for block in blocks:
            keys = slice(block.k0, block.k1)
            sums = (self._dk[:, :, keys], self._dv[:, :, keys]) if gradients else (None, None)
            yield block, Keys(self._k[:, :, keys], self._v[:, :, keys], *sums)

    def gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Views of the sums."""
        self._begin_gradients()
        return self._dk[:, :, start:stop], self._dv[:, :, start:stop]


class _Page:
    """One page on the host, token-major (P, B, G, D), and the events that end its last copies to the host."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors  # k, v, dk, dv
        self.saved: list[Event] = [None] * len(tensors)


class Ring:
    """Pages on the host; two blocks at a time on the device, with their gradients in a backward pass.

    Token-major, so that any range of keys is one contiguous copy; kernels read the permuted view.
    """

    def __init__(self, length: int, page: int, device: torch.device, transfer: Transfer):
        self._length, self._page, self._device, self._transfer = length, page, device, transfer
        self._pages: list[_Page] = []
        self._zeroed = False

    def begin(self, like_k: Tensor, like_v: Tensor) -> None:
        """Take (or reuse) host pages."""
        self._zeroed = False
        wide = _sum_type(like_k.dtype)
        wanted = [((self._page, *like.shape[:2], like.shape[3]), dtype) for like, dtype in
                  ((like_k, like_k.dtype), (like_v, like_v.dtype), (like_k, wide), (like_v, wide))]
        if not self._pages or [(tuple(t.shape), t.dtype) for t in self._pages[0].tensors] != wanted:
            count = -(-self._length // self._page)
            self._pages = [_Page([self._transfer.empty(*room) for room in wanted]) for _ in range(count)]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[_Page, slice, slice]]:
        """(page, part of the page, part of [start, stop)) for each page that the range touches."""
        for number in range(start // self._page, -(-stop // self._page)):
            first = number * self._page
            a, b = max(start, first), min(stop, first + self._page)
            yield self._pages[number], slice(a - first, b - first), slice(a - start, b - start)

    def _save(self, start: int, tensors: Sequence[Tensor], first: int) -> None:
        """Token-major tensors of one range to the host; `first`: 0 for k, v, 2 for dk, dv."""
        for page, there, here in self._pieces(start, start + tensors[0].shape[0]):
            for index, tensor in enumerate(tensors, first):
                page.saved[index] = self._transfer.save(tensor[here], page.tensors[index][there])

    def _load(self, start: int, stop: int, first: int, last: int) -> tuple[list[Tensor], list[Event]]:
        """Token-major copies of k, v, dk, dv [first:last] on the device, and the events that complete them.
        """
        found = [torch.empty((stop - start, *held.shape[1:]), dtype=held.dtype, device=self._device)
                 for held in self._pages[0].tensors[first:last]]
        events = []
        for page, there, here in self._pieces(start, stop):
            for index, tensor in enumerate(found, first):
                held, saved = page.tensors[index][there], page.saved[index]
                events.append(self._transfer.load(held, tensor[here], saved))
        return found, events

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Send a chunk to its host pages."""
        self._save(start, [t.detach().permute(2, 0, 1, 3).contiguous() for t in (k, v)], 0)

    def _begin_gradients(self) -> None:
        """Zeros from the device: a CPU write would race with copies that are still under way."""
        if not self._zeroed:
            self._zeroed = True
            zeros = [torch.zeros(held.shape, dtype=held.dtype, device=self._device)
                     for held in self._pages[0].tensors[2:]]
            for number in range(len(self._pages)):
                self._save(number * self._page, zeros, 2)

    def sweep(self, blocks: Sequence[Block], gradients: bool) -> Iterator[tuple[Block, Keys]]:
        """Load one block ahead if copies overlap, but not past a block whose gradients it shares."""
        last = 4 if gradients else 2
        if gradients:
            self._begin_gradients()
        ahead = None
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            held, events = ahead or self._load(block.k0, block.k1, 0, last)
            ahead = None
            if self._transfer.overlap and following is not None and not (
                    gradients and _overlap(block, following)):
                ahead = self._load(following.k0, following.k1, 0, last)
            for event in events:
                self._transfer.wait(event)
            yield block, Keys(*(tensor.permute(1, 2, 0, 3) for tensor in held))
            if gradients:
                self._save(block.k0, held[2:], 2)

    def gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Sums brought to the device."""
        self._begin_gradients()
        held, events = self._load(start, stop, 2, 4)
        for event in events:
            self._transfer.wait(event)
        dk, dv = (tensor.permute(1, 2, 0, 3) for tensor in held)
        return dk, dv


def _overlap(a: Block, b: Block) -> bool:
    return a.k0 < b.k1 and b.k0 < a.k1


def build(place: str, length: int, page: int, device: torch.device, transfer: Transfer) -> Pages:
    """Pages of a policy's place."""
    return Resident(length, device) if place == "device" else Ring(length, page, device, transfer)
