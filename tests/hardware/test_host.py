from pathlib import Path

import pytest

from training.hardware import host
from training.records import GIB

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse sse2 fma avx f16c avx2 vaes fsrm

processor\t: 1
model name\t: AMD EPYC 7B13
"""
GRACE = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\n"
V1 = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cpuinfo_gives_name_and_the_flags_that_matter():
    assert host.cpu_name(EPYC) == "AMD EPYC 7B13"
    assert host.cpu_flags(EPYC) == ("avx", "avx2", "f16c", "fma")


def test_an_arm_cpuinfo_has_features_and_no_name():
    assert host.cpu_name(GRACE) == ""
    assert host.cpu_flags(GRACE) == ("asimd", "bf16", "i8mm", "sve")


def test_a_version_2_memory_limit_is_honoured_with_the_page_cache_counted_as_free(tmp_path):
    put(tmp_path / "box" / "memory.max", f"{4 * GIB}\n")
    put(tmp_path / "box" / "memory.current", f"{3 * GIB}\n")
    put(tmp_path / "box" / "memory.stat", f"anon 1\ninactive_file {GIB}\n")
    assert host.memory_limit("0::/box\n", tmp_path) == (4 * GIB, 2 * GIB)


def test_a_tighter_limit_of_a_parent_group_wins(tmp_path):
    put(tmp_path / "outer" / "memory.max", f"{2 * GIB}\n")
    put(tmp_path / "outer" / "inner" / "memory.max", f"{8 * GIB}\n")
    assert host.memory_limit("0::/outer/inner\n", tmp_path)[0] == 2 * GIB


def test_version_2_without_a_limit_says_max(tmp_path):
    put(tmp_path / "memory.max", "max\n")
    assert host.memory_limit("0::/\n", tmp_path) == (0, 0)


def test_a_version_1_limit_seen_from_inside_a_container_lies_at_the_mounts_root(tmp_path):
    put(tmp_path / "memory" / "memory.limit_in_bytes", f"{3 * GIB}\n")
    put(tmp_path / "memory" / "memory.usage_in_bytes", f"{2 * GIB}\n")
    put(tmp_path / "memory" / "memory.stat", f"inactive_file 5\ntotal_inactive_file {GIB}\n")
    assert host.memory_limit(V1, tmp_path) == (3 * GIB, GIB)


def test_version_1_without_a_limit_holds_a_huge_number(tmp_path):
    put(tmp_path / "memory" / "docker" / "abc" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert host.memory_limit(V1, tmp_path) == (0, 0)


def test_no_cgroups_at_all_set_no_limit(tmp_path):
    assert host.memory_limit("", tmp_path) == (0, 0)
    assert host.cpu_limit("", tmp_path) is None


@pytest.mark.parametrize(("text", "cores"), [("250000 100000\n", 2.5), ("max 100000\n", None)])
def test_a_version_2_cpu_quota(tmp_path, text, cores):
    put(tmp_path / "box" / "cpu.max", text)
    assert host.cpu_limit("0::/box\n", tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("150000\n", 1.5), ("-1\n", None)])
def test_a_version_1_cpu_quota(tmp_path, quota, cores):
    put(tmp_path / "cpu" / "docker" / "abc" / "cpu.cfs_quota_us", quota)
    put(tmp_path / "cpu" / "docker" / "abc" / "cpu.cfs_period_us", "100000\n")
    assert host.cpu_limit(V1, tmp_path) == cores


def test_the_disk_of_a_run_that_does_not_exist_yet_is_its_nearest_parents(tmp_path):
    assert host.existing_parent(tmp_path / "runs" / "a" / "b") == tmp_path
    assert not (tmp_path / "runs").exists()


def test_this_machine_is_read_within_its_own_bounds(tmp_path):
    machine = host.fetch(tmp_path / "run")
    assert 0 < machine.ram_available_bytes <= machine.ram_total_bytes
    assert machine.cpu_cores >= 1
    assert machine.disk_path == str(tmp_path)
