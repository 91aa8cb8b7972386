"""Rows 58 to 66 of docs/reliability.md: odd files, datasets, models, names and command lines."""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from run_factory import FAKE, make_run
from run_maker import configure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "dataset"))
import odd_models  # noqa: E402
from checkpoints import make_tiny_checkpoint  # noqa: E402
from odd_words import NAMES, any_arguments, any_notebook, any_yaml  # noqa: E402
from repositories import FUNCTION, make, read_tree, settings, write_tree  # noqa: E402
from test_hostile import FILES  # noqa: E402

import elite_train  # noqa: E402
from training import models  # noqa: E402
from training.command import checks  # noqa: E402
from training.command.ending import guarded  # noqa: E402
from training.command.request import MAX_NAME_BYTES  # noqa: E402
from training.configuration import to_yaml  # noqa: E402
from training.dataset import DatasetGenerator, WindowStore  # noqa: E402
from training.dataset.sources.repository import advice  # noqa: E402
from training.dataset.store import content_digest  # noqa: E402
from training.dataset.windows import TRAINED  # noqa: E402
from training.errors import DataError, EliteError  # noqa: E402
from training.manager.manager import TrainingManager  # noqa: E402
from training.records import Result  # noqa: E402
from training.rundir import RunDirectory, read_record  # noqa: E402
from training.settings import Config, read_yaml  # noqa: E402
from training.trainer.batches import Layout, read_update  # noqa: E402
from training.trainer.journal import read_lines  # noqa: E402

real = pytest.mark.real
CODE = FUNCTION.format(name="code")


# Files


def balanced(manifest, there):
    """Whether every file of a repository is accepted or dropped for a reason."""
    files = manifest["files"]
    return files["seen"] == files["accepted"] + sum(files["dropped"].values()) == there


def told(error):
    """Whether an error is bad data in one line that says what and why."""
    text = str(error)
    return error.exit_code == 65 and "\n" not in text and bool(re.search(r"empty|holds no code|bytes", text))


@real
def test_odd_files_alone_and_together_are_taken_or_refused_with_a_reason_and_all_are_counted(
        matrix, tmp_path):
    cases = {name: {name: content} for name, (content, _) in FILES.items()}
    line = b"x = '" + b"a" * matrix.count(5 << 20, 100 << 20) + b"'\n"
    cases |= {"line": {"line.py": line}, "line in prose": {"line.md": line},
              "one row": {"one.py": b"one = 1\n"}, "copies": {f"copy{i}.py": CODE.encode() for i in range(9)},
              "nothing": {}}
    passed, notes, most_s = 0, [], 0.0
    for number, (name, files) in enumerate(cases.items()):
        root = write_tree(tmp_path / f"{number}" / "root", files)
        root.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            facts = DatasetGenerator.survey(str(root))
            good = 1 <= facts.code_files <= facts.files == len(files)
        except DataError as error:
            good = told(error)
        if good and number % matrix.count(8, 1) == 0:
            try:
                manifest, _ = make(root, tmp_path / f"{number}" / "out", context_tokens=64, target_tokens=32)
                good = balanced(manifest, len(files))
            except DataError as error:
                good = told(error)
        most_s = max(most_s, time.monotonic() - began)
        passed += good
        notes += [] if good else [name]
    together = write_tree(tmp_path / "all", {f"{number}/{name}": content for number, files in
                                             enumerate(cases.values()) for name, content in files.items()})
    manifest, _ = make(together, tmp_path / "made", context_tokens=128, target_tokens=64)
    assert balanced(manifest, sum(map(len, cases.values())))
    assert all(map(advice, manifest["files"]["dropped"]))
    assert most_s < 30
    matrix.record(58, passed, len(cases), "; ".join(notes))


