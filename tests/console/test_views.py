"""The views at 80 columns: nothing is cut, nothing acts on a terminal, and a closed pipe ends nothing."""

import dataclasses
import io
import re

import pytest
from papers import PLAN, PROFILE, text_of
from rich.console import Console

from training.console import stages
from training.console.theme import STYLES
from training.records import (
    Choice,
    Memory,
    Range,
    RepositoryFacts,
    Request,
    TierRow,
    Trial,
    TrialStep,
)

SUMMARY = {"state": "done", "verdict": "The loss on held-out files fell from 8.333 to 7.436.",
           "compared": [{"name": "memory", "predicted": "0.29 GiB", "measured": "0.85 GiB", "off": "+189 %"}],
           "quality": [{"name": "held-out loss", "before": "8.333", "after": "7.436", "change": "-0.898",
                        "verdict": "better"}],
           "sample": {"path": "a.py", "prefix": "1\n2\n3\ndef f():\n    ", "before": "[bold]x\x1b[31m",
                      "after": "return 1", "expected": "return 2"},
           "context": "Composed context of 900 tokens lowers the loss by 0.300 (0.250 to 0.350).",
           "model_dir": "/runs/a/model", "report": "/runs/a/report.html",
           "load": ["from transformers import AutoModelForCausalLM",
                    "model = AutoModelForCausalLM.from_pretrained('/runs/a/model')"]}


def test_the_plan_shows_its_decisions_with_their_reasons():
    text = text_of(stages.plan, PLAN)
    assert "Tier 2: windows of 8,192 tokens, 2,048 of them trained on; 120 steps of 2.5 s, 5:00" in text
    assert "By limit: device 2, hours 5." in text
    assert "Device: tier 3 needs 7.1 GiB and 5.0 GiB is free." in text
    assert "48 h granted" not in text
    assert "training.micro_batch 4 measured: two steps took 1.1 GiB, and" in text
    assert "A activations 3.0, B weights 2.0" in text
    assert "training.seed" not in text
    assert "3 more choices" in text
    assert "YaRN" in text


def test_windows_of_which_some_are_trained_on_whole_are_told_so():
    whole = {"dataset.fim_share": Choice(0.0, "derived", "none"),
             "dataset.whole_share": Choice(0.15, "derived", "some")}
    mixed = dataclasses.replace(PLAN, choices=PLAN.choices | whole)
    text = text_of(stages.plan, mixed)
    assert "windows of 8,192 tokens, 2,048 or all of them trained on; 120 steps" in text
    packed = dataclasses.replace(mixed, target_tokens=8192)
    assert "windows of 8,192 tokens, 8,192 of them trained on; 120 steps" in text_of(stages.plan, packed)


TIERS = tuple(TierRow(tier=number, context_tokens=2048 << number, target_tokens=512, step=step,
                      device_bytes=device << 30, host_bytes=2 << 30, disk_bytes=(12 << 30) // 10, step_s=2.0,
                      total_s=3600.0 * number ** 6, fits={"device_memory": device < 6, "host_memory": True,
                                                          "disk": True, "hours": number < 3,
                                                          "repository": True, "model": number < 4})
              for number, step, device in ((1, "plain", 4), (2, "recomputed", 5), (3, "streamed", 3),
                                           (4, "streamed", 7)))
ROOMY = dataclasses.replace(PLAN, tiers=TIERS, room={"device_bytes": 6 << 30, "device_total_bytes": 8 << 30,
                                                     "host_bytes": 4 << 30, "disk_bytes": 90 << 30})


