"""Whole machines from captured text: nvidia-smi's answers and torch.cuda's values, to a profile."""

import json
from dataclasses import dataclass

import pytest
from smi_texts import (
    H100_MIG,
    H100_MIG_LIST,
    H100_MIG_TABLE,
    H200,
    H200_MIG,
    H200_MIG_LIST,
    H200_MIG_TABLE,
    L40S,
    MISMATCH,
    NO_DEVICES,
    NOT_FOUND,
    NOT_LOADED,
    RTX_2080_SUPER,
    RTX_2080_SUPER_WDDM,
    RTX_5090_LAPTOP_WSL,
    TWO_RTX_4090,
    answers,
)

from training.hardware import host, nvidia, probe, profiler, support
from training.records import GIB, HardwareProfile, dumps, from_data

MIB = 1 << 20


class FakeCuda:
    """torch.cuda of a machine: per device its name, capability, free and total bytes."""

    def __init__(self, devices):
        self.devices = devices

    def is_available(self):
        return bool(self.devices)

    def device_count(self):
        return len(self.devices)

    def get_device_name(self, index):
        return self.devices[index][0]

    def get_device_capability(self, index):
        return self.devices[index][1]

    def mem_get_info(self, index):
        return self.devices[index][2], self.devices[index][3]


class FakeTorch:
    def __init__(self, devices):
        self.cuda = FakeCuda(devices)


@dataclass(frozen=True, kw_only=True)
class Machine:
    replies: tuple
    devices: tuple = ()
    torch_cuda: str = "13.0"
    release: str = "6.8.0-generic"
    name: str = ""
    architecture: str = ""


# Totals: RTX 4090 24,217 MiB as torch reports it (logs of ultralytics); the others the driver's total less
# what it reserves (memory.reserved in the same capture). Free: made up, less than the driver's by a context.
def device(name, capability, total_mib, free_mib):
    return name, capability, free_mib * MIB, total_mib * MIB


MACHINES = {
    "single consumer GPU with a desktop": Machine(
        replies=(RTX_2080_SUPER,), name="NVIDIA GeForce RTX 2080 SUPER", architecture="Turing",
        devices=(device("NVIDIA GeForce RTX 2080 SUPER", (7, 5), 7792, 7400),)),
    "two GPUs": Machine(
        replies=(TWO_RTX_4090,), name="2 x NVIDIA GeForce RTX 4090", architecture="Ada",
        devices=(device("NVIDIA GeForce RTX 4090", (8, 9), 24217, 23800),
                 device("NVIDIA GeForce RTX 4090", (8, 9), 24217, 23850))),
    "H200": Machine(
        replies=(H200,), name="NVIDIA H200", architecture="Hopper",
        devices=(device("NVIDIA H200", (9, 0), 143157, 142600),)),
    "H200 in MIG": Machine(
        replies=(H200_MIG, H200_MIG_LIST, H200_MIG_TABLE), name="NVIDIA H200 MIG 1c.3g.71gb",
        architecture="Hopper", devices=(device("NVIDIA H200 MIG 1c.3g.71gb", (9, 0), 71424, 71000),)),
    "H100 in MIG": Machine(
        replies=(H100_MIG, H100_MIG_LIST, H100_MIG_TABLE), name="NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        architecture="Hopper", devices=(device("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 40448, 40000),)),
    "WSL": Machine(
        replies=(RTX_5090_LAPTOP_WSL,), release="6.6.87.2-microsoft-standard-WSL2", architecture="Blackwell",
        name="NVIDIA GeForce RTX 5090 Laptop GPU",
        devices=(device("NVIDIA GeForce RTX 5090 Laptop GPU", (12, 0), 24463, 22500),)),
    "WDDM driver": Machine(
        replies=(RTX_2080_SUPER_WDDM,), name="NVIDIA GeForce RTX 2080 SUPER", architecture="Turing",
        devices=(device("NVIDIA GeForce RTX 2080 SUPER", (7, 5), 8192, 7000),)),
    "no driver": Machine(replies=(NOT_FOUND,)),
    "driver without a GPU": Machine(replies=(NO_DEVICES,)),
    "driver not loaded": Machine(replies=(NOT_LOADED,)),
    "driver and library differ": Machine(replies=(MISMATCH,)),
    "GPU beside a CPU build of torch": Machine(replies=(L40S,), torch_cuda=""),
}
WITH_GPU = [name for name, machine in MACHINES.items() if machine.devices]
WITHOUT = [name for name, machine in MACHINES.items() if not machine.devices]


