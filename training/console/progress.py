"""Progress of long work: bars with the time left on a terminal, a line every five seconds in a pipe."""

from __future__ import annotations

import re
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from training.console.theme import plain, span

PIPE_INTERVAL_S = 5.0
SAME_LINE_INTERVAL_S = 30.0
WORDS = {"profile": "measuring", "list": "listing files", "read": "reading",
         "split": "choosing what is held out", "tokenizer": "making the tokenizer", "encode": "tokenizing",
         "windows": "making windows", "write": "writing", "import": "loading libraries",
         "load": "loading the model",
         "compile_ops": "compiling DeepSpeed's op", "evaluate_before": "evaluating the untrained weights",
         "evaluate_after": "evaluating the trained weights", "evaluate": "evaluating",
         "evaluate_average": "evaluating their average", "train": "training", "save": "saving",
         "export": "writing the model", "download": "downloading", "preflight": "checking",
         "start": "starting", "restart": "starting again"}


# Counts in the details of these phases get a rate beside them: `1,204 files, 18.3 MB`.
RATED = ("read", "encode", "windows")
_COUNT = re.compile(r"([\d,]+(?:\.\d+)?) (files|MB|tokens|windows)\b")


class Pace:
    """The time left of one phase, from the share done since it began, and the rates of what its details
    count."""

    def __init__(self, now_s: float):
        self.began_s = now_s

    def rated(self, detail: str, now_s: float) -> str:
        """The detail with a rate after each count, once there is a second to judge by.

        >>> Pace(0.0).rated("1,204 files, 18.3 MB", 4.0)
        '1,204 files (301/s), 18.3 MB (4.6/s)'
        """
        elapsed_s = now_s - self.began_s
        if elapsed_s <= 1.0:
            return detail

        def beside(match: re.Match[str]) -> str:
            rate = float(match[1].replace(",", "")) / elapsed_s
            return f"{match[0]} ({rate:,.0f}/s)" if rate >= 10 else f"{match[0]} ({rate:.1f}/s)"
        return _COUNT.sub(beside, detail)

    def left_s(self, done: int, total: int, now_s: float) -> float | None:
        """Seconds left, or None while there is nothing to judge by."""
        elapsed_s = now_s - self.began_s
        return elapsed_s * (total - done) / done if 0 < done <= total and elapsed_s > 1.0 else None


def line_of(phase: str, done: int, total: int, detail: str, left_s: float | None) -> str:
    """One line for a pipe.

    >>> line_of("train", 3, 10, "loss 3.21", 12.0)
    'training 3/10, loss 3.21, 12.0 s left'
    >>> line_of("read", 1204, 1758, "1,204 files (301/s)", 1.8)
    'reading 68 %, 1,204 files (301/s), 1.8 s left'
    """
    word = WORDS.get(phase, phase)
    count = f" {done:,}/{total:,}" if total > 1 else ""
    if total and detail.startswith(f"{done:,} "):
        count = f" {100 * done / total:.0f} %"
    return ", ".join(part for part in (word + count, *_beside(word, detail, left_s)) if part)


def _beside(word: str, detail: str, left_s: float | None) -> tuple[str, str]:
    """The detail, unless it repeats the phase, and the time left, unless the detail tells it."""
    left = f"{span(left_s)} left" if left_s and "left" not in detail else ""
    return "" if detail == word else detail, left


class ProgressView:
    """Called as `progress(phase, done, total, detail)`; used as a context it cleans up after itself."""

    def __init__(self, console: Console):
        self.console = console
        self.phase, self.done = "", 0
        self.pace = Pace(0.0)
        self.shown, self.shown_s = "", 0.0
        self.task: TaskID | None = None
        self.bars = _bars(console) if console.is_terminal else None

    def __enter__(self) -> ProgressView:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show where the work is; `total` 0: not known."""
        now_s = time.monotonic()
        changed = phase != self.phase
        if changed or done < self.done:     # the next repository is read from its beginning
            self.phase, self.pace = phase, Pace(now_s)
        self.done = done
        left_s = self.pace.left_s(done, total, now_s)
        if phase in RATED:
            detail = self.pace.rated(detail, now_s)
        if self.bars is not None:
            self._draw(changed, done, total, detail, left_s)
        elif changed or now_s - self.shown_s >= PIPE_INTERVAL_S:
            self._print(line_of(phase, done, total, detail, left_s), now_s)

    def _print(self, line: str, now_s: float) -> None:
        if line == self.shown and now_s - self.shown_s < SAME_LINE_INTERVAL_S:
            return
        self.shown, self.shown_s = line, now_s
        self.console.print(plain("  " + line), soft_wrap=True)

    def _draw(self, changed: bool, done: int, total: int, detail: str, left_s: float | None) -> None:
        assert self.bars is not None
        word = WORDS.get(self.phase, self.phase)
        if changed and self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
        if self.task is None:
            self.task = self.bars.add_task(word, total=None, detail="", share="")
        shown = " · ".join(part for part in _beside(word, detail, left_s) if part)
        self.bars.update(self.task, completed=done, total=total or None, detail=plain(shown).plain,
                         share=f"{100 * done / total:3.0f}%" if total else "    ")


def _bars(console: Console) -> Progress:
    """Spinner, phase, bar, share and detail within 80 columns; gone when the work is done."""
    return Progress(SpinnerColumn("line"), TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=14), TextColumn("{task.fields[share]}", style="quiet"),
                    TextColumn("{task.fields[detail]}", markup=False), console=console, transient=True,
                    refresh_per_second=6)
