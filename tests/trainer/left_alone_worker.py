"""Rank 1 ends before rank 0, which waits for nothing in particular. Runs in forks: tests/forked.py."""

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from training.trainer import processes


def main(alone_s, waits_s):
    """Rank 0 stays for `waits_s` seconds and then ends well; it is left alone for `alone_s` at most."""
    logging.basicConfig(stream=sys.stdout)
    processes.ALONE_S = alone_s
    rank, _ = processes.join(torch.device("cpu"))
    if rank == 0:
        time.sleep(waits_s)
    return 3 * rank