@real
def test_notebooks_of_any_shape_are_accepted_or_dropped_and_none_is_lost(matrix, tmp_path):
    draw, count, batch = random.Random(59), matrix.count(200, 2_000), 200
    passed = 0
    for start in range(0, count, batch):
        files = {f"n{number}.ipynb": any_notebook(draw) for number in range(start, start + batch)}
        root = write_tree(tmp_path / str(start), files | {"good.py": CODE})
        sources, dropped = read_tree(root)
        names = {source.path for source in sources}
        passed += sum((name in names) + (name in dropped) == 1 for name in files)
        assert 5 < len(sources) < batch, "some are notebooks and some are not"
        manifest, _ = make(root, tmp_path / f"out-{start}", context_tokens=64, target_tokens=32)
        assert balanced(manifest, batch + 1)
    matrix.record(59, passed, count)


# Datasets


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    parts = {f"p{index}.py": f"import p{index - 1}\n" + "".join(
        FUNCTION.format(name=f"step{index}_{inner}") for inner in range(index % 7 + 1))
        for index in range(1, 13)}
    return write_tree(root, parts | {"README.md": "# Parts\n\nThey add one.\n"})


@real
def test_no_length_of_window_gives_a_batch_without_a_target_and_such_windows_are_refused(
        matrix, repository, tmp_path):
    draw, tries, passed = random.Random(60), matrix.count(5, 40), 0
    for number in range(tries):
        context = draw.choice((2, 3, 5, 17, 64, 200, 333, 900))
        _, store = make(repository, tmp_path / str(number), context_tokens=context,
                        target_tokens=draw.randrange(1, context + 1))
        layout = Layout(windows=store.count("train"), micro=2, accumulation=1, ranks=1)
        updates = [read_update(store, step, layout, 0, 1) for step in range(layout.updates_per_epoch)]
        passed += (not len(store.without_target("train")) and not len(store.without_target("held_out"))
                   and all(targets > 0 and all(bool((batch.labels[:, 1:] >= 0).any()) for batch in batches)
                           for batches, targets in updates))
    masked = masked_dataset(tmp_path / "0", draw)
    problem, = checks.dataset_is_as_made(RunDirectory(tmp_path / "0"), Config({}))
    assert isinstance(problem, DataError)
    assert f"{masked} of " in str(problem)
    assert "train windows have no token to train on" in str(problem)
    matrix.record(60, passed, tries)


