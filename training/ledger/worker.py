"""The real trainer, in children forked from a server that has imported its libraries and computed nothing.

A fresh process spends 4 to 6 s on imports, more than a short run's steps. Forking a process that has run an
OpenMP region is unsound (the child has no pool threads and waits for them); a server that only imported has
none, which is what multiprocessing's forkserver is for. VmHWM of a forked child starts at its own resident
memory, not at the server's peak (kernel/fork.c, dup_mm), so that it is the run's: 523.4 and 523.9 MB in two
runs of one configuration (2026-11).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from training.manager import launcher
from training.rundir import RunDirectory
from training.settings import Config

# What every run loads. The trainer's own modules compute nothing at import either. Each child runs the
# command's main module once more, so its imports are made here, too: 0.1 s a child in place of 0.9 s, 2 busy
# cores.
PRELOAD = ("torch", "transformers.models.llama.modeling_llama", "training.trainer.phases", "elite_train",
           "training.ledger.worker")
POLL_S = 0.1


def start_server() -> None:
    """Start the server in the environment that a trainer gets; without this the first run does."""
    wanted = launcher.environment(Config({}), os.environ) | {
        "HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(launcher.ROOT), os.environ.get("PYTHONPATH", ""))))}
    # A run's own configuration says later which devices it sees, and its parent is the server.
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", launcher.WATCH_PARENT):
        wanted.pop(name, None)
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    with _environment(wanted):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(folder: Path, config: Config, tell: Callable[[], None] = lambda: None) -> int:
    """Train what a run directory describes, a process a device, and wait; the first exit code that is not 0.

    `tell` is called while it runs.
    """
    count = int(config["device.count"])
    shared = launcher.environment(config, {}) | {"MASTER_ADDR": "127.0.0.1",
                                                 "MASTER_PORT": str(launcher.free_port())}
    del shared["PATH"]
    context = multiprocessing.get_context("forkserver")
    start_server()
    ranks = []
    for rank in range(count):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count} if count > 1 else {}
        env = shared | {name: str(value) for name, value in names.items()}
        ranks.append(context.Process(target=_work, args=(str(folder), rank, env)))
    try:
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            ranks[0].join(POLL_S)
            tell()
            if any(process.exitcode for process in ranks):
                _end(ranks, grace_s=5.0)
    finally:
        _end(ranks, grace_s=0.0)
    return next((process.exitcode for process in ranks if process.exitcode), 0)


def _end(ranks: list[Any], grace_s: float) -> None:
    """End what is left: a rank whose neighbour has died waits for it forever."""
    limit = time.monotonic() + grace_s
    for process in ranks:
        if process.pid is not None:
            process.join(max(0.0, limit - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _work(folder: str, rank: int, env: Mapping[str, str]) -> None:
    """One rank, in the child: what `model_trainer_unified.py` does after its imports."""
    start = time.monotonic()
    os.environ.update(env)
    run_dir = RunDirectory(Path(folder))
    log = os.open(run_dir.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    import logging

    from training.trainer.session import run_session

    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s", force=True)
    sys.exit(run_session(run_dir.path, rank, start))
