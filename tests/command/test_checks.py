"""The preflight's looks into other rooms, and what --allow-change may name."""

import shutil

import numpy as np
import pytest
from checkpoints import make_tiny_checkpoint

from training.command import checks, continuing
from training.dataset.generator import DatasetGenerator
from training.dataset.store import WindowStore
from training.errors import EliteError
from training.rundir import RunDirectory
from training.settings import Config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of a few files."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "code").mkdir()
    for index in range(12):
        (folder / "code" / f"m{index}.py").write_text(
            "".join(f"def f{index}_{n}(value):\n    return value * {n} + {index}\n\n\n" for n in range(40)))
    config = Config({"dataset.repo": str(folder / "code"), "dataset.context_tokens": 128,
                     "dataset.target_tokens": 64, "embedded.vocab_tokens": 512})
    DatasetGenerator(config, folder / "run").generate()
    return folder / "run"


def copied(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def told(found):
    return [str(problem) for problem in found]


def test_a_dataset_as_it_was_made_has_no_problem(made, tmp_path):
    assert checks.dataset_is_as_made(copied(made, tmp_path), Config({})) == []


@pytest.mark.parametrize("name", ["tokens.bin", "train_windows.bin", "tokenizer/tokenizer.json"])
def test_one_changed_byte_of_the_dataset_is_found(made, tmp_path, name):
    run = copied(made, tmp_path)
    data = bytearray((run.dataset / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run.dataset / name).write_bytes(data)
    (problem,) = checks.dataset_is_as_made(run, Config({}))
    assert "was changed: its content hash is" in str(problem)
    assert problem.exit_code == 65


def test_windows_without_a_token_to_train_on_are_named(made, tmp_path):
    run = copied(made, tmp_path)
    store = WindowStore.open(run.dataset)
    assert len(store.without_target("train")) == 0
    bounds = np.asarray(store._windows["train"])
    rows = np.array(store._segments["train"])
    for window in (1, 3):
        rows[bounds[window]:bounds[window + 1], 2] = 0
    rows.tofile(run.dataset / "train_segments.bin")
    assert WindowStore.open(run.dataset).without_target("train").tolist() == [1, 3]
    assert all((WindowStore.open(run.dataset).window("train", window)[1] == -100).all() for window in (1, 3))


def test_a_whole_base_has_no_problem_and_each_hole_is_named(tmp_path):
    base = make_tiny_checkpoint(tmp_path / "base", "qwen2")
    config, run = Config({"model.base": str(base)}), RunDirectory(tmp_path)
    assert checks.base_is_whole(run, config) == []
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (problem,) = checks.base_is_whole(run, config)
    assert "model.safetensors has" in str(problem)
    assert "where its header says" in str(problem)
    weights.unlink()
    (base / "config.json").write_text("{")
    assert len(checks.base_is_whole(run, config)) == 2
    assert checks.base_is_whole(run, Config({})) == []


def test_a_base_that_left_the_cache_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (problem,) = checks.base_is_whole(RunDirectory(tmp_path), Config({"model.base": "some/model"}))
    assert "some/model is not in the Hugging Face cache" in str(problem)
    assert problem.exit_code == 66


def test_names_of_what_is_compared_are_allowed():
    names = ["training.learning_rate", "data", "base", "windows per update", "versions.torch"]
    assert continuing.allowed(names, True) == tuple(names)
    assert continuing.allowed(None, False) == ()


def test_other_names_and_no_resume_are_refused_together():
    with pytest.raises(EliteError) as caught:
        continuing.allowed(["training.learning_rat"], False)
    text = str(caught.value)
    assert "--allow-change training.learning_rat names nothing that a resume compares" in text
    assert "Nearest: training.learning_rate." in text
    assert "--allow-change does nothing without --resume." in text
    assert caught.value.exit_code == 2
