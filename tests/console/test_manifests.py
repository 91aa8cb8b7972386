"""The dataset's screens: the short one of the chain, the whole account of `dataset`, sample windows."""

import copy
import io
import re

import pytest
from rich.console import Console

from training.console import stages
from training.console.progress import Pace, ProgressView
from training.console.theme import STYLES, Outlasting

MANIFEST = {
    "files": {"seen": 1912, "accepted": 1758, "train": 1670, "held_out": 88,
              "dropped": {"ignored by rule": 96, "duplicate": 31, "generated": 12, "over 9 bytes": 3,
                          "not UTF-8": 2},
              "examples": {"duplicate": ["vendor/six.py"], "generated": ["a_pb2.py", "b_pb2.py"]}},
    "languages": {"c": 3_000_000, "python": 25_800_000},
    "tokens": {"total": 8_650_000, "held_out": 430_000, "trained_per_epoch": 8_200_000, "rejected": 20_000,
               "lost": 0},
    "windows": {"train": 10_300, "held_out": 420},
    "kinds": {"cross-file": {"windows": 9800, "target_tokens": 6_150_000, "tokens": 40_000_000},
              "whole": {"windows": 500, "target_tokens": 2_050_000, "tokens": 2_040_000}},
    "packing": {"waste": 0.0036}, "split": {"by": "time", "why": "the newest 5 %", "near_duplicates": 3},
    "leakage": 0.031, "dependency_coverage": {"1024": 0.12, "16384": 0.7, "4096": 0.37},
    "secrets_replaced": 3, "personal_replaced": 12,
    "replaced_by_rule": {"aws-access-key": 3, "personal-email": 12},
    "commits": {"used": 312, "skipped": {"lock file": 9}},
    "repositories": [{"named": "https://example.org/click.git", "commit": "0123456789abcdef"},
                     {"named": "/src/mine", "commit": ""}],
    "selftest": {"files": 16, "bits_per_byte": {"none": 1.664, "composed": 1.373}},
    "notes": ["12,300 tokens of code in 14 files. Expect little."]}
CONTEXT = "".join(f"line {number}\n" for number in range(100))
SAMPLES = [{"index": 5, "kind": "cross-file", "path": "app/a.py", "tokens": 1000, "target_tokens": 200,
            "pieces": [{"text": CONTEXT, "trained": False},
                       {"text": "class A:\n\tx = '\x1b[31m'\n", "trained": True}]},
           {"index": 9, "kind": "fim", "path": "app/b.py", "tokens": 40, "target_tokens": 8,
            "pieces": [{"text": "def f(x):\n    return ", "trained": False},
                       {"text": "x + 1", "trained": True}, {"text": "\n", "trained": False}]}]


def lines_of(draw, *values, width=80, **terminal):
    stream = io.StringIO()
    draw(Console(file=Outlasting(stream), theme=STYLES, highlight=False, width=width, **terminal), *values)
    lines = stream.getvalue().split("\n")
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= width
    return lines


def text_of(*values):
    return re.sub(r"\s+", " ", " ".join(lines_of(*values)))


def test_the_chains_screen_is_short_and_says_what_was_left_out():
    lines = lines_of(stages.dataset, MANIFEST)
    assert len(lines) <= 12
    text = re.sub(r"\s+", " ", " ".join(lines))
    assert "1,758 of 1,912 files; 8,650,000 tokens, 8,200,000 trained on in an epoch; 10,300 windows" in text
    assert "Trained tokens: 75 % cross-file, 25 % whole." in text
    assert ("Left out: 96 ignored by rule, 31 duplicate, 12 generated, 3 over 9 bytes, 2 for other "
            "reasons.") in text
    assert "12 % within 1,024, 37 % within 4,096, 70 % within 16,384." in text
    assert "Replaced before training: 3 secrets, 12 personal data." in text
    assert "Expect little." in text


def test_the_whole_account_has_each_reason_with_examples_and_what_to_do():
    text = text_of(stages.manifest, MANIFEST, {"generated": "Take the mark out."}.get)
    assert "https://example.org/click.git, commit 0123456789ab /src/mine, not in git" in text
    assert "1,758 of 1,912 files accepted: 1,670 to train on, 88 held out." in text
    assert "duplicate 31 vendor/six.py generated 12 a_pb2.py, b_pb2.py Take the mark out. over 9" in text
    assert "Text 28.8 MB: python 90 %, c 10 %" in text
    assert ("8,650,000 = 8,200,000 trained on in an epoch + 430,000 held out + 20,000 in windows of a single "
            "token, left out + 0 lost") in text
    assert "cross-file 9,800 6,150,000 75 % 4,082 whole 500 2,050,000 25 % 4,080" in text
    assert "Besides: 420 windows held out, packing leaves 0.36 % of full windows empty." in text
    assert "by time: the newest 5 %; 3 near duplicates kept on their side; 3.1 % of its 13-token runs" in text
    assert "3 secrets, 12 personal data (12 personal-email, 3 aws-access-key), each by a placeholder" in text
    assert "312 changes to files used; left out: 9 lock file" in text
    assert "composed 1.373, none 1.664" in text


