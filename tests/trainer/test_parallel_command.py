"""The trainer's own command line on two CPU devices without DeepSpeed's engine, and with a ring of them."""

import os
import shutil
import subprocess
import sys

import forked
import pytest
from run_maker import configure, dataset_at

from training.manager import launcher
from training.records import Result
from training.rundir import read_record
from training.settings import Config
from training.trainer.journal import read_lines

pytestmark = pytest.mark.real
PATIENCE_S = 300


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory):
    return dataset_at(tmp_path_factory.mktemp("dataset"))


def trained(with_dataset, path, forks=True, **settings):
    """What the trainer makes of a run: its result, its curve and its log. `forks`: without the launcher."""
    run = path / "run"
    run.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", run / "dataset")
    chosen = {"training__micro_batch": 1, "training__accumulation": 4, "training__max_steps": 4,
              "training__save_steps": 0, "evaluation__completions": 1, "evaluation__windows": 2, **settings}
    configure(run, **chosen)
    if forks:
        job = forked.server().start(launcher.SCRIPT, path / "ranks.log",
                                    {"arguments": ["--run-dir", str(run)]}, chosen.get("device__count", 0))
        codes, told = job.wait(), job.text()
    else:
        done = launched(chosen, run)
        codes, told = [done.returncode], done.stdout
    result = read_record(Result, run / "result.json")
    assert (result.state, result.steps, any(codes)) == ("done", 4, False), told[-3000:]
    rows = [value for line in read_lines(run / "metrics.jsonl")
            for value in (line["loss"], line["grad_norm"], line["tokens"])]
    return result, rows, told


def launched(chosen, run):
    config = Config({name.replace("__", "."): value for name, value in chosen.items()})
    argv = launcher.command(config, run, sys.executable, port=launcher.free_port())
    return subprocess.run(argv, text=True, capture_output=True, timeout=PATIENCE_S, cwd="/",
                          env=os.environ | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"})


@pytest.fixture(scope="module")
def by_one(with_dataset, tmp_path_factory):
    return trained(with_dataset, tmp_path_factory.mktemp("one"), forks=False)


def test_two_devices_at_stage_0_make_one_devices_updates(with_dataset, by_one, tmp_path):
    result, rows, _ = trained(with_dataset, tmp_path, forks=False, device__count=2, training__accumulation=2)
    assert rows == pytest.approx(by_one[1], rel=1e-4)
    assert result.quality["after"].loss == pytest.approx(by_one[0].quality["after"].loss, rel=1e-4)
    assert result.quality["before"] == by_one[0].quality["before"]


@pytest.mark.parametrize("stage", [0, 2])
def test_two_devices_that_share_each_window_make_one_devices_updates(with_dataset, by_one, tmp_path, stage):
    result, rows, log = trained(with_dataset, tmp_path, device__count=2, parallel__ring=2,
                                training__checkpointing=True, deepspeed__stage=stage)
    assert "ring of 2: on a short sequence its loss is" in log
    assert rows == pytest.approx(by_one[1], rel=1e-3)
    assert result.quality["after"].loss == pytest.approx(by_one[0].quality["after"].loss, rel=1e-3)
    assert [sample["after"] for sample in result.samples] == [sample["after"] for sample in by_one[0].samples]
