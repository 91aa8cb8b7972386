"""A run that is killed or refused by its disk at any moment goes on from a whole checkpoint.

Rows 1 to 6, 9, 15, 16, 18 and 19 of docs/reliability.md; rows 7 to 14 and 17 are in test_crash_damage.py.
"""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import forked
import psutil
import pytest
from crash_tools import (
    ROOT,
    STEPS,
    TWO,
    OneSave,
    can_trace,
    killed,
    log_of,
    manifest_of,
    need_strace,
    run_at,
    seeded,
    traced,
    trained,
    unfinished,
    weights_at,
    worker,
)
from run_maker import dataset_at, repository_at

from training.errors import CannotWrite
from training.manager import lock
from training.trainer import checkpoints

# Of one save those that change something, and those that open and close what is changed.
CHANGING = ("write", "ftruncate", "fsync", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "unlinkat",
            "rmdir")
OPENING = ("openat", "close", "read", "newfstatat", "getdents64")
RENAMES = ("rename", "renameat", "renameat2")
REFUSALS = (errno.EXDEV, errno.EROFS, errno.EACCES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run that nothing interrupted, its digest, and the seconds it took."""
    folder = tmp_path_factory.mktemp("finished")
    digest = trained(run_at(dataset, folder / "first"))  # what it takes the first time is not its own
    began = time.monotonic()
    assert trained(run_at(dataset, folder / "run")) == digest
    return folder / "run", digest, time.monotonic() - began


@pytest.fixture(scope="module")
def of_two(dataset, tmp_path_factory):
    """The digest of a run of two ranks with ZeRO-2."""
    return trained(run_at(dataset, tmp_path_factory.mktemp("two") / "run", **TWO), ranks=2)


@pytest.fixture(scope="module")
def one_save(tmp_path_factory):
    return OneSave(tmp_path_factory.mktemp("save"))


@pytest.mark.real
@pytest.mark.parametrize(("row", "most", "short"), [(1, 1, 4), (2, 3, 2)])
def test_a_run_killed_at_random_moments_ends_in_the_uninterrupted_weights(dataset, finished, tmp_path, matrix,
                                                                          row, most, short):
    _, digest, seconds = finished
    (source, note), good, kills, tries = seeded(), 0, 0, matrix.count(short, 200)
    lasts_s = [seconds, seconds]
    for number in range(tries):
        count = source.randint(1, most)
        run = killed(lambda number=number: run_at(dataset, tmp_path / str(number)), count, source, lasts_s)
        good, kills = good + (trained(run) == digest), kills + count
        shutil.rmtree(run)
    matrix.record(row, good, tries, f"{kills} kills; {note}")


@pytest.mark.real
def test_a_save_killed_at_each_system_call_leaves_the_old_or_the_new_checkpoint(one_save, matrix):
    need_strace()
    points, problems = 0, []
    for call in CHANGING + OPENING[:matrix.count(0, len(OPENING))]:
        made, found = one_save.swept(lambda path, n, call=call: traced(
            one_save.folder / "log", "save", path, [call], f"signal=KILL:when={n}")[0])
        points, problems = points + made, problems + [f"{call} {each}" for each in found]
    assert points > 20
    matrix.record(3, points - len(problems), points, "; ".join(["by strace", *problems]))


@pytest.mark.real
def test_a_save_killed_while_it_lets_go_of_old_checkpoints_leaves_a_whole_one(one_save, matrix):
    """Each rename, unlink and rmdir of a save, of which most are the retention's."""
    points, problems = 0, []
    for call in ("rename", "unlink", "rmdir"):
        made, found = one_save.swept(lambda path, n, call=call: worker(
            one_save.folder / "log", "save", path, {"call": call, "at": n, "then": "kill"}).wait()[0])
        points, problems = points + made, problems + [f"{call} {each}" for each in found]
    assert points > 10
    matrix.record(4, points - len(problems), points, "; ".join(problems))


@pytest.mark.real
@pytest.mark.parametrize(("row", "then"), [(5, "group"), (6, "peer")])
def test_ranks_killed_in_a_save_go_on_to_the_uninterrupted_weights(dataset, of_two, tmp_path, matrix, row,
                                                                   then):
    """All at once, or one while the other writes, which then ends by itself."""
    (source, note), good, tries = seeded(), 0, matrix.count(1, 20)
    for number in range(tries):
        run = run_at(dataset, tmp_path / str(number), **TWO)
        at = source.randint(1, 18)
        fault = {"call": "fsync", "at": at, "then": then}
        job = worker(log_of(run), "train", run, fault, ranks=2)
        codes = job.wait(120)
        assert codes[1] == -signal.SIGKILL, job.text()[-3000:]
        assert codes[0] not in (0, None), f"fsync {at}: {job.text()[-3000:]}"
        newest, skipped = checkpoints.newest_valid(run)
        whole = not skipped and all(weights_at(path)[1] == manifest_of(path)["step"]
                                    for path in run.glob("checkpoint-*"))
        good += whole and (newest is None or newest.name in (f"checkpoint-{(at - 1) // 6}",
                                                             f"checkpoint-{(at - 1) // 6 + 1}"))
        good -= trained(run, ranks=2) != of_two
        shutil.rmtree(run)
    matrix.record(row, good, tries, note)


@pytest.mark.real
def test_a_rename_that_is_refused_ends_with_73_and_the_old_checkpoint_stays(finished, tmp_path, matrix):
    """Each rename of the trainer, where strace is here, and those of checkpoints alone."""
    done, digest, _ = finished
    good, ways = 0, list(itertools.product(REFUSALS, ["python", "strace"][:1 + can_trace()]))
    for number, by in ways:
        run = unfinished(done, tmp_path / f"{number}-{by}")
        before = checkpoints.newest_valid(run)
        if by == "strace":
            code, text = traced(log_of(run), "train", run, RENAMES, f"error={errno.errorcode[number]}")
        else:
            job = worker(log_of(run), "train", run, {"call": "rename", "at": 0, "then": number})
            [code], text = job.wait(), job.text()
        told = f": {os.strerror(number)}" in text and "Cannot write" in text and "Traceback" not in text
        good += (code == 73 and told and checkpoints.newest_valid(run) == before != (None, [])
                 and trained(run) == digest)
    matrix.record(9, good, len(ways), "strace and Python" if can_trace() else "Python")


@pytest.mark.real
def test_a_run_whose_small_files_are_all_torn_goes_on_from_the_checkpoint_before(finished, tmp_path, matrix):
    """The records of the last attempt, the journal, and the newest checkpoint's manifest."""
    done, digest, _ = finished
    source, note = seeded()
    for number in range(matrix.count(2, 40)):
        run = tmp_path / str(number)
        shutil.copytree(done, run)
        for file in (run / "result.json", run / "heartbeat.json", run / f"checkpoint-{STEPS}/MANIFEST.json"):
            whole = file.read_bytes()
            file.write_bytes(whole[:source.randrange(len(whole) - 2)] + source.choice((b"", bytes(9), b"}{")))
        (run / "metrics.jsonl").write_bytes((done / "metrics.jsonl").read_bytes()[:-source.randint(2, 50)])
        assert trained(run) == digest, note
        told = log_of(run).read_text()
        assert f"checkpoint-{STEPS} is skipped: " in told, note
        assert f"going on from checkpoint-{STEPS - 1}" in told, note
        assert "Traceback" not in told, note


@pytest.mark.real
def test_of_two_trainers_started_at_once_one_is_refused_and_the_other_is_not_disturbed(dataset, finished,
                                                                                       tmp_path, matrix):
    good, tries = 0, matrix.count(2, 50)
    for number in range(tries):
        run = run_at(dataset, tmp_path / str(number))
        both = [forked.trainer(run, tmp_path / f"{number}-{name}.log") for name in ("one", "other")]
        said = "".join(process.communicate()[0] for process in both)
        codes = sorted(process.returncode for process in both)
        # The later one comes too late to be refused where the first took less than half a second.
        refused = codes == [0, 73] and "Another trainer is writing to" in said
        good += (refused or (codes == [0, 0] and "nothing is done" in said)) and trained(run) == finished[1]
        shutil.rmtree(run)
    matrix.record(15, good, tries)


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from training.manager.lock import RunLock
guard = RunLock(Path(sys.argv[1]))
guard.take()
if sys.argv[2:]:
    subprocess.Popen(["sleep", sys.argv[2]], pass_fds=(guard.handle,), stdout=subprocess.DEVNULL)
print(flush=True)
time.sleep(60)
"""


def killed_holder(run, *heir_s):
    """Take a run's lock in a process that is killed then, and is survived by an heir for some seconds."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run), *map(str, heir_s)], cwd=ROOT,
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    assert lock.held(run)
    process.kill()
    process.communicate()


def test_ranks_that_outlive_a_killed_command_keep_the_next_one_out_until_they_end(tmp_path, matrix):
    good, tries = 0, matrix.count(2, 50)
    for number in range(tries):
        run = tmp_path / str(number)
        killed_holder(run, 1.5)
        with pytest.raises(CannotWrite, match="a trainer without a command"):
            lock.RunLock(run).take(patience_s=0.2)
        later = lock.RunLock(run)
        later.take(patience_s=30)
        good += lock.holder(run / lock.NAME) == os.getpid()
        later.release()
    assert good == tries


def test_a_lock_of_a_killed_process_or_in_the_name_of_another_is_no_lock(tmp_path, matrix):
    good, tries = 0, matrix.count(4, 50)
    for number in range(tries):
        run = tmp_path / str(number)
        killed_holder(run)
        if number % 2:
            other = psutil.Process(1)  # the number of the one that was killed is another's now
            (run / lock.NAME).write_text(json.dumps({"pid": 1, "started": other.create_time()}))
        began = time.monotonic()
        guard = lock.RunLock(run)
        guard.take(patience_s=0)
        good += time.monotonic() - began < lock.PROBE_S
        guard.release()
    matrix.record(16, good, tries)


@pytest.mark.real
def test_a_run_that_was_moved_goes_on_where_it_is(finished, tmp_path, matrix):
    """Renamed, below a linked folder, by a relative path, with odd characters in its name."""
    done, digest, _ = finished
    ways = [("moved", "{}/moved", "/"), ("linked", "{}/link/linked", "/"),
            ("relative", "deep/../relative", "{}"), ("a b\n'é$(x)", "{}/a b\n'é$(x)", "{}")]
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "deep").mkdir()
    good, tries = 0, matrix.count(len(ways), 20)
    for number in range(tries):
        name, path, cwd = ways[number % len(ways)]
        run = unfinished(done, tmp_path / "first")
        here = str(run).encode()
        absolute = [file for saved in run.glob("checkpoint-*") for file in saved.iterdir()
                    if here in file.read_bytes() or str(done).encode() in file.read_bytes()]
        os.rename(run, tmp_path / name)
        where = {"path": path.replace("{}", str(tmp_path)), "cwd": cwd.replace("{}", str(tmp_path))}
        job = worker(tmp_path / "log", "train", **where)
        assert job.wait() == [0], job.text()[-3000:]
        result = json.loads((tmp_path / name / "result.json").read_text())
        good += result["digest"] == digest and not absolute and not (tmp_path / "first").exists()
        shutil.rmtree(tmp_path / name)
    matrix.record(18, good, tries)


