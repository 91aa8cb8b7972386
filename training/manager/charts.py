"""The loss curve and small bars as inline SVG text: no scripts, no styles of their own, all text escaped.

Colours come from the page's classes, so the same drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 14, 36
MAX_POINTS = 500


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: each the mean of its neighbours, so no spike decides a pixel.

    >>> thin([(1, 4.0), (2, 2.0), (3, 1.0), (4, 0.0)], 2)
    [(1.5, 3.0), (3.5, 0.5)]
    """
    if len(points) <= limit:
        return list(points)
    found = []
    for index in range(limit):
        part = points[index * len(points) // limit: (index + 1) * len(points) // limit]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return found


def smooth(points: Points, share: float = 0.8) -> list[tuple[float, float]]:
    """An exponential mean over the steps, corrected for its start (Adam, section 3).

    >>> smooth([(1, 2.0), (2, 2.0)])
    [(1, 2.0), (2, 2.0)]
    """
    mean, weight, found = 0.0, 0.0, []
    for x, y in points:
        mean, weight = share * mean + (1 - share) * y, share * weight + (1 - share)
        found.append((x, round(mean / weight, 9)))
    return found


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count` of them.

    >>> ticks(0.3, 4.1)
    [1.0, 2.0, 3.0, 4.0]
    """
    raw = (high - low) / max(1, count) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]


def loss_curve(train: Points, held_out: Points) -> str:
    """Loss by step: each step faintly, their running mean, and the held-out evaluations as dots.

    (step, loss) pairs; an empty text when there are fewer than two in all.
    """
    if len(train) + len(held_out) < 2:
        return ""
    xs, ys = zip(*[*train, *held_out], strict=True)
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.5
    frame = _Frame(min(xs), max(xs), max(0.0, low - margin), high + margin)
    parts = [_grid(frame), _line("raw", frame, thin(train)), _line("mean", frame, thin(smooth(train))),
             _line("held", frame, held_out),
             *(f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4">'
               f"<title>step {x:,.0f}: held-out loss {y:.3f}</title></circle>" for x, y in held_out)]
    label = f"Training loss over {len(train):,} steps and {len(held_out)} held-out evaluations"
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
            f"{''.join(parts)}</svg>")


class _Frame:
    """Maps steps and losses to the drawing's units."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float):
        self.x_low, self.x_high, self.y_low, self.y_high = x_low, x_high, y_low, y_high

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(frame: _Frame) -> str:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(frame.x_low, frame.x_high, 6):
        if value == int(value):
            parts.append(f'<text class="tick" x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                         f'text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>'
                 f'<text class="tick" x="4" y="{TOP - 2}">loss</text>')
    return "".join(parts)


def _line(name: str, frame: _Frame, points: Points) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="{name}" points="{path}"/>'


def bar(share: float) -> str:
    """A bar filled to `share` of its width (0 to 1), for a table cell.

    >>> bar(0.5).count('width="60.0"')
    1
    """
    width = 120 * min(1.0, max(0.0, share))
    return ('<svg class="bar" viewBox="0 0 120 10" aria-hidden="true">'
            '<rect class="track" width="120" height="10" rx="3"/>'
            f'<rect class="fill" width="{width:.1f}" height="10" rx="3"/></svg>')
