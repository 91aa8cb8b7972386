"""A training in a network namespace without an interface; each attempt to connect is written down. Forked."""

import ctypes
import socket
import sys
from pathlib import Path

CLONE_NEWNET = 0x40000000


def main(run, attempts):
    """Train a run directory; its exit code. `attempts`: a file that gets one line an attempt."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from training import model_trainer_unified

    alone = ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0
    print("in a namespace of its own" if alone else "with every connection refused", flush=True)

    def refuse(_, address):
        with open(attempts, "a") as file:
            file.write(f"{address!r}\n")
        raise OSError("there is no network here")

    socket.socket.connect = socket.socket.connect_ex = refuse
    return model_trainer_unified.main(["--run-dir", run])
