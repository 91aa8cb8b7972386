"""The training subprocess: a run directory in, a trained model out.

    python training/model_trainer_unified.py [--trial] --run-dir DIR
    deepspeed --num_gpus N training/model_trainer_unified.py --run-dir DIR

The launcher adds --local_rank.
"""

from __future__ import annotations

import time

START = time.monotonic()

import argparse  # noqa: E402
import faulthandler  # noqa: E402
import functools  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

HERE = Path(__file__).resolve().parent


def prepare_path() -> None:
    """Import from the checkout, not from this folder, whose modules would hide others of the same name."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))


def prepare_environment() -> None:
    """Settings that libraries read once, when they are imported."""
    # OpenMP's waiting threads spin: beside one busy neighbour a 2-thread step took 7 s in place of 0.7 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # DeepSpeed calls `ninja` to build an op; it lies beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A bar that cannot be written to a log on a full disk would end a finished training.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the base model was fetched before the training
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments and train; the exit code."""
    parser = argparse.ArgumentParser(description="Train what a run directory describes.")
    parser.add_argument("--run-dir", required=True, type=Path, help="the run directory")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")),
                        help="which process of this machine (set by DeepSpeed's launcher)")
    parser.add_argument("--trial", action="store_true",
                        help="take the steps of DIR/trial-order.json on random tokens and train nothing")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                        help="go on although this changed since the checkpoint")
    options = parser.parse_args(arguments)
    prepare_path()
    prepare_environment()
    from training.manager.watchdog import parent_is_gone, watch_parent

    folder = options.run_dir.resolve()
    # A trial's folder is its command's to remove; without a command nobody else will.
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    watch_parent(at_end=remove if options.trial else None)
    faulthandler.register(signal.SIGUSR1)  # the command asks for stacks when there is no sign of life
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s",
                        datefmt="%H:%M:%S")
    from training.trainer.session import run_session

    code = run_session(folder, options.local_rank, START, trial=options.trial,
                       allowed=tuple(options.allow_change))
    if options.trial and parent_is_gone():
        remove()
    return code


def leave(code: int) -> NoReturn:
    """End the process now, without taking the interpreter apart.

    A worker thread of gloo or NCCL that waits for the interpreter's lock at that moment, to drop the last
    reference to a tensor of a finished exchange, would abort the process ("terminate called without an active
    exception"): DeepSpeed's references to the process group keep such threads alive after it is destroyed.
    Everything that must be on disk is there, synced, by now.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