def lines_of(draw, *values, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace", write_through=True)
    draw(Console(file=stream, theme=STYLES, highlight=False, width=width), *values)
    lines = [line.rstrip() for line in raw.getvalue().decode(encoding).split("\n")]
    assert max(map(len, lines)) <= width
    assert "\x1b" not in "".join(lines)
    return lines


def test_memory_is_a_bar_of_its_terms_against_the_limit_and_the_headroom():
    lines = lines_of(stages.plan, ROOMY)
    bar = next(line for line in lines if line.startswith("  Device"))
    drawn, figures = bar[10:].split("  ")
    assert figures == "5.0 of 6.0 GiB"
    assert re.fullmatch(r"A+B+\.*\|/+", drawn)
    width = len(drawn)
    assert drawn.count("A") == round(3 / 8 * width)
    assert drawn.count("B") == round(5 / 8 * width) - round(3 / 8 * width)
    assert drawn.index("|") == round(6 / 8 * width) - 1
    legend = lines[lines.index(bar) + 1]
    assert legend == "          A activations 3.0, B weights 2.0, . free 1.0, / headroom 2.0"
    assert any(line.startswith("  Host    ###") and line.endswith("2.0 of 4.0 GiB") for line in lines)
    assert not any(line.startswith("  Disk") for line in lines)


def test_a_plan_that_does_not_fit_runs_over_the_limit():
    large = {"weights": 2 << 30, "activations": 10 << 30}
    over = dataclasses.replace(ROOMY, memory=Memory(device_bytes=12 << 30, host_bytes=0, disk_bytes=0,
                                                    terms=large))
    bar = next(line for line in lines_of(stages.plan, over) if line.startswith("  Device"))
    assert re.search(r" A+B+  12\.0 of 6\.0 GiB$", bar)


def test_small_terms_are_drawn_together():
    many = {f"t{number}": 1 << 20 for number in range(30)} | {"weights": 4 << 30}
    made = dataclasses.replace(ROOMY, memory=Memory(device_bytes=sum(many.values()), host_bytes=0,
                                                    disk_bytes=0, terms=many))
    assert any("A weights 4.0, B others <0.1" in line for line in lines_of(stages.plan, made))


@pytest.mark.parametrize(("encoding", "yes", "no"), [("utf-8", "✓", "✗"), ("ascii", "ok", "NO")])
def test_every_tier_has_a_verdict_for_each_limit_and_the_chosen_one_is_marked(encoding, yes, no):
    lines = lines_of(stages.plan, ROOMY, encoding=encoding)
    first = next(index for index, line in enumerate(lines) if line.split()[:2] == ["Tier", "Context"])
    words = [line.split() for line in lines[first + 1:first + 5]]
    assert words == [
        ["1", "4,096", "plain", "4.0", yes, "2.0", yes, "1.2", yes, "1.0", yes, yes, yes],
        [">", "2", "8,192", "recomputed", "5.0", yes, "2.0", yes, "1.2", yes, "64.0", yes, yes, yes],
        ["3", "16,384", "streamed", "3.0", yes, "2.0", yes, "1.2", yes, "729", no, yes, yes],
        ["4", "32,768", "streamed", "7.0", no, "2.0", yes, "1.2", yes, "4,096", no, yes, no]]
    assert f"{yes} within its limit, {no}" in " ".join(lines)


def test_a_window_that_is_no_tiers_has_a_row_of_its_own():
    own = dataclasses.replace(ROOMY, tier=1, context_tokens=6000)
    rows = [line.split() for line in lines_of(stages.plan, own) if line.startswith("  >")]
    assert rows == [[">", "1", "6,000", "plain", "5.0", "✓", "2.0", "✓", "1.0", "✓", "<0.1"]]


def test_colours_are_added_and_take_nothing_away():
    stream = io.StringIO()
    console = Console(file=stream, theme=STYLES, highlight=False, width=80, force_terminal=True,
                      color_system="standard")
    stages.plan(console, ROOMY)
    plain_lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).split("\n")
    assert [line.rstrip() for line in plain_lines] == lines_of(stages.plan, ROOMY)
    assert "\x1b[30;46mA" in stream.getvalue()


RANGES = {"device_bytes": Range(low=4 << 30, expected=5 << 30, high=6 << 30, source="measured",
                                why="2 steps"),
          "step_s": Range(low=2.0, expected=2.5, high=90.0, source="measured"),
          "loss": Range(low=0.5, expected=0.75, high=1.25, source="measured")}


