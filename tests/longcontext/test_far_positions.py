"""Lengths whose element counts pass 2^31 and 2^32, without their memory: meta tensors, stubs, holes."""

import itertools

import pytest
import torch

from training.longcontext.attention import Visit
from training.longcontext.blocks import Block, blocks
from training.longcontext.inputs import DiskStore
from training.longcontext.pages import Resident, Ring, _Page
from training.longcontext.transfer import Transfer

CPU = torch.device("cpu")


def chunk(tokens):
    """Keys and values (1, 2, C, 4)."""
    return torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4)


def test_resident_pages_are_addressed_beyond_32_bits():
    meta, length = torch.device("meta"), 2**33
    pages = Resident(length, meta)
    like = torch.empty(1, 2, 8, 4, device=meta)
    pages.begin(like, like)
    pages.write(length - 8, like, like)
    block = Block("full", length - 8, length, 2**32 + 3, 2**32 + 10)
    (_, held), = pages.sweep([block], gradients=True)
    for tensor in held:
        assert tensor.shape == (1, 2, 7, 4)
        assert tensor.storage_offset() == (2**32 + 3) * 4
    assert [t.shape[2] for t in pages.gradients(length - 5, length)] == [5, 5]


class OnDemand(dict):
    """Pages that exist once they are touched."""

    def __missing__(self, number):
        self[number] = _Page([torch.zeros(4, 1, 2, 4) for _ in range(4)])
        return self[number]


@pytest.mark.parametrize("start", [2**31 - 3, 2**32 - 3, 2**40 + 1])
def test_a_rings_pages_are_addressed_beyond_32_bits(start):
    ring = Ring(2**41, 4, CPU, Transfer(CPU, pinned=False))
    ring._pages, ring._zeroed = OnDemand(), True
    k, v = chunk(7)
    ring.write(start, k, v)
    block = Block("causal", start, start + 7, start, start + 7)
    for _ in range(2):
        for _, held in ring.sweep([block], gradients=True):
            assert torch.equal(held.k, k)
            assert torch.equal(held.v, v)
            held.dk.add_(k)
            held.dv.add_(v)
    dk, dv = ring.gradients(start + 2, start + 7)
    assert torch.equal(dk, 2 * k[:, :, 2:])
    assert torch.equal(dv, 2 * v[:, :, 2:])
    assert sorted(ring._pages) == [0, *range(start // 4, (start + 6) // 4 + 1)]  # page 0 tells the shapes


@pytest.mark.parametrize("end", [2**31 - 100, 2**32 - 100, 2**35])
def test_the_disk_store_writes_beyond_32_bits(end, tmp_path):
    store = DiskStore(CPU, str(tmp_path))
    store._end = end
    tensors = [torch.randn(5, 7) for _ in range(6)]
    for index, tensor in enumerate(tensors):
        store.put(index, tensor)
    assert all(torch.equal(store.get(index), tensor) for index, tensor in enumerate(tensors))
    assert store._end == end + 6 * 5 * 7 * 4
    store.close()


def test_a_chunk_far_out_plans_its_window_alone():
    start = 2**33
    visit = Visit(pages=Resident(1, CPU), start=start, stop=start + 100, page=4096)
    (_, plan), = visit.plan(512)
    assert min(block.k0 for block in plan) == start - 511
    assert len(plan) <= 3


def test_the_work_of_a_far_chunk_is_that_of_its_keys():
    """Pairs of the last of many chunks: c (S - c) full and c (c + 1) / 2 causal ones."""
    length, size, page = 2**32, 2**20, 2**26
    found = blocks(length - size, length, page=page)
    pairs = {kind: sum((b.q1 - b.q0) * (b.k1 - b.k0) for b in group)
             for kind, group in itertools.groupby(sorted(found), key=lambda b: b.kind)}
    assert pairs == {"causal": size * size, "full": size * (length - size)}
