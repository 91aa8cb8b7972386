"""A profile in the run directory is reused when it is whole, own, recent and of this machine."""

import dataclasses
import datetime
import json
import os

import pytest
from smi_texts import NOT_FOUND, TWO_RTX_4090, Reply, answers

from training.hardware import cache, host, limits, nvidia, profiler, speed, support
from training.hardware.profiler import HardwareProfiler
from training.records import GIB, Figure, HardwareProfile, dumps, from_data
from training.rundir import RunDirectory

MIB = 1 << 20
RATES = {name: {"value": 1e10, "unit": "FLOP/s", "method": "measured once"} for name in cache.WANTED}


def figure(value, unit="bytes"):
    return {"value": value, "unit": unit, "method": "test"}


class Bench:
    """One machine whose probe answers at once; it counts how often it was asked."""

    def __init__(self, monkeypatch, run):
        self.patch, self.run, self.probes = monkeypatch, run, 0
        self.reply, self.gpus, self.figures = NOT_FOUND, [], dict(RATES)
        monkeypatch.setattr(nvidia, "fetch", lambda real=nvidia.fetch: real(answers(self.reply)))
        monkeypatch.setattr(profiler, "run_probe", self.probe)
        monkeypatch.setattr(speed, "disk", lambda folder, limit_s, size_bytes: {
            "disk.write": Figure(value=2e9, unit="bytes/s", method="test")})
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def probe(self, machine, tell):
        self.probes += 1
        return {"gpus": self.gpus, "figures": self.figures, "trials": {"sdpa_flash": ""}, "versions": {}}

    def profile(self, **options) -> HardwareProfile:
        made = HardwareProfiler(self.run).profile(**options)
        if not options.get("quick"):
            self.run.mkdir(exist_ok=True)
            RunDirectory(self.run).hardware.write_text(dumps(made))
        return made

    def changed(self, **changes):
        path = RunDirectory(self.run).hardware
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(data))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    return Bench(monkeypatch, tmp_path / "run")


def days_ago(days):
    then = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=days)
    return then.isoformat(timespec="seconds")


def test_a_second_profile_measures_nothing_and_says_when_its_rates_are_from(bench):
    first = bench.profile()
    assert (bench.probes, first.rates_date) == (1, "")
    then, told = days_ago(2), []
    bench.changed(date=then)
    second = bench.profile(progress=lambda *event: told.append(event))
    assert bench.probes == 1
    assert second.rates_date == then
    assert second.date > days_ago(1)
    assert second.rate("cpu.train_fp32") == 1e10
    assert second.rate("disk.write") == 2e9
    assert second.supports["sdpa_flash"].why.endswith("tried on tiny tensors")
    assert told[-1] == ("profile", 1, 1, "")
    assert from_data(HardwareProfile, json.loads(dumps(second))) == second


def test_reused_rates_keep_their_own_date_and_grow_too_old(bench):
    bench.profile()
    then = days_ago(6)
    bench.changed(date=then)
    assert bench.profile().rates_date == then
    assert bench.profile().rates_date == then
    bench.changed(rates_date=days_ago(8))
    assert bench.profile().rates_date == ""
    assert bench.probes == 2


def test_fresh_measures_again(bench):
    bench.profile()
    assert bench.profile(fresh=True).rates_date == ""
    assert bench.probes == 2


def test_quick_takes_nothing_from_the_run_directory(bench):
    bench.profile()
    assert bench.profile(quick=True).rate("cpu.train_fp32") is None


def test_what_is_free_and_what_is_allowed_is_read_anew(bench, monkeypatch):
    bench.profile()
    real = host.fetch
    monkeypatch.setattr(host, "fetch", lambda output: dataclasses.replace(
        real(output), ram_available_bytes=123, disk_free_bytes=456))
    monkeypatch.setattr(limits, "open_files", lambda: 789)
    again = bench.profile()
    assert bench.probes == 1
    assert (again.ram_available_bytes, again.disk_free_bytes) == (123, 456)
    assert again.rate("host.open_files") == 789


@pytest.mark.parametrize("changes", [
    {"date": days_ago(30)}, {"date": days_ago(-1)}, {"date": "soon"}, {"date": "2026-01-01"},
    {"source": "preset"}, {"cpu_name": "another"}, {"cpu_cores": 999}, {"system": "Linux 2.6 x86_64"},
    {"cpu_flags": ["amx_bf16"]}, {"ram_total_bytes": GIB // 8}, {"disk_path": "/elsewhere"},
    {"disk_path": "/proc"},
    {"versions": {"torch": "1.0"}}, {"figures": {}}, {"figures": "none"},
    {"figures": RATES | {"cpu.train_fp32": figure(-5.0)}},
    {"figures": RATES | {"cpu.extra": figure(float("nan"))}},
    {"figures": RATES | {"cpu.extra": {"value": 1.0, "unit": "FLOP/s", "method": "\x1b[2Jcleared"}}},
    {"supports": {"bf16": {"works": False, "why": "no", "what_to_do": "two\nlines"}}},
    {"name": "x\x07"}, {"gpus": [{"index": 0}]}])
def test_what_is_not_this_machines_own_recent_measurement_is_not_taken(bench, changes):
    bench.profile()
    bench.changed(**changes)
    assert bench.profile().rates_date == ""
    assert bench.probes == 2


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '{"name": "x"}', "[" * 100_000, "\x00\xff"])
def test_a_torn_file_is_measured_over(bench, text):
    bench.profile()
    RunDirectory(bench.run).hardware.write_text(text, encoding="latin-1")
    bench.profile()
    assert bench.probes == 2


