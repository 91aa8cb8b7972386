import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from smi_texts import MISMATCH, NOT_FOUND, RTX_2060, TWO_GPUS, answers

from training.errors import EliteError
from training.hardware import host, nvidia, profiler, support
from training.hardware.profiler import HardwareProfiler, run_probe
from training.records import HardwareProfile, dumps, from_data, to_data

CHILD = """
import json, sys, time
from training.hardware.profiler import HardwareProfiler
began = time.perf_counter()
profile = HardwareProfiler(sys.argv[1]).profile(quick=True)
json.dump({"seconds": time.perf_counter() - began, "torch": "torch" in sys.modules,
           "profile": json.loads(__import__("training.records").records.dumps(profile))}, sys.stdout)
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    found = {"seconds": float("inf")}
    # Another process on the same cores can slow one attempt down; the fastest of three is the figure.
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CHILD, str(folder / "runs" / "x")], check=True,
                              capture_output=True, text=True)
        found = min(found, json.loads(done.stdout), key=lambda one: one["seconds"])
        if found["seconds"] < 2:
            break
    return found | {"folder": folder}


@pytest.fixture(scope="module")
def full():
    phases = []
    profile = HardwareProfiler().profile(quick=False, progress=lambda *event: phases.append(event))
    return profile, phases


def test_the_quick_profile_takes_less_than_two_seconds_and_loads_no_torch(quick):
    assert quick["torch"] is False
    assert quick["seconds"] < 2


def test_the_quick_profile_measures_processor_and_disk_and_leaves_no_file(quick):
    profile = from_data(HardwareProfile, quick["profile"])
    assert profile.source == "measured"
    assert profile.rate("cpu.matmul_fp32") > 0
    assert profile.rate("disk.write") > 0
    assert profile.disk_path == str(quick["folder"])
    assert list(quick["folder"].iterdir()) == []


def test_both_profiles_tell_the_systems_limits_and_the_versions(quick, full):
    for profile in (from_data(HardwareProfile, quick["profile"]), full[0]):
        assert {"host.pinned_limit", "host.memlock_limit", "host.cgroup_memory", "host.cgroup_cpus",
                "host.open_files", "host.swap", "host.shm"} <= profile.figures.keys()
        assert {"torch", "deepspeed", "bitsandbytes"} <= profile.versions.keys()
        assert profile.rates_date == ""


def test_a_quick_profile_survives_its_json(quick):
    profile = from_data(HardwareProfile, quick["profile"])
    assert json.loads(dumps(profile)) == quick["profile"]
    assert from_data(HardwareProfile, to_data(profile)) == profile


def test_the_full_profile_measures_with_torch_and_tries_the_quantized_kernels(full):
    profile, _ = full
    for name in ("matmul_fp32", "matmul_bf16", "matmul_fp16", "train_fp32", "memory_bandwidth",
                 "attention_forward", "attention_backward", "attention_forward_1024",
                 "attention_backward_1024", "nf4_linear", "nf4_unpack"):
        figure = profile.figures[f"cpu.{name}"]
        assert figure.value, f"{name}: {figure.method}"
        assert figure.repeats >= 1
        assert (figure.spread is None) == (figure.repeats == 1)
    for name in ("sdpa_flash", "sdpa_math", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        assert profile.supports[name].works, profile.supports[name].why
        assert "tried" in profile.supports[name].why


def test_the_full_profile_survives_its_json(full):
    assert from_data(HardwareProfile, json.loads(dumps(full[0]))) == full[0]


def test_progress_names_each_measurement_in_order_and_ends(full):
    names = [event[3] for event in full[1]]
    assert names.index("cpu.matmul_fp32") < names.index("cpu.train_fp32") < names.index("optimizations")
    assert full[1][-1][1] == full[1][-1][2]


def machine() -> host.Host:
    return host.fetch(None)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_probe_that_hangs_is_ended_with_its_children(tmp_path):
    code = ("import subprocess, sys, pathlib; child = subprocess.Popen([sys.executable, '-c', "
            "'import time; time.sleep(60)']); "
            f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); child.wait()")
    began = time.monotonic()
    with pytest.raises(EliteError, match=r"did not end within 2 s; `profile --quick`"):
        run_probe(machine(), profiler.silent, timeout_s=2, command=python(code))
    assert time.monotonic() - began < 10
    time.sleep(0.2)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_probe_without_torch_says_so_and_what_to_install():
    code = "raise ModuleNotFoundError(\"No module named 'torch'\")"
    with pytest.raises(EliteError, match=r"ended with code 1: .*'torch'; install the requirements"):
        run_probe(machine(), profiler.silent, command=python(code))


def test_a_probe_killed_by_a_signal_is_told_by_it():
    with pytest.raises(EliteError, match="was ended by signal 9: it printed nothing"):
        run_probe(machine(), profiler.silent, command=python("import os; os.kill(os.getpid(), 9)"))


def test_a_probe_that_ends_well_without_an_answer_is_a_failure():
    with pytest.raises(EliteError, match="ended with code 0"):
        run_probe(machine(), profiler.silent, command=python("print('no json')"))


def test_ctrl_c_in_the_progress_callable_ends_the_probe(tmp_path):
    code = ("import os, sys, time, pathlib; "
            f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); "
            f"sys.stderr.write({profiler.MARK!r} + ' 0 1 x\\n'); sys.stderr.flush(); time.sleep(60)")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_probe(machine(), stop, command=python(code))
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.fixture
def torch_build(monkeypatch):
    def pretend(cuda: str, version: str):
        monkeypatch.setattr(support, "torch_cuda_version", lambda: cuda)
        monkeypatch.setattr(support, "installed_packages", lambda names=(): {"torch": version})
    return pretend


def profile_with(monkeypatch, reply) -> HardwareProfile:
    driver = nvidia.fetch(answers(reply))
    monkeypatch.setattr(nvidia, "fetch", lambda: driver)
    return HardwareProfiler().profile(quick=True)


def test_a_gpu_beside_a_cpu_build_of_torch_is_not_planned_for_but_told(monkeypatch, torch_build):
    torch_build("", "2.13.0+cpu")
    profile = profile_with(monkeypatch, RTX_2060)
    assert profile.device == "cpu"
    assert "but torch 2.13.0+cpu is a CPU build" in profile.supports["cuda"].why
    assert profile.supports["cuda"].what_to_do == (
        f"{sys.executable} -m pip install --force-reinstall torch==2.13.0 "
        "--index-url https://download.pytorch.org/whl/cu126")


def test_two_gpus_are_named_and_judged_by_the_weaker_one(monkeypatch, torch_build):
    torch_build("13.0", "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    profile = profile_with(monkeypatch, TWO_GPUS)
    assert profile.device == "cuda"
    assert profile.name == "NVIDIA GeForce RTX 3090, NVIDIA GeForce RTX 4090"
    assert profile.supports["bf16"].why == "compute capability 8.6 has bf16 units"


def test_hidden_gpus_are_explained_by_the_setting(monkeypatch, torch_build):
    torch_build("13.0", "2.13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    profile = profile_with(monkeypatch, TWO_GPUS)
    assert profile.gpus == ()
    assert "CUDA_VISIBLE_DEVICES is ''" in profile.supports["cuda"].what_to_do


def test_a_driver_in_trouble_leaves_a_cpu_profile_with_its_remedy(monkeypatch):
    profile = profile_with(monkeypatch, MISMATCH)
    assert profile.device == "cpu"
    assert profile.supports["cuda"].what_to_do == "Reboot the machine."


def test_no_driver_is_a_normal_cpu_machine(monkeypatch):
    profile = profile_with(monkeypatch, NOT_FOUND)
    assert profile.name.endswith("cores") or profile.name.endswith("core")
    assert profile.supports["cuda"].what_to_do == ""


def test_the_probe_is_started_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = python("import training.hardware.shell, json; "
                     "print(json.dumps({'gpus': [], 'figures': {}, 'trials': {}}))")
    assert run_probe(machine(), profiler.silent, command=command) == {"gpus": [], "figures": {}, "trials": {}}
    assert Path(os.getcwd()) == tmp_path
