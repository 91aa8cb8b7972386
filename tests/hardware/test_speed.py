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


def test_work_that_fits_is_timed_twice_at_least_since_a_first_call_starts_threads():
    calls = []

    def work():
        calls.append(1)
        time.sleep(0.05 if len(calls) == 1 else 0.01)

    times = speed.seconds_of(work, limit_s=0.06)
    assert len(times) >= 2
    assert max(times) < 0.05


def test_a_single_measurement_has_no_spread():
    assert speed.rate(1.0, [2.0], "bytes/s", "example").spread is None


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
    """A device of `total` bytes of which `others` are taken, in place of torch. Beyond its memory it refuses,
    or spills: then it serves from the host, whose bytes fill `SLOW` times as slowly."""

    uint8, OutOfMemoryError = "uint8", MemoryError
    FILL_BYTES_PER_S, SLOW = 4e12, 20

    def __init__(self, total, others=0, spills=False, says_free=None, leaks=0):
        self.total, self.others, self.spills, self.says_free = total, others, spills, says_free
        self.held, self.peak, self.leaks = 0, 0, leaks
        self.cuda = self

    def mem_get_info(self, index):
        free = self.total - self.others - self.held if self.says_free is None else self.says_free
        return max(0, free), self.total

    def empty_cache(self):
        self.others += self.leaks
        self.leaks = 0

    def synchronize(self, index):
        pass

    def empty(self, size, dtype, device):
        room = self.total - self.others - self.held
        if size > room and not self.spills:
            raise MemoryError
        return Block(self, size, slow=size > room)


class Block:
    def __init__(self, device, size, slow):
        self.device, self.size = device, size
        self.fill_s = size / device.FILL_BYTES_PER_S * (device.SLOW if slow else 1)
        device.held += size
        device.peak = max(device.peak, device.held)

    def fill_(self, value):
        end_s = time.perf_counter() + self.fill_s
        while time.perf_counter() < end_s:
            pass

    def __del__(self):
        self.device.held -= self.size


@pytest.mark.parametrize("others_mib", [0, 1096, 8000])
def test_the_device_memory_test_leaves_a_reserve_and_releases_all(others_mib):
    device = FakeCuda(total=8192 * MIB, others=others_mib * MIB)
    free = (8192 - others_mib) * MIB
    figures = stress.device_figures(device, 0, spills=False)
    blocks, piece = figures["allocatable_bytes"], figures["allocatable_piece_bytes"]
    reserve = min(stress.RESERVE_BYTES, free // 64)
    assert free - reserve - 2 * MIB <= blocks.value <= free - reserve
    assert free - reserve - 16 * MIB <= piece.value <= free - reserve
    assert device.peak <= free - reserve
    assert device.held == 0
    assert figures["unreleased_bytes"].value == 0
    assert (blocks.repeats, blocks.spread, piece.repeats) == (2, 0.0, 2)


def test_memory_that_is_refused_below_what_is_free_is_found():
    device = FakeCuda(total=4096 * MIB, others=1024 * MIB, says_free=4000 * MIB)
    figures = stress.device_figures(device, 0, spills=False)
    assert figures["allocatable_bytes"].value == 3072 * MIB
    assert figures["allocatable_piece_bytes"].value == 3072 * MIB


def test_no_more_is_taken_than_is_still_free_when_another_process_takes_some():
    device = FakeCuda(total=8192 * MIB)
    real = device.empty

    def empty(size, dtype, device_name):
        device.others = 6000 * MIB
        return real(size, dtype, device_name)

    device.empty = lambda size, dtype, device: empty(size, dtype, device)
    figures = stress.device_figures(device, 0, spills=False)
    assert figures["allocatable_bytes"].value <= 2192 * MIB


def test_memory_that_does_not_come_back_is_told():
    device = FakeCuda(total=8192 * MIB, leaks=300 * MIB)
    assert stress.device_figures(device, 0, spills=False)["unreleased_bytes"].value == 300 * MIB


def test_a_device_that_is_full_has_nothing_to_allocate():
    figures = stress.device_figures(FakeCuda(total=8192 * MIB, others=8192 * MIB), 0, spills=True)
    assert figures["allocatable_bytes"].value == 0


def test_blocks_that_spill_into_host_memory_are_told_by_their_slow_fill():
    # 3 GiB are taken by others, and the driver says that all is free, as one that spills may.
    device = FakeCuda(total=8192 * MIB, others=3072 * MIB, spills=True, says_free=8192 * MIB)
    figures = stress.device_figures(device, 0, spills=True)
    assert figures["allocatable_bytes"].value <= 5120 * MIB
    assert figures["allocatable_bytes"].value >= 5120 * MIB - 512 * MIB
    assert figures["allocatable_piece_bytes"].value <= 5120 * MIB
    assert "it did spill" in figures["allocatable_bytes"].method
    assert device.held == 0


def test_where_memory_spills_the_test_stays_below_the_total():
    device = FakeCuda(total=4096 * MIB, spills=True)
    figures = stress.device_figures(device, 0, spills=True)
    assert device.peak <= 4096 * MIB - stress.WDDM_MARGIN_BYTES
    assert "spills into host memory without an error" in figures["allocatable_bytes"].method
    assert "it did spill" not in figures["allocatable_bytes"].method


class FakePinning:
    """Pins up to `limit` bytes in one piece."""

    uint8 = "uint8"

    def __init__(self, limit):
        self.limit, self.asked = limit, []

    def empty(self, size, dtype, pin_memory):
        assert pin_memory
        self.asked.append(size)
        if size > self.limit:
            raise RuntimeError("CUDA error: out of memory")


def test_pinning_without_a_refusal_means_all_ram():
    torch = FakePinning(limit=1 << 40)
    figure = stress.pinned_limit(torch, 64 << 30, 32 << 30)
    assert torch.asked == [1 << 30]
    assert figure.value == 64 << 30
    assert figure.method == "all RAM: CUDA pinned 1,024 MiB of it in a test"


def test_a_small_machine_is_asked_for_a_sixteenth_of_its_free_ram():
    torch = FakePinning(limit=1 << 40)
    stress.pinned_limit(torch, 8 << 30, 4 << 30)
    assert torch.asked == [256 * MIB]


@pytest.mark.parametrize(("limit_mib", "found_mib"), [(300, 256), (0, 0)])
def test_a_refused_piece_is_halved_until_it_can_be_pinned(limit_mib, found_mib):
    figure = stress.pinned_limit(FakePinning(limit=limit_mib * MIB), 64 << 30, 32 << 30)
    assert figure.value == found_mib * MIB
    assert "CUDA refused to pin" in figure.method
