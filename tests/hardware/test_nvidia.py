import os
import sys
import time

import pytest
from smi_texts import (
    H100_MIG_TABLE,
    H200_MIG,
    H200_MIG_LIST,
    H200_MIG_TABLE,
    HUNG,
    LOST,
    MIG_EMPTY_LIST,
    MIG_LIST,
    MIG_QUERY,
    MISMATCH,
    MIXED_LIST,
    MIXED_QUERY,
    NO_DEVICES,
    NO_TABLE,
    NOT_FOUND,
    NOT_LOADED,
    OLD_ANSWER,
    OLD_REFUSAL,
    RTX_2060,
    SHARED_MEMORY,
    TWO_GPUS,
    answers,
)

from training.hardware import nvidia
from training.hardware.nvidia import Reply
from training.records import GIB


def test_one_rtx_2060_is_read_with_its_architecture_and_free_memory():
    driver = nvidia.fetch(answers(RTX_2060))
    (gpu,) = driver.gpus
    assert (gpu.name, gpu.architecture, gpu.capability) == ("NVIDIA GeForce RTX 2060 SUPER", "Turing", "7.5")
    assert gpu.total_bytes == 8 * GIB
    assert gpu.free_bytes == 7586 << 20
    assert driver.version == "550.90.07"
    assert driver.problem == ""


def test_two_different_gpus_keep_their_order():
    gpus = nvidia.fetch(answers(TWO_GPUS)).gpus
    assert [(gpu.index, gpu.architecture) for gpu in gpus] == [(0, "Ampere"), (1, "Ada")]


@pytest.mark.parametrize(("capability", "name"), [
    ("7.0", "Volta"), ("7.5", "Turing"), ("8.0", "Ampere"), ("8.6", "Ampere"), ("8.7", "Ampere"),
    ("8.9", "Ada"), ("9.0", "Hopper"), ("10.0", "Blackwell"), ("10.3", "Blackwell"), ("12.0", "Blackwell"),
    ("99.0", "unknown"), ("[N/A]", "unknown")])
def test_the_architecture_follows_the_capability(capability, name):
    assert nvidia.architecture(capability) == name


def test_no_command_means_no_driver_and_is_no_fault_to_mend():
    driver = nvidia.fetch(answers(NOT_FOUND))
    assert (driver.installed, driver.gpus, driver.what_to_do) == (False, (), "")


@pytest.mark.parametrize(("reply", "problem", "advice"), [
    (MISMATCH, "old kernel module", "Reboot"), (NOT_LOADED, "not loaded", "modprobe"),
    (NO_DEVICES, "finds no GPU", "container"), (LOST, "fallen off the bus", "Reboot"),
    (HUNG, "did not answer within 10 s", "reinstall")])
def test_a_driver_in_trouble_says_what_it_is_and_what_to_do(reply, problem, advice):
    driver = nvidia.fetch(answers(reply))
    assert driver.installed
    assert driver.gpus == ()
    assert problem in driver.problem
    assert advice in driver.what_to_do
    assert "\n" not in driver.problem


def test_a_divided_a100_offers_its_first_instance_not_its_full_memory():
    driver = nvidia.fetch(answers(MIG_QUERY, MIG_LIST, NO_TABLE))
    (gpu,) = driver.gpus
    assert gpu.name == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert gpu.total_bytes == 18 * GIB
    assert "divided by MIG into 2" in driver.notes[0]


@pytest.mark.parametrize(("table", "device", "sizes"), [
    (H200_MIG_TABLE, (0, 3), (9, 16384)), (H200_MIG_TABLE, (0, 0), (22, 71424)),
    (H100_MIG_TABLE, (0, 0), (26, 40448))])
def test_the_table_tells_each_mig_devices_memory(table, device, sizes):
    found = nvidia.instance_memory(table.text)
    assert found[device] == (sizes[0] << 20, sizes[1] << 20)


def test_without_a_table_a_mig_device_is_taken_for_less_than_it_has():
    (gpu,) = nvidia.fetch(answers(H200_MIG, H200_MIG_LIST, NO_TABLE)).gpus
    assert 0.85 * (71424 << 20) < gpu.total_bytes < 71424 << 20


