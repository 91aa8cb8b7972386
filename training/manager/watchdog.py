"""A trainer does not outlive its command: two lines that end it when the command is gone.

The command holds the write end of a pipe whose read end is the subprocess's standard input. Standard input
is the one descriptor that DeepSpeed's launcher passes on to its ranks (it closes all others). When the
command dies, by SIGKILL too, the kernel closes its end and every rank reads the end of the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable

VARIABLE = "ELITE_PARENT_FD"
GRACE_S = 10.0
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def watch_parent(grace_s: float = GRACE_S, at_end: Callable[[], object] | None = None) -> bool:
    """Watch the command from a daemon thread; call it first thing in the trainer.

    When the command dies this process gets SIGTERM, hence saves and ends; after `grace_s` seconds `at_end` is
    called and its whole process group gets SIGKILL. Returns False, and does nothing, when no command started
    this process.
    """
    text = os.environ.get(VARIABLE, "")
    if not text.isdigit():
        return False
    threading.Thread(target=_wait, args=(int(text), grace_s, at_end), name="watch-parent",
                     daemon=True).start()
    return True


def parent_is_gone() -> bool:
    """Whether the command that started this process has died: its end of the pipe is closed."""
    text = os.environ.get(VARIABLE, "")
    if not text.isdigit():
        return False
    readable, _, _ = select.select([int(text)], [], [], 0)
    return bool(readable) and not os.read(int(text), 1)


def _wait(descriptor: int, grace_s: float, at_end: Callable[[], object] | None = None) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    if at_end is not None:
        at_end()
    # Only a group that was made for this run: its id is the session's too.
    if os.getpgid(0) == os.getsid(0):
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies. Runs between fork and exec, so it only calls prctl.

    It covers the direct child from its first instruction; `watch_parent` covers the ranks.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
