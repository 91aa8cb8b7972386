"""The training subprocess through the streamed step: the plain curve, kills, resumes, refusals; its exit."""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from checkpoints import make_tiny_checkpoint
from run_maker import configure, dataset_at

from training.errors import CannotWrite, DataError, UsageError
from training.longcontext import StoreFull, StreamError, Unsupported
from training.records import Result
from training.rundir import RunDirectory, read_record
from training.settings import Config
from training.trainer.journal import read_lines
from training.trainer.session import Session, _of_the_stream

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINER = ROOT / "training" / "model_trainer_unified.py"
PATIENCE_S = 120
STREAMED = {"stream__chunk_tokens": 48, "stream__page_tokens": 20, "stream__inputs": "disk",
            "stream__keep_every": 2, "training__max_steps": 6, "training__save_steps": 2}
real = pytest.mark.real


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("dataset"))


def run_at(with_dataset, path, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return configure(path, **settings)


def start(run):
    return forked.trainer(run, run.parent / "trainer.log")


def train(run, **options):
    """Forked, or with options in a process with imports of its own."""
    process = start(run) if not options else subprocess.Popen(
        [sys.executable, str(TRAINER), "--run-dir", str(run)], text=True, cwd="/", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options)
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def outcome(run):
    return read_record(Result, run / "result.json")


def losses(run):
    return [line["loss"] for line in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def streamed(with_dataset, tmp_path_factory):
    run = run_at(with_dataset, tmp_path_factory.mktemp("streamed") / "run", **STREAMED)
    code, output = train(run)
    assert code == 0, output
    return run, output


@real
def test_it_learns_what_the_plain_step_learns(streamed, with_dataset, tmp_path):
    run, output = streamed
    plain = run_at(with_dataset, tmp_path / "run", training__max_steps=6)
    assert train(plain)[0] == 0
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
    for name in ("before", "after"):
        one, other = outcome(run).quality[name], outcome(plain).quality[name]
        assert (one.loss, one.exact_match) == (pytest.approx(other.loss, rel=1e-4), other.exact_match)
    assert ("streamed step (stream.chunk_tokens=48, stream.page_tokens=20, stream.inputs=disk, "
            "stream.keep_every=2): on 96 tokens its loss is") in output
    assert not (run / "stream").exists()


@real
def test_a_kill_and_a_resume_end_in_the_same_weights_bit_for_bit(streamed, with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run", **STREAMED)
    process = start(run)
    end = time.monotonic() + PATIENCE_S
    while not (run / "checkpoint-2").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.communicate()
    code, output = train(run)
    assert (code, "going on from checkpoint-" in output) == (0, True), output
    assert outcome(run).digest == outcome(streamed[0]).digest
    assert losses(run) == losses(streamed[0])
    assert not (run / "stream").exists()


@real
def test_another_chunk_size_may_continue_a_run(streamed, with_dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(streamed[0], run)
    for name in ("result.json", "checkpoint-6"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    configure(run, **STREAMED | {"stream__chunk_tokens": 64, "stream__inputs": "device"})
    code, output = train(run)
    assert (code, "going on from checkpoint-4" in output) == (0, True), output
    assert losses(run) == pytest.approx(losses(streamed[0]), rel=1e-4)


@real
def test_two_ranks_under_zero_3_make_the_same_updates_and_evaluations(streamed, with_dataset, tmp_path):
    settings = STREAMED | {"deepspeed__stage": 3, "device__count": 2, "training__accumulation": 1}
    run = run_at(with_dataset, tmp_path / "run", **settings)
    forked.server().run(TRAINER, tmp_path / "ranks.log", {"arguments": ["--run-dir", str(run)]}, ranks=2)
    assert outcome(run).state == "done"
    assert losses(run) == pytest.approx(losses(streamed[0]), rel=1e-3)
    for name in ("before", "after"):
        one, other = outcome(run).quality[name], outcome(streamed[0]).quality[name]
        assert (one.loss, one.exact_match) == (pytest.approx(other.loss, rel=1e-3), other.exact_match)
    assert outcome(run).samples == outcome(streamed[0]).samples
    assert not (run / "stream").exists()


@real
def test_a_full_disk_ends_with_73_and_one_line(with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run", **STREAMED)
    code, output = train(run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    found = outcome(run)
    assert (code, found.exit_code, found.state) == (73, 73, "failed")
    assert "No space is left in" in found.error
    assert "Free some, or set stream.inputs=pageable or a larger stream.keep_every." in found.error
    assert "Traceback" not in output
    assert not (run / "stream").exists()


@real
def test_a_policy_that_does_not_fit_the_model_ends_with_2(with_dataset, tmp_path):
    run = run_at(with_dataset, tmp_path / "run", **STREAMED | {"stream__keep_every": 5})
    code, output = train(run)
    assert (code, "Traceback" in output) == (2, False)
    assert outcome(run).error == (
        "The streamed step cannot run as configured: keep_every is 5 and the model has 2 layers. See the "
        "stream.* keys, or set stream.chunk_tokens=0.")


@real
def test_a_model_with_attention_sinks_ends_with_65(with_dataset, tmp_path):
    base = make_tiny_checkpoint(tmp_path / "base", "gpt_oss", head_dim=16, num_local_experts=2,
                                num_experts_per_tok=1, intermediate_size=32)
    settings = STREAMED | {"model__base": str(base), "model__attention": "eager"}
    run = run_at(with_dataset, tmp_path / "run", **settings)
    code, output = train(run)
    assert (code, "Traceback" in output) == (65, False), output
    assert outcome(run).error == (f"The streamed step cannot train {base} exactly: attention sinks. Set "
                                  "stream.chunk_tokens=0 for the plain step, with a context that fits it.")


@pytest.mark.parametrize(("error", "kind", "message"), [
    (Unsupported("attention sinks"), DataError,
     "The streamed step cannot train some/base exactly: attention sinks. Set stream.chunk_tokens=0 for the "
     "plain step, with a context that fits it."),
    (StoreFull("No space is left."), CannotWrite,
     "No space is left. Free some, or set stream.inputs=pageable or a larger stream.keep_every."),
    (StreamError("chunk_tokens\n is 0."), UsageError,
     "The streamed step cannot run as configured: chunk_tokens is 0. See the stream.* keys, or set "
     "stream.chunk_tokens=0.")])
def test_each_refusal_has_its_exit_code_and_names_the_way_out(tmp_path, error, kind, message):
    config = Config({"model.base": "some/base"})
    found = _of_the_stream(error, Session(run=RunDirectory(tmp_path), local_rank=0, start=0.0, config=config))
    assert (type(found), str(found)) == (kind, message)


# A thread of gloo's waits for the interpreter's lock when the interpreter ends: `atexit` holds it meanwhile.
LATE_THREAD = """
import atexit, os, sys, time
atexit.register(sum, range(150_000_000))
import builtins, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from training.model_trainer_unified import leave
dist.init_process_group("gloo", rank=int(sys.argv[3]), world_size=2, init_method="file://" + sys.argv[2])
builtins.kept = dist.distributed_c10d._get_default_group()
tensor = torch.ones(1000)
tensor.mark = 1
dist.barrier()
if sys.argv[3] == "1":
    time.sleep(1.0)
work = dist.all_reduce(tensor, async_op=True)
if sys.argv[3] == "1":
    work.wait()
    time.sleep(3.0)
    os._exit(0)
del tensor, work
dist.destroy_process_group()
print("done")
leave(5)
"""


@real
def test_a_late_thread_of_the_process_group_does_not_abort_the_exit(tmp_path):
    """With `sys.exit` in place of `leave` it ends -6: "terminate called without an active exception"."""
    arguments = [sys.executable, "-c", LATE_THREAD, str(ROOT), str(tmp_path / "meeting")]
    first, second = (subprocess.Popen([*arguments, rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      text=True) for rank in "01")
    output, _ = first.communicate(timeout=PATIENCE_S)
    second.communicate(timeout=PATIENCE_S)
    assert (first.returncode, output.splitlines()[-1]) == (5, "done"), output


def test_leaving_flushes_what_was_printed():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from training.model_trainer_unified import leave\n" \
           "print('said', end=''); print('and this', end='', file=sys.stderr); leave(7)"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "said", "and this")
