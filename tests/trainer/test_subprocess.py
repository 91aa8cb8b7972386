"""The real training subprocess on a real dataset: results, stops, kills, resumes, refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked
import pytest
from run_maker import configure, dataset_at

from training.records import Result
from training.rundir import RunDirectory, read_record, write_record
from training.trainer.journal import read_lines
from training.trainer.session import Session, result

real = pytest.mark.real
TRAINER = Path(__file__).resolve().parent.parent.parent / "training" / "model_trainer_unified.py"
PATIENCE_S = 120


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def finished(with_dataset, tmp_path_factory):
    run = run_at(with_dataset, tmp_path_factory.mktemp("finished") / "run")
    done = ended(start(run))
    assert done.returncode == 0, done.stdout
    return run, done.stdout


def run_at(with_dataset, path, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return configure(path, **settings)


def python(code):
    return subprocess.run([sys.executable, "-c", code, str(TRAINER.parent.parent)], capture_output=True,
                          text=True, check=True)


def start(run):
    """The trainer in a process of its own, with the imports it makes."""
    return subprocess.Popen([sys.executable, str(TRAINER), "--run-dir", str(run)], text=True, cwd="/",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def fork(run):
    """The same with the imports made before."""
    handle, log = tempfile.mkstemp(dir=run.parent, suffix=".log")
    os.close(handle)
    return forked.trainer(run, log)


def ended(process):
    output, _ = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def train(run):
    return ended(fork(run))


def outcome(run):
    return read_record(Result, run / "result.json")


def wait_for(process, condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_made(run):
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


def phase(run):
    try:
        return json.loads((run / "heartbeat.json").read_text())["phase"]
    except OSError:
        return ""


@real
def test_a_run_ends_done_with_a_lower_held_out_loss(finished):
    run, _ = finished
    found = outcome(run)
    assert (found.state, found.steps, found.exit_code, found.error) == ("done", 12, 0, "")
    assert found.quality["after"].loss < found.quality["before"].loss
    assert found.tokens_trained == sum(line["tokens"] for line in read_lines(run / "metrics.jsonl"))
    assert found.memory["predicted_bytes"] == 1 << 28
    assert 1 << 27 < found.memory["measured_bytes"] < 1 << 33
    assert found.time["predicted_s"] == 6.0
    assert found.seconds == found.time["measured_s"] > 1.0
    assert re.fullmatch("[0-9a-f]{64}", found.digest)
    assert len(found.samples) == 2
    assert found.samples[0].keys() == {"path", "prefix", "before", "after", "expected"}


@real
def test_the_run_directory_holds_what_is_promised(finished):
    run, _ = finished
    assert steps_made(run) == list(range(1, 13))
    assert [line["step"] for line in read_lines(run / "evaluations.jsonl")] == [0, 12]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    assert (run / "model" / "README.md").is_file()
    assert phase(run) == "done"


def test_neither_deepspeed_nor_peft_is_imported_before_the_first_step():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from training.trainer import phases, embedded; "
            "import transformers.models.llama.modeling_llama; "
            "print([name for name in ('deepspeed', 'peft', 'bitsandbytes') if name in sys.modules])")
    found = python(code)
    assert found.stdout.strip() == "[]"


def test_the_session_itself_needs_no_torch_so_that_the_first_heartbeat_comes_at_once():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import training.trainer.session; "
            "print('torch' in sys.modules)")
    found = python(code)
    assert found.stdout.strip() == "False"


@real
def test_a_finished_run_is_left_alone(finished):
    run, _ = finished
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*")
             if path.suffix in (".safetensors", ".jsonl")}
    again = train(run)
    assert again.returncode == 0
    assert "holds a finished run already; nothing is done" in again.stdout
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


@real
def test_a_run_killed_before_its_result_goes_straight_to_the_last_phases(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    (run / ".staging-12-1").mkdir()
    again = train(run)
    assert again.returncode == 0
    assert "going on from checkpoint-12" in again.stdout
    assert "step 12 of 12" not in again.stdout
    assert outcome(run).digest == outcome(finished[0]).digest
    assert [line["step"] for line in read_lines(run / "evaluations.jsonl")] == [0, 12]
    assert not (run / ".staging-12-1").exists()


@real
@pytest.mark.parametrize(("how", "code", "error"), [
    (signal.SIGINT, 130, "Stopped by the user at step"), (signal.SIGTERM, 75, "Stopped by SIGTERM at step"),
    ("SIGINT", 130, "Stopped by the user at step"), ("SIGTERM", 75, "Stopped by SIGTERM at step")])
def test_a_stop_saves_and_a_resume_ends_the_same(with_dataset, finished, tmp_path, how, code, error):
    run = run_at(with_dataset, tmp_path / "run", training__save_steps=0)
    process = fork(run)
    wait_for(process, lambda: len(steps_made(run)) >= 2)
    if isinstance(how, str):
        (run / "stop").write_text(how)
    else:
        process.send_signal(how)
    stopped = ended(process)
    found = outcome(run)
    assert (stopped.returncode, found.state, found.exit_code) == (code, "interrupted", code)
    assert found.error.startswith(error)
    assert "Traceback" not in stopped.stdout
    assert 2 <= found.steps < 12
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{found.steps}"]
    assert not (run / "stop").exists()
    assert train(run).returncode == 0
    assert outcome(run).digest == outcome(finished[0]).digest
    assert outcome(run).tokens_trained == outcome(finished[0]).tokens_trained
    assert outcome(run).seconds > found.seconds
    assert steps_made(run) == list(range(1, 13))


@real
def test_kills_and_resumes_end_in_the_uninterrupted_weights(with_dataset, finished, tmp_path):
    """Each start is warmed up, and the run they are compared with was not."""
    run = run_at(with_dataset, tmp_path / "run", training__save_steps=1, device__warmup_steps=1)
    for made in (3, 7):
        process = fork(run)
        wait_for(process, lambda made=made: len(steps_made(run)) >= made)
        process.kill()
        process.communicate()
    last = train(run)
    assert last.returncode == 0
    assert "going on from checkpoint-" in last.stdout
    assert "warmed up with 1 step on made-up windows" in last.stdout
    assert outcome(run).digest == outcome(finished[0]).digest
    assert steps_made(run) == list(range(1, 13))


@real
@pytest.mark.parametrize("where", ["import", "load", "evaluate_before", "export"])
def test_a_stop_is_honoured_within_ten_seconds_in_other_phases(with_dataset, tmp_path, where):
    run = run_at(with_dataset, tmp_path / "run", evaluation__completions=0)
    process = start(run) if where == "import" else fork(run)
    wait_for(process, lambda: phase(run) == where)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    stopped = ended(process)
    if where == "export" and stopped.returncode == 0:
        pytest.skip("the export was finished before the signal came")
    assert (stopped.returncode, outcome(run).state) == (75, "interrupted")
    assert time.monotonic() - begin < 10 + 20  # other tests' processes share these cores


@real
def test_a_second_trainer_is_kept_out_and_the_first_is_not_disturbed(with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run")
    first = fork(run)
    wait_for(first, lambda: phase(run) != "")
    second = train(run)
    assert second.returncode == 73
    assert "Another trainer is writing to" in second.stdout
    assert ended(first).returncode == 0
    assert outcome(run).state == "done"


@real
def test_a_changed_key_ends_in_one_line_and_leaves_the_checkpoints(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "result.json").unlink()
    configure(run, training__learning_rate=1e-3)
    refused = train(run)
    assert refused.returncode == 2
    assert "training.learning_rate was 0.003 in checkpoint-12 and is 0.001 now" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert (outcome(run).state, outcome(run).exit_code) == ("failed", 2)
    assert (run / "checkpoint-12").is_dir()


@real
def test_a_damaged_checkpoint_is_skipped_with_the_reason(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "result.json").unlink()
    weights = bytearray((run / "checkpoint-12" / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "checkpoint-12" / "weights.safetensors").write_bytes(weights)
    again = train(run)
    assert again.returncode == 0
    assert "checkpoint-12 is skipped: weights.safetensors is damaged (its sha256 differs)." in again.stdout
    assert "going on from checkpoint-8" in again.stdout
    assert outcome(run).digest == outcome(finished[0]).digest


def test_missing_input_ends_in_one_line(tmp_path):
    nothing = ended(start(tmp_path / "nowhere"))
    assert (nothing.returncode, nothing.stdout.count("\n")) == (66, 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    found = ended(start(empty))
    assert (found.returncode, outcome(empty).state) == (66, "failed")
    assert "Traceback" not in found.stdout


@real
def test_a_torn_dataset_ends_with_65(with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run")
    with open(run / "dataset" / "tokens.bin", "ab") as file:
        file.write(b"xx")
    found = train(run)
    assert (found.returncode, outcome(run).exit_code) == (65, 65)


def test_a_result_can_be_written_before_anything_is_known(tmp_path):
    run = RunDirectory(tmp_path)
    session = Session(run=run, local_rank=0, start=time.monotonic())
    write_record(run.result, result(session, "failed"))
    assert outcome(tmp_path).quality == {"before": None, "after": None}
