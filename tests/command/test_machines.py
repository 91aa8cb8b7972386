"""Planning for other machines: presets, files, and other sizes of memory and disk."""

import pytest

from training.command import machines
from training.errors import MissingInput, UsageError
from training.records import GIB, HardwareProfile
from training.rundir import write_record

CARD = """\
name: a card of 8 GB
ram_gib: 64
disk_free_gib: 200
cpu: {name: any, cores: 8}
gpu: {name: any, capability: "8.6", total_gib: 8, count: 1, allocatable_gib: 7, matmul_bf16_tflops: 40}
"""


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text(CARD)
    return path


def test_a_preset_file_is_a_machine_and_sizes_replace_its_own(card):
    machine = machines.described(str(card), vram_gib=24, ram_gib=None, disk_gib=10)
    assert machine.gpus[0].free_bytes == machine.gpus[0].total_bytes == 24 * GIB
    assert machine.rate("gpu0.allocatable_bytes") == 24 * GIB
    assert machine.rate("gpu0.matmul_bf16") == 40e12
    assert (machine.ram_available_bytes, machine.disk_free_bytes) == (64 * GIB, 10 * GIB)


def test_a_saved_profile_can_be_planned_with(card, tmp_path):
    write_record(tmp_path / "hardware.json", machines.load(str(card)))
    loaded = machines.load(str(tmp_path / "hardware.json"))
    assert isinstance(loaded, HardwareProfile)
    assert loaded.name == "a card of 8 GB"


def test_vram_without_a_gpu_is_an_error(card):
    card.write_text(CARD.split("gpu:")[0])
    with pytest.raises(UsageError, match=r"--vram is 24 and a card of 8 GB has no GPU; add --hardware"):
        machines.described(str(card), 24, None, None)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_sizes_that_make_no_sense_are_refused(card, size):
    with pytest.raises(UsageError, match=r"--ram is .*; it must be more than 0"):
        machines.described(str(card), None, size, None)


def test_an_unknown_machine_and_a_file_that_is_none_are_refused(tmp_path):
    with pytest.raises(MissingInput, match="No hardware preset or file 'rtx9'"):
        machines.load("rtx9")
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="holds a list"):
        machines.load(str(tmp_path / "a.yaml"))
