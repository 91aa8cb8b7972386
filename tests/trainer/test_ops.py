import sys
import threading
import time

import psutil
import pytest

from training.errors import Interrupted
from training.trainer import ops


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The place where torch would build the op."""
    place = tmp_path / "cpu_adam"
    place.mkdir()
    monkeypatch.setattr("torch.utils.cpp_extension._get_build_directory", lambda name, verbose: str(place))
    return place


def quiet(detail):
    pass


def test_torchs_lock_that_a_killed_build_left_is_removed(folder, monkeypatch):
    (folder / "lock").touch()
    monkeypatch.setattr(ops, "_run", lambda tell, start: 0)
    ops.prepare_cpu_adam(quiet)
    assert not (folder / "lock").exists()


def test_a_built_op_is_not_built_again(folder, monkeypatch):
    (folder / "cpu_adam.so").touch()
    (folder / "build.ninja").write_text("rule touch\n  command = touch $out\nbuild cpu_adam.so: touch\n")
    monkeypatch.setattr(ops, "_run", lambda tell, start: pytest.fail("built again"))
    assert not ops._is_current(folder)  # ninja has not recorded it
    monkeypatch.setattr(ops, "_is_current", lambda folder: True)
    ops.prepare_cpu_adam(quiet)


def test_a_library_without_its_objects_is_not_current(folder):
    (folder / "cpu_adam.so").touch()
    (folder / "a.cpp").touch()
    (folder / "build.ninja").write_text("rule copy\n  command = cp $in $out\nbuild a.o: copy a.cpp\n"
                                        "build cpu_adam.so: copy a.o\n")
    assert not ops._is_current(folder)


def test_only_one_process_builds_and_the_other_waits(folder, monkeypatch):
    order = []

    def build(tell, start):
        order.append("begin")
        time.sleep(0.3)
        order.append("end")
        (folder / "cpu_adam.so").touch()
        return 0

    monkeypatch.setattr(ops, "_run", build)
    monkeypatch.setattr(ops, "_is_current", lambda folder: (folder / "cpu_adam.so").exists())
    threads = [threading.Thread(target=ops.prepare_cpu_adam, args=(quiet,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["begin", "end"]


def test_a_stop_ends_the_compiler_with_all_its_children(monkeypatch):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    monkeypatch.setattr(ops, "BUILD", code)
    begin = time.monotonic()
    before = set(psutil.Process().children(recursive=True))  # such as the resource tracker of multiprocessing

    def stop_when_it_runs(detail):
        if any(child.children() for child in set(psutil.Process().children()) - before):
            raise Interrupted("Stopped by SIGTERM.")
        assert time.monotonic() - begin < 30

    with pytest.raises(Interrupted):
        ops._run(stop_when_it_runs, begin)
    children = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in children if p.name().startswith(sys.executable[-6:])]


def test_the_wait_is_told_in_seconds(monkeypatch):
    monkeypatch.setattr(ops, "BUILD", "import time; time.sleep(0.4)")
    told = []
    assert ops._run(told.append, time.monotonic()) == 0
    assert told[0] == "compiling DeepSpeed's CPU Adam, 0 s"
