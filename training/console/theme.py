"""One look for every view: the console, its colours, and how bytes, rates and times are written."""

from __future__ import annotations

import os
import re
import sys
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from training.records import GIB
from training.texts import visible

STYLES = Theme({"stage": "bold cyan", "good": "green", "warn": "yellow", "bad": "red", "quiet": "dim",
                "head": "bold"})
MIN_COLUMNS, MAX_COLUMNS = 60, 110
_BLANKS = re.compile(r" +(?=\n)")


class Outlasting:
    """A text stream that goes quiet when its reader is gone (`| head`, a closed terminal): work goes on."""

    def __init__(self, stream: IO[str]):
        self.stream = stream
        self.gone = False
        self.terminal = stream.isatty()

    def write(self, text: str) -> int:
        """Write, or do nothing once the reader is gone. Files and pipes get no blanks at line ends."""
        self._try(self.stream.write, text if self.terminal else _BLANKS.sub("", text))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once the reader is gone."""
        self._try(self.stream.flush)

    def _try(self, act: Any, *arguments: str) -> None:
        if self.gone:
            return
        try:
            act(*arguments)
        except (OSError, ValueError):
            self.gone = True
            mute(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def mute(stream: IO[str]) -> None:
    """Point a stream whose reader is gone at nothing, so that closing it at exit raises nothing either."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError):
        pass


def make_console(to_stderr: bool = False) -> Console:
    """The console for views. `to_stderr`: standard output is kept for one JSON document."""
    stream = sys.stderr if to_stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    console = Console(file=Outlasting(stream), theme=STYLES, highlight=False, soft_wrap=False)  # type: ignore[arg-type]
    console.width = max(MIN_COLUMNS, min(MAX_COLUMNS, console.width))
    return console


def rows(*heads: str, right: tuple[int, ...] = (), wide: int | None = None) -> Table:
    """A table without frames. `right`: the right-aligned columns; `wide`: the one that folds."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(heads),
                  header_style="quiet")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index in right else "left", no_wrap=index != wide,
                         overflow="fold" if index == wide else "ellipsis", ratio=1 if index == wide else None)
    return table


def plain(value: Any, style: str = "") -> Text:
    """A value as text in which nothing is markup and no control character acts."""
    return Text(visible(value), style=style)


def gib(size_bytes: float | None) -> str:
    """Bytes as GiB, small amounts as MiB.

    >>> gib(3 * 2**30), gib(5 * 2**20), gib(None)
    ('3.0 GiB', '5.0 MiB', 'not measured')
    """
    if size_bytes is None:
        return "not measured"
    return f"{size_bytes / GIB:,.1f} GiB" if size_bytes >= GIB / 2 else f"{size_bytes / 2**20:,.1f} MiB"


def span(seconds: float | None) -> str:
    """A time for people.

    >>> span(4.25), span(75), span(3 * 3600 + 120), span(None)
    ('4.2 s', '1:15 min', '3:02 h', 'not measured')
    """
    if seconds is None:
        return "not measured"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def amount(value: float | None, unit: str) -> str:
    """A measured figure with its unit.

    >>> amount(1.54e11, "FLOP/s"), amount(2.1e9, "bytes/s"), amount(None, "FLOP/s")
    ('154.0 GFLOP/s', '2.1 GB/s', 'not measured')
    """
    if value is None:
        return "not measured"
    if unit == "bytes":
        return gib(value)
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.1f} {letter}{'B/s' if unit == 'bytes/s' else unit}"
    return f"{value:,.1f} {unit}"
