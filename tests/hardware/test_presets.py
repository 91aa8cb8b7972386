import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.errors import UsageError
from training.hardware import nvidia
from training.hardware.profiler import from_preset
from training.records import GIB, HardwareProfile, from_data, to_data

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "hardware"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
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


def test_each_figures_source_is_that_of_the_longest_key_it_begins_with():
    sources = {"gpu": "sheet", "gpu.h2d": "assumed: PCIe", "disk": "assumed: NVMe"}
    figures = from_preset(RTX_2060 | {"sources": sources}).figures
    assert {name: figure.method for name, figure in figures.items() if not name.startswith("host.")} == {
        "gpu0.matmul_fp16": "sheet", "gpu0.memory_bandwidth": "sheet", "gpu0.h2d_pinned": "assumed: PCIe",
        "disk.write": "assumed: NVMe", "cpu.matmul_fp32": "vendor sheet, 2019"}


def test_sources_that_are_no_mapping_are_refused():
    with pytest.raises(UsageError, match="sources is 'the web'; it must be a mapping"):
        from_preset(RTX_2060 | {"sources": "the web"})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_preset_has_every_figure_with_its_source(path):
    profile = from_preset(yaml.safe_load(path.read_text()))
    assert profile.name == path.stem
    wanted = {"cpu.matmul_fp32", "cpu.train_fp32", "cpu.memory_bandwidth", "disk.write", "disk.read"}
    if profile.gpus:
        wanted |= {f"gpu0.{name}" for name in ("matmul_fp32", "matmul_fp16", "memory_bandwidth", "h2d_pinned",
                                               "d2h_pinned")}
        assert profile.gpus[0].free_bytes <= profile.gpus[0].total_bytes
        assert profile.gpus[0].architecture == nvidia.architecture(profile.gpus[0].capability)
    if profile.supports["bf16"].works:
        wanted.add("gpu0.matmul_bf16")
    assert wanted == set(profile.figures)
    for name, figure in profile.figures.items():
        assert figure.value > 0
        assert len(figure.method) > 15, name
    for name in ("disk.write", "cpu.train_fp32"):
        assert profile.figures[name].method.startswith("assumed:"), name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_tensor_rates_are_those_with_fp32_accumulation(path):
    profile = from_preset(yaml.safe_load(path.read_text()))
    if "gpu0.matmul_bf16" in profile.figures:
        assert profile.rate("gpu0.matmul_fp16") == profile.rate("gpu0.matmul_bf16")


@pytest.mark.parametrize(("name", "cores", "ghz", "tensor_flop"), [
    ("rtx-2060-super", 2176, 1.650, 272 * 128), ("rtx-3060-12gb", 3584, 1.777, 112 * 256),
    ("rtx-3090", 10496, 1.695, 328 * 256), ("rtx-4090", 16384, 2.520, 512 * 256),
    ("rtx-5090", 21760, 2.407, 680 * 256)])
def test_a_geforce_cards_peaks_follow_from_its_cores_and_clock(name, cores, ghz, tensor_flop):
    profile = from_preset(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    assert profile.rate("gpu0.matmul_fp32") == pytest.approx(2e9 * cores * ghz, rel=0.01)
    assert profile.rate("gpu0.matmul_fp16") == pytest.approx(1e9 * tensor_flop * ghz / 2, rel=0.01)


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
