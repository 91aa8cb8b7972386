"""Rows 45 to 57 of docs/reliability.md: a disk, memory, handles or numbers that run out."""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from managed_runs import Job
from run_maker import configure
from trainer_fakes import config_of, training_of

from training import models
from training.errors import DoesNotFit
from training.planning import memory
from training.settings import Config
from training.trainer import checkpoints
from training.trainer.journal import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
real = pytest.mark.real
STEPS = list(range(1, 13))
# Of the room a run takes at most.
MOST_OFF = 0.05


# Disks


def on_small_disks(folder, wanted):
    """The figures of small_disks.py; skips where no file system can be mounted."""
    argv = ["unshare", "-rm", sys.executable, str(HERE / "small_disks.py"), str(folder), *wanted]
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=1800,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"nothing can be mounted here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@real
def test_a_training_on_a_disk_of_any_size_keeps_what_it_saved_and_ends_in_the_same_weights(
        matrix, tmp_path):
    """Bytes and inodes for no checkpoint up to all of them; logs on a full disk of their own."""
    draw = random.Random(45)
    sizes = sorted(draw.sample(range(4096, 135_168, 1024), matrix.count(10, 128)))
    inodes = sorted(draw.sample(range(2, 26), matrix.count(6, 24)))
    rooms = draw.sample(range(9), matrix.count(2, 9))
    found = on_small_disks(tmp_path, [*(f"bytes={size}" for size in sizes),
                                      *(f"inodes={count}" for count in inodes),
                                      *(f"logs={step}" for step in rooms), "logs=99"])
    by_kind = {kind: [line for line in found if line["kind"] == kind] for kind in ("bytes", "inodes", "logs")}
    ways = {"bytes": r"It takes [\d.,]+ MiB and [\d.,]+ MiB is free; free some room",
            "inodes": r"the disk can hold no more files, whatever their size .*; delete some"}
    assert {bool(line["told"]) for line in by_kind["bytes"]} == {True, False}, "some held all, some did not"
    assert [line["told"] for kind, way in ways.items() for line in by_kind[kind]
            if line["told"] and not re.search(way, line["told"])] == []
    for row, kind in ((45, "bytes"), (47, "inodes"), (48, "logs")):
        lines = by_kind[kind]
        matrix.record(row, sum(not line["faults"] for line in lines), len(lines),
                      "; ".join(f"{line['size']}: {line['faults']}" for line in lines if line["faults"]))


