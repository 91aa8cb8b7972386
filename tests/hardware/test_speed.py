import os
import time

import pytest

from training.hardware import speed, stress

MIB = 1 << 20


def test_work_slower_than_the_limit_runs_once():
    calls = []

    def work():
        calls.append(1)
        time.sleep(0.05)

    assert speed.seconds_of(work, limit_s=0.01) == [pytest.approx(0.05, abs=0.04)]
    assert len(calls) == 1


def test_fast_work_runs_as_often_as_asked_after_one_warm_up():
    calls = []
    assert len(speed.seconds_of(lambda: calls.append(1), limit_s=5, repeats=3)) == 3
    assert len(calls) == 4


def test_a_rate_is_the_median_with_its_spread():
    figure = speed.rate(100.0, [1.0, 2.0, 4.0], "bytes/s", "example")
    assert (figure.value, figure.repeats, figure.spread) == (50.0, 3, 1.5)


def test_the_disk_is_measured_and_nothing_is_left_behind(tmp_path):
    figures = speed.disk(tmp_path, limit_s=0.2, size_bytes=4 * MIB)
    assert figures["disk.write"].value > 0
    assert figures["disk.write"].unit == "bytes/s"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_gives_a_reason_instead_of_a_figure(tmp_path):
    figures = speed.disk(tmp_path / "absent")
    assert figures["disk.write"].value is None
    assert "No such file or directory" in figures["disk.write"].method


def test_a_full_disk_says_how_much_is_missing(tmp_path, monkeypatch):
    def full(handle, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert "has no 32 MiB free" in speed.disk(tmp_path)["disk.write"].method


def test_numpy_matmul_has_unit_method_and_repeats():
    figure = speed.matmul_numpy(limit_s=0.05, n=128)
    assert figure.value > 0
    assert (figure.unit, figure.method) == ("FLOP/s", "numpy matmul, fp32, n=128")


@pytest.mark.parametrize("limit_mib", [0, 5, 16, 100, 999, 1000, 5000])
def test_the_largest_piece_is_found_and_never_above_what_is_free(limit_mib):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit_mib * MIB

    found = stress.largest_piece(fits, 1000 * MIB)
    assert found == min(limit_mib, 1000) // 16 * 16 * MIB
    assert max(asked) <= 1000 * MIB


def test_blocks_fill_up_in_falling_sizes_and_stop_at_free():
    held = []

    def take(size):
        if sum(held) + size > 700 * MIB:
            return False
        held.append(size)
        return True

    assert stress.fill(take, 2000 * MIB) == 700 * MIB
    held.clear()
    assert stress.fill(take, 600 * MIB) == 600 * MIB


class FakeCuda:
    """A device with `room` bytes that counts what is held, in place of torch."""

    uint8, OutOfMemoryError = "uint8", MemoryError

    def __init__(self, room, free):
        self.room, self.free, self.held, self.peak = room, free, 0, 0
        self.cuda = self

    def mem_get_info(self, index):
        return self.free, self.free

    def empty_cache(self):
        pass

    def empty(self, size, dtype, device):
        if self.held + size > self.room:
            raise MemoryError
        return Block(self, size)


class Block:
    def __init__(self, device, size):
        self.device, self.size = device, size
        device.held += size
        device.peak = max(device.peak, device.held)

    def __del__(self):
        self.device.held -= self.size


@pytest.mark.parametrize("room_mib", [3000, 8192])
def test_the_device_memory_test_never_takes_more_than_is_free_and_releases_all(room_mib):
    device = FakeCuda(room=room_mib * MIB, free=4096 * MIB)
    figures = stress.device_figures(device, 0, spills=False)
    assert figures["allocatable_bytes"].value == min(room_mib, 4096) * MIB
    assert device.peak <= 4096 * MIB
    assert device.held == 0


def test_windows_and_wsl_are_told_that_spilling_hides_the_limit():
    figures = stress.device_figures(FakeCuda(room=MIB << 10, free=MIB << 10), 0, spills=True)
    assert "spills into host memory" in figures["allocatable_bytes"].method