def test_estimates_are_a_sentence_before_the_trial_and_a_table_after_it():
    formulas = {"step_s": Range(low=1.0, expected=2.5, high=4.0, source="derived", why="formulas")}
    text = text_of(stages.plan, dataclasses.replace(ROOMY, ranges=formulas))
    assert "Range: a step 1.0 s to 4.0 s (derived: formulas)." in text
    assert "Estimate" not in text
    trial = Trial(load_s=4.0, resident_bytes=1 << 30, evaluation_s=2.0, confirmed=True, steps=(
        TrialStep(context_tokens=1024, target_tokens=512, micro_batch=2, seconds=(1.0, 3.0), update_s=4.5,
                  peak_bytes=3 << 30, loss=1.5),
        TrialStep(context_tokens=8192, target_tokens=512, micro_batch=1, seconds=(), update_s=0.0,
                  peak_bytes=0, error="out of memory at 7.1 GiB")))
    text = text_of(stages.trial, dataclasses.replace(ROOMY, ranges=RANGES, trial=trial))
    assert "1,024 tokens 2 3.0 GiB 2.0 s 4.5 s 1.500 8,192 tokens 1 - - - -" in text
    assert "8,192 tokens: out of memory at 7.1 GiB" in text
    assert "The last step had the planned size; loading took 4.0 s and left 1.0 GiB resident, an " \
           "evaluation 2.0 s." in text
    assert "device memory 4.0 GiB 5.0 GiB 6.0 GiB measured: 2 steps" in text
    assert "a step 2.0 s 2.5 s 1:30 min measured" in text
    assert "loss 0.500 0.750 1.250" in text
    skipped = dataclasses.replace(trial, confirmed=False, skipped="the step at size does not fit")
    text = text_of(stages.trial, dataclasses.replace(ROOMY, trial=skipped))
    assert "No step had the planned size; loading" in text
    assert "Left out: the step at size does not fit" in text
    assert text_of(stages.trial, ROOMY).strip() == ""
    none = Trial(load_s=0.0, resident_bytes=0, steps=(), skipped="training.trial is off.")
    assert text_of(stages.trial, dataclasses.replace(ROOMY, trial=none)).strip() == (
        "Left out: training.trial is off.")
    assert "a step 2.0 s" not in text_of(stages.plan, dataclasses.replace(ROOMY, ranges=RANGES, trial=none))


def test_a_plan_of_the_common_case_fits_one_screen():
    from training import models
    from training.hardware.presets import from_preset
    from training.planning import OptimalConfigCalculator, presets
    from training.planning.outlook import REFERENCE
    machine = from_preset(presets.load("rtx-3090"))
    base = models.registry()["phi-2"]
    made = OptimalConfigCalculator(machine).calculate(Request(repo="/r"), base, REFERENCE)
    shown = lines_of(stages.hardware, machine) + lines_of(stages.plan, made)
    assert len(shown) < 60
    assert sum(line.lstrip().startswith(tuple("123456789>")) for line in shown) >= 11


def outlooks(machines, models_):
    class Row:
        """As planning.outlook makes them."""
    for machine in machines:
        for model in models_:
            row = Row()
            row.__dict__ = {"machine": machine, "model": model, "tier": 7, "context": "256K",
                            "step": "streamed", "device_bytes": 3 << 30, "host_bytes": 2 << 30,
                            "disk_bytes": 1 << 30, "hours": 41.0, "by": ("device_memory", "hours"),
                            "cell": "-" if model == "huge" else "7s 256K 41h",
                            "refused": "This run needs much." if model == "huge" else ""}
            yield row


FACTS = RepositoryFacts(path="a repository of 5 M tokens", name="r", files=1, code_files=1,
                        code_bytes=16_000_000, languages={})


def test_all_machines_and_models_are_one_table_in_blocks():
    names = ["rtx-2060-super", "h100", "c", "d", "e"]
    lines = lines_of(stages.outlook, list(outlooks(names, ["a-model", "huge"])), FACTS, Request(repo="/r"))
    assert lines[0] == "Plans for a repository of 5 M tokens, 16.0 MB, 48 hours"
    assert [line.split() for line in lines if line.startswith("  a-model")] == [
        ["a-model", *["7s", "256K", "41h"] * 4], ["a-model", "7s", "256K", "41h"]]
    assert [line.split() for line in lines if line.startswith("  huge")] == [["huge", *"----"], ["huge", "-"]]