def full_at(monkeypatch, number):
    """Let the `number`-th of a save's calls that write, sync or rename end half-way for want of room; what
    counts them."""
    import safetensors.torch

    made = []

    def failing(plain):
        def call(*arguments, **named):
            made.append(plain)
            if len(made) != number:
                return plain(*arguments, **named)
            if plain.__name__ in ("save_file", "write_text"):
                target = arguments[1] if plain.__name__ == "save_file" else arguments[0]
                plain(*arguments, **named)
                os.truncate(target, os.path.getsize(target) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call

    for owner, name in ((safetensors.torch, "save_file"), (Path, "write_text"), (os, "fsync"),
                        (os, "rename")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    return made


def test_a_save_whose_disk_is_full_at_any_of_its_calls_leaves_the_older_one_and_nothing_else(
        tmp_path, monkeypatch):
    training = training_of(tmp_path / "run", config_of(training__save_steps=0))
    for _ in range(2):
        training._train_one()
    training.save()
    training._train_one()
    captured, state = training.engine.capture(), {"step": 3}
    number, reached = 0, True
    while reached:
        number += 1
        with monkeypatch.context() as patch:
            made = full_at(patch, number)
            with contextlib.suppress(checkpoints.NoRoom):
                checkpoints.save(tmp_path / "run", captured, state, training.identity)
            reached = len(made) >= number
        if reached:
            assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
            assert not list((tmp_path / "run").glob(".staging-*"))
            assert checkpoints.newest_valid(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", [])
    assert number > 10
    assert checkpoints.newest_valid(tmp_path / "run")[0].name == "checkpoint-3"


TEXTS = ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79",
         "CUDA error: out of memory",
         "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
         "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
         "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
         "tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
         "std::bad_alloc", "MemoryError: ", "OSError: [Errno 12] Cannot allocate memory")


def stopped_and_changed(with_dataset, path, step):
    """A run that was stopped before update `step` and went on with half the micro-batch."""
    path = path / "run"
    job = Job(with_dataset, path, {"where": "stop", "step": step}).train()
    assert job.error.exit_code == 75, job.log()
    configure(path, evaluation__completions=0, training__save_steps=0, training__micro_batch=2,
              training__accumulation=4)
    job.error = None
    job.train({})
    assert job.error is None, job.log()
    return job


@real
def test_memory_that_runs_out_in_any_words_makes_the_planned_updates_once_each_with_half_the_micro_batch(
        matrix, with_dataset, tmp_path):
    texts = TEXTS[::matrix.count(3, 1)]
    steps = (5,) if len(texts) < len(TEXTS) else (1, 5, 11)
    passed, notes = 0, []
    for step in steps:
        wanted = stopped_and_changed(with_dataset, tmp_path / f"wanted-{step}", step)
        for number, text in enumerate(texts):
            fault = {"where": "loss", "step": step, "batch": number % 2, "above": 2, "error": text}
            job = Job(with_dataset, tmp_path / f"{step}-{number}", fault).train()
            good = (job.error is None and job.result.digest == wanted.result.digest
                    and [row[0] for row in job.rows] == STEPS and job.rows == wanted.rows
                    and [each.partition(": ")[2] for each in job.restarts] == [
                        "on with micro-batches of 2 in place of 4"]
                    and job.values["training.accumulation"] == 4)
            passed += good
            notes += [] if good else [f"step {step}, {text}: {job.error} {job.restarts} {job.rows}"]
    assert [row[0] for row in wanted.rows] == STEPS
    matrix.record(50, passed, len(texts) * len(steps), "; ".join(notes))


@real
def test_the_room_that_a_plan_asks_for_is_at_most_a_twentieth_more_than_its_run_takes_and_never_less(
        matrix, with_dataset, tmp_path):
    """One more than is kept, and the best one, which lies further back."""
    sizes = [(64, 2), (128, 3), (192, 3), (256, 2)][-matrix.count(1, 3):]
    passed, notes = 0, []
    for hidden, layers in sizes:
        job = Job(with_dataset, tmp_path / str(hidden), {"where": "disk"}, training__save_steps=1,
                  training__eval_steps=6, embedded__hidden=hidden, embedded__layers=layers).train()
        assert job.error is None, job.log()
        values = Config(job.values)
        tokens = json.loads((job.run.dataset / "manifest.json").read_text())["tokens"]["total"]
        planned = memory.disk_bytes(models.embedded(values).shape, values, tokens)
        taken = int((job.run.path / "most-bytes").read_text())
        off = planned / taken - 1
        passed += 0 <= off <= MOST_OFF
        notes.append(f"{hidden} wide: planned {planned:,} bytes, taken {taken:,} ({off:+.1%})")
    matrix.record(46, passed, len(sizes), "; ".join(notes))


@pytest.fixture(scope="module")
def plain(with_dataset, tmp_path_factory):
    """The same run without a fault."""
    job = Job(with_dataset, tmp_path_factory.mktemp("plain") / "run", {}).train()
    assert job.error is None, job.log()
    return job


@real
def test_memory_that_runs_out_beside_the_training_leaves_its_recipe_or_its_result_as_they_were(
        matrix, with_dataset, plain, tmp_path):
    """In evaluations, which give up their own extras; in a save and in the export, once."""
    passed, notes, tries = 0, [], 0
    cases = [("evaluation", {"evaluation__completions": 2}), ("export", {})]
    cases += matrix.count([], [("evaluation", {"evaluation__completions": 2, "training__eval_steps": 5}),
                               ("save", {"training__save_steps": 4})])
    for where, settings in cases:
        for text in TEXTS[:matrix.count(1, 5)]:
            fault = {"where": where, "error": text}
            job = Job(with_dataset, tmp_path / str(tries), fault, **settings).train()
            tries += 1
            lost = [] if job.error else [
                name for name, value in plain.values.items()
                if name.startswith("training.") and job.values[name] != value
                and name not in ("training.eval_steps", "training.save_steps")]
            exact = job.error is None and job.result.digest == plain.result.digest
            good = exact and not lost if where == "evaluation" else job.error is None and (
                job.result.tokens_trained == plain.result.tokens_trained)
            passed += good and [row[0] for row in job.rows] == STEPS
            notes += [] if good else [f"{where}, {settings}: {job.error} {job.restarts} {lost} {exact}"]
    matrix.record(51, passed, tries, "; ".join(notes))


@real
def test_memory_that_always_runs_out_ends_with_71_and_a_table_within_six_attempts(
        matrix, with_dataset, tmp_path):
    passed, texts = 0, TEXTS[:matrix.count(1, 8)]
    for number, text in enumerate(texts):
        fault = {"where": "loss", "step": 0, "error": text}
        job = Job(with_dataset, tmp_path / str(number), fault).train()
        tries = len(re.findall(r"^  after step 0, train", str(job.error), re.MULTILINE))
        passed += (isinstance(job.error, DoesNotFit) and job.error.exit_code == 71 and 2 < tries <= 6
                   and tries == len(job.restarts) + 1 and f"Memory ran out {tries} times:" in str(job.error)
                   and job.result.exit_code == 71)
    matrix.record(52, passed, len(texts), "" if passed == len(texts) else str(job.error))


@real
def test_a_limit_of_memory_is_told_as_memory_and_a_smaller_micro_batch_goes_on(
        matrix, with_dataset, tmp_path):
    """RLIMIT_AS in the trainer: torch's own allocator and Python's refuse."""
    passed, notes, kinds = 0, [], ("torch", "python")
    repeats = matrix.count(1, 5)
    for number in range(repeats * len(kinds)):
        fault = {"where": "limit", "step": 3 + number // 2, "above": 2, "error": kinds[number % 2]}
        job = Job(with_dataset, tmp_path / str(number), fault).train()
        line = read_lines(job.run.recovery)[:1]
        good = (job.error is None and [row[0] for row in job.rows] == STEPS
                and [(found["kind"], found["memory"]) for found in line] == [("out_of_memory", "host")])
        passed += good
        notes += [] if good else [f"{fault}: {job.error} {line} {job.log()[-800:]}"]
    matrix.record(53, passed, repeats * len(kinds), "; ".join(notes))


# Limits of the process


@real
def test_few_open_files_or_processes_are_refused_in_one_line(matrix, with_dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(with_dataset / "dataset", run / "dataset")
    configure(run)
    passed, notes = 0, []
    files, processes = (64, 32)[:matrix.count(1, 2)], (16, 100)
    for limit in files:
        done = subprocess.run(
            [sys.executable, str(ROOT / "elite_train.py"), "resume", str(run)], capture_output=True,
            text=True, check=False, timeout=120, stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
        last = done.stderr.splitlines()[-1:]
        good = (done.returncode == 71 and "Traceback" not in done.stderr + done.stdout
                and last == [f"A process may open {limit} files here and training opens up to 256; raise the "
                             "limit with `ulimit -Hn 256` as an administrator."])
        passed += good
        notes += [] if good else [f"{limit}: {done.returncode} {done.stderr[-500:]}"]
    code = ("import resource, sys; from training.manager import preflight; limit = int(sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))\n"
            "print(*preflight.process_problems({'device.count': 1}))")
    for limit in processes:
        done = subprocess.run([sys.executable, "-c", code, str(limit)], capture_output=True, text=True,
                              check=True, cwd=ROOT)
        good = f"This user may have {limit} processes and threads and training needs up to 128" in done.stdout
        passed += good
        notes += [] if good else [f"{limit}: {done.stdout}"]
    matrix.record(49, passed, len(files) + len(processes), "; ".join(notes))
