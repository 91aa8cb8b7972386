"""Blocks cover exactly what each query sees: held against the mask written out."""


import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.longcontext import blocks as module
from training.longcontext.blocks import Block, blocks

SEES = {"full": lambda i, j: True, "causal": lambda i, j: j <= i, "window": lambda i, j: j >= i}


def covered(found):
    """Every (query, key) pair of the blocks, counted."""
    pairs = []
    for block in found:
        assert block.kind == "full" or block.q1 - block.q0 == block.k1 - block.k0, block
        pairs += [(i, j) for i in range(block.q0, block.q1) for j in range(block.k0, block.k1)
                  if SEES[block.kind](i - block.q0, j - block.k0)]
    return pairs


def seen(start, stop, documents, window):
    """What queries [start, stop) see by definition."""
    begins = {i: max(d for d in documents if d <= i) for i in range(start, stop)}
    return sorted((i, j) for i in range(start, stop) for j in range(begins[i], i + 1)
                  if not window or j > i - window)


@st.composite
def chunks(draw):
    """(start, stop, documents) within a sequence of at most 40."""
    length = draw(st.integers(1, 40))
    start = draw(st.integers(0, length - 1))
    documents = draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=5))
    return start, draw(st.integers(start + 1, length)), (0, *sorted(d for d in documents if d < length))


@settings(max_examples=400)
@given(chunks(), st.sampled_from([0, 1, 2, 3, 5, 8, 50]), st.sampled_from([0, 1, 3, 7, 64]),
       st.sampled_from([1, 2, 3, 5, 1024]))
def test_every_pair_that_is_seen_is_in_one_block_and_no_other_pair(chunk, window, page, piece):
    start, stop, documents = chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_PIECE", piece)
        found = blocks(start, stop, documents=documents, window=window, page=page)
    assert sorted(covered(found)) == seen(start, stop, documents, window)
    most = max(page, min(window, piece))  # along a window's edge blocks are no longer than its pieces
    assert all(block.k1 - block.k0 <= most for block in found if page and block.kind == "full")


@settings(max_examples=100)
@given(chunks(), st.sampled_from([0, 3, 8]), st.sampled_from([1, 4]), st.sampled_from([2**31, 2**32, 2**40]))
def test_chunks_beyond_32_bits_are_those_near_zero_moved(chunk, window, page, far):
    start, stop, documents = chunk
    near = blocks(start, stop, documents=documents, window=window, page=page)
    moved = blocks(start + far, stop + far, documents=(0, *(d + far for d in documents)), window=window,
                   page=page)
    assert moved == [Block(b.kind, *(edge + far for edge in b[1:])) for b in near]


def test_pages_are_visited_from_the_nearest_back():
    found = blocks(20, 24, page=8)
    assert found == [Block("causal", 20, 24, 20, 24), Block("full", 20, 24, 16, 20),
                     Block("full", 20, 24, 8, 16), Block("full", 20, 24, 0, 8)]