def test_one_machine_is_shown_in_full():
    text = text_of(stages.outlook, list(outlooks(["h100"], ["a-model", "huge"])), FACTS, Request(repo="/r"))
    assert "With h100:" in text
    assert "a-model 7 256K streamed 3.0 2.0 1.0 41.0 device, hours" in text
    assert "huge - no plan fits" in text
    assert "No plan: This run needs much." in text


def test_hardware_says_what_works_and_every_figure_when_asked():
    short = text_of(stages.hardware, PROFILE)
    assert "GPU 0 NVIDIA GeForce RTX 2060, Turing (7.5), 5.0 GiB of 6.0 GiB free fp16 36.0 TFLOP/s" in short
    assert "1 of 2 optimizations work here; not bf16: `doctor` says why." in short
    assert "attention_forward" not in short
    every = text_of(stages.hardware, PROFILE, True)
    assert "gpu0.matmul_fp16 36.0 TFLOP/s 4 %" in every
    assert "Works here: triton." in every
    assert "gpu0.attention_forward not measured no kernel" in every
    assert "bf16 needs Ampere; Use float16." in every


def test_gpus_alike_share_a_row_and_a_description_says_that_it_is_one():
    gpus = tuple(dataclasses.replace(PROFILE.gpus[0], index=index) for index in range(4))
    small = dataclasses.replace(gpus[0], index=4, free_bytes=1 << 30)
    text = text_of(stages.hardware, dataclasses.replace(PROFILE, gpus=(*gpus, small), source="preset"))
    assert "GPU 0-3 NVIDIA" in text
    assert "GPU 4 NVIDIA" in text
    assert "Described, not measured: a machine." in text


def test_the_last_table_shows_before_beside_after_and_how_to_load_the_model():
    text = text_of(stages.result, SUMMARY)
    assert "memory 0.29 GiB 0.85 GiB +189 %" in text
    assert "held-out loss 8.333 7.436 -0.898 better" in text
    assert "Composed context of 900 tokens lowers the loss by 0.300 (0.250 to 0.350)." in text
    assert "... 2 3 def f():" in text or "... 3 def f():" in text
    assert "before [bold]x<U+001B>[31m after return 1 expected return 2" in text
    assert "model = AutoModelForCausalLM.from_pretrained('/runs/a/model')" in text


def test_opening_configuration_dataset_and_runs_fit_too():
    facts = RepositoryFacts(path="/src/" + "deep/" * 12, name="click", files=40, code_files=35,
                            code_bytes=450_000,
                            languages={"python": 440_000, "markdown": 10_000})
    assert "35 of 40 files accepted, 0.45 MB; python 98 %, markdown 2 %." in text_of(
        stages.opening, facts, Request(repo="/src", output="runs/click"))
    two = Request(repo="/src", output="runs/click", settings={"dataset.also": ["/a"]})
    assert "click and 1 more repository: 35 of 40" in text_of(
        stages.opening, dataclasses.replace(facts, path="/src/click"), two)
    manifest = {"files": {"seen": 40, "accepted": 35, "dropped": {"binary": 5}}, "tokens": {"total": 1000},
                "windows": {"train": 9, "held_out": 1}, "secrets_replaced": 2,
                "dependency_coverage": {"512": 0.25}}
    text = text_of(stages.dataset, manifest)
    assert "Left out: 5 binary." in text
    assert "25 % within 512" in text
    assert "Replaced before training: 2 secrets." in text
    info = {"name": "click", "state": "interrupted", "step": 5, "steps": 20, "loss": None, "tier": 1,
            "base_model": "phi-2", "date": "2026-11-20 10:00:00"}
    assert "click interrupted 5/20 1 phi-2 2026-11-20 10:00" in text_of(stages.runs, [info], "/runs")
    assert "No runs in /runs." in text_of(stages.runs, [], "/runs")
