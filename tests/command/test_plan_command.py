"""`plan`: machines that are not here, all of them at once, and how little that costs."""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import elite_train
from training import models
from training.command import machines, request
from training.command.choices import Choices
from training.command.ending import Session
from training.errors import UsageError
from training.hardware.profiler import HardwareProfiler
from training.planning import presets, tiers
from training.planning.outlook import REFERENCE, REFERENCE_TOKENS, outlook
from training.records import GIB, Gpu, Request

ROOT = Path(__file__).resolve().parent.parent.parent
REPO = str(ROOT / "training")
HEAVY = "torch transformers peft deepspeed bitsandbytes"


@pytest.fixture
def here(monkeypatch):
    """This machine, measured quickly once, with no GPU."""
    measured = dataclasses.replace(machines.load("cpu-box"), source="measured", name="here")
    monkeypatch.setattr(HardwareProfiler, "profile", lambda self, quick: measured)
    return measured


def run(capsys, *words):
    elite_train.run(Session(argv=["elite_train.py", *words]))
    return capsys.readouterr()


@pytest.mark.parametrize(("vram_gib", "like"), [(24, "rtx-3090"), (8, "rtx-2060-super"), (500, "b200"),
                                                (11.5, "rtx-3060-12gb"), (1, "rtx-2060-super")])
def test_a_card_that_is_not_here_is_as_fast_as_the_preset_nearest_in_memory(here, vram_gib, like):
    machine = machines.described("", vram_gib, 64, None)
    assert presets.nearest_gpu(vram_gib) == like
    name = f"a GPU of {vram_gib:g} GiB, as fast as {like}, the preset nearest in memory"
    assert (machine.gpus[0].name, machine.gpus[0].free_bytes) == (name, int(vram_gib * GIB))
    assert machine.rate("gpu0.matmul_bf16") == machines.load(like).rate("gpu0.matmul_bf16")
    assert (machine.ram_available_bytes, machine.source) == (64 * GIB, "preset")
    assert machine.disk_free_bytes == here.disk_free_bytes


def test_vram_and_ram_alone_make_a_plan(here, capsys):
    shown = run(capsys, "plan", "--vram", "24", "--ram", "64", "--repo", REPO, "--base-model", "phi-2").out
    assert "a GPU of 24 GiB, as fast as rtx-3090" in " ".join(shown.split())
    assert "Described, not measured: this machine with a GPU of 24 GiB" in " ".join(shown.split())
    assert "of 21.1 GiB" in shown


def test_a_gpu_whose_speed_was_not_measured_borrows_that_of_its_preset(here):
    card = Gpu(index=0, name="NVIDIA GeForce RTX 4090", architecture="Ada", capability="8.9",
               total_bytes=24 * GIB, free_bytes=20 * GIB)
    found = machines.with_rates(dataclasses.replace(here, gpus=(card,)))
    assert found.rate("gpu0.matmul_bf16") == machines.load("rtx-4090").rate("gpu0.matmul_bf16")
    assert found.figures["gpu0.matmul_bf16"].method == "not measured: the preset rtx-4090"
    assert machines.with_rates(found) == found
    assert machines.with_rates(here) == here


def test_one_base_model_on_every_machine_as_json(capsys):
    found = json.loads(run(capsys, "plan", "--all", "--base-model", "phi-2", "--json").out)
    assert [row["machine"] for row in found["plans"]] == list(presets.by_memory())
    assert set(presets.by_memory()) == set(presets.names())
    assert found["repository"]["code_bytes"] == 16_000_000
    rows = {row["machine"]: row for row in found["plans"]}
    assert rows["h100"]["hours"] < rows["rtx-3090"]["hours"]
    assert (rows["h100"]["by"], rows["h100"]["tier"]) == (["model"], 5)
    assert all(row["model"] == "phi-2" and not row["refused"] for row in found["plans"])


def test_one_machine_with_every_base_model_for_a_repository(capsys):
    shown = run(capsys, "plan", "--all", "--hardware", "rtx-2060-super", "--repo", REPO).out
    assert shown.startswith(f"Plans for {REPO}, ")
    assert all(f"\n  {name} " in shown for name in models.registry() if name != "embedded")
    assert "With rtx-2060-super:" in shown