def test_beside_whole_gpus_a_divided_one_is_left_out():
    driver = nvidia.fetch(answers(MIXED_QUERY, MIXED_LIST, NO_TABLE))
    assert [gpu.index for gpu in driver.gpus] == [1, 2, 3]
    assert {gpu.name for gpu in driver.gpus} == {"NVIDIA A100-SXM4-80GB"}
    assert driver.problem == ""
    assert "GPU 0 is divided by MIG into 4" in driver.notes[0]
    assert "it is left out beside whole GPUs" in driver.notes[0]


def test_of_two_divided_gpus_a_process_gets_one_device():
    query = Reply(code=0, text="".join(line.replace("Disabled", "Enabled") + "\n"
                                       for line in MIXED_QUERY.text.splitlines()[:2]))
    listing = Reply(code=0, text=MIXED_LIST.text.replace("GPU 1: NVIDIA A100-SXM4-80GB (", "GPU 1: X (")
                    .split("GPU 2:")[0] + "  MIG 2g.20gb     Device  0: (UUID: MIG-1)\n")
    driver = nvidia.fetch(answers(query, listing, NO_TABLE))
    assert [gpu.name for gpu in driver.gpus] == ["NVIDIA A100-SXM4-80GB MIG 1g.20gb"]
    assert "GPU 1 is divided by MIG into 1 (2g.20gb)" in driver.notes[1]


def test_mig_mode_without_an_instance_leaves_no_gpu_and_says_so():
    driver = nvidia.fetch(answers(MIG_QUERY, MIG_EMPTY_LIST, NO_TABLE))
    assert driver.gpus == ()
    assert "without an instance" in driver.problem
    assert "Create a MIG instance" in driver.what_to_do


def test_an_old_driver_is_asked_again_without_the_fields_it_does_not_know():
    ask = answers(OLD_REFUSAL, OLD_ANSWER)
    (gpu,) = nvidia.fetch(ask).gpus
    assert "compute_cap" in ask.asked[0][0]
    assert "compute_cap" not in ask.asked[1][0]
    assert (gpu.architecture, gpu.capability, gpu.total_bytes) == ("Turing", "7.5", 15109 << 20)


def test_a_gpu_that_shares_the_host_memory_is_noted():
    driver = nvidia.fetch(answers(SHARED_MEMORY))
    assert driver.gpus[0].architecture == "Blackwell"
    assert "no memory size" in driver.notes[0]


@pytest.mark.parametrize(("setting", "kept"), [
    (None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("0,7,1", [0]), ("GPU-2222", [0, 1])])
def test_cuda_visible_devices_hides_and_orders(setting, kept):
    gpus = nvidia.fetch(answers(TWO_GPUS)).gpus
    assert [gpu.index for gpu in nvidia.visible(gpus, setting)] == kept


@pytest.mark.parametrize(("driver", "capability", "tag"), [
    ("580.95.05", "8.9", "cu130"), ("550.90.07", "8.9", "cu126"), ("580.95.05", "7.0", "cu126"),
    ("580.95.05", "12.0", "cu130"), ("", "", "cu126")])
def test_the_wheel_index_fits_driver_and_gpu(driver, capability, tag):
    assert nvidia.torch_index(driver, capability).endswith(tag)


def fake_smi(folder, body):
    script = folder / "nvidia-smi"
    script.write_text(f"#!{sys.executable}\n{body}\n")
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_hanging_nvidia_smi_is_given_up_after_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_smi(tmp_path, "import time; time.sleep(30)"))
    began = time.monotonic()
    reply = nvidia.run_smi([], timeout_s=0.3)
    assert time.monotonic() - began < 5
    assert (reply.code, reply.text) == (None, "nvidia-smi did not answer within 0.3 s")


def test_a_real_process_is_asked_for_csv(tmp_path, monkeypatch):
    body = f"import sys; print({TWO_GPUS.text!r} if '--format=csv,noheader,nounits' in sys.argv else 'no')"
    monkeypatch.setenv("PATH", fake_smi(tmp_path, body))
    assert len(nvidia.fetch().gpus) == 2
