"""The lock of a run directory."""

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from training.errors import CannotWrite
from training.manager import lock


def test_it_is_free_again_after_release_and_needs_no_cleaning(tmp_path):
    first = lock.RunLock(tmp_path)
    first.take()
    assert lock.held(tmp_path)
    with pytest.raises(CannotWrite, match=f"in use by process {os.getpid()}"):
        lock.RunLock(tmp_path).take()
    first.release()
    assert not lock.held(tmp_path)
    lock.RunLock(tmp_path).take()


def test_a_lock_file_left_by_a_dead_process_is_no_lock(tmp_path):
    (tmp_path / lock.NAME).write_text(json.dumps({"pid": 1, "started": 0}))
    assert not lock.held(tmp_path)
    assert lock.holder(tmp_path / lock.NAME) is None, "process 1 lives, but it is not the one that wrote this"
    lock.RunLock(tmp_path).take()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\0\0"])
def test_a_torn_lock_file_is_no_lock(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    assert lock.holder(tmp_path / lock.NAME) is None
    lock.RunLock(tmp_path).take()


def test_a_trainer_that_outlived_its_command_is_waited_for(tmp_path):
    first = lock.RunLock(tmp_path)
    first.take()
    heir = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.2)"], pass_fds=(first.handle,))
    first.release()
    (tmp_path / lock.NAME).write_text("")
    began = time.monotonic()
    with pytest.raises(CannotWrite, match="a trainer without a command"):
        lock.RunLock(tmp_path).take(patience_s=0.6)
    lock.RunLock(tmp_path).take(patience_s=10)
    assert time.monotonic() - began > 1
    assert heir.wait() == 0


def test_a_trainers_own_lock_counts(tmp_path):
    with (tmp_path / lock.TRAINER_NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock.held(tmp_path)
        with pytest.raises(CannotWrite, match="a trainer without a command"):
            lock.RunLock(tmp_path).take(patience_s=0.1)
    lock.RunLock(tmp_path).take(patience_s=0.1)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("keep")
    (tmp_path / lock.NAME).symlink_to(target)
    with pytest.raises(CannotWrite):
        lock.RunLock(tmp_path).take()
    assert target.read_text() == "keep"


def test_the_lock_does_not_leak_into_other_children(tmp_path):
    guard = lock.RunLock(tmp_path)
    guard.take()
    child = subprocess.Popen(["sleep", "5"])
    guard.release()
    assert not lock.held(tmp_path)
    child.kill()
    child.wait()