def test_the_reference_repository_has_the_tokens_that_it_is_said_to_have():
    assert REFERENCE_TOKENS == 5_000_000 == round(REFERENCE.code_bytes / 3.2)


@pytest.mark.real
@pytest.mark.alone
def test_all_plans_take_less_than_ten_cpu_seconds():
    """A twelfth of the 336 plans of the shipped tables, spread over machines and models, in a twelfth: the
    best of three times, since a busy host's are up to twice as long."""
    bases = machines.bases("auto")[::4]
    some = {name: machines.load(name) for name in presets.by_memory()[::3]}
    assert len(bases) * len(some) == 28

    def took_s():
        start = time.process_time()
        assert len(list(outlook(some, bases, Request(repo="/r")))) == 28
        return time.process_time() - start
    assert min(took_s() for _ in range(3)) < 10 * 28 / 336


def test_anyway_reaches_the_request():
    def survey(path):
        return REFERENCE
    for choices, anyway in ((Choices(anyway=True), True), (Choices(), False)):
        made = request.check(choices, survey, claim=False, instead=REFERENCE)
        assert (made.request.anyway, made.facts) == (anyway, REFERENCE)


def test_anyway_shows_a_plan_that_is_refused_without_it(capsys):
    words = ["plan", "--hardware", "rtx-2060-super", "--base-model", "qwen2.5-coder-7b", "--tier", "2",
             "--set", "stream.chunk_tokens=0", "--set", "training.micro_batch=8", "--repo", REPO]
    with pytest.raises(Exception, match=r"Nearest setting that fits: --"):
        run(capsys, *words)
    shown = " ".join(run(capsys, *words, "--anyway").out.split())
    assert "--anyway: it runs although it does not fit. This run needs " in shown


def test_a_twelfth_tier_is_on_the_screen_and_in_the_documentation(capsys, monkeypatch, tmp_path):
    from training import documentation
    path = tmp_path / "tiers.yaml"
    row = ("  - {tier: 12, context_tokens: 8388608, target_tokens: 1048576, lora_rank: 2, min_vram_gib: 48, "
           "needs: [streamed]}\n")
    path.write_text(tiers.TABLE.read_text() + row)
    monkeypatch.setattr(tiers, "TABLE", path)
    shown = run(capsys, "plan", "--hardware", "b200", "--base-model", "phi-2", "--tier", "12", "--repo",
                REPO, "--anyway", "--set", "model.rope_factor=4096").out
    assert "Tier 12: windows of 8,388,608 tokens" in shown
    assert "  >   12 8,388,608 streamed" in shown
    monkeypatch.setattr(documentation, "plans", lambda: dict.fromkeys(
        [(machine, model) for machine in presets.by_memory() for model in documentation.SHOWN],
        next(outlook({"x": machines.load("b200")}, [models.registry()["phi-2"]], Request(repo="/r")))))
    page = documentation.tiers_page()
    assert "| 12 | 8,388,608 | 1,048,576 | 2 | 48 GB | streamed |" in page
    assert "| 12 | (8,388,608) | streamed |" in page


def test_a_plan_for_another_machine_takes_less_than_two_cpu_seconds_and_no_torch():
    code = ("import runpy, sys; sys.argv = ['elite_train.py', *sys.argv[1:]]\n"
            "try:\n    runpy.run_path('elite_train.py', run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            f"sys.stderr.write('loaded: ' + ' '.join(sorted(set(sys.modules) & set('{HEAVY}'.split()))))")
    words = ["plan", "--hardware", "rtx-2060-super", "--base-model", "phi-2", "--repo", "training"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded: "
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_gpus_of_another_machine_can_be_named_and_wrong_ones_are_refused_with_its_own(here, capsys):
    words = ("plan", "--hardware", "rtx-3090", "--base-model", "phi-2", "--repo", REPO, "--json", "--set")
    plan = json.loads(run(capsys, *words, "device.gpus=0").out)
    assert plan["choices"]["device.gpus"] == {"value": "0", "source": "user", "why": "set by the user"}
    with pytest.raises(UsageError) as caught:
        run(capsys, *words, "device.gpus=3")
    assert str(caught.value) == "device.gpus names 3; the GPUs found have the indices 0."
