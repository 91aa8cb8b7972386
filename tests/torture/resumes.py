"""What the tests of resuming share."""

import os
import shutil

from run_maker import configure

from training.trainer.journal import read_lines

COMPARED = ("step", "epoch", "loss", "lr", "grad_norm", "tokens")


def rows(path):
    """What metrics.jsonl says of the course of a training."""
    return [tuple(line[name] for name in COMPARED) for line in read_lines(path / "metrics.jsonl")]


def flipped(path):
    """One bit of a file, its times kept."""
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def run_at(with_dataset, path, **settings):
    path.mkdir(parents=True)
    shutil.copytree(with_dataset / "dataset", path / "dataset")
    return configure(path, **{"evaluation__completions": 0, "evaluation__windows": 2, **settings})
