"""DeepSpeed's engines equal the plain one; its real launcher runs the real trainer on CPU ranks over gloo."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from run_maker import configure, dataset_at
from trainer_fakes import FakeStore, TinyModel, config_of, training_of

from training.records import Result
from training.rundir import read_record
from training.trainer import ops
from training.trainer.journal import read_lines

pytestmark = pytest.mark.real
HERE = Path(__file__).resolve().parent
TRAINER = HERE.parent.parent / "training" / "model_trainer_unified.py"
PATIENCE_S = 300


def work(path, ranks=1, **options):
    """Run zero_worker.py in `ranks` processes; what it wrote."""
    path.mkdir(exist_ok=True)
    (path / "outcome.json").unlink(missing_ok=True)
    arguments = {"path": str(path), "ranks": ranks, **options}
    forked.server().run(HERE / "zero_worker.py", path / "worker.log", arguments, ranks)
    return json.loads((path / "outcome.json").read_text())


def curve(path):
    return [(line["loss"], line["grad_norm"], line["lr"], line["tokens"])
            for line in read_lines(path / "metrics.jsonl")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The plain engine's curve, and the sums of its final weights."""
    path = tmp_path_factory.mktemp("plain")
    torch.set_num_threads(1)
    config = config_of(training__micro_batch=1, training__accumulation=4, training__clip_norm=0.5)
    model = TinyModel(dropout=0.0)
    training_of(path, config, FakeStore(11), model).train()
    return curve(path), {name: float(p.detach().sum()) for name, p in model.named_parameters()}


