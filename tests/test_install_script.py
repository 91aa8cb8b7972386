"""install_extreme_optimizations.sh, with a stand-in for Python where a GPU or a failure is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "install_extreme_optimizations.sh"
ITEMS = ["ninja", "cuda-torch", "triton", "liger-kernel", "flash-attn", "deepspeed-ops", "async-io"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

FACTS = {"GPU": "", "GPU_PROBLEM": "no nvidia-smi", "CAPABILITY": "0", "TORCH": "2.13.0+cpu",
         "TORCH_CUDA": "", "DEEPSPEED": "0.19.8", "TORCH_INDEX": "https://example.org/cu130",
         "TORCH_PIN": "torch==2.13.0", "NINJA_PIN": "ninja==1.13.2", "TRITON_PIN": "triton==3.6.0",
         "NO_COMPILER": "", "NINJA": "", "NVCC": "/usr/bin/nvcc", "BUILT_OPS": "", "JOBS": "2"}


def run(*arguments, script=SCRIPT, **environment):
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, check=False,
                          env=os.environ | {"NO_COLOR": "1", "COLUMNS": "80"} | environment)


@pytest.fixture
def copy(tmp_path):
    """The script in a folder of its own, whose .venv/bin/python answers `facts` and logs what it is asked."""
    def make(answer="exit 0", **facts):
        shutil.copy(SCRIPT, tmp_path / SCRIPT.name)
        binary = tmp_path / ".venv" / "bin" / "python"
        binary.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(f"{name}='{value}'" for name, value in (FACTS | facts).items())
        binary.write_text("#!/bin/bash\n"
                          f"if [ \"$2\" = training.hardware.shell ]; then cat <<'E'\n{lines}\nE\n"
                          f"exit 0; fi\necho \"$@\" >>{tmp_path}/asked\n{answer}\n")
        binary.chmod(0o755)
        return tmp_path / SCRIPT.name
    return make


def table(text):
    """The closing table: item -> (before, action, after, seconds)."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("item "))
    assert lines[start].split() == ["item", "before", "action", "after", "seconds"]
    body = [line for line in lines[start + 2:] if line[:13].strip() in ITEMS]
    return {line[:13].strip(): tuple(line[a:b].strip() for a, b in ((15, 34), (36, 49), (51, 70), (72, 80)))
            for line in body}


def test_a_dry_run_here_lists_every_item_in_a_table_within_80_columns():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == ITEMS
    assert all(row[1] in ("none", "skipped", "would install") for row in rows.values())
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("  ")) <= 80
    assert "\x1b" not in done.stdout


def test_without_a_gpu_its_items_are_skipped_with_the_reason(copy):
    done = run("--dry-run", script=copy())
    rows = table(done.stdout)
    assert {rows[item][1] for item in ("cuda-torch", "triton", "liger-kernel", "flash-attn")} == {"skipped"}
    assert "flash-attn: skipped: no GPU (no nvidia-smi)." in done.stdout


def test_a_dry_run_prints_the_exact_commands_and_runs_none_of_them(copy, tmp_path):
    done = run("--dry-run", script=copy(GPU="NVIDIA GeForce RTX 4090", CAPABILITY="89"))
    python = tmp_path / ".venv" / "bin" / "python"
    assert f"  {python} -m pip install ninja==1.13.2\n" in done.stdout
    assert (f"  {python} -m pip install --force-reinstall torch==2.13.0 --index-url https://example.org/cu130\n"
            in done.stdout)
    assert "flash-attn: skipped: torch is a CPU build; install cuda-torch first." in done.stdout
    assert table(done.stdout)["ninja"][:2] == ("absent", "would install")
    assert not (tmp_path / "asked").exists()


def test_a_turing_gpu_skips_flash_attention_by_its_capability(copy):
    script = copy(GPU="RTX 2060", CAPABILITY="75", TORCH_CUDA="13.0")
    done = run("--dry-run", "--only", "flash-attn", script=script)
    assert "skipped: compute capability is below 8.0 (Ampere)." in done.stdout