def profile_of(name, monkeypatch) -> tuple[nvidia.Driver, HardwareProfile]:
    machine = MACHINES[name]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(support, "torch_cuda_version", lambda: machine.torch_cuda)
    monkeypatch.setattr(probe, "torch", FakeTorch(machine.devices))
    around = host.fetch(None)
    release = f"Linux version {machine.release}"
    around = type(around)(**{**around.__dict__, "system": host._system(release),
                             "wsl": "microsoft" in release})
    driver = nvidia.fetch(answers(*machine.replies))
    return driver, profiler.assemble(around, driver, tuple(probe.devices()), {}, {}, {"cudnn": "9.10.2"})


@pytest.mark.parametrize("name", MACHINES)
def test_every_captured_machine_makes_a_profile_that_survives_its_json(name, monkeypatch):
    _, profile = profile_of(name, monkeypatch)
    assert from_data(HardwareProfile, json.loads(dumps(profile))) == profile
    assert all(answer.why and (answer.works or answer.what_to_do or key == "cuda")
               for key, answer in profile.supports.items())


@pytest.mark.parametrize("name", WITH_GPU)
def test_torch_and_the_driver_see_the_same_gpus(name, monkeypatch):
    driver, profile = profile_of(name, monkeypatch)
    assert profile.device == "cuda"
    assert profile.name == MACHINES[name].name
    assert {gpu.architecture for gpu in profile.gpus} == {MACHINES[name].architecture}
    assert [(gpu.name, gpu.capability) for gpu in driver.gpus] == [(gpu.name, gpu.capability)
                                                                  for gpu in profile.gpus]
    for told, opened in zip(driver.gpus, profile.gpus, strict=True):
        assert abs(told.total_bytes - opened.total_bytes) < 0.06 * told.total_bytes
        assert opened.free_bytes <= told.free_bytes <= told.total_bytes


@pytest.mark.parametrize("name", WITHOUT)
def test_a_machine_without_a_gpu_that_torch_can_use_is_a_cpu_machine(name, monkeypatch):
    _, profile = profile_of(name, monkeypatch)
    assert profile.device == "cpu"
    assert not profile.supports["cuda"].works


@pytest.mark.parametrize(("name", "advice"), [
    ("no driver", ""), ("driver without a GPU", "Check that the GPU is seated"),
    ("driver not loaded", "modprobe nvidia"), ("driver and library differ", "Reboot the machine."),
    ("GPU beside a CPU build of torch", "--index-url https://download.pytorch.org/whl/cu130")])
def test_each_trouble_has_its_own_remedy(name, advice, monkeypatch):
    _, profile = profile_of(name, monkeypatch)
    assert advice in profile.supports["cuda"].what_to_do
    assert bool(advice) == bool(profile.supports["cuda"].what_to_do)


def test_a_mig_device_has_the_memory_of_the_table_not_of_its_name(monkeypatch):
    driver, _ = profile_of("H200 in MIG", monkeypatch)
    assert driver.gpus[0].total_bytes == 71424 * MIB
    assert driver.gpus[0].free_bytes == (71424 - 22) * MIB
    assert "divided by MIG into 5 (1c.3g.71gb, 2c.3g.71gb, 2g.35gb, 1g.18gb, 1g.18gb)" in driver.notes[0]


def test_on_wsl_the_system_says_so_and_the_probe_watches_for_spilling(monkeypatch):
    _, profile = profile_of("WSL", monkeypatch)
    assert profile.system.endswith("(WSL)")
    around = host.fetch(None)
    assert "--spills" in profiler.probe_command(type(around)(**{**around.__dict__, "wsl": True}))


def test_turing_beside_ada_differ_in_what_they_support(monkeypatch):
    _, turing = profile_of("single consumer GPU with a desktop", monkeypatch)
    _, ada = profile_of("two GPUs", monkeypatch)
    differing = {name for name in turing.supports
                 if turing.supports[name].works != ada.supports[name].works}
    assert {"bf16", "sdpa_flash", "sdpa_cudnn"} <= differing
    assert turing.supports["fp16"].works
    assert turing.supports["sdpa_efficient"].works


def test_the_driver_and_the_packages_are_named_with_their_versions(monkeypatch):
    _, profile = profile_of("H200", monkeypatch)
    assert profile.versions["driver"] == "590.48.01"
    assert profile.versions["cudnn"] == "9.10.2"
    assert profile.versions["torch_cuda"] == "13.0"
    assert profile.gpus[0].total_bytes > 139 * GIB
