"""Hardware presets: shipped files, people's own, and the overrides."""

import pytest

from training import models
from training.errors import EliteError, MissingInput, UsageError
from training.hardware.presets import from_preset
from training.planning import OptimalConfigCalculator, presets, tables
from training.records import GIB, RepositoryFacts, Request

WANTED = {"rtx-2060-super", "rtx-3060-12gb", "rtx-3090", "rtx-4090", "rtx-5090", "a100-40gb", "a100-80gb",
          "h100", "h200", "b200", "laptop", "cpu-box"}
FACTS = RepositoryFacts(path="/r", name="r", files=200, code_files=180, code_bytes=5_000_000,
                        languages={"python": 180})


def test_the_shipped_presets_are_there():
    assert set(presets.names()) >= WANTED


@pytest.mark.parametrize("name", presets.names())
def test_each_preset_makes_a_plan(name):
    profile = from_preset(presets.load(name))
    base = models.registry()["phi-2" if profile.gpus else "embedded"]
    plan = OptimalConfigCalculator(profile).calculate(Request(repo="/r"), base, FACTS)
    assert plan.total_s > 0
    assert profile.figures
    assert presets.load(name)["source"]


def test_overrides_are_put_in():
    data = presets.load("RTX-4090", vram_gib=16, ram_gib=8, disk_gib=50)
    profile = from_preset(data)
    assert profile.gpus[0].total_bytes == 16 * GIB
    assert (profile.ram_total_bytes, profile.disk_free_bytes) == (8 * GIB, 50 * GIB)
    assert presets.load("rtx-4090")["gpu"]["total_gib"] == 24


def test_an_unknown_preset_gets_the_nearest_and_the_list():
    with pytest.raises(MissingInput, match=r"No hardware preset or file 'rtx-490'\. Nearest: rtx-4090\. "
                                           r"Presets: a100"):
        presets.load("rtx-490")


def test_a_file_of_ones_own_serves(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nram_gib: 4\ndisk_free_gib: 10\ncpu: {cores: 2, matmul_fp32_gflops: 30}\n")
    assert from_preset(presets.load(str(path))).name == "mine"


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("ram_gib: -4\ncpu: {cores: x}\ngpu: {total_gib: 8}\n")
    with pytest.raises(EliteError) as error:
        presets.load(str(path))
    text = str(error.value)
    assert all(word in text for word in ("ram_gib is -4", "disk_free_gib is None", "cpu.cores is 'x'",
                                         "gpu.count is None"))


def test_vram_on_a_machine_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="--vram was given and this hardware has no GPU"):
        presets.load("laptop", vram_gib=8)
    with pytest.raises(UsageError, match="--ram 0: give GiB above 0"):
        presets.load("laptop", ram_gib=0)


def test_the_rows_for_the_documentation_name_every_preset():
    assert {row["preset"] for row in tables.preset_rows()} == set(presets.names())
