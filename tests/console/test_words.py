"""What is written for people, terminals, pipes and answers."""

import os
import re

import pytest
from papers import PLAN, paper

from training.console import stages
from training.console.progress import ProgressView, line_of
from training.console.questions import ask, confirm, pick, resumable
from training.console.theme import Outlasting, amount, gib, make_console, plain, span
from training.errors import UsageError


def test_figures_are_written_for_people():
    assert (gib(None), gib(1 << 30)) == ("not measured", "1.0 GiB")
    assert (span(61), span(None)) == ("1:01 min", "not measured")
    assert (amount(5e9, "bytes/s"), amount(1 << 31, "bytes")) == ("5.0 GB/s", "2.0 GiB")
    assert plain("a\x1b]0;x\x07\u202eb").plain == "a<U+001B>]0;x<U+0007><U+202E>b"


def test_a_pipe_gets_a_line_for_each_phase_and_no_bar(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 9.0, 9.5, 15.0])
    monkeypatch.setattr("training.console.progress.time.monotonic", lambda: next(clock))
    console, stream = paper()
    with ProgressView(console) as progress:
        progress("load", 0, 0, "")
        progress("train", 1, 10, "loss 3.2")
        progress("train", 2, 10, "loss 3.1")  # 1 s after the last line: not shown
        progress("train", 5, 10, "loss 3.0")
        progress("train", 5, 10, "loss 3.0")
        progress("train", 5, 10, "loss 3.0")  # the same line again: not shown
    assert stream.getvalue().splitlines() == [
        "  loading the model", "  training 1/10, loss 3.2", "  training 5/10, loss 3.0, 8.0 s left",
        "  training 5/10, loss 3.0, 14.0 s left"]


def test_the_time_left_is_not_told_twice():
    assert line_of("train", 1, 2, "loss 1 · 0:10 left", 9.0) == "training 1/2, loss 1 · 0:10 left"


def test_no_color_and_pipes_get_no_escapes(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    console = make_console()
    stages.heading(console, 1, "Plan")
    stages.plan(console, PLAN)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert not re.search(r" \n", shown)


def test_a_reader_that_has_gone_ends_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", buffering=1)
    outlasting = Outlasting(stream)
    outlasting.write("a line\n")
    outlasting.flush()
    assert outlasting.gone
    assert outlasting.write("more\n") == 5
    stream.close()


def answer(monkeypatch, *lines):
    given = iter(lines)

    def read():
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", read)


def test_enter_takes_the_default_and_a_bad_answer_is_asked_again(monkeypatch):
    def digits(text):
        if not text.isdigit():
            raise UsageError(f"{text!r} is no number.")
    console, stream = paper()
    answer(monkeypatch, "", "x", "7")
    assert ask(console, "Epochs", "3", digits) == "3"
    assert ask(console, "Epochs", "3", digits) == "7"
    assert "Epochs [3]: " in stream.getvalue()
    assert "'x' is no number." in stream.getvalue()


def test_the_end_of_input_is_an_error_and_not_an_answer(monkeypatch):
    answer(monkeypatch)
    with pytest.raises(UsageError, match="--auto asks none"):
        ask(paper()[0], "Epochs", "3")


def test_yes_no_and_lists(monkeypatch):
    answer(monkeypatch, "", "maybe", "N", "9", "2", "")
    console, stream = paper()
    assert confirm(console, "Go on?", default=True) is True
    assert confirm(console, "Go on?", default=True) is False
    assert pick(console, "Which", ["a", "b"]) == 1
    run = {"name": "click", "state": "interrupted", "step": 5, "steps": 20, "date": "2026-11-20 10:00:00"}
    assert resumable(console, [run]) is None
    assert "'maybe' is neither yes nor no." in stream.getvalue()
    assert "'9' is not in the list; give 1 to 2" in stream.getvalue()
    assert "1  click: interrupted at step 5 of 20, 2026-11-20 10:00" in stream.getvalue()
