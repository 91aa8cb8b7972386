"""What context is worth to LZMA: sizes as the compressor's own, context that helps, and a bounded effort."""

import argparse
import lzma
import os
import random
import time
import zlib
from pathlib import Path

import pytest

from training.dataset import selftest as module
from training.dataset.selftest import BUDGET_BYTES, CONTEXT_BYTES, MAX_FILES, selftest


def noise(size, seed):
    """Text without repetition, some 6 bits a byte."""
    return bytes(random.Random(seed).choices(range(32, 96), k=size))


def test_context_that_holds_the_second_half_is_worth_almost_all_of_it():
    items = [(noise(3_000, n), noise(4_000, 100 + n),
              {"random": noise(9_000, 200 + n), "composed": noise(5_000, 300 + n) + noise(4_000, 100 + n)})
             for n in range(5)]
    found = selftest(items, 1)
    assert (found["files"], found["bytes"]) == (5, 20_000)
    assert found["context_bytes"] == {"none": 0, "random": 9_000, "composed": 9_000}
    shares = found["bits_per_byte"]
    assert list(shares) == ["none", "random", "composed"]
    assert shares["none"] == pytest.approx(6, abs=0.3)
    assert shares["random"] == pytest.approx(shares["none"], abs=0.15)
    assert shares["composed"] < 0.1
    mean, low, high = found["gain"]["composed"]
    assert mean == pytest.approx(shares["none"] - shares["composed"], abs=2e-4)
    assert low <= mean <= high
    assert set(found["gain"]) == {"random", "composed"}


def test_sizes_are_those_of_xz_and_gzip_without_their_containers():
    text = Path(argparse.__file__).read_bytes()[:60_000]
    first, second = text[:20_000], text[20_000:40_000]
    found = selftest([(first, second, {"random": text[40_000:]})], 1)
    how = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]

    def size(data):
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=how))

    gain = size(text[40_000:] + first + second) - size(text[40_000:] + first)
    assert found["bits_per_byte"]["random"] == pytest.approx(8 * gain / 20_000, abs=1e-4)
    assert found["bits_per_byte"]["none"] == pytest.approx(8 * (size(first + second) - size(first)) / 20_000,
                                                           abs=1e-4)
    assert found["xz"] == pytest.approx(8 * size(first + second) / 40_000, abs=1e-4)
    assert size(first + second) < len(lzma.compress(first + second)) < size(first + second) + 100
    deflated = len(zlib.compress(first + second, 9)) - 6
    assert found["gzip"] == pytest.approx(8 * deflated / 40_000, abs=1e-4)
    assert found["gain"]["random"][1:] == [None, None]


def test_the_text_nearest_to_the_target_counts():
    second = noise(2_000, 1)
    far = second + noise(CONTEXT_BYTES, 2)
    near = noise(CONTEXT_BYTES, 2) + second
    found = selftest([(noise(500, 3), second, {"far": far, "near": near})], 1)
    assert found["bits_per_byte"]["near"] < 0.3 < 5 < found["bits_per_byte"]["far"]
    assert found["context_bytes"] == {"none": 0, "far": CONTEXT_BYTES, "near": CONTEXT_BYTES}


def test_effort_is_bounded_by_files_and_bytes(monkeypatch):
    small = [(b"one two three\n", b"four five six\n", {"random": b"seven"})] * 100
    assert selftest(small, 1)["files"] == MAX_FILES
    given = []
    monkeypatch.setattr(module, "lzma_bytes", lambda data: given.append(len(data)) or len(data))
    large = [(noise(200_000, 1), noise(200_000, 2), dict.fromkeys("abc", noise(200_000, 3)))] * 100
    found = selftest(large, 1)
    assert 3 < found["files"] < MAX_FILES
    assert sum(given) <= BUDGET_BYTES + found["files"] * 2 * (64 << 10)     # and each file alone, for xz
    assert found["bytes"] == found["files"] * (32 << 10)


def test_nothing_to_compress_is_nothing():
    assert selftest([], 1) == {}
    assert selftest([(b"text", b"", {"random": b"x"})], 1) == {}


def test_the_same_items_give_the_same_figures_in_little_time():
    data = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))][:30]
    items = [(text[:len(text) // 2], text[len(text) // 2:],
              {"random": data[-1 - place], "path": data[place - 1]})
             for place, text in enumerate(data[:12])]
    start = time.process_time()
    first = selftest(iter(items), 1)
    assert time.process_time() - start < 10       # some 1 s where nothing else runs
    assert selftest(items, 1) == first