def test_without_a_compiler_nothing_is_compiled(copy):
    done = run("--only", "deepspeed-ops", script=copy(NO_COMPILER="no C++ compiler was found"))
    assert done.returncode == 0
    assert "deepspeed-ops: skipped: no C++ compiler was found." in done.stdout


def test_a_failed_installation_shows_its_last_lines_and_exits_1(copy):
    answer = "for i in $(seq 40); do echo line $i; done; echo 'ERROR: No matching distribution' >&2; exit 1"
    done = run("--only", "ninja", script=copy(answer))
    assert done.returncode == 1
    assert "  | ERROR: No matching distribution" in done.stdout
    assert "  | line 40" in done.stdout
    assert "  | line 2\n" not in done.stdout
    assert table(done.stdout)["ninja"][1:3] == ("FAILED", "install failed")
    assert "1 item(s) failed; full logs in " in done.stdout


def test_an_installation_that_ends_well_but_does_not_work_is_a_failure(copy):
    done = run("--only", "ninja", script=copy("echo installed; exit 0"))
    assert done.returncode == 1
    assert table(done.stdout)["ninja"][1:3] == ("FAILED", "does not work")


def test_one_failure_does_not_stop_the_items_after_it(copy):
    done = run("--only", "ninja", "--only", "deepspeed-ops", script=copy("exit 1"))
    assert list(table(done.stdout)) == ["ninja", "deepspeed-ops"]


def test_after_an_installation_the_facts_are_read_again(copy, tmp_path):
    script = copy(f"sed -i \"s|^BUILT_OPS=.*|BUILT_OPS='cpu_adam'|\" {tmp_path}/.venv/bin/python\n"
                  "echo '2 compiled'")
    done = run("--only", "deepspeed-ops", script=script)
    assert done.returncode == 0, done.stdout
    assert table(done.stdout)["deepspeed-ops"][:3] == ("not compiled", "installed", "2 compiled")
    assert (tmp_path / "asked").read_text().split("\n")[0] == "-m training.hardware.ops --build"


def test_a_path_with_a_space_is_quoted(copy, tmp_path):
    script = copy("echo ok")
    spaced = tmp_path / "my code"
    spaced.mkdir()
    shutil.move(tmp_path / ".venv", spaced / ".venv")
    shutil.move(script, spaced / SCRIPT.name)
    run("--only", "ninja", script=spaced / SCRIPT.name)
    assert "-m pip install ninja==1.13.2" in (tmp_path / "asked").read_text()


def test_a_python_that_cannot_examine_the_machine_ends_with_what_it_said(copy, tmp_path):
    script = copy()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/bash\necho 'SyntaxError: invalid syntax' >&2\nexit 1\n")
    done = run(script=script)
    assert done.returncode == 1
    assert "SyntaxError: invalid syntax" in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["--only", "flash"], "Unknown item flash. Known: ninja cuda-torch"),
    (["--only"], "--only needs an item"), (["--fast"], "Unknown argument --fast. See --help.")])
def test_wrong_arguments_exit_2_in_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_help_names_every_item_within_80_columns():
    done = run("--help")
    assert done.returncode == 0
    assert all(f"\n  {item} " in done.stdout for item in ITEMS)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_facts_are_plain_shell_assignments():
    done = subprocess.run([sys.executable, "-S", "-m", "training.hardware.shell"], capture_output=True,
                          text=True, cwd=ROOT, check=True)
    assert {line.partition("=")[0] for line in done.stdout.splitlines()} == set(FACTS)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.real
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_deepspeeds_ops_are_compiled_and_computed_with():
    done = run("--only", "deepspeed-ops")
    assert done.returncode == 0, done.stdout
    assert table(done.stdout)["deepspeed-ops"][2].endswith("compiled, tried")
