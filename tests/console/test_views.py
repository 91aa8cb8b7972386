"""The views at 80 columns: nothing is cut, nothing acts on a terminal, and a closed pipe ends nothing."""

import io
import os
import re

import pytest
from rich.console import Console

from training.console import stages
from training.console.progress import ProgressView, line_of
from training.console.questions import ask, confirm, pick, resumable
from training.console.theme import STYLES, Outlasting, amount, gib, make_console, plain, span
from training.errors import UsageError
from training.records import (
    Choice,
    Figure,
    Gpu,
    HardwareProfile,
    Limit,
    Memory,
    Plan,
    RepositoryFacts,
    Request,
    Support,
)


def paper(width=80):
    stream = io.StringIO()
    return Console(file=Outlasting(stream), theme=STYLES, highlight=False, width=width), stream


def text_of(draw, *values, width=80):
    console, stream = paper(width)
    draw(console, *values)
    text = stream.getvalue()
    assert max(map(len, text.split("\n"))) <= width
    return re.sub(r"\s+", " ", text)


PROFILE = HardwareProfile(
    name="a machine", source="measured", date="2026-11-20", system="Linux", cpu_name="AMD EPYC", cpu_cores=2,
    cpu_flags=("avx2", "sse"), ram_total_bytes=8 << 30, ram_available_bytes=6 << 30,
    gpus=(Gpu(index=0, name="NVIDIA GeForce RTX 2060", architecture="Turing", capability="7.5",
              total_bytes=6 << 30, free_bytes=5 << 30),),
    disk_path="/a/very/long/path/" + "x" * 60, disk_free_bytes=90 << 30,
    figures={"gpu0.matmul_fp16": Figure(value=3.6e13, unit="FLOP/s", method="torch matmul, n=4096", repeats=7,
                                        spread=0.04),
             "gpu0.attention_forward": Figure(value=None, unit="FLOP/s", method="no kernel")},
    supports={"bf16": Support(works=False, why="needs Ampere", what_to_do="Use float16."),
              "triton": Support(works=True, why="")})
PLAN = Plan(
    tier=2, context_tokens=8192, target_tokens=2048, base_model="phi-2", steps=120, step_s=2.5, total_s=300.0,
    choices={"model.base": Choice("microsoft/phi-2", "user", "asked for"),
             "lora.rank": Choice(32, "preset", "tier 2"),
             "training.seed": Choice(1, "preset", "not shown"),
             "training.micro_batch": Choice(4, "measured", "two steps took 1.1 GiB, and 5.0 GiB is free")},
    memory=Memory(device_bytes=5 << 30, host_bytes=2 << 30, disk_bytes=1 << 30,
                  terms={"weights": 2 << 30, "activations": 3 << 30, "nothing": 0}),
    limits={"device_memory": Limit(tier=2, why="tier 3 needs 7.1 GiB and 5.0 GiB is free"),
            "hours": Limit(tier=5, why="48 h granted")},
    notes=("RoPE is scaled by 4 (YaRN), because the context exceeds the model's own 2,048.",))
SUMMARY = {"state": "done", "verdict": "The loss on held-out files fell from 8.333 to 7.436.",
           "compared": [{"name": "memory", "predicted": "0.29 GiB", "measured": "0.85 GiB", "off": "+189 %"}],
           "quality": [{"name": "held-out loss", "before": "8.333", "after": "7.436", "change": "-0.898",
                        "verdict": "better"}],
           "sample": {"path": "a.py", "prefix": "1\n2\n3\ndef f():\n    ", "before": "[bold]x\x1b[31m",
                      "after": "return 1", "expected": "return 2"},
           "model_dir": "/runs/a/model", "report": "/runs/a/report.html",
           "load": ["from transformers import AutoModelForCausalLM",
                    "model = AutoModelForCausalLM.from_pretrained('/runs/a/model')"]}


def test_the_plan_shows_its_decisions_with_their_reasons():
    text = text_of(stages.plan, PLAN)
    assert "Tier 2: windows of 8,192 tokens, 2,048 of them trained on; 120 steps of 2.5 s, 5:00" in text
    assert "device memory tier 2 tier 3 needs 7.1 GiB and 5.0 GiB is free" in text
    assert "model.base microsoft/phi-2 user: asked for" in text
    assert "training.micro_batch 4 measured: two steps took 1.1 GiB, and" in text
    assert "activations 3.0 GiB, weights 2.0 GiB" in text
    assert "training.seed" not in text
    assert "1 more choices" in text
    assert "YaRN" in text


def test_hardware_says_what_works_and_every_figure_when_asked():
    short = text_of(stages.hardware, PROFILE)
    assert "GPU 0 NVIDIA GeForce RTX 2060, Turing (7.5), 5.0 GiB of 6.0 GiB free" in short
    assert "gpu0.matmul_fp16 36.0 TFLOP/s 4 %" in short
    assert "Works here: triton." in short
    assert "attention_forward" not in short
    every = text_of(stages.hardware, PROFILE, True)
    assert "gpu0.attention_forward not measured no kernel" in every
    assert "bf16 needs Ampere; Use float16." in every


def test_the_last_table_shows_before_beside_after_and_how_to_load_the_model():
    text = text_of(stages.result, SUMMARY)
    assert "memory 0.29 GiB 0.85 GiB +189 %" in text
    assert "held-out loss 8.333 7.436 -0.898 better" in text
    assert "... 2 3 def f():" in text or "... 3 def f():" in text
    assert "before [bold]x<U+001B>[31m after return 1 expected return 2" in text
    assert "model = AutoModelForCausalLM.from_pretrained('/runs/a/model')" in text


def test_opening_configuration_dataset_and_runs_fit_too():
    facts = RepositoryFacts(path="/src/" + "deep/" * 12, name="click", files=40, code_files=35,
                            code_bytes=450_000,
                            languages={"python": 440_000, "markdown": 10_000})
    assert "35 of 40 files accepted, 0.45 MB; python 98 %, markdown 2 %." in text_of(
        stages.opening, facts, Request(repo="/src", output="runs/click"))
    manifest = {"files": {"seen": 40, "accepted": 35, "dropped": {"binary": 5}}, "tokens": {"total": 1000},
                "windows": {"train": 9, "held_out": 1}, "secrets_replaced": 2,
                "dependency_coverage": {"512": 0.25}}
    text = text_of(stages.dataset, manifest)
    assert "Left out: 5 binary." in text
    assert "25 % at 512" in text
    assert "Secrets replaced before training: 2." in text
    info = {"name": "click", "state": "interrupted", "step": 5, "steps": 20, "loss": None, "tier": 1,
            "base_model": "phi-2", "date": "2026-11-20 10:00:00"}
    assert "click interrupted 5/20 1 phi-2 2026-11-20 10:00" in text_of(stages.runs, [info], "/runs")
    assert "No runs in /runs." in text_of(stages.runs, [], "/runs")


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
