import subprocess
import sys

import pytest

from training.errors import UsageError
from training.hardware.profiler import from_preset
from training.records import GIB, HardwareProfile, from_data, to_data

RTX_2060 = {
    "name": "rtx-2060-super", "source": "vendor sheet, 2019", "ram_gib": 32, "disk_free_gib": 200,
    "disk_write_gb_s": 2.5,
    "gpu": {"name": "NVIDIA GeForce RTX 2060 SUPER", "architecture": "Turing", "capability": "7.5",
            "total_gib": 8, "matmul_fp16_tflops": 57.4, "memory_gb_s": 448, "h2d_pinned_gb_s": 12},
    "cpu": {"cores": 8, "matmul_fp32_gflops": 400},
}


def test_a_preset_becomes_a_profile_whose_figures_name_their_source():
    profile = from_preset(RTX_2060)
    assert (profile.source, profile.device, profile.cpu_cores) == ("preset", "cuda", 8)
    assert profile.gpus[0].total_bytes == 8 * GIB
    assert profile.gpus[0].free_bytes == 8 * GIB
    assert profile.rate("gpu0.matmul_fp16") == pytest.approx(57.4e12)
    assert profile.rate("gpu0.memory_bandwidth") == 448e9
    assert profile.rate("gpu0.h2d_pinned") == 12e9
    assert profile.rate("cpu.matmul_fp32") == 400e9
    assert profile.rate("disk.write") == 2.5e9
    assert profile.figures["gpu0.matmul_fp16"].method == "vendor sheet, 2019"


def test_sizes_are_no_rates():
    assert not [name for name in from_preset(RTX_2060).figures if "total" in name or "free" in name]


def test_support_follows_the_described_capability():
    supports = from_preset(RTX_2060).supports
    assert not supports["bf16"].works
    assert supports["nvme"].works
    assert supports["bitsandbytes_4bit"].works


def test_several_gpus_share_the_described_figures():
    preset = RTX_2060 | {"gpu": RTX_2060["gpu"] | {"count": 2}}
    profile = from_preset(preset)
    assert [gpu.index for gpu in profile.gpus] == [0, 1]
    assert profile.rate("gpu1.matmul_fp16") == profile.rate("gpu0.matmul_fp16")


def test_a_preset_without_a_gpu_is_a_cpu_machine():
    profile = from_preset({name: value for name, value in RTX_2060.items() if name != "gpu"})
    assert profile.device == "cpu"
    assert not profile.supports["cuda"].works


def test_a_preset_profile_survives_its_own_json():
    profile = from_preset(RTX_2060)
    assert from_data(HardwareProfile, to_data(profile)) == profile


@pytest.mark.parametrize(("change", "message"), [
    ({"ram_gib": None}, "Hardware preset rtx-2060-super: ram_gib is None; it must be a number above 0."),
    ({"ram_gib": -1}, "ram_gib is -1"), ({"cpu": {}}, "cores is None"), ({"gpu": "big"}, "gpu is 'big'"),
    ({"gpu": {"name": "x"}}, "total_gib is None"), ({"gpu": {"total_gib": 8, "count": 0}}, "count is 0")])
def test_a_wrong_preset_is_refused_with_the_key_and_the_value(change, message):
    with pytest.raises(UsageError, match=message):
        from_preset(RTX_2060 | change)


def test_reading_a_preset_loads_no_torch():
    code = ("import sys; from training.hardware.profiler import from_preset; "
            f"from_preset({RTX_2060!r}); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
