"""Ranks as forks of one process that has imported what they need: seconds of imports once, not per rank."""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training.model_trainer_unified import leave


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(ranks, work, *arguments):
    """Call `work` in as many forks, each with a rank's environment; exits with 1 when one of them fails."""
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                   "GLOO_SOCKET_IFNAME": "lo"}
    left = {_fork(rank, work, arguments) for rank in range(ranks)}
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _fork(rank, work, arguments):
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