def command(output, repository, *before):
    """The whole command on an output folder: its exit code, what it said, and its CPU seconds."""
    argv = [*before, sys.executable, str(ROOT / "elite_train.py"), "--auto", "--no-setup", "--repo",
            str(repository), "--output", str(output)]
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                          stdin=subprocess.DEVNULL)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime + now.ru_stime - earlier.ru_utime - earlier.ru_stime
    return done.returncode, done.stdout, seconds


@pytest.mark.real
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, matrix):
    """A file system that is read-only, one that refuses a folder for a quota, and one without rename."""
    repository = repository_at(tmp_path / "repository")
    ways = []
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0:
        ways.append((errno.EROFS, ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"',
                                   str(tmp_path / "EROFS")]))
    if can_trace():
        for number, calls in ((errno.EDQUOT, "?mkdir,?mkdirat"),
                              (errno.EPERM, "?rename,?renameat,?renameat2")):
            ways.append((number, ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e",
                                  f"inject={calls}:error={errno.errorcode[number]}"]))
    if not ways:
        pytest.skip("no strace here, and no file system may be mounted")
    good, told = 0, []
    for number, before in ways:
        folder = tmp_path / errno.errorcode[number]
        folder.mkdir()
        code, text, seconds = command(folder / "run", repository, *before)
        told.append(f"{folder.name}: code {code} after {seconds:.1f} s of CPU")
        good += (code == 73 and f"{os.strerror(number)}. Choose another --output." in text
                 and text.count("\n") == 1 and seconds < 5)
    matrix.record(19, good, len(ways), "; ".join(told))
