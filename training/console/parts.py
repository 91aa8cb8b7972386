"""Sentences and tables as every stage shows them: indented by two columns."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from training.console.theme import plain, span


def heading(console: Console, number: int, name: str, seconds: float | None = None) -> None:
    """The line that opens a stage; `seconds`: how long its work took."""
    console.print()
    line = plain(f"{number} {name}", "stage")
    if seconds is not None:
        line.append(f"  {span(seconds)}", "quiet")
    console.print(line)


def note(console: Console, text: str, style: str = "", indent: int = 2) -> None:
    """One indented sentence."""
    console.print(Padding(plain(text, style), (0, 0, 0, indent)))


def show(console: Console, table: Table) -> None:
    """A table, unless it is empty."""
    if table.row_count:
        console.print(Padding(table, (0, 0, 0, 2)))
