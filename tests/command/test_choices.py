"""Flags become choices: precedence, conflicts, and every problem in one look."""

import pytest

from training.command import places
from training.command.choices import Choices, settings_of
from training.errors import CannotWrite, MissingInput
from training.manager.lock import RunLock


def words(problems):
    return [str(problem) for problem in problems]


def test_the_command_line_beats_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  epochs: 2\n  learning_rate: 1e-3\n")
    values, problems = settings_of(Choices(config=str(file), epochs=5, set=["lora.rank=8"]))
    assert problems == []
    assert values == {"training.epochs": 5, "training.learning_rate": 1e-3, "lora.rank": 8}


def test_a_flag_and_set_of_the_same_key_is_an_error():
    problems = settings_of(Choices(epochs=2, set=["training.epochs=3"]))[1]
    assert words(problems) == ["--epochs 2 and --set training.epochs=3 both set training.epochs; "
                               "keep one of them."]


def test_every_problem_is_told_with_where_it_stands(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  epoch: 2\nseed: x\n")
    problems = settings_of(Choices(config=str(file), epochs=0, context=0, set=["lora.rank=0", "nonsense"]))[1]
    assert words(problems) == [
        f"{file}: Unknown configuration key training.epoch. Nearest: training.epochs.",
        f"{file}: Unknown configuration key seed. Nearest: run.seed.",
        "--context: dataset.context_tokens is 0; the least is 1.",
        "--epochs: training.epochs is 0; the least is 1.",
        "--set: lora.rank is 0; the least is 1.",
        "--set takes KEY=VALUE; got 'nonsense'. Example: --set training.epochs=2"]


def test_a_file_that_is_no_mapping_is_one_problem_among_others(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("- 1\n")
    problems = words(settings_of(Choices(config=str(file), seed=-1))[1])
    assert problems[0].startswith(f"{file} holds a list; a configuration is a mapping")
    assert problems[1] == "--seed: run.seed is -1; the least is 0."


def test_the_repository_is_looked_for_here_above_and_in_projects(tmp_path):
    home = tmp_path / "home"
    project = home / "work/tool"
    (project / "src/deep").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    assert places.find_repository(project, home) == (project, "the current folder")
    assert places.find_repository(project / "src/deep", home) == (project, "a parent of the current folder")
    with pytest.raises(MissingInput, match="give one"):
        places.default_repository(home, home)
    (home / "projects/new/.git").mkdir(parents=True)
    (home / "Makefile").touch()  # a home folder with a Makefile is no repository
    assert places.find_repository(home, home) == (home / "projects/new", "the newest folder in ~/projects")


def test_names_and_free_folders(tmp_path):
    assert places.name_of("git@example.org:a/Some Tool.git") == "Some-Tool"
    assert places.name_of("../..") == "model"
    assert places.free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert places.free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a/x").touch()
    assert places.free_path(tmp_path / "a") == tmp_path / "a-2"


def test_an_old_run_is_moved_aside_and_never_deleted(tmp_path):
    run = tmp_path / "click"
    assert places.move_aside(run) is None
    for number in (1, 2):
        run.mkdir()
        (run / "plan.json").write_text(f"{number}")
        assert places.move_aside(run) == tmp_path / f"click.old-{number}"
    assert (tmp_path / "click.old-1/plan.json").read_text() == "1"
    assert not run.exists()


def test_a_run_in_use_is_not_moved(tmp_path):
    (tmp_path / "plan.json").touch()
    guard = RunLock(tmp_path)
    guard.take()
    try:
        with pytest.raises(CannotWrite, match="is in use by process"):
            places.move_aside(tmp_path)
    finally:
        guard.release()