@pytest.mark.parametrize("lacking", [*MANIFEST, None])
def test_what_a_manifest_lacks_is_left_out(lacking):
    found = copy.deepcopy(MANIFEST)
    found.pop(lacking, None)
    for each in (found, {} if lacking is None else found):
        lines_of(stages.dataset, each)
        lines_of(stages.manifest, each, lambda reason: "")
    assert "no secrets found" in text_of(stages.manifest, {}, lambda reason: "")


def test_a_pipe_gets_marks_in_the_margin_and_a_long_context_is_shortened():
    lines = [line.rstrip() for line in lines_of(stages.windows, SAMPLES)]
    first = lines.index("  Window 5: cross-file, app/a.py, 1,000 tokens, 200 of them trained on")
    assert lines[first + 1:first + 6] == ["  . line 0", "  . line 1", "  . line 2", "  . line 3",
                                          "  . ... about 707 tokens ..."]   # 698 of 790 characters, 800
    assert lines[first + 6] == "  . line 92"
    assert lines[first + 13:first + 16] == ["  . line 99", "  > class A:", "  >     x = '<U+001B>[31m'"]
    second = next(index for index, line in enumerate(lines) if line.startswith("  Window 9: fim"))
    assert lines[second + 1:second + 4] == ["  . def f(x):", "  .     return", "  > x + 1"]


def test_a_terminal_gets_colours_and_no_marks_and_no_color_takes_them_away():
    coloured = lines_of(stages.windows, SAMPLES, force_terminal=True, color_system="standard")
    assert any(re.match(r"  \x1b\[32mclass A:\x1b\[0m", line) for line in coloured)
    assert any(re.match(r"  \x1b\[2mline 0\x1b\[0m", line) for line in coloured)
    assert not any(line.startswith(("  .", "  >")) for line in coloured)
    plain = lines_of(stages.windows, SAMPLES, force_terminal=True, no_color=True)
    assert "  > class A:" in [line.rstrip() for line in plain]


def test_reading_is_told_with_files_and_megabytes_a_second(monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("training.console.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with ProgressView(Console(file=Outlasting(stream), width=80)) as progress:
        progress("read", 0, 1758, "0 files, 0.0 MB")
        progress("read", 600, 1758, "600 files, 12.0 MB")
        progress("tokenizer", 0, 1, "")
    assert stream.getvalue().splitlines() == [
        "  reading 0 %, 0 files, 0.0 MB",
        "  reading 34 %, 600 files (60/s), 12.0 MB (1.2/s), 19.3 s left",
        "  making the tokenizer"]


def test_a_rate_needs_a_second_and_other_phases_get_none(monkeypatch):
    assert Pace(5.0).rated("600 files, 12.0 MB", 5.9) == "600 files, 12.0 MB"
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("training.console.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with ProgressView(Console(file=Outlasting(stream), width=80)) as progress:
        progress("trial", 0, 3, "1,024 tokens")
        progress("trial", 1, 3, "1,024 tokens")
    assert stream.getvalue().splitlines()[-1] == "  trial 1/3, 1,024 tokens, 20.0 s left"


def test_a_window_of_many_stretches_is_cut_short_and_says_so():
    pieces = [{"text": f"piece {number}\n" * 3, "trained": number % 2 == 1} for number in range(20)]
    lines = lines_of(stages.windows, [{"index": 1, "tokens": 40, "target_tokens": 20, "pieces": pieces}])
    assert "  . piece 0" in lines
    assert "  > piece 11" in lines
    assert "  . piece 12" not in lines
    assert "  ... and 8 more stretches of context and target." in [line.rstrip() for line in lines]


def test_a_second_repositorys_files_have_a_rate_of_their_own(monkeypatch):
    clock = iter([0.0, 100.0, 101.0, 103.0])
    monkeypatch.setattr("training.console.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with ProgressView(Console(file=Outlasting(stream), width=80)) as progress:
        for done in (0, 600, 0, 300):
            progress("read", done, 600, f"{done} files, {done / 100:.1f} MB")
    assert stream.getvalue().splitlines() == ["  reading 0 %, 0 files, 0.0 MB",
                                              "  reading 100 %, 600 files (6.0/s), 6.0 MB (0.1/s)"]
    assert progress.pace.began_s == 101.0
