"""What is refused before a run starts, and what is said."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import make_run

from training.errors import CannotWrite, DataError, DoesNotFit, MissingInput, Problems, UsageError
from training.manager import lock, preflight
from training.manager.manager import TrainingManager
from training.records import GIB, Memory
from training.rundir import RunDirectory


def test_a_new_or_empty_output_is_fine_and_nothing_is_left_behind(tmp_path):
    preflight.check_output(tmp_path / "a" / "b", resume=False, fresh=False)
    (tmp_path / "empty").mkdir()
    preflight.check_output(tmp_path / "empty", resume=False, fresh=False)
    (tmp_path / "empty" / lock.NAME).touch()
    preflight.check_output(tmp_path / "empty", resume=False, fresh=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [lock.NAME, "empty"]


def test_an_output_with_a_run_is_refused_with_the_three_ways_out(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(CannotWrite) as caught:
        preflight.check_output(run.path, resume=False, fresh=False)
    assert all(word in str(caught.value) for word in (str(run.path), "--resume", "--fresh", "--output"))
    assert caught.value.exit_code == 73
    preflight.check_output(run.path, resume=True, fresh=False)
    preflight.check_output(run.path, resume=False, fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_run_is_never_taken(tmp_path, fresh):
    (tmp_path / "main.py").write_text("x = 1\n")
    with pytest.raises(CannotWrite, match="is not a run directory"):
        preflight.check_output(tmp_path, resume=False, fresh=fresh)


def test_files_links_and_impossible_parents_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, says in ((file, "is a file"), (file / "under", "is a file"),
                       (tmp_path / "link", "link to nothing"), (Path("/proc/run"), "Cannot write in /proc")):
        with pytest.raises(CannotWrite, match=says):
            preflight.check_output(path, resume=False, fresh=False)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CannotWrite, match="Permission denied"):
        preflight.check_output(tmp_path / "run", resume=False, fresh=False)


def test_resume_needs_a_run_and_excludes_fresh(tmp_path):
    with pytest.raises(MissingInput, match="holds no run to resume"):
        preflight.check_output(tmp_path / "none", resume=True, fresh=False)
    with pytest.raises(UsageError, match="give one of them"):
        preflight.check_output(tmp_path, resume=True, fresh=True)


def test_a_disk_without_room_is_refused_with_both_sizes(tmp_path):
    preflight.check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(CannotWrite, match=r"The run needs 1,?048576\.00 GiB on the disk .* GiB is free"):
        preflight.check_disk(tmp_path / "run", (1 << 20) * GIB)


def test_what_the_run_holds_already_is_not_needed_again(tmp_path):
    free_bytes = psutil.disk_usage(str(tmp_path)).free
    run = make_run(tmp_path / "run", memory=Memory(device_bytes=1, host_bytes=1, terms={},
                                                   disk_bytes=free_bytes + (1 << 30)))
    with pytest.raises(CannotWrite):
        preflight.check_run(run)
    with (run.path / "held").open("wb") as file:
        file.truncate(2 << 30)
    preflight.check_run(run)


def test_a_whole_run_passes(tmp_path):
    run = make_run(tmp_path / "run")
    assert TrainingManager(run.path).preflight() == preflight.version_warnings()


def test_the_checks_of_other_rooms_are_asked_too(tmp_path):
    def check(run, config):
        return [MissingInput(f"no {config['model.base']}")]

    run = make_run(tmp_path / "run")
    with pytest.raises(MissingInput, match="no embedded"):
        TrainingManager(run.path, checks=[check]).preflight()


def test_every_problem_is_told_at_once(tmp_path):
    memory = Memory(device_bytes=1 << 60, host_bytes=1, disk_bytes=1, terms={})
    run = make_run(tmp_path / "run", memory=memory)
    (run.dataset / "manifest.json").write_text(json.dumps({"windows": {"train": 0},
                                                           "tokens": {"trained_per_epoch": 0}}))
    (run.dataset / "tokens.bin").unlink()
    run.config.write_text(run.config.read_text().replace('base: "embedded"', 'base: "/gone"'))
    with pytest.raises(Problems) as caught:
        preflight.check_run(run)
    kinds = [type(problem) for problem in caught.value.problems]
    assert kinds == [MissingInput, DoesNotFit, DataError, MissingInput]
    assert "/gone is not there" in str(caught.value)
    assert "1073741824.0 GiB of RAM" in str(caught.value)
    assert "0 train windows and 0 tokens" in str(caught.value)


@pytest.mark.parametrize(("text", "error"), [("{", DataError), ("{}", DataError), (None, MissingInput),
                                             ('{"windows": 3, "tokens": 1}', DataError)])
def test_a_dataset_that_was_not_finished_is_named(tmp_path, text, error):
    run = make_run(tmp_path / "run")
    path = run.dataset / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    problems = preflight.dataset_problems(run)
    assert [type(problem) for problem in problems] == [error]
    assert str(path) in str(problems[0])


def test_an_unknown_key_in_the_configuration_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    run.config.write_text(run.config.read_text() + "\nfoo: 1\n")
    with pytest.raises(UsageError, match="Unknown configuration key foo"):
        preflight.check_run(run)


def test_a_model_folder_is_looked_into_and_a_hub_name_is_not(tmp_path):
    assert preflight.model_problems({"model.base": "org/name"}) == []
    problem, = preflight.model_problems({"model.base": str(tmp_path)})
    assert "has no config.json and no weights" in str(problem)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    assert preflight.model_problems({"model.base": str(tmp_path)}) == []


def limited(soft, hard, needed):
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
            "from training.manager import preflight\n"
            f"print([str(p) for p in preflight.limit_problems({needed})], resource.getrlimit(7)[0])")
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, cwd=root, check=True).stdout


def test_a_low_limit_of_open_files_is_raised_where_it_may_be():
    assert resource.RLIMIT_NOFILE == 7
    assert limited(64, 512, 256) == "[] 256\n"
    assert "may open 128 files here and training opens up to 256" in limited(64, 128, 256)


def test_missing_packages_and_other_versions_are_told(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("psutil==0.0.1\nno-such-package==1.0\nold==1; python_version < '3.10'\n# a==9\n")
    assert "Not installed: no-such-package." in str(preflight.package_problems(requirements)[0])
    assert preflight.version_warnings(requirements) == (
        f"psutil {psutil.__version__} is installed; 0.0.1 was tested",)


def test_a_clock_that_was_never_set_is_told(tmp_path):
    run = RunDirectory(tmp_path)
    run.plan.write_text("{}")
    assert "the clock says 1970-01-01" in preflight.clock_warnings(run, 0.0)[0]
    assert "plan.json is 2 h newer" in preflight.clock_warnings(run, run.plan.stat().st_mtime - 7200)[0]
    assert preflight.clock_warnings(run) == ()


def test_ranks_that_cannot_talk_or_share_memory_are_told_before_they_start(monkeypatch):
    config = {"device.count": 2, "device.kind": "cuda"}
    assert preflight.port_problems({"device.count": 1, "device.kind": "cuda"}) == []
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, 0, 1 << 20))

    class NoLoopback(socket.socket):
        def bind(self, address):
            raise OSError(99, "Cannot assign requested address")
    monkeypatch.setattr(socket, "socket", NoLoopback)
    loopback, shared = preflight.port_problems(config)
    assert "No port of 127.0.0.1 can be opened (Cannot assign requested address)" in str(loopback)
    assert "/dev/shm has 1 MiB and NCCL may need 66" in str(shared)


def test_more_than_can_be_pinned_is_refused(tmp_path):
    memory = Memory(device_bytes=1, host_bytes=9 * GIB, disk_bytes=1, terms={})
    run = make_run(tmp_path / "run", memory=memory)
    run.hardware.write_text(json.dumps({"figures": {"host.pinned_limit": {"value": 4 * GIB}}}))
    pinned = {"stream.inputs": "pinned", "stream.pages": "device"}
    (problem,) = preflight.pinned_problems(run, pinned)
    assert "9.0 GiB of host memory and 4.0 GiB can be pinned here" in str(problem)
    assert preflight.pinned_problems(run, {**pinned, "stream.inputs": "pageable"}) == []
    run.hardware.write_text("{}")
    assert preflight.pinned_problems(run, pinned) == []


def test_too_few_processes_are_told_or_the_soft_limit_raised(monkeypatch):
    limits, infinity = {"now": (10, 40)}, resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.update(now=wanted))
    (problem,) = preflight.process_problems({"device.count": 1})
    assert "may have 40 processes and threads and training needs up to 128" in str(problem)
    limits["now"] = (10, 4000)
    assert preflight.process_problems({"device.count": 2}) == []
    assert limits["now"] == (256, 4000)
    limits["now"] = (infinity, infinity)
    assert preflight.process_problems({"device.count": 8}) == []
