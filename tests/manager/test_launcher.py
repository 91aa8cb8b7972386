"""The trainer's command line and environment, and DeepSpeed's launcher on two CPU ranks."""

import base64
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import FAKE, make_run
from test_training_manager import out, start_command, trained, trainers, wait_for

from training.errors import EliteError, MissingInput
from training.manager import launcher
from training.manager.manager import TrainingManager
from training.settings import Config

RUN = Path("/runs/my model; $(x)")
ZERO_2 = {"deepspeed.stage": 2, "device.count": 2}


def test_stage_0_is_plain_python_with_the_path_as_one_word():
    assert launcher.command(Config({}), RUN, "/env/bin/python") == [
        "/env/bin/python", str(launcher.SCRIPT), "--run-dir", "/runs/my model; $(x)"]


def test_deepspeed_is_its_own_launcher_with_one_rank_a_device():
    argv = launcher.command(Config(ZERO_2), RUN, "/env/bin/python", port=4711)
    assert argv[0] == "/env/bin/python"
    assert argv[argv.index("-m") + 1] == "deepspeed.launcher.launch"
    assert "--master_port=4711" in argv
    world = next(word for word in argv if word.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["-1", "-1"]}
    assert argv[-3:] == [str(launcher.SCRIPT), "--run-dir", str(RUN)]


def test_several_devices_without_deepspeeds_engine_are_started_by_its_launcher_too():
    argv = launcher.command(Config({"device.count": 3}), RUN, "/env/bin/python", port=4711)
    assert argv[argv.index("-m") + 1] == "deepspeed.launcher.launch"
    world = next(word for word in argv if word.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["-1"] * 3}
    assert argv[-3:] == [str(launcher.SCRIPT), "--run-dir", str(RUN)]


def test_before_python_3_11_the_working_directory_is_kept_off_the_module_path():
    assert launcher._isolation((3, 10)) == ["-I"]
    assert launcher._isolation((3, 11)) == []


def test_ranks_use_the_gpus_that_the_user_made_visible():
    config = Config({**ZERO_2, "device.kind": "cuda"})
    assert launcher.device_ids(config, {}) == ["0", "1"]
    assert launcher.device_ids(config, {"CUDA_VISIBLE_DEVICES": "3, GPU-8f1c,5"}) == ["3", "GPU-8f1c"]
    with pytest.raises(MissingInput, match=r"needs 2 GPUs and CUDA_VISIBLE_DEVICES=3 shows 1"):
        launcher.device_ids(config, {"CUDA_VISIBLE_DEVICES": "3"})


