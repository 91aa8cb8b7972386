"""Building DeepSpeed's CPU Adam before it is needed: announced, once for all processes, and stoppable.

Left to itself the build happens inside `import`-like code without a word (64-95 s on 2 cores), and a build
that was killed leaves torch's `lock` file behind, on which every later start waits for ever.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

OP = "cpu_adam"
POLL_S = 0.25
BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"


def prepare_cpu_adam(tell: Callable[[str], None]) -> None:
    """Build the op when it is not built yet. `tell` is called four times a second and may raise to stop.

    A build that fails is left to the caller: loading the op then raises with the compiler's reason.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(OP, False))
    with _sole_user(folder, tell):
        if _is_current(folder):
            return
        log.info("DeepSpeed's CPU Adam is compiled now, once for this machine (about a minute on 2 cores).")
        start = time.monotonic()
        code = _run(tell, start)
        outcome = "built" if code == 0 else f"not built (exit {code})"
        log.info("DeepSpeed's CPU Adam: %s after %.0f s, in %s.", outcome, time.monotonic() - start, folder)


@contextmanager
def _sole_user(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that the system frees with its process; torch's own, if it is there, is then a leftover."""
    with open(folder.parent / f".{OP}.flock", "w") as file:
        while not _try_lock(file.fileno()):
            tell("waiting for another process that compiles DeepSpeed's CPU Adam")
            time.sleep(POLL_S)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_current(folder: Path) -> bool:
    """Whether loading compiles nothing. The library alone does not say so: its objects may be gone."""
    if not (folder / f"{OP}.so").exists():
        return False
    try:
        rehearsal = subprocess.run(["ninja", "-n"], cwd=folder, capture_output=True, text=True,
                                   timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True  # loading will say what is wrong with ninja
    return "no work to do" in rehearsal.stdout


def _run(tell: Callable[[str], None], start: float) -> int:
    """Compile in a process group of its own, so that a stop ends the compiler too."""
    null = subprocess.DEVNULL
    build = subprocess.Popen([sys.executable, "-c", BUILD], stdin=null, stdout=null, stderr=null,
                             start_new_session=True)
    try:
        while build.poll() is None:
            tell(f"compiling DeepSpeed's CPU Adam, {time.monotonic() - start:.0f} s")
            time.sleep(POLL_S)
    finally:
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGKILL)
            build.wait()
    return build.returncode
