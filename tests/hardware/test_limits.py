"""What the system allows: pinned memory, cgroups, files, swap, /dev/shm."""

import resource
from pathlib import Path

import pytest

from training.hardware import host, limits
from training.records import GIB

NAMES = {f"host.{name}" for name in ("pinned_limit", "memlock_limit", "cgroup_memory", "cgroup_cpus",
                                     "open_files", "swap", "shm")}


def test_every_limit_has_a_unit_and_says_where_it_is_from():
    figures = limits.figures(8 * GIB, gpus=0)
    assert set(figures) == NAMES
    for figure in figures.values():
        assert figure.unit in ("bytes", "cores", "files")
        assert figure.method
        assert figure.value is not None or figure.method.startswith(("no limit", "not measured"))


@pytest.mark.parametrize(("locked", "value", "words"), [
    (8 << 20, 8 << 20, "RLIMIT_MEMLOCK"), (None, 4 * GIB, "sets no lower one"),
    (16 * GIB, 4 * GIB, "sets no lower one")])
def test_without_a_gpu_the_locked_memory_limit_binds(locked, value, words):
    figure = limits.pinned_limit(4 * GIB, locked, gpus=0)
    assert figure.value == value
    assert words in figure.method


def test_with_a_gpu_cuda_pins_outside_the_locked_memory_limit():
    figure = limits.pinned_limit(64 * GIB, 8 << 20, gpus=2)
    assert figure.value == 64 * GIB
    assert "not tried" in figure.method


def test_a_cgroups_limits_become_figures(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    real_memory, real_cpu = host.memory_limit, host.cpu_limit
    monkeypatch.setattr(host, "memory_limit", lambda text: real_memory("0::/\n", tmp_path))
    monkeypatch.setattr(host, "cpu_limit", lambda text: real_cpu("0::/\n", tmp_path))
    figures = limits.figures(8 * GIB, gpus=0)
    assert (figures["host.cgroup_memory"].value, figures["host.cgroup_cpus"].value) == (4 * GIB, 1.5)


def test_no_cgroup_is_no_limit_and_not_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "memory_limit", lambda text: (0, 0))
    monkeypatch.setattr(host, "cpu_limit", lambda text: None)
    figures = limits.figures(8 * GIB, gpus=0)
    assert figures["host.cgroup_memory"].value is None
    assert figures["host.cgroup_memory"].method == "no limit (cgroup memory)"
    assert figures["host.cgroup_cpus"].method == "no limit (cgroup CPU quota)"


def test_the_limits_of_this_process_are_the_systems_own():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits.open_files() == (None if soft == resource.RLIM_INFINITY else soft)


def test_an_unlimited_resource_has_no_number(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert limits.memlock_bytes() is None


def test_a_system_without_shared_memory_says_so(tmp_path):
    assert limits.shm(Path(tmp_path)).value > 0
    assert limits.shm(tmp_path / "absent").method == f"not measured: there is no {tmp_path / 'absent'}"
