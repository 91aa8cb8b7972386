"""A process that parses for this one, so that no text can hang or crash it.

The kernel ends the worker (RLIMIT_CPU) where one text takes MAX_CPU_S; the next text starts another. Messages
both ways are pickles, each behind its length (8 bytes).
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Parse = Callable[[bytes, str], Any]
MAX_CPU_S = 3                 # an ordinary text of 1 MiB takes 0.4 s
GARBAGE_THRESHOLD = 1_000_000 # objects: a text makes 10^5 nodes, none of them in cycles
_PROGRAM = """
from training.dataset.structure.syntax import parsed_structure
from training.dataset.structure.worker import serve
serve(parsed_structure)
"""
_ROOT = Path(__file__).resolve().parents[3]
_LENGTH_BYTES = 8


def ask(data: bytes, language: str) -> Any:
    """The `syntax.Structure` of a text (UTF-8) by its grammar; None where none is at hand or it took long."""
    global _worker
    with _lock:
        if _worker is None or _worker.owner != os.getpid():      # a fork has its own
            _worker = _Worker()
        try:
            return _worker.ask(data, language)
        except (OSError, EOFError):
            _worker.close()
            _worker = None
            return None


class _Worker:
    """The other process, and the pipes to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path})

    def ask(self, data: bytes, language: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, (data, language))
        return _receive(self._process.stdout)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


_worker: _Worker | None = None
_lock = threading.Lock()


@atexit.register
def close() -> None:
    """End this process's worker, if there is one."""
    global _worker
    if _worker is not None and _worker.owner == os.getpid():
        _worker.close()
    _worker = None


def serve(parse: Parse) -> None:
    """Answer until the other side closes; for each text the CPU limit is set anew."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # the one who asks decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.set_threshold(GARBAGE_THRESHOLD)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        try:
            data, language = _receive(sys.stdin.buffer)
        except EOFError:
            return
        limit_s = math.ceil(time.process_time()) + MAX_CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s if hard < 0 else min(limit_s, hard), hard))
        _send(sys.stdout.buffer, parse(data, language))


def _send(pipe: IO[bytes], message: Any) -> None:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """Raises EOFError where the other side is gone."""
    length = int.from_bytes(_read(pipe, _LENGTH_BYTES), "little")
    return pickle.loads(_read(pipe, length))


def _read(pipe: IO[bytes], length: int) -> bytes:
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError(f"{len(data)} of {length} bytes")
    return data
