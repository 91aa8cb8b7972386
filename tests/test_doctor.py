import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import doctor
from training.errors import EliteError
from training.hardware import nvidia, profiler
from training.hardware.profiler import HardwareProfiler
from training.records import GIB, Gpu, Support, to_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checks():
    return doctor.examine(quick=True)


def test_this_installation_can_train(checks):
    assert doctor.exit_code(checks) == 0
    assert all(check.works for check in checks if check.exit_code)


def test_every_pinned_requirement_of_this_python_is_looked_at_once(checks):
    names = [check.name for check in checks if check.group == "packages"]
    pinned = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
              if "==" in line and not line.startswith("#")]
    assert sorted(names) == sorted(set(pinned))


def test_each_optimization_and_the_machine_are_told(checks):
    names = {check.name for check in checks}
    assert {"Python", "virtual environment", "disk", "memory", "runs/", "git", "Hugging Face cache",
            "DeepSpeed ops", "bf16", "flash_attention_2", "deepspeed_cpu_adam", "bitsandbytes_4bit", "nvme",
            "compiler"} <= names


def test_what_does_not_work_says_why(checks):
    assert all(check.detail for check in checks)


def test_the_checks_are_plain_json(checks):
    data = json.loads(json.dumps(to_data(checks)))
    assert {"name", "group", "works", "detail", "what_to_do", "exit_code"} <= data[0].keys()


def test_rows_name_a_group_once_and_add_the_remedy_only_where_it_fails():
    checks = [doctor.Check(name="a", group="g", works=True, detail="fine", what_to_do="never shown"),
              doctor.Check(name="b", group="g", works=False, detail="old", what_to_do="update"),
              doctor.Check(name="c", group="h", works=False, detail="gone", exit_code=70)]
    assert doctor.rows(checks) == [("g", "a", "yes", "fine"), ("", "b", "no", "old\n-> update"),
                                   ("h", "c", "MISSING", "gone")]
    assert doctor.exit_code(checks) == 70


def test_a_missing_package_ends_training_and_another_version_does_not():
    missing = doctor.requirement_check("no-such-package==1.0")
    assert (missing.works, missing.exit_code) == (False, 70)
    assert missing.what_to_do == f"{sys.executable} -m pip install 'no-such-package==1.0'"
    other = doctor.requirement_check("psutil==0.1")
    assert (other.works, other.exit_code) == (False, 0)
    assert "psutil==0.1 is what was tested" in other.detail


def test_a_cpu_build_of_the_pinned_version_is_the_pinned_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert doctor.requirement_check("torch==2.13.0").works


def test_markers_comments_and_options_of_requirements_are_understood():
    text = ("# head\n-r other.txt\nnumpy==2.4.6; python_version >= '3.0'\n"
            "numpy==1.0; python_version < '3.0'  # old\nrich==15.0.0  # tables\n\n")
    assert doctor.requirement_lines(text) == ["numpy==2.4.6", "rich==15.0.0"]


def test_without_requirements_txt_the_checkout_is_broken(tmp_path):
    (check,) = doctor.requirement_checks(tmp_path / "requirements.txt")
    assert (check.works, check.exit_code) == (False, 70)


@pytest.mark.parametrize(("version", "works"), [((3, 9, 18), False), ((3, 10, 0), True), ((3, 13, 1), True)])
def test_python_310_is_the_oldest(version, works):
    check = doctor.python_check(version)
    assert (check.works, check.exit_code) == (works, 70)


def test_a_folder_that_cannot_be_written_costs_exit_73(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    check = doctor.write_check(tmp_path / "runs")
    assert (check.works, check.exit_code) == (False, 73)
    assert "Permission denied" in check.detail


def test_a_full_disk_costs_exit_71(tmp_path, monkeypatch):
    class Usage:
        free = GIB // 2

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    assert doctor.exit_code(doctor.machine_checks(tmp_path)) == 71


def test_the_write_check_leaves_nothing_behind(tmp_path):
    assert doctor.write_check(tmp_path / "runs").works
    assert list(tmp_path.iterdir()) == []


def test_offline_mode_with_an_empty_cache_is_told_with_the_way_out(tmp_path):
    check = doctor.cache_check({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert not check.works
    assert "nothing is downloaded" in check.detail
    (tmp_path / "hub" / "models--microsoft--phi-2").mkdir(parents=True)
    cached = doctor.cache_check({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert cached.works
    assert cached.detail.startswith("1 model in ")


def with_gpus(checks_profile, gpus, cuda):
    from dataclasses import replace

    return replace(checks_profile, gpus=gpus, supports={**checks_profile.supports, "cuda": cuda})


@pytest.fixture(scope="module")
def profile():
    return HardwareProfiler().profile(quick=True)


def test_a_gpu_is_told_in_gib(profile):
    gpu = Gpu(index=0, name="NVIDIA GeForce RTX 2060 SUPER", architecture="Turing", capability="7.5",
              total_bytes=8 * GIB, free_bytes=7 * GIB)
    (check,) = doctor.gpu_checks(with_gpus(profile, (gpu,), Support(works=True, why="")),
                                 nvidia.Driver(installed=True, gpus=(gpu,)))
    assert check.detail == "NVIDIA GeForce RTX 2060 SUPER (Turing, 7.5), 7.0 of 8.0 GiB free"


def test_a_gpu_hidden_by_a_cpu_build_comes_with_the_exact_command(profile):
    cuda = Support(works=False, why="there is an RTX, but torch 2.13.0+cpu is a CPU build",
                   what_to_do="pip install Y")
    driver = nvidia.Driver(installed=True, notes=("GPU 0 is divided by MIG into 2.",))
    check, note = doctor.gpu_checks(with_gpus(profile, (), cuda), driver)
    assert check.detail.endswith("is a CPU build; training runs on the CPU")
    assert check.what_to_do == "pip install Y"
    assert "divided by MIG" in note.detail


def test_a_broken_torch_is_told_and_the_rest_is_still_examined(monkeypatch):
    def broken(*_, **__):
        raise EliteError("The hardware probe ended with code 1: ImportError: libtorch_cpu.so.")

    monkeypatch.setattr(profiler, "run_probe", broken)
    checks = doctor.hardware_checks(quick=False)
    assert checks[0].exit_code == 70
    assert "libtorch_cpu.so" in checks[0].detail
    assert "compiler" in {check.name for check in checks}


def test_the_module_loads_without_any_installed_package():
    code = ("import sys; sys.path.insert(0, '.'); import training.doctor; "
            "sys.exit(any(name in sys.modules for name in ('numpy', 'psutil', 'yaml', 'torch')))")
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_script_at_the_root_is_the_doctor_command(tmp_path):
    script = tmp_path / "test_extreme_optimizations.py"
    script.write_text((ROOT / "test_extreme_optimizations.py").read_text())
    (tmp_path / "elite_train.py").write_text("import sys; print(sys.argv[1:]); sys.exit(73)\n")
    done = subprocess.run([sys.executable, str(script), "--json"], capture_output=True, text=True,
                          check=False, cwd=os.sep)
    assert (done.returncode, done.stdout.strip()) == (73, "['doctor', '--json']")


def test_importing_the_script_runs_nothing():
    done = subprocess.run([sys.executable, "-c", "import test_extreme_optimizations"], cwd=ROOT, check=False)
    assert done.returncode == 0
