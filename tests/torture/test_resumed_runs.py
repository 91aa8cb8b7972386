"""The real trainer, stopped, killed and started again: to the same digest, rows and memory."""

import random
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
from resumes import flipped, rows, run_at
from run_maker import configure

from training.manager import launcher
from training.manager.manager import TrainingManager
from training.records import Result
from training.rundir import read_record
from training.trainer import checkpoints
from training.trainer.journal import read_lines

PATIENCE_S = 300


def train(run, *arguments, ranks=0):
    """The trainer to its end: exit codes by rank, and what it printed."""
    words = ["--run-dir", str(run), *arguments]
    job = forked.server().start(launcher.SCRIPT, run.parent / f"{run.name}.log", {"arguments": words}, ranks)
    return job.wait(PATIENCE_S), job.text()


def outcome(run):
    return read_record(Result, run / "result.json")


@pytest.fixture(scope="module")
def finished(with_dataset, tmp_path_factory):
    """A run to its end with each of its 12 steps saved."""
    run = run_at(with_dataset, tmp_path_factory.mktemp("finished") / "run", training__save_steps=1,
                 training__keep_checkpoints=20)
    codes, told = train(run)
    assert codes == [0], told
    return run


def as_of(finished, path, step):
    """A copy of the run as if it had been killed after a step's checkpoint."""
    shutil.copytree(finished, path)
    for name in ("result.json", "heartbeat.json"):
        (path / name).unlink()
    checkpoints.drop_after(path, step)
    return path


def ends_the_same(run, finished):
    found, expected = outcome(run), outcome(finished)
    return (found.state == "done" and found.digest == expected.digest and rows(run) == rows(finished)
            and found.tokens_trained == expected.tokens_trained and found.seconds > 0)


@pytest.mark.real
def test_the_trainer_goes_on_from_each_step_to_the_same_digest(tmp_path, matrix, finished):
    steps = matrix.count((5,), range(1, 13))
    passed = 0
    for step in steps:
        run = as_of(finished, tmp_path / str(step), step)
        codes, told = train(run)
        passed += (codes == [0] and f"going on from checkpoint-{step}\n" in told
                   and ends_the_same(run, finished))
    matrix.record(20, passed, len(steps), "the trainer itself")


@pytest.mark.real
def test_a_change_that_is_allowed_by_name_is_made_and_recorded(tmp_path, matrix, finished):
    run = as_of(finished, tmp_path / "run", 11)
    configure(run, training__learning_rate=1e-3, evaluation__completions=0, evaluation__windows=2)
    saved = run / "checkpoint-11"
    (captured, state), identity = checkpoints.load(saved), checkpoints.read_identity(saved)
    state.pop("optimizer", None)
    saved.rename(tmp_path / saved.name)
    identity |= {"versions": {**identity["versions"], "torch": "1.0"}, "data": "0" * 64}
    checkpoints.save(run, captured, state, identity)
    codes, told = train(run)
    assert codes == [2], told
    for problem in ("training.learning_rate was 0.003 in checkpoint-11 and is 0.001 now", "torch was 1.0 in ",
                    "The dataset changed since checkpoint-11 (digest 000000000000, now "):
        assert problem in told
    assert outcome(run).state == "failed"
    assert not (run / "changes.jsonl").exists()
    names = ["training.learning_rate", "versions.torch", "data"]
    codes, told = train(run, *(word for name in names for word in ("--allow-change", name)))
    assert codes == [0], told
    lines = read_lines(run / "changes.jsonl")
    assert sorted(line["key"] for line in lines) == sorted(names)
    assert {line["since"] for line in lines} == {"checkpoint-11"}
    assert next((line["before"], line["after"]) for line in lines if "rate" in line["key"]) == (3e-3, 1e-3)
    matrix.record(23, 4, 4, "refused all at once by the trainer; allowed by name and recorded")


