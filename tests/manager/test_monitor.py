"""Reading a running trainer's files: torn lines, restarts, speed, time left, and silence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.manager import monitor
from training.manager.monitor import Monitor, Tail, Update
from training.rundir import RunDirectory

# Two lines as the trainer writes them.
ROWS = """\
{"step": 1, "epoch": 0.1, "loss": 8.31, "lr": 0.0002, "grad_norm": 2.0, "tokens": 4096, \
"tokens_per_s": 1024.0, "device_bytes": 700000000, "host_bytes": 700000000, "time": 1795224168.7}
{"step": 2, "epoch": 0.2, "loss": 7.02, "lr": 0.0003, "grad_norm": 1.5, "tokens": 4096, \
"tokens_per_s": 2048.0, "device_bytes": 1288490189, "host_bytes": 700000000, "time": 1795224170.7}
"""


def beat(run, **fields):
    run.heartbeat.write_text(json.dumps({"pid": 1, "phase": "train", "step": 2, "steps": 102, "done": 0,
                                         "total": 0, "detail": "", "time": 1.0, **fields}))


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_line_is_read_once_and_only_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    first, second = ROWS.splitlines(keepends=True)
    path.write_text(first + second[:40])
    assert [row["step"] for row in tail.read()[1]] == [1]
    assert tail.read() == (False, [])
    path.write_text(first + second)
    assert [row["step"] for row in tail.read()[1]] == [2]


def test_a_file_that_a_resume_cut_is_read_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(ROWS)
    tail = Tail(path)
    tail.read()
    path.write_text(ROWS.splitlines(keepends=True)[0])
    restarted, rows = tail.read()
    assert restarted
    assert [row["step"] for row in rows] == [1]


@given(st.binary(max_size=300))
def test_no_bytes_make_the_reader_fail(data):
    text = data.decode("utf-8", errors="replace")
    assert all(isinstance(row, dict) for row in monitor.parse_lines(text))
    monitor.describe(monitor.parse_lines(text), 5)
    monitor.parse_heartbeat(text)


@given(st.dictionaries(st.sampled_from(["phase", "step", "steps", "time", "tokens", "tokens_per_s", "loss"]),
                       st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)))
def test_no_values_make_the_reader_fail(row):
    assert isinstance(monitor.describe([row, row], 5), str)
    assert isinstance(monitor.parse_heartbeat(json.dumps(row)), monitor.Heartbeat | None)


def test_the_line_shows_loss_speed_memory_and_time_left():
    rows = monitor.parse_lines(ROWS)
    assert monitor.describe(rows, 102) == "loss 7.02 · 1,365 tokens/s · 1.2 GiB · 5:00 left"


def test_a_pause_between_two_attempts_does_not_slow_the_shown_speed():
    rows = monitor.parse_lines(ROWS)
    rows[1]["time"] += 7 * 86400
    assert monitor.speed(rows) == (8192 / 6, 3.0)


def test_a_loss_that_is_not_finite_is_said():
    assert monitor.describe([{"step": 1, "loss": None}], 2) == "loss is not finite"


def test_phases_come_from_the_heartbeat_and_steps_from_the_newest_line(tmp_path):
    run = RunDirectory(tmp_path)
    watch = Monitor(run)
    assert watch.poll() == Update("start", 0, 0, "")
    beat(run, phase="evaluate_before", done=3, total=32, detail="windows")
    assert watch.poll() == Update("evaluate_before", 3, 32, "windows")
    beat(run, step=1)
    run.metrics.write_text(ROWS)
    assert watch.poll() == Update("train", 2, 102, "loss 7.02 · 1,365 tokens/s · 1.2 GiB · 5:00 left")
    beat(run, phase="save", detail="checkpoint-2")
    assert watch.poll() == Update("train", 2, 102, "saving checkpoint-2"), "a part of the training"
    beat(run, phase="evaluate", done=1, total=8, detail="windows")
    assert watch.poll() == Update("train", 2, 102, "evaluating"), "a part of it, too"
    run.heartbeat.write_text('{"phase": "tr')
    assert watch.poll().done == 2, "a torn heartbeat leaves the last one"


def pass_by(watch, clock, seconds):
    """Looked at every five seconds; what is told at the end."""
    for _ in range(int(seconds // 5)):
        clock.now_s += 5
        detail = watch.poll().detail
    return detail


def learned(run, watch, step_s, steps=6):
    """Rows of steps that took so long, and a heartbeat in between."""
    slow = json.loads(ROWS.splitlines()[0]) | {"tokens": 4096, "tokens_per_s": 4096 / step_s}
    run.metrics.write_text("".join(json.dumps(slow | {"step": step}) + "\n" for step in range(steps)))
    beat(run)
    watch.poll()


def test_silence_is_told_at_half_its_limit_and_forgotten_with_the_next_sign(tmp_path):
    run, clock = RunDirectory(tmp_path), Clock()
    watch = Monitor(run, clock)
    beat(run, phase="import")
    watch.poll()
    assert "no sign of life" not in pass_by(watch, clock, 295)
    assert pass_by(watch, clock, 10) == "no sign of life for 5:05; started again at 10:00"
    beat(run, phase="import", time=2.0)
    assert "no sign of life" not in watch.poll().detail
    assert not watch.hung


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.5, 60), (6, 60), (30, 300), (300, 3000)])
def test_while_it_trains_the_limit_is_learned_from_the_steps(tmp_path, step_s, limit_s):
    """Ten times the median step, and a minute at least: steps of ten times the usual time are no hang."""
    run, clock = RunDirectory(tmp_path), Clock()
    watch = Monitor(run, clock)
    learned(run, watch, step_s)
    pass_by(watch, clock, limit_s)
    assert not watch.hung
    pass_by(watch, clock, 5)
    assert watch.hung


def test_before_that_it_goes_by_the_phase_and_the_planned_step(tmp_path):
    run, clock = RunDirectory(tmp_path), Clock()
    watch = Monitor(run, clock, planned_step_s=200.0)
    assert watch.limit_s == 4000
    beat(run, phase="train")
    watch.poll()
    assert watch.limit_s == 4000
    assert Monitor(run, clock).limit_s == 600
    beat(run, phase="compile_ops", detail="cpu_adam")
    other = Monitor(run, clock)
    assert other.poll().detail == "cpu_adam"
    assert other.limit_s == 1800


def test_time_in_which_the_command_itself_was_stopped_does_not_count(tmp_path):
    """As when a laptop sleeps: the trainer was stopped with it."""
    run, clock = RunDirectory(tmp_path), Clock()
    watch = Monitor(run, clock)
    learned(run, watch, 1.0)
    pass_by(watch, clock, 55)
    clock.now_s += 86_400
    assert "no sign of life" not in watch.poll().detail
    pass_by(watch, clock, 60)
    assert not watch.hung
    watch.awake()
    pass_by(watch, clock, 60)
    assert not watch.hung
    pass_by(watch, clock, 5)
    assert watch.hung


def test_steps_of_an_earlier_session_say_nothing_of_the_first_ones_of_this(tmp_path):
    """A first step compiles and warms up: five of this session's own are waited for."""
    run, clock = RunDirectory(tmp_path), Clock()
    run.metrics.write_text(ROWS * 10)
    watch = Monitor(run, clock)
    beat(run)
    assert watch.poll().detail.startswith("loss 7.02")
    assert watch.limit_s == 1800
    run.metrics.write_text(ROWS * 4)  # rewound to a checkpoint
    watch.poll()
    assert watch.limit_s == 1800
    with run.metrics.open("a") as file:
        file.write(ROWS * 3)
    watch.poll()
    assert watch.limit_s == 60
