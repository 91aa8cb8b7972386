"""The loss that a running training is expected to end at, refitted from its own curve as it grows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import CannotWrite
from training.records import Range
from training.rundir import write_record

NAME = "forecast.json"
REFIT_S = 5.0
# (tokens trained on, loss) so far, the tokens of the whole run and those of an epoch (0: unknown) -> the loss
# at its end, None while unknown.
Forecast = Callable[[Sequence[tuple[float, float]], float, float], Range | None]


class LossForecast:
    """Collects metrics rows; `text` tells what is expected, and what was expected at half is written once."""

    def __init__(self, run_path: Path, forecast: Forecast | None, now: Callable[[], float] = time.monotonic):
        self._path, self._forecast, self._now = run_path / NAME, forecast, now
        self._tokens = 0.0
        self._points: list[tuple[float, float]] = []
        self._steps: list[float] = []
        self._epochs = 0.0
        self._fitted_s = float("-inf")
        self._found: Range | None = None

    def clear(self) -> None:
        """Forget the curve: its file started over."""
        self._tokens, self._points, self._steps = 0.0, [], []

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """More rows of metrics.jsonl; those without a finite loss are left out."""
        for row in rows:
            tokens, loss, step = (row.get(name) for name in ("tokens", "loss", "step"))
            if all(isinstance(value, int | float) for value in (tokens, loss, step)):
                self._tokens += float(tokens or 0)
                self._points.append((self._tokens, float(loss or 0)))
                self._steps.append(float(step or 0))
                epochs = row.get("epoch")
                self._epochs = float(epochs) if isinstance(epochs, int | float) else 0.0

    def text(self, steps: int) -> str:
        """The expected final loss with its interval, or nothing yet."""
        if self._forecast is None or not self._points or steps <= 0:
            return ""
        self._keep_half(steps)
        if self._now() - self._fitted_s >= REFIT_S:
            self._fitted_s = self._now()
            self._found = self._fit(len(self._points), steps)
        found = self._found
        return f"at end {found.expected:.2f} ({found.low:.2f}-{found.high:.2f})" if found else ""

    def _fit(self, count: int, steps: int) -> Range | None:
        """From the first `count` points; later steps are taken to have as many tokens as those so far."""
        if self._forecast is None or not count or not self._steps[count - 1]:
            return None
        # A row's epoch is that of its update's beginning.
        before = self._points[-2][0] if len(self._points) > 1 else 0.0
        return self._forecast(self._points[:count],
                              self._points[count - 1][0] * steps / self._steps[count - 1],
                              before / self._epochs if self._epochs > 0 else 0.0)

    def _keep_half(self, steps: int) -> None:
        """Once half of the steps are made: what they said of the end, for the report."""
        if self._steps[-1] < steps / 2 or self._path.exists():
            return
        found = self._fit(sum(step <= steps / 2 for step in self._steps), steps)
        if found is not None:
            with contextlib.suppress(CannotWrite, ValueError):
                write_record(self._path, found)
