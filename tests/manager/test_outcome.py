"""What an end means: exit codes, signals, the log's tail."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import make_run

from training.errors import DoesNotFit, EliteError, Interrupted, MissingInput, StoppedByUser
from training.manager import group, outcome
from training.manager.outcome import Ending, conclude


def test_the_tail_is_this_attempts_last_lines_without_escapes(tmp_path):
    log = tmp_path / "train.log"
    log.write_bytes(b"old attempt\n")
    offset = log.stat().st_size
    with log.open("ab") as file:
        file.write(b"10%\r55%\r100%\n\n\x1b[31mred\x1b[0m \x1b]0;title\x07end\n\xff\xfe\x00bad\n")
    assert outcome.log_tail(log, offset) == ["100%", "red end", "\ufffd\ufffdbad"]
    assert outcome.log_tail(log, offset, 1) == ["\ufffd\ufffdbad"]
    assert outcome.log_tail(tmp_path / "absent") == []


def test_a_long_log_is_read_from_its_end_only(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("x" * 200_000 + "\nlast\n")
    assert outcome.log_tail(log, 0, 1) == ["last"]


@pytest.mark.parametrize(("ending", "error", "says"), [
    (Ending(returncode=-2, asked="SIGINT"), StoppedByUser, "Stopped by Ctrl+C before the first step."),
    (Ending(returncode=-15, asked="SIGTERM"), Interrupted, "Stopped by SIGTERM"),
    (Ending(returncode=1, asked="SIGINT", forced=True), StoppedByUser, "Stopped by Ctrl+C"),
    (Ending(returncode=1, asked="SIGINT"), EliteError, "ended with code 1"),
    (Ending(returncode=247), Interrupted, "with SIGKILL"),
    (Ending(returncode=247, oom_kills=1), DoesNotFit, "memory (RAM) ran out"),
    (Ending(returncode=-7), EliteError, "ended with SIGBUS"),
    (Ending(returncode=2), EliteError, "ended with code 2"),
    (Ending(returncode=66), MissingInput, "ended with code 66"),
    (Ending(returncode=0, asked="SIGINT"), EliteError, "left no valid result.json"),
])
def test_an_end_without_a_result(tmp_path, ending, error, says):
    run = make_run(tmp_path / "run")
    result, found = conclude(run, ending)
    assert type(found) is error
    assert says in str(found)
    assert "from the beginning (no checkpoint was saved)" in str(found)
    assert result.exit_code == error.exit_code
    assert result.memory["predicted_bytes"] == 1 << 28


@pytest.mark.parametrize(("line", "error"), [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has", DoesNotFit),
    ("RuntimeError: alloc_cpu.cpp:121 DefaultCPUAllocator: can't allocate memory", DoesNotFit),
    ("MemoryError", DoesNotFit),
    ("ModuleNotFoundError: No module named 'peft'", MissingInput),
    ("The server socket has failed to listen (errno: 98 - Address already in use).", Interrupted),
    ("OSError: [Errno 24] Too many open files: 'x'", EliteError),
])
def test_known_last_words_have_a_class_and_a_way_out(tmp_path, line, error):
    run = make_run(tmp_path / "run")
    run.log.write_text(f"Traceback (most recent call last):\n{line}\n")
    _, found = conclude(run, Ending(returncode=1))
    assert type(found) is error
    assert line in str(found), "the log's end is shown"


def test_a_done_result_needs_its_model_and_digest(tmp_path):
    run = make_run(tmp_path / "run")
    good = ('{"state": "done", "steps": 1, "epochs": 1, "tokens_trained": 1, "seconds": 1, "tier": 1,'
            '"context_tokens": 1, "memory": {}, "time": {}, "quality": {}, "model_dir": "model",'
            '"digest": "ab"}')
    run.result.write_text(good)
    assert outcome.read_result(run) is None
    (run.path / "model").mkdir()
    assert outcome.read_result(run).state == "done"
    run.result.write_text(good.replace('"ab"', '""'))
    assert outcome.read_result(run) is None
    run.result.write_text(good.replace('"done"', '"finished"'))
    assert outcome.read_result(run) is None


def test_kills_for_memory_are_counted_where_the_kernel_tells_them(tmp_path):
    events, vmstat = tmp_path / "memory.events", tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 8\noom_kill 7\n")
    assert group.oom_kills((events, vmstat)) == 7
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert group.oom_kills((events, vmstat)) == 2
    assert group.oom_kills((tmp_path / "a",)) == 0
