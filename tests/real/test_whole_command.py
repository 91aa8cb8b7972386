"""The real command on a real package: it trains, helps, stops, goes on, and others can load the result."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from checkpoints import make_tiny_checkpoint
from measured import PROFILE

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path(typer.__file__).parent
ENVIRONMENT = {**os.environ, **PROFILE, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
SMALL = ["--context", "256", "--set", "evaluation.windows=8", "--set", "evaluation.completions=4",
         "--set", "evaluation.completion_tokens=8", "--set", "evaluation.context_targets=2"]
NO_TRIAL = ["--set", "training.trial=false"]
pytestmark = pytest.mark.real


def elite(*arguments, folder, timeout=600):
    return subprocess.run([sys.executable, str(ROOT / "elite_train.py"), *map(str, arguments)], cwd=folder,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT,
                          timeout=timeout)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain_python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run of the embedded model, and what the command printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = elite("--auto", "--repo", PACKAGE, "--output", "run", "--base-model", "embedded", "--json", *SMALL,
                 "--set", "training.max_steps=16", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_the_command_ends_with_a_better_model(trained):
    run, done = trained
    result = json.loads((run / "result.json").read_text())
    assert json.loads(done.stdout) == result
    assert (result["state"], result["steps"], result["exit_code"]) == ("done", 16, 0)
    before, after = result["quality"]["before"], result["quality"]["after"]
    assert after["loss"] < before["loss"] - 0.1
    assert 0 < after["bits_per_byte"] < before["bits_per_byte"]
    assert result["memory"]["measured_bytes"] > 0 < result["memory"]["predicted_bytes"]
    assert [row["step"] for row in rows(run)] == list(range(1, 17))
    assert all(math.isfinite(row["loss"]) for row in rows(run))


def test_the_loss_behind_each_context_stands_in_the_result_and_the_report(trained):
    run, done = trained
    quality = json.loads((run / "result.json").read_text())["quality"]
    before, after = (quality[when]["context_curve"] for when in ("before", "after"))
    assert after["items"] == before["items"] == 2
    assert {row["kind"] for row in before["rows"]} == {"composed"}
    assert {row["kind"] for row in after["rows"]} == {"composed", "random", "foreign"}
    assert {row["length"] for row in after["rows"]} >= {0, 64, 128, 256}
    assert all(math.isfinite(row["loss"]) for row in (*before["rows"], *after["rows"]))
    assert "Loss by context" in (run / "report.html").read_text(encoding="utf-8")
    assert "ontext" in done.stderr.split("Before", 1)[1]


def test_every_stage_leaves_its_file_and_shows_its_reasons(trained):
    run, done = trained
    for name in ("hardware.json", "plan.json", "config.yaml", "ds_config.json", "command.txt",
                 "dataset/manifest.json", "train.log", "report.html"):
        assert (run / name).stat().st_size > 0
    for words in ("1 Hardware", "2 Plan", "3 Configuration", "4 Dataset", "5 Training",
                  "Base model: embedded", "Predicted", "Measured", "Before", "After", "load it with"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    plan = json.loads((run / "plan.json").read_text())
    assert plan["trial"]["confirmed"]
    assert plan["memory"]["device_bytes"] == plan["ranges"]["device_bytes"]["expected"]
    memory = json.loads((run / "result.json").read_text())["memory"]
    assert memory["predicted_bytes"] == plan["memory"]["device_bytes"]
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.1)
    assert list(run.parent.iterdir()) == [run]  # the trial's folder is gone
    assert max(map(len, done.stderr.splitlines())) <= 80 + len(str(run))


def test_plain_transformers_loads_the_model_and_finds_the_same_loss(trained):
    run, _ = trained
    code = ("import sys, torch; from training.dataset.store import WindowStore\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model = AutoModelForCausalLM.from_pretrained('run/model')\n"
            "AutoTokenizer.from_pretrained('run/model')\n"
            "store, total, count = WindowStore.open('run/dataset'), 0.0, 0\n"
            "for i in range(min(8, store.count('held_out'))):\n"
            "    ids, labels = (torch.tensor(x)[None] for x in store.window('held_out', i))\n"
            "    n = int((labels[:, 1:] != -100).sum())\n"
            "    total, count = total + float(model(input_ids=ids, labels=labels).loss) * n, count + n\n"
            "print(total / count)")
    measured = float(plain_python(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code, run.parent))
    after = json.loads((run / "result.json").read_text())["quality"]["after"]["loss"]
    windows = json.loads((run / "dataset/manifest.json").read_text())["windows"]["held_out"]
    assert measured == pytest.approx(after, rel=1e-3 if windows <= 8 else 0.2)


def test_a_finished_run_is_left_as_it_is(trained):
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for arguments in (["resume", "run"], ["--auto", "--resume", "--repo", PACKAGE, "--output", "run"]):
        done = elite(*arguments, folder=run.parent)
        assert done.returncode == 0, done.stderr
        assert "load it with" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_the_run_is_listed_reported_and_refuses_other_choices(trained):
    run, _ = trained
    shutil.copytree(run, run.parent / "runs/typer", dirs_exist_ok=True)
    listed = json.loads(elite("runs", "--json", folder=run.parent).stdout)
    assert [(item["name"], item["state"], item["step"]) for item in listed] == [("typer", "done", 16)]
    assert elite("report", "typer", folder=run.parent).returncode == 0
    done = elite("--auto", "--resume", "--output", "run", "--epochs", "9", "--seed", "7", folder=run.parent)
    assert done.returncode == 2
    assert "run was made with training.epochs = 8, not 9; a run is resumed as planned." in done.stderr
    assert "run.seed" in done.stderr


ZERO_2 = ["--set", "deepspeed.stage=2", "--set", "deepspeed.offload_optimizer=true"]


@pytest.mark.parametrize(("family", "name", "extra"), [("phi", "PhiForCausalLM", []),
                                                       ("qwen2", "Qwen2ForCausalLM", ZERO_2)])
def test_nf4_and_lora_on_a_tiny_checkpoint_in_plain_python_and_under_deepspeed(tmp_path, family, name, extra):
    base = make_tiny_checkpoint(tmp_path / family, family)
    done = elite("--auto", "--repo", PACKAGE, "--output", "run", "--base-model", base, *SMALL, *NO_TRIAL,
                 *extra, "--set", "training.max_steps=12", "--set", "training.learning_rate=0.01",
                 folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    config = (run / "config.yaml").read_text()
    assert 'quantization: "nf4"' in config
    assert "enabled: true" in config
    result = json.loads((run / "result.json").read_text())
    assert result["quality"]["after"]["loss"] < result["quality"]["before"]["loss"]
    assert result["model_dir"] == "adapter"
    found = plain_python("from peft import AutoPeftModelForCausalLM\n"
                         "model = AutoPeftModelForCausalLM.from_pretrained('run/adapter')\n"
                         "print(type(model.get_base_model()).__name__)", tmp_path)
    assert found == name


def test_ctrl_c_saves_and_resume_finishes(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "elite_train.py"), "--auto", "--repo", str(PACKAGE), "--model-name",
         "stopped", "--base-model", "embedded", *SMALL, *NO_TRIAL, "--set", "training.max_steps=24",
         "--set", "training.save_steps=0"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        env=ENVIRONMENT, start_new_session=True)
    run = tmp_path / "runs/stopped"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.count("\n") == 1
    assert "Stopped by Ctrl+C after step" in said
    stopped = len(rows(run))
    assert stopped < 24
    state = json.loads(elite("runs", "--json", folder=tmp_path).stdout)[0]
    assert (state["state"], state["step"]) == ("interrupted", stopped)

    done = elite("resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 Training" in done.stdout  # the dataset is not made again
    assert json.loads((run / "result.json").read_text())["state"] == "done"
    assert [row["step"] for row in rows(run)] == list(range(1, 25))


def test_fresh_moves_the_old_run_aside(tmp_path):
    old = tmp_path / "runs/typer"
    old.mkdir(parents=True)
    (old / "plan.json").write_text("{}")
    done = elite("--auto", "--fresh", "--repo", PACKAGE, "--model-name", "typer", "--base-model", "embedded",
                 *SMALL, *NO_TRIAL, "--set", "training.max_steps=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/typer.old-1/plan.json").read_text() == "{}"
    assert "The old run was moved to runs/typer.old-1." in done.stdout


CARD = """\
name: a card of 8 GB
source: made up for a test
ram_gib: 64
disk_free_gib: 200
cpu: {name: any, cores: 8, matmul_fp32_gflops: 400}
gpu: {name: any, capability: "8.6", total_gib: 8, count: 1, matmul_bf16_tflops: 40, memory_gb_s: 400}
"""


def test_dry_run_and_plan_write_nothing(tmp_path, tmp_path_factory):
    card = tmp_path_factory.mktemp("card") / "card.yaml"
    card.write_text(CARD)
    done = elite("--auto", "--dry-run", "--json", "--repo", PACKAGE, "--base-model", "embedded",
                 *NO_TRIAL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"tier", "choices", "memory", "limits", "step_s", "total_s"} <= json.loads(done.stdout).keys()
    done = elite("plan", "--json", "--repo", PACKAGE, "--vram", "12", "--disk", "300", "--hardware", card,
                 folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(choice["why"] for choice in json.loads(done.stdout)["choices"].values())
    assert list(tmp_path.iterdir()) == []


def test_the_dataset_alone_goes_where_it_is_told(tmp_path):
    done = elite("dataset", "--repo", PACKAGE, "--context", "512", "--output", "data", "--json",
                 folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "data/manifest.json").read_text())
    assert (tmp_path / "data/tokens.bin").stat().st_size > 0
