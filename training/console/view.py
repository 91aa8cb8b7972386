"""What a command shows while it works: numbered stages with progress, then one JSON document where asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from training.console import stages
from training.console.progress import ProgressView
from training.console.theme import make_console, mute
from training.records import dumps


class View:
    """The views of one command. With `json` everything but the document goes to standard error."""

    def __init__(self, json: bool):
        self.json = json
        self.console = make_console(to_stderr=json)
        self.number = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[ProgressView]:
        """Open a numbered stage; its progress is gone when its tables are shown."""
        self.number += 1
        stages.heading(self.console, self.number, name)
        with ProgressView(self.console) as progress:
            yield progress

    def show(self, draw: Callable[..., None], *values: Any) -> None:
        """Draw one of the tables of `stages`."""
        draw(self.console, *values)

    def say(self, text: str, style: str = "") -> None:
        """One sentence."""
        stages.note(self.console, text, style)

    def document(self, data: Any) -> None:
        """The one JSON document, where it was asked for."""
        if not self.json:
            return
        try:
            sys.stdout.write(dumps(data))
            sys.stdout.flush()
        except BrokenPipeError:
            mute(sys.stdout)
