"""Bad input: one line a problem (value, limit, way out), the right exit code, within two seconds."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 2.0
pytestmark = pytest.mark.real


@pytest.fixture
def here(tmp_path):
    """A folder with a repository and other things to point at."""
    code = tmp_path / "code"
    code.mkdir()
    for number in range(20):
        (code / f"m{number}.py").write_text("\n".join(f"def f{number}_{i}(x):\n    return x * {i + number}"
                                                      for i in range(40)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.md").write_text("# Words only\n\n" + "Nothing but prose stands here. " * 50)
    (tmp_path / "file.txt").write_text("a file")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("do not touch")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/plan.json").write_text("{}")
    (tmp_path / "list.yaml").write_text("- epochs\n")
    (tmp_path / "unknown.yaml").write_text("training:\n  epoch: 3\n")
    (tmp_path / "torn.yaml").write_text("training: {epochs: [\n")
    return tmp_path


def run(folder, *arguments, prefix=()):
    """The real command; its CPU seconds, since a busy machine's clock says nothing about it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*prefix, sys.executable, str(ROOT / "elite_train.py"), *arguments], cwd=folder,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def listing(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*"))


ROWS = [
    ("--repo nowhere", 66, ["The repository nowhere does not exist"]),
    ("--repo empty", 65, ["empty: no file to read"]),
    ("--repo words", 65, ["holds no code to train on"]),
    ("--repo file.txt", 66, ["The repository file.txt is a file"]),
    ("--repo code --base-model phi-22", 66, ["Unknown base model 'phi-22'. Nearest: phi-2."]),
    ("--repo code --base-model ./none", 66, ["there is no such folder"]),
    ("--repo code --tier 12", 2, ["--tier 12:", "tiers 1 to 11"]),
    ("--repo code --tier 0", 2, ["--tier 0:", "tiers 1 to 11"]),
    ("--repo code --context 0", 2, ["dataset.context_tokens is 0; the least is 1"]),
    ("--repo code --base-model embedded --context 99999999", 2,
     ["--context 99,999,999 is beyond what embedded can be trained at: 16,384 tokens"]),
    ("--repo code --base-model phi-2 --context 99999999", 2, ["beyond what phi-2 can be trained at: 65,536"]),
    ("--repo code --context 99999999", 2, ["--context 99,999,999 is beyond"]),
    ("--repo code --epochs 0", 2, ["training.epochs is 0; the least is 1"]),
    ("--repo code --epochs two", 2, ["--epochs is 'two'; it must be a whole number"]),
    ("--repo code --max-hours 0", 2, ["--max-hours 0 grants no time"]),
    ("--repo code --seed -1", 2, ["run.seed is -1; the least is 0"]),
    ("--repo code --output taken", 73, ["taken exists and is not a run directory; nothing in it is touched"]),
    ("--repo code --output old", 73, ["old already holds a run. --resume continues it"]),
    ("--repo code --output file.txt", 73, ["file.txt is a file"]),
    ("--repo code --output file.txt/run", 73, ["file.txt is a file"]),
    ("--repo code --output /proc/run", 73, ["Cannot write in /proc"]),
    ("--repo code --model-name a/b", 2, ["cannot name a folder"]),
    ("--repo code --config nowhere.yaml", 66, ["Cannot read the configuration nowhere.yaml"]),
    ("--repo code --config unknown.yaml", 2, ["unknown.yaml: Unknown configuration key training.epoch. "
                                              "Nearest: training.epochs."]),
    ("--repo code --config list.yaml", 2, ["list.yaml holds a list; a configuration is a mapping"]),
    ("--repo code --config torn.yaml", 2, ["torn.yaml is not valid YAML"]),
    ("--repo code --set training.epoch=1", 2, ["Nearest: training.epochs."]),
    ("--repo code --set epochs", 2, ["--set takes KEY=VALUE; got 'epochs'"]),
    ("--repo code --epochs 2 --set training.epochs=3", 2, ["both set training.epochs"]),
    ("--repo code --resume --fresh", 2, ["give one of them"]),
    ("--repo code --resume --output empty", 66, ["holds no run to resume"]),
    ("--repo code --bogus", 2, ["Unknown flag --bogus."]),
]


@pytest.mark.parametrize(("arguments", "code", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_bad_input_gets_one_line_and_leaves_nothing(here, arguments, code, words):
    before = listing(here)
    done, seconds = run(here, "--auto", *arguments.split())
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in done.stderr
    assert listing(here) == before
    assert seconds <= LIMIT_S


def test_all_problems_are_told_at_once(here):
    done, _ = run(here, "--auto", "--repo", "nowhere", "--tier", "12", "--epochs", "0", "--base-model",
                  "phi-22", "--output", "taken", "--set", "lora.rnk=3", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == said["exit_code"] == 2
    assert done.stderr.splitlines() == said["problems"]
    assert len(said["problems"]) == 6


def test_without_a_terminal_and_without_auto_it_says_so(here):
    done, _ = run(here, "--repo", "code")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("Standard input is no terminal, so nothing can be asked; --auto takes the "
                           "defaults.\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_repository_is_said_to_be_unreadable(here):
    (here / "code").chmod(0)
    done, _ = run(here, "--auto", "--repo", "code")
    (here / "code").chmod(0o755)
    assert done.returncode == 66
    assert "cannot be read: Permission denied" in done.stderr


def test_a_disk_without_room_is_refused_before_any_work(here):
    script = here / "small.sh"
    script.write_text('mount -t tmpfs -o size=4m none "$PWD/empty" || exit 99\nexec "$@"\n')
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    done, seconds = run(here, "--auto", "--repo", "code", "--output", "empty/run",
                        prefix=("unshare", "-rm", "sh", str(script)))
    if done.returncode in (1, 99):
        pytest.skip(f"no mount here: {done.stderr}")
    assert done.returncode == 73
    assert "The run needs 0.20 GiB on the disk of empty/run; 0.00 GiB is free." in done.stderr
    assert seconds <= LIMIT_S