def masked_dataset(run, draw):
    """Take the targets of some train windows away, under a new digest; how many windows."""
    folder = run / "dataset"
    store = WindowStore.open(folder)
    chosen = sorted(draw.sample(range(store.count("train")), 3))
    bounds = np.fromfile(folder / "train_windows.bin", np.int64)
    rows = np.fromfile(folder / "train_segments.bin", np.int64).reshape(-1, store._segments["train"].shape[1])
    for index in chosen:
        rows[bounds[index]:bounds[index + 1], 2] &= ~TRAINED
    rows.tofile(folder / "train_segments.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["digest"] = content_digest(folder, manifest["store"]["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return len(chosen)


def trained(run, log, meanwhile):
    """A trainer's exit code and output; `meanwhile` is called once, after its fifth step."""
    process = forked.trainer(run, log)
    limit = time.monotonic() + forked.PATIENCE_S
    while len(read_lines(run / "metrics.jsonl")) < 5 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    meanwhile()
    return process.communicate()[0], process.returncode


@real
def test_data_that_change_during_a_run_are_not_mixed_into_it(matrix, with_dataset, tmp_path):
    """The repository, and the run's own windows, replaced, appended to or written over. The trainer has the
    replaced ones still; of the others it makes no checkpoint. The next start sees both."""
    source = with_dataset.parent / "repository"

    def run_at(name):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        shutil.copytree(with_dataset / "dataset", run / "dataset")
        return configure(run, evaluation__completions=0, dataset__repo=str(source))

    def write_over():
        for path in source.glob("*.py"):
            path.write_text(path.read_text() + "\nCHANGED = True\n")

    def replaced(run):
        tokens = run / "dataset" / "tokens.bin"
        aside = tokens.with_name("aside")
        aside.write_bytes(bytes(tokens.stat().st_size))
        os.replace(aside, tokens)

    def appended(run):
        with open(run / "dataset" / "tokens.bin", "ab") as file:
            file.write(bytes(64))

    def written_over(run):
        with open(run / "dataset" / "tokens.bin", "r+b") as file:
            file.write(bytes(256))

    wanted = run_at("wanted")
    assert trained(wanted, tmp_path / "log", lambda: None)[1] == 0
    digest = read_record(Result, wanted / "result.json").digest
    passed, notes, repeats = 0, [], matrix.count(1, 5)
    for number in range(repeats):
        for name, change in (("repository", lambda run: write_over()), ("replaced", replaced),
                             ("appended", appended), ("written over", written_over)):
            run = run_at(f"{name}-{number}")
            said, code = trained(run, tmp_path / f"log-{name}-{number}", functools.partial(change, run))
            result = read_record(Result, run / "result.json")
            if name in ("repository", "replaced"):
                good = code == 0 and result.digest == digest
            else:
                good = code == 65 and "tokens.bin was written to during the training" in result.error
            if name != "repository":
                problem = checks.dataset_is_as_made(RunDirectory(run), Config({}))
                good &= bool(problem) and problem[0].exit_code == 65
            passed += good
            notes += [] if good else [f"{name}: {code} {said[-600:]}"]
    matrix.record(64, passed, 4 * repeats, "; ".join(notes))


# Models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "phi", "phi", context_tokens=256)


def copied(base, path):
    shutil.copytree(base, path)
    return path


def prepared(folder, repository, output):
    """The stages before the first step on a base model: its files, its dataset, itself. Raises EliteError."""
    import torch

    from training.trainer.loading import load

    config = Config({**settings(repository, context_tokens=64, target_tokens=32), "model.base": str(folder),
                     "lora.enabled": True})
    resolved = models.resolve(str(folder))
    DatasetGenerator(config, output, resolved).generate()
    for problem in checks.base_is_whole(RunDirectory(output), config):
        raise problem
    return load(config, WindowStore.open(output / "dataset"), torch.device("cpu"))


def refused(act):
    """(exit code, text) of an EliteError in one line; (0, "") for none; -1 for any other exception."""
    try:
        act()
    except EliteError as error:
        return (error.exit_code if "\n" not in str(error) else -1), str(error)
    except Exception as error:
        return -1, repr(error)
    return 0, ""


def tried(cases, base, repository, folder):
    """(how many ended with a code that they may end with, the others); what trains has `base`'s weights."""
    plain = prepared(base, repository, folder / "plain").model.base_model.model.state_dict()
    passed, notes = 0, []
    for number, (name, (change, codes)) in enumerate(cases.items()):
        odd, made = copied(base, folder / f"base{number}"), []
        change(odd)
        code, text = refused(lambda odd=odd, number=number, made=made: made.append(
            prepared(odd, repository, folder / f"out{number}").model.base_model.model.state_dict()))
        good = code in codes and all(bool((found[key] == plain[key]).all())
                                     for found in made for key in plain if "lora_" not in key)
        passed += good
        notes += [] if good else [f"{name}: {code} {text[:200]}"]
        shutil.rmtree(odd)
    return passed, "; ".join(notes)


@real
def test_a_tokenizer_that_does_not_fit_its_model_is_refused_or_mended_as_documented(
        matrix, base, repository, tmp_path):
    cases = odd_models.tokenizers()
    passed, notes = tried(cases, base, repository, tmp_path)
    matrix.record(62, passed, len(cases), notes)


@real
def test_a_model_folder_with_anything_wrong_is_refused_before_the_first_step(
        matrix, base, repository, tmp_path):
    cases = odd_models.models()
    passed, notes = tried(cases, base, repository, tmp_path)
    matrix.record(63, passed, len(cases), notes)


# Names and command lines


def called(*arguments):
    """(exit code, standard output, standard error) of the command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = guarded(elite_train.run, ["elite_train.py", *arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def handlers():
    """What a command in this process does to signals is taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@real
def test_names_of_any_kind_are_data_to_the_dataset_and_to_the_trainers_command(
        matrix, handlers, monkeypatch, tmp_path):
    tries = matrix.count(10, len(NAMES))
    names = NAMES if tries == len(NAMES) else NAMES[::len(NAMES) // tries][:tries]
    passed, notes = 0, []
    monkeypatch.setenv("FAKE", "done")
    monkeypatch.setenv("FAKE_STEPS", "2")
    for number, name in enumerate(names):
        here = tmp_path / str(number)
        root = write_tree(here / name, {f"{name[:120]}.py": CODE * 2, "good.py": CODE})
        monkeypatch.chdir(here)
        repo = f"./{name}" if name.startswith("-") else str(root)
        made = here / "made" / (name if len(name.encode()) <= MAX_NAME_BYTES else "made")
        code, _, said = called("dataset", "--repo", repo, "--output", str(made), "--context", "64", "--json",
                               "--base-model", "embedded")
        run = make_run(here / "runs" / name, {"run.name": name, "dataset.repo": str(root)})
        result = TrainingManager(run.path, script=FAKE, pauses_s=(0.0,)).train()
        values = read_yaml(run.config)
        good = (code == 0 and (made / "manifest.json").is_file() and result.state == "done"
                and (values["run.name"], values["dataset.repo"]) == (name, str(root))
                and not list(tmp_path.rglob("canary")))
        if name.startswith("-"):  # reads like a flag, and git would take it for one
            good &= called("dataset", f"--repo={name}")[::2] == (2, (
                f"The repository {name!r} starts with '-' and reads like a flag; write ./{name} for a "
                "folder.\n"))
        if made.name == "made":  # what is written aside has a longer name still
            good &= called("dataset", "--repo", repo, "--output", str(made.parent / name))[0] in (2, 73)
        passed += good
        notes += [] if good else [f"{name!r}: {code} {said[-300:]} {result.state}"]
    matrix.record(65, passed, len(names), "; ".join(notes))


def is_told(arguments, code, out, err):
    """Whether an end is one of bad usage or input, with a line for each problem. A name that holds line ends
    itself is told as it is."""
    if code not in (2, 65, 66) or not err.strip() or "Traceback" in err + out:
        return False
    named = sum(word.count("\n") for word in arguments)
    problems = json.loads(out)["problems"] if out else []
    return not out or (err == "".join(f"{each}\n" for each in problems)
                       and len(problems) <= err.count("\n") <= len(problems) + named)


@real
def test_random_command_lines_and_configurations_end_in_a_line_a_problem_within_a_second(
        matrix, handlers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    called("--auto", "--repo", "nowhere")
    draw, tries, passed, notes = random.Random(66), matrix.count(300, 5_000), 0, []
    plain = to_yaml(Config({}), {}).splitlines()
    for number in range(tries):
        if number % 2:
            (tmp_path / "odd.yaml").write_bytes(any_yaml(draw, plain).encode("utf-8", "surrogateescape"))
            arguments = ["--auto", "--repo", "nowhere", "--config", "odd.yaml", "--json"]
        else:
            arguments = [*any_arguments(draw), *["--json"] * draw.randrange(2)]
        began = time.process_time()
        code, out, err = called(*arguments)
        took = time.process_time() - began
        good = is_told(arguments, code, out, err) and took < 1
        passed += good
        notes += [] if good else [f"{arguments} {took:.1f} s: {code} {err[-300:]!r}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.yaml"]
    matrix.record(66, passed, tries, f"{len(notes)} others: " * bool(notes) + "; ".join(notes[:5]))
