"""Fits the number of steps, once, to the seconds granted (training.budget_s) and the first steps' speed; and
tells when a stage of growing context has taught what it can (dataset.curriculum_pace)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from training.errors import EliteError
from training.rundir import RunDirectory, read_data, write_text

# The first step warms caches up; the fit is made after this many, from all but the first of the session.
FIT_AFTER = 6
LEAST_STEPS = 10
# Kept free for checkpoints and for steps that turn out slower than the measured ones.
RESERVE = 0.05
# A stage's last losses are compared in two halves of so many updates. Fewer tell a fall from noise too
# rarely; more would not fit into the stages of short runs, which are some tens of updates long.
HALF = 8


def fit(budget_s: float, planned: int, done: int, step_seconds: Sequence[float]) -> dict[str, Any]:
    """How many steps end within `budget_s`: at least 10, never more than planned. With the numbers it used.

    `done` steps are made; `step_seconds` are the durations of this session's, two or more. The median
    decides, since one slow step is common.

    >>> fit(100.0, 500, 6, [3.0, 1.0, 1.0, 1.0, 1.0, 1.0])["steps"]
    93
    """
    median_s = statistics.median(step_seconds[1:])
    left_s = budget_s * (1 - RESERVE) - sum(step_seconds)
    affordable = done + int(max(0.0, left_s) / median_s)
    steps = min(planned, max(LEAST_STEPS, affordable))
    return {"steps": steps, "planned": planned, "budget_s": budget_s, "step_s": median_s}


def explain(decision: dict[str, Any]) -> str:
    """The decision in one line."""
    predicted_s = decision["steps"] * decision["step_s"]
    return (f"{decision['steps']:,} of {decision['planned']:,} planned steps: a step takes "
            f"{decision['step_s']:.2f} s, so they take {predicted_s:,.0f} s of the "
            f"{decision['budget_s']:,.0f} s granted (training.budget_s).")


def record(run: RunDirectory, decision: Mapping[str, Any], identity_digest: str) -> None:
    """Write schedule.json before the decision is used: a killed run decides the same when resumed."""
    text = json.dumps({**decision, "identity": identity_digest}, indent=1)
    write_text(run.path / "schedule.json", text + "\n")


def recorded(run: RunDirectory, identity_digest: str) -> dict[str, Any] | None:
    """The decision of an earlier session of the same run, or None."""
    try:
        decision = read_data(run.path / "schedule.json")
    except EliteError:
        return None
    return decision if isinstance(decision, dict) and decision.get("identity") == identity_digest else None


def levelled(losses: Sequence[float]) -> bool:
    """Whether the loss no longer falls: the last 8 updates' mean is not below that of the 8 before by more
    than the standard error of the difference. False while there are fewer than 16.

    Growing windows: SkyLadder, arXiv:2503.15450, by a fixed schedule; following what the model can do rather
    than a schedule: competence-based curricula, arXiv:1903.09848, section 3. Here competence is that the loss
    at a context length has levelled off.

    >>> levelled([2.0 - 0.01 * update for update in range(16)])
    False
    >>> levelled([2.0, 2.1] * 8)
    True
    """
    if len(losses) < 2 * HALF:
        return False
    before, last = losses[-2 * HALF:-HALF], losses[-HALF:]
    error = math.sqrt((statistics.variance(before) + statistics.variance(last)) / HALF)
    return statistics.fmean(before) - statistics.fmean(last) <= error
