"""How a command ends: one line a problem, the right exit code, one JSON document."""

import json
import re
from pathlib import Path

import pytest

import elite_train
from training.command.ending import guarded
from training.errors import CannotWrite, DataError, MissingInput, Problems, UsageError


def raising(error):
    def act(session):
        raise error
    return act


@pytest.mark.parametrize(("error", "code", "said"), [
    (UsageError("a"), 2, "a\n"),
    (Problems([DataError("b"), CannotWrite("c")]), 65, "b\nc\n"),
    (MissingInput("No \x1b]8;;http://x\x07file\u202e.py"), 66, "No <U+001B>]8;;http://x<U+0007>file<U+202E>.py\n"),
    (KeyboardInterrupt(), 130, "Stopped by Ctrl+C. Nothing was written.\n"),
    (BrokenPipeError(), 0, ""),
])
def test_each_ending_has_its_code_and_its_lines(error, code, said, capfd):
    assert guarded(raising(error), ["elite_train.py"]) == code
    assert capfd.readouterr().err == said


def test_json_gives_one_document_on_errors_too(capsys):
    assert guarded(raising(Problems([UsageError("a"), MissingInput("b")])), ["elite_train.py", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "a\nb", "exit_code": 2, "problems": ["a", "b"]}
    assert shown.err == "a\nb\n"


def test_ctrl_c_says_what_is_kept(tmp_path, capsys):
    def act(session):
        session.run = tmp_path
        raise KeyboardInterrupt
    assert guarded(act, ["elite_train.py"]) == 130
    said = capsys.readouterr().err
    assert f"{tmp_path} is kept; `python3 elite_train.py resume {tmp_path}` continues it." in said


def test_a_fault_of_ours_is_one_line_and_a_saved_traceback(tmp_path, capsys):
    def act(session):
        session.run = tmp_path
        raise ZeroDivisionError("division\nby zero")
    assert guarded(act, ["elite_train.py"]) == 70
    said = capsys.readouterr().err
    assert re.fullmatch(r"A fault in ELITE \(ZeroDivisionError: division by zero\)\. "
                        r"The traceback is in (\S+); please report it\.\n", said)
    place = Path(re.search(r"is in (\S+);", said)[1])
    assert place.parent == tmp_path
    assert "ZeroDivisionError: division" in place.read_text()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--bogus"], "Unknown flag --bogus. --help lists them all."),
    (["--epoch", "3"], "Unknown flag --epoch. Nearest: --epochs."),
    (["plan", "--vrm", "3"], "Unknown flag --vrm. Nearest: --vram."),
    (["pln"], "No such command 'pln'. Did you mean 'plan'?"),
    (["--tier", "abc"], "--tier is 'abc'; it must be a whole number."),
    (["--tier=x"], "--tier is 'x'; it must be a whole number."),
    (["plan", "--ram", "much"], "--ram is 'much'; it must be a number."),
    (["--epochs"], "Option '--epochs' requires an argument."),
    (["report"], "Missing argument 'RUN'."),
    (["--repo", "x", "plan"], "--repo before plan would do nothing; flags go after plan."),
    (["--epochs", "0", "runs"], "--epochs before runs would do nothing; flags go after runs."),
])
def test_bad_flags_get_one_line_and_exit_2(arguments, said, capsys):
    assert guarded(elite_train.run, ["elite_train.py", *arguments]) == 2
    assert capsys.readouterr() == ("", said + "\n")


def test_the_stage_classes_can_be_imported_from_the_command():
    for name in elite_train.EXPORTS:
        assert getattr(elite_train, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        elite_train.Nothing  # noqa: B018