def flat(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize(("stage", "ranks", "offload"), [
    (1, 2, False), (2, 1, True), (2, 2, True), (2, 2, False), (3, 1, False), (3, 2, True)])
def test_every_stage_gives_the_plain_engines_curve_and_weights(tmp_path, plain, stage, ranks, offload):
    found = work(tmp_path, ranks=ranks, stage=stage, offload=offload)
    assert flat(curve(tmp_path)) == pytest.approx(flat(plain[0]), rel=1e-4)
    assert found["sums"] == pytest.approx(plain[1], rel=1e-3, abs=1e-4)


def test_a_checkpoint_is_continued_by_another_stage_and_another_number_of_ranks(tmp_path, plain):
    work(tmp_path, ranks=2, stage=3, max_steps=3)
    work(tmp_path, ranks=1, stage=2, offload=True, max_steps=5)
    work(tmp_path, ranks=2, stage=1, max_steps=7)
    found = work(tmp_path, ranks=2, stage=3)
    assert flat(curve(tmp_path)) == pytest.approx(flat(plain[0]), rel=1e-4)
    assert found["sums"] == pytest.approx(plain[1], rel=1e-3, abs=1e-4)


def test_deepspeeds_own_adam_stops_and_goes_on_on_the_same_curve(tmp_path, plain):
    from torch.utils.cpp_extension import _get_build_directory

    if not ops._is_current(Path(_get_build_directory(ops.OP, False))):
        pytest.skip("DeepSpeed's CPU Adam is not built here, and building it takes minutes")
    work(tmp_path, ranks=2, stage=2, offload=True, native=True, max_steps=4)
    found = work(tmp_path, ranks=2, stage=2, offload=True, native=True)
    assert flat(curve(tmp_path)) == pytest.approx(flat(plain[0]), rel=1e-4)
    assert found["sums"] == pytest.approx(plain[1], rel=1e-3, abs=1e-4)


def test_deepspeeds_checkpoint_is_continued_by_plain_python(tmp_path, plain):
    work(tmp_path, ranks=2, stage=2, max_steps=4)
    config = config_of(training__micro_batch=1, training__accumulation=4, training__clip_norm=0.5)
    training_of(tmp_path, config, FakeStore(11), TinyModel(dropout=0.0)).train()
    assert flat(curve(tmp_path)) == pytest.approx(flat(plain[0]), rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_update_on_all(tmp_path, stage):
    found = work(tmp_path, ranks=2, stage=stage, bad_call=5)
    assert found["skipped"] == 1
    assert [row[1] is None for row in curve(tmp_path)] == [False, False, True] + [False] * 6


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("dataset"))


def run_at(with_dataset, path, ranks, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return reconfigure(path, ranks, **settings)


def reconfigure(path, ranks, **settings):
    """Four windows an update on any number of ranks."""
    return configure(path, device__count=ranks, training__micro_batch=1, training__accumulation=4 // ranks,
                     training__max_steps=6, training__save_steps=0, evaluation__completions=0,
                     **{"deepspeed__stage": 2, "deepspeed__offload_optimizer": True, **settings})


def launch(run, ranks):
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [str(deepspeed), "--num_gpus", str(ranks), "--master_port", forked.free_port(), str(TRAINER),
               "--run-dir", str(run)]
    return subprocess.Popen(command, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, cwd="/",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def launched(run, ranks):
    output, _ = launch(run, ranks).communicate(timeout=PATIENCE_S)
    return output, read_record(Result, run / "result.json")


def start(run, ranks):
    """The trainer in as many forks as there are ranks, without the launcher."""
    return forked.server().start(TRAINER, run / "ranks.log", {"arguments": ["--run-dir", str(run)]}, ranks)


def ranks_of(run, ranks):
    job = start(run, ranks)
    job.wait()
    return job.text(), read_record(Result, run / "result.json")


@pytest.fixture(scope="module")
def by_one(with_dataset, tmp_path_factory):
    run = run_at(with_dataset, tmp_path_factory.mktemp("one") / "run", ranks=1)
    output, found = launched(run, 1)
    return output, found, curve(run)


def test_one_rank_under_deepspeeds_launcher_ends_with_a_valid_result(by_one):
    output, found, rows = by_one
    assert (found.state, found.steps, len(rows)) == ("done", 6, 6), output[-3000:]
    assert found.quality["after"].loss < found.quality["before"].loss


@pytest.mark.parametrize(("stage", "offload"), [(2, True), (3, False)])
def test_two_ranks_make_the_same_updates(with_dataset, by_one, tmp_path, stage, offload):
    """At stage 2 under DeepSpeed's launcher."""
    run = run_at(with_dataset, tmp_path / "run", ranks=2, deepspeed__stage=stage,
                 deepspeed__offload_optimizer=offload)
    output, found = launched(run, 2) if stage == 2 else ranks_of(run, 2)
    assert (found.state, found.steps) == ("done", 6), output[-3000:]
    assert flat(curve(run)) == pytest.approx(flat(by_one[2]), rel=1e-3)
    assert found.quality["after"].loss == pytest.approx(by_one[1].quality["after"].loss, rel=1e-3)
    assert (run / "model" / "model.safetensors").is_file()


def test_a_stop_ends_both_ranks_with_a_checkpoint_that_one_rank_continues(with_dataset, by_one, tmp_path):
    run = run_at(with_dataset, tmp_path / "run", ranks=2)
    job = start(run, 2)
    end = time.monotonic() + PATIENCE_S
    while len(read_lines(run / "metrics.jsonl")) < 2 and time.monotonic() < end and None in job.poll():
        time.sleep(0.01)
    (run / "stop").write_text("SIGTERM")
    assert job.wait() == [75, 75], job.text()[-3000:]
    stopped = read_record(Result, run / "result.json")
    assert (stopped.state, stopped.exit_code) == ("interrupted", 75)
    reconfigure(run, ranks=1, deepspeed__stage=0, deepspeed__offload_optimizer=False)
    assert forked.trainer(run, run / "alone.log").communicate()
    assert read_record(Result, run / "result.json").state == "done"
    assert flat(curve(run)) == pytest.approx(flat(by_one[2]), rel=1e-3)