@pytest.mark.real
def test_two_ranks_then_one_then_two_keep_to_one_curve(tmp_path, matrix, with_dataset):
    def settings(ranks):
        return {"device__count": ranks, "training__micro_batch": 1, "training__accumulation": 4 // ranks,
                "training__max_steps": 6, "training__save_steps": 2, "training__keep_checkpoints": 9}
    whole = run_at(with_dataset, tmp_path / "whole", **settings(1))
    assert train(whole)[0] == [0]
    run = run_at(with_dataset, tmp_path / "run", **settings(2))
    for last, ranks in ((2, 2), (4, 1), (6, 2)):
        configure(run, evaluation__completions=0, evaluation__windows=2, **settings(ranks))
        codes, told = train(run, ranks=0 if ranks == 1 else ranks)
        assert not any(codes), told
        assert f"going on from checkpoint-{last - 2}\n" in told or last == 2
        if last < 6:
            (run / "result.json").unlink()
            checkpoints.drop_after(run, last)
    losses = list(zip(rows(run), rows(whole), strict=True))
    near = [one[2] == pytest.approx(other[2], rel=1e-5) for one, other in losses]
    matrix.record(24, sum(near), 6, "loss of each update within 1e-5 of one process's")


@pytest.mark.real
def test_a_finished_run_is_not_written_to(tmp_path, matrix, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    TrainingManager(run).train()  # the lock's file is made

    def times():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    before = times()
    assert TrainingManager(run).train().state == "done"
    through_the_command = times() == before
    codes, told = train(run)
    assert "holds a finished run already; nothing is done" in told
    matrix.record(25, through_the_command + (codes == [0] and times() == before), 2, "command and trainer")


@pytest.mark.real
def test_without_a_usable_checkpoint_the_training_starts_at_0_and_says_so(tmp_path, matrix, finished):
    passed = 0
    for left in ("none", "damaged"):
        run = as_of(finished, tmp_path / left, 3 if left == "damaged" else 0)
        for path in run.glob("checkpoint-*"):
            flipped(path / "weights.safetensors")
        codes, told = train(run)
        assert codes == [0], told
        assert told.count("is skipped: weights.safetensors is damaged") == (3 if left == "damaged" else 0)
        passed += ("No checkpoint can be used; training starts from step 0." in told
                   and ends_the_same(run, finished))
    matrix.record(26, passed, 2, "all deleted; all damaged")


def resident(pid, name="VmHWM"):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def peak_of(run, log, first, then):
    """The most resident memory of a trainer until step `then`; counted anew after step `first` if not 0."""
    process = forked.trainer(run, log)
    peak, counted = 0, first == 0
    while process.poll() is None and (done := steps_made(run)) <= then:
        if not counted and done >= first:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
            counted = True
        elif counted:
            peak = resident(process.pid)
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return peak


def steps_made(run):
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


@pytest.mark.real
def test_a_resume_takes_no_more_memory_than_the_training(tmp_path, matrix, with_dataset):
    """A model of 13 million weights, whose checkpoint is 156 MB."""
    run = run_at(with_dataset, tmp_path / "run", embedded__hidden=512, embedded__layers=4, embedded__mlp=1408,
                 training__micro_batch=1, training__accumulation=1, training__max_steps=12,
                 training__save_steps=6)
    steady = peak_of(run, tmp_path / "log", 2, 5)
    process = forked.trainer(run, tmp_path / "log")
    while process.poll() is None and not (run / "checkpoint-6").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = peak_of(run, tmp_path / "log", 0, 9)
    ratio = resumed / steady
    matrix.record(28, ratio <= 1.10, 1, f"{resumed / 2**20:.0f} MiB in load and three steps, "
           f"{steady / 2**20:.0f} MiB in steps 3 to 5 of an uninterrupted run: {ratio:.2f}")


@pytest.mark.real
def test_three_kills_leave_each_row_once_and_as_it_was(tmp_path, matrix, finished, with_dataset):
    passed, tries = 0, matrix.count(1, 20)
    for turn in range(tries):
        source = random.Random(turn)
        run = run_at(with_dataset, tmp_path / str(turn), training__save_steps=source.randint(1, 3))
        for after in sorted(source.sample(range(1, 11), 3)):
            process = forked.trainer(run, tmp_path / f"{turn}.log")
            while process.poll() is None and steps_made(run) < after:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        codes, _ = train(run)
        before = [line["time"] for line in read_lines(run / "metrics.jsonl")]
        passed += codes == [0] and ends_the_same(run, finished) and before == sorted(before)
    matrix.record(29, passed, tries, "step, epoch, loss, rate, norm and tokens of each row")