def test_named_gpus_are_positions_among_the_visible_ones():
    two = Config({**ZERO_2, "device.kind": "cuda", "device.gpus": "0,2"})
    assert launcher.device_ids(two, {}) == ["0", "2"]
    assert launcher.device_ids(two, {"CUDA_VISIBLE_DEVICES": "3,GPU-8f1c,5"}) == ["3", "5"]
    with pytest.raises(MissingInput, match=r"needs 3 GPUs and CUDA_VISIBLE_DEVICES=3,4 shows 2"):
        launcher.device_ids(two, {"CUDA_VISIBLE_DEVICES": "3,4"})
    one = Config({"device.kind": "cuda", "device.gpus": "1"})
    assert launcher.environment(one, {})["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in launcher.environment(Config({"device.kind": "cuda"}), {})


def test_cpu_ranks_share_the_cores_wait_passively_and_see_no_gpu():
    env = launcher.environment(Config(ZERO_2), {"PATH": "/bin", "RANK": "3", "WORLD_SIZE": "9", "HOME": "/h"},
                               python="/env/bin/python", cores=16)
    assert env["OMP_NUM_THREADS"] == "8"
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert (env["DS_ACCELERATOR"], env["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    assert env["GLOO_SOCKET_IFNAME"] == "lo"
    assert env["PATH"] == "/env/bin:/bin"
    assert env["HOME"] == "/h"
    assert not {"RANK", "WORLD_SIZE", "PYTORCH_ALLOC_CONF"} & set(env)


def test_a_gpu_run_gets_expandable_segments_unless_the_user_chose():
    config = Config({"device.kind": "cuda"})
    env = launcher.environment(config, {}, cores=4)
    assert env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert env["DS_ACCELERATOR"] == "cuda"
    assert "OMP_WAIT_POLICY" not in env
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        chosen = launcher.environment(config, {name: "max_split_size_mb:64"}, cores=4)
        assert [value for key, value in chosen.items() if "ALLOC_CONF" in key] == ["max_split_size_mb:64"]


def test_the_allocator_is_told_before_the_trainer_starts():
    split = Config({"device.kind": "cuda", "device.allocator": "split"})
    assert launcher.environment(split, {})["PYTORCH_ALLOC_CONF"] == (
        "max_split_size_mb:512,garbage_collection_threshold:0.8")
    mapped = Config({"device.allocator": "mapped"})
    assert launcher.environment(mapped, {})["MALLOC_MMAP_THRESHOLD_"] == "1048576"
    assert launcher.environment(mapped, {"MALLOC_MMAP_THRESHOLD_": "7"})["MALLOC_MMAP_THRESHOLD_"] == "7"
    assert "MALLOC_MMAP_THRESHOLD_" not in launcher.environment(Config({}), {})


def test_threads_of_the_configuration_beat_the_shell_which_beats_the_share():
    shell = {"OMP_NUM_THREADS": "3"}
    assert launcher.environment(Config({"device.threads": 5}), shell)["OMP_NUM_THREADS"] == "5"
    assert launcher.environment(Config({}), shell, cores=8)["OMP_NUM_THREADS"] == "3"


def test_free_ports_are_free():
    ports = {launcher.free_port() for _ in range(5)}
    assert all(1024 <= port <= 65535 for port in ports)


def test_a_program_that_cannot_be_started_is_missing_input(tmp_path):
    with pytest.raises(MissingInput, match="Cannot start /no/such/python"):
        launcher.start(["/no/such/python"], {}, tmp_path / "log", os.open("/dev/null", os.O_RDONLY))


@pytest.mark.real
def test_deepspeed_runs_two_cpu_ranks_to_the_end(tmp_path):
    run = make_run(tmp_path / "run", ZERO_2)
    assert TrainingManager(run.path, script=FAKE).train().state == "done"


@pytest.mark.real
def test_a_rank_that_is_killed_under_deepspeed_never_ends_as_done(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", ZERO_2)
    monkeypatch.setenv("FAKE", "fail_at_3")
    monkeypatch.setenv("FAKE_FAIL", "SIGKILL")
    with pytest.raises(EliteError, match="SIGKILL after step 3") as caught:
        TrainingManager(run.path, script=FAKE).train()
    assert caught.value.exit_code == 75
    assert trainers(run) == []


@pytest.mark.real
@pytest.mark.parametrize(("number", "code"),
                         [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_stops_reach_every_rank_and_leave_none(tmp_path, number, code):
    run = make_run(tmp_path / "run", ZERO_2)
    command = start_command(run, FAKE_STEPS=100_000)
    wait_for(trained(run), 60)
    wait_for(lambda: len(trainers(run)) == 3, 5, "the launcher and two ranks")
    command.send_signal(number)
    assert command.wait(20) == code, out(run)
    wait_for(lambda: not trainers(run), 15, "all ranks to end")


@pytest.mark.real
def test_the_death_of_the_launcher_ends_its_ranks_and_they_are_started_again(tmp_path):
    run = make_run(tmp_path / "run", ZERO_2)
    command = start_command(run, FAKE_STEPS=100_000)
    wait_for(trained(run), 60)
    first = trainers(run)
    leader = next(pid for pid in first if psutil.Process(pid).ppid() == command.pid)
    os.kill(leader, signal.SIGKILL)
    wait_for(lambda: "restart 1 of 3 without progress" in out(run), 20, "the restart")
    assert not set(first) & set(trainers(run))
    wait_for(lambda: trainers(run), 20, "the new trainer")
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 75
    assert trainers(run) == []
