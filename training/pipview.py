"""pip at work: one updating line on a terminal, a line every few seconds in a pipe. Standard library only."""

from __future__ import annotations

import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TextIO

# Shares of a set-up's time (measured, warm cache, 2 cores): fetching, then unpacking and compiling; PyTorch
# takes almost half of these.
FETCH_SHARE = 0.25
HEAVY = {"torch": 0.45, "transformers": 0.2}
PIPE_INTERVAL_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9_.-]*")


def size_text(size_bytes: int) -> str:
    """Decimal, as pip and package indexes count.

    >>> size_text(1_500_000_000), size_text(420_000_000)
    ('1.5 GB', '420 MB')
    """
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def clock(seconds: float) -> str:
    """Minutes and seconds: 75 -> 1:15."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class PipProgress:
    """How far a set-up is, over all its pip runs. `expected`: packages in the whole environment."""

    def __init__(self, expected: int):
        self.expected = expected
        self.seen: set[str] = set()
        self.what = "starting pip"
        self.share = 0.0
        self.left_s: float | None = None
        self.changed_s = 0.0
        self.started = time.monotonic()

    def feed(self, line: str) -> None:
        """Take one line of pip's output."""
        words = line.split()
        if line.startswith(("Collecting ", "Requirement already satisfied: ")):
            name = _NAME.match(words[1 if words[0] == "Collecting" else 3])
            self.what = name.group() if name else self.what
            self.seen.add(self.what.lower())
        elif line.lstrip().startswith(("Downloading ", "Building wheel")):
            self.what = " ".join(words)[:60]
        elif line.startswith("Installing collected packages:"):
            self.what = f"unpacking {len(words) - 3} packages"

    def advance(self, present: Collection[str], elapsed_s: float) -> None:
        """Take what is installed by now. Between two packages the estimate counts down."""
        others = min(1.0, sum(name not in HEAVY for name in present) / (self.expected - len(HEAVY)))
        heavy = sum(weight for name, weight in HEAVY.items() if name in present)
        unpacked = heavy + (1 - sum(HEAVY.values())) * others
        share = FETCH_SHARE * min(1.0, len(self.seen) / self.expected) + (1 - FETCH_SHARE) * unpacked
        if share > self.share:
            self.share, self.changed_s = min(share, 0.99), elapsed_s
            self.left_s = elapsed_s * (1 - share) / share if share > 0.2 else None

    def text(self, present: int, elapsed_s: float) -> str:
        """What to show, without the bar."""
        left_s = max(0.0, (self.left_s or 0.0) - (elapsed_s - self.changed_s))
        left = f", about {clock(left_s)} left" if left_s else ""
        count = f"{min(present, self.expected)}/{self.expected} packages"
        return f"{clock(elapsed_s)}{left}  {count}, {self.what}"


def follow(command: list[str], env: dict[str, str], log: Path, progress: PipProgress,
           packages: Callable[[], Collection[str]]) -> list[str]:
    """Run a command, show its progress on standard error and keep its output in `log`.

    `packages` names what is installed by now. Returns nothing when the command succeeded, else its last six
    lines. On Ctrl+C it is stopped and waited for.
    """
    tail: deque[str] = deque(maxlen=6)
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    show = _Line(sys.stderr)
    try:
        with log.open("a", encoding="utf-8") as kept:
            kept.write("$ " + " ".join(command) + "\n")
            while (line := _next(lines)) is not None:
                if line:
                    kept.write(line)
                    tail.append(line.rstrip())
                    progress.feed(line)
                show.update(progress, packages)
    finally:
        show.close()
        if process.poll() is None and sys.exc_info()[0] is not None:
            process.terminate()
        process.wait()
    return list(tail) or ["no output"] if process.returncode else []


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _next(lines: queue.Queue[str | None]) -> str | None:
    """The next line, an empty text when none came within half a second, None at the end."""
    try:
        return lines.get(timeout=0.5)
    except queue.Empty:
        return ""


class _Line:
    """One line on a terminal, rewritten in place; in a pipe a new line every few seconds."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.terminal = stream.isatty()
        self.width = min(shutil.get_terminal_size().columns, 100) - 1
        self.shown = time.monotonic()

    def update(self, progress: PipProgress, packages: Callable[[], Collection[str]]) -> None:
        """Show where the set-up is, unless it was shown a moment ago."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else PIPE_INTERVAL_S):
            return
        self.shown = now
        present = packages()
        progress.advance(present, now - progress.started)
        text = progress.text(len(present), now - progress.started)
        if self.terminal:
            done = int(20 * progress.share)
            line = f"[{'#' * done}{'.' * (20 - done)}] {progress.share:4.0%}  {text}"[:self.width]
            self.stream.write(f"\r{line:<{self.width}}")
        else:
            self.stream.write(f"  {progress.share:4.0%}  {text}\n")
        self.stream.flush()

    def close(self) -> None:
        """Leave the terminal's line clean."""
        if self.terminal:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
