"""Trainings on disks of some kilobytes, each a tmpfs of its own; run by `unshare -rm`, prints JSON lines.

    small_disks.py FOLDER KIND=SIZE...    KIND: bytes, inodes, or logs with the update that finds room
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "trainer")]

import torch  # noqa: E402
from trainer_fakes import config_of, same, training_of, weights_of  # noqa: E402

from training.errors import CannotWrite  # noqa: E402
from training.trainer import checkpoints, loop  # noqa: E402
from training.trainer.journal import read_lines  # noqa: E402

SETTINGS = {"training__save_steps": 2, "training__keep_checkpoints": 2}
STEPS = list(range(1, 10))


def mounted(path, options):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
    return path


def enlarged(path):
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=9999", str(path)], check=True)


class Saved(logging.Handler):
    """The names of the checkpoints that the loop says it saved."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.names = []

    def emit(self, record):
        if record.msg == "saved %s":
            self.names.append(record.args[0])


SAVED = Saved()


def trained(path):
    """A training to its end: (the training, what ended it or None)."""
    training = training_of(path, config_of(**SETTINGS))
    try:
        training.train()
    except CannotWrite as error:
        return training, error
    return training, None


def steps(path):
    return [line["step"] for line in read_lines(path / "metrics.jsonl")]


def faults(path):
    """What lies in a run directory and should not."""
    left = [item.name for item in path.iterdir() if item.name.startswith((".staging-", "trash-"))]
    torn = [item.name for item in path.glob("checkpoint-*")
            if checkpoints.fault(item, checkpoints.step_of(item))]
    return [*left, *torn]


def on_a_disk_of(path, options, whole):
    """What went wrong on a disk too small for all, some or no checkpoints; then it is enlarged."""
    mounted(path, options)
    SAVED.names.clear()
    training, error = trained(path)
    newest, saved = checkpoints.newest_valid(path)[0], SAVED.names[-1:]
    found = faults(path)
    found += [] if ([newest.name] if newest else []) == saved else [f"saved {saved}, valid {newest}"]
    if error is None:
        ended = training
    else:
        found += [] if error.exit_code == 73 and training.progress.step == STEPS[-1] else [repr(error)]
        enlarged(path)
        ended, error_then = trained(path)
        found += [repr(error_then)] if error_then else []
    found += [] if steps(path) == STEPS else [f"steps {steps(path)}"]
    found += [] if same(weights_of(ended), whole) else ["other weights"]
    told = str(error) if error else ""
    subprocess.run(["umount", str(path)], check=True)
    return {"faults": found, "told": told}


def with_full_logs(path, room_at, whole):
    """metrics.jsonl and evaluations.jsonl on a full disk until update `room_at`."""
    path.mkdir()
    logs = mounted(path / "logs", "size=16k")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (logs / name).touch()
        (path / name).symlink_to(logs / name)
    fill(logs / "filler")
    training = training_of(path, config_of(**SETTINGS, training__eval_steps=3))
    plain, evaluated = training._record, []

    def evaluate(step):
        evaluated.append(step)
        training.journal.evaluation({"step": step, "loss": 3.0 - step / 10, "identity": "i"})

    def record(*arguments, **named):
        if training.progress.step == room_at:
            (logs / "filler").unlink()
        plain(*arguments, **named)
    training._record, training.evaluate = record, evaluate
    training.train()
    known = [line["step"] for line in training.journal.evaluations()]
    found = faults(path) + ([] if steps(path) == STEPS else [f"steps {steps(path)}"])
    found += [] if evaluated == known == [3, 6] else [f"evaluations {known}"]
    written = [line["step"] for line in read_lines(path / "evaluations.jsonl")]
    found += [] if written == [3, 6] else [f"evaluations written {written}"]
    found += [] if same(weights_of(training), whole) else ["other weights"]
    subprocess.run(["umount", str(logs)], check=True)
    return {"faults": found, "told": ""}


def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 512):
                pass
        except OSError:
            return


def main():
    torch.set_num_threads(1)
    loop.log.setLevel(logging.INFO)
    loop.log.addHandler(SAVED)
    loop.log.propagate = False
    folder = Path(sys.argv[1])
    (folder / "whole").mkdir()
    whole = weights_of(trained(folder / "whole")[0])
    options = {"bytes": "size={}", "inodes": "size=64m,nr_inodes={}"}
    for given in sys.argv[2:]:
        kind, _, size = given.partition("=")
        found = (with_full_logs(folder / given, int(size), whole) if kind == "logs"
                 else on_a_disk_of(folder / given, options[kind].format(size), whole))
        print(json.dumps({"kind": kind, "size": int(size), **found}), flush=True)


if __name__ == "__main__":
    main()