def test_a_link_a_pipe_a_folder_and_an_overlong_file_are_not_read(bench, tmp_path):
    bench.profile()
    path = RunDirectory(bench.run).hardware
    good = tmp_path / "good.json"
    path.rename(good)
    path.symlink_to(good)
    assert cache.read(RunDirectory(bench.run).hardware) is None
    path.unlink()
    os.mkfifo(path)
    assert cache.read(RunDirectory(bench.run).hardware) is None
    path.unlink()
    path.mkdir()
    assert cache.read(RunDirectory(bench.run).hardware) is None
    path.rmdir()
    path.write_text(good.read_text() + " " * cache.MAX_FILE_BYTES)
    assert cache.read(RunDirectory(bench.run).hardware) is None
    path.write_text(good.read_text())
    assert cache.read(RunDirectory(bench.run).hardware) is not None


def test_another_users_file_is_not_read(bench, monkeypatch):
    bench.profile()
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert cache.read(RunDirectory(bench.run).hardware) is None


def test_no_run_directory_has_no_earlier_profile(tmp_path):
    assert cache.read(None) is None
    assert cache.read(tmp_path / "absent") is None


@pytest.fixture
def two_gpus(bench, monkeypatch):
    monkeypatch.setattr(support, "torch_cuda_version", lambda: "13.0")
    bench.reply = TWO_RTX_4090
    one = {"name": "NVIDIA GeForce RTX 4090", "architecture": "Ada", "capability": "8.9",
           "total_bytes": 24217 * MIB, "free_bytes": 23600 * MIB}
    bench.gpus = [one | {"index": index} for index in (0, 1)]
    bench.figures = RATES | {"gpu0.matmul_bf16": figure(1.6e14, "FLOP/s"),
                             "gpu0.allocatable_bytes": figure(23400.0 * MIB),
                             "gpu1.allocatable_bytes": figure(23400.0 * MIB),
                             "host.pinned_limit": figure(5.0 * GIB)}
    return bench


def test_on_gpus_the_rates_are_kept_and_free_memory_is_the_drivers(two_gpus):
    two_gpus.profile()
    again = two_gpus.profile()
    assert two_gpus.probes == 1
    assert [gpu.free_bytes for gpu in again.gpus] == [24057 * MIB, 24105 * MIB]
    assert [gpu.total_bytes for gpu in again.gpus] == [24217 * MIB] * 2
    assert again.rate("gpu0.matmul_bf16") == 1.6e14
    assert again.rate("gpu0.allocatable_bytes") == 23400 * MIB
    assert again.rate("host.pinned_limit") == 5 * GIB


@pytest.mark.parametrize("free_mib", [8000, 23000])
def test_what_could_be_allocated_is_forgotten_once_less_is_free(two_gpus, free_mib):
    two_gpus.profile()
    two_gpus.reply = Reply(code=0, text=TWO_RTX_4090.text.replace("24057", str(free_mib)))
    again = two_gpus.profile()
    assert two_gpus.probes == 1
    assert again.gpus[0].free_bytes == free_mib * MIB
    assert again.rate("gpu0.allocatable_bytes") is None
    assert again.rate("gpu1.allocatable_bytes") == 23400 * MIB


def test_what_could_be_allocated_is_forgotten_once_much_more_is_free(two_gpus):
    two_gpus.gpus = [gpu | {"free_bytes": 4000 * MIB} for gpu in two_gpus.gpus]
    two_gpus.figures |= {"gpu0.allocatable_bytes": figure(3900.0 * MIB)}
    two_gpus.profile()
    again = two_gpus.profile()
    assert two_gpus.probes == 1
    assert again.rate("gpu0.allocatable_bytes") is None


@pytest.mark.parametrize("text", [
    TWO_RTX_4090.text.splitlines()[0] + "\n", TWO_RTX_4090.text.replace("550.163.01", "580.95.05"),
    TWO_RTX_4090.text.replace("RTX 4090", "RTX 3090"), TWO_RTX_4090.text.replace("24564", "49140")])
def test_another_set_of_gpus_or_driver_is_measured_again(two_gpus, text):
    two_gpus.profile()
    two_gpus.reply = Reply(code=0, text=text)
    two_gpus.profile()
    assert two_gpus.probes == 2


@pytest.fixture
def shared(monkeypatch, tmp_path):
    """Where the last profile is kept for other runs."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache" / "hardware.json"))
    return tmp_path / "cache" / "hardware.json"


def test_another_run_on_the_same_machine_measures_nothing(bench, shared, tmp_path):
    first = bench.profile()
    assert (bench.probes, shared.exists(), oct(shared.stat().st_mode & 0o777)) == (1, True, "0o600")
    bench.run = tmp_path / "other"
    assert bench.profile().rates_date == first.date
    assert bench.probes == 1
    bench.run = tmp_path / "third"
    assert bench.profile(fresh=True).rates_date == ""
    assert bench.probes == 2


def test_the_shared_profile_must_be_of_this_machine_and_own(bench, shared, tmp_path):
    bench.profile()
    data = json.loads(shared.read_text())
    for changes in ({"cpu_name": "another"}, {"date": days_ago(8)}, {"disk_path": "/proc"}):
        shared.write_text(json.dumps(data | changes))
        bench.run = tmp_path / str(bench.probes)
        before = bench.probes
        bench.profile()
        assert bench.probes == before + 1
    shared.unlink()
    shared.symlink_to(tmp_path / "run" / "hardware.json")
    bench.run = tmp_path / "linked"
    assert bench.profile().rates_date == ""


def test_a_cache_that_cannot_be_written_and_an_empty_variable_keep_nothing(bench, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "/proc/elite/hardware.json")
    assert bench.profile().rates_date == ""
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache.shared_path() is None
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache.shared_path()) == "/somewhere/elite/hardware.json"
