"""What each limit allows, tier by tier, and in words: device memory, host memory, disk, hours, repository,
model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.planning.memory import largest_term
from training.planning.situation import Situation, model_reason
from training.planning.tiers import Tier
from training.planning.timing import Schedule
from training.records import GIB, Choice, Limit, Memory


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One window length worked out: all choices, memory and length of the run."""

    context_tokens: int
    target_tokens: int
    tier: int
    choices: dict[str, Choice]
    memory: Memory
    schedule: Schedule


def gib(size_bytes: float) -> str:
    """Bytes as GiB with one digit.

    >>> gib(8589934592)
    '8.0'
    """
    return f"{size_bytes / GIB:,.1f}"


def hours(seconds: float) -> str:
    """A duration in the unit a person would use.

    >>> hours(42), hours(600), hours(7200), hours(864000), hours(float("inf"))
    ('42 s', '10 min', '2.0 h', '10 days', 'an unknown time')
    """
    if seconds == float("inf"):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 5 * 86400 else f"{seconds / 86400:,.0f} days"


def verdicts(situation: Situation, rows: Sequence[Candidate]) -> dict[str, Limit]:
    """The highest tier each limit alone allows. `rows`: one candidate for each tier, ascending."""
    return {
        "device_memory": _judge(rows, situation.device_bytes, lambda c: c.memory.device_bytes, _device_text),
        "host_memory": _judge(rows, situation.host_bytes, lambda c: c.memory.host_bytes,
                              lambda need, room, c: f"needs {gib(need)} of {gib(room)} GiB usable host "
                                                    "memory"),
        "disk": _judge(rows, situation.profile.disk_free_bytes, lambda c: c.memory.disk_bytes,
                       lambda need, room, c: f"needs {gib(need)} of {gib(room)} GiB free on disk"),
        "hours": _judge(rows, situation.hours * 3600, lambda c: c.schedule.uncut_s,
                        lambda need, room, c: f"takes {hours(need)} of {hours(room)} granted"),
        "repository": _tokens_limit(situation.tiers, situation.repository_tokens,
                                    f"the repository has about {situation.repository_tokens:,} tokens"),
        "model": _tokens_limit(situation.tiers, situation.max_context, model_reason(situation)),
    }


def _device_text(need: float, room: float, candidate: Candidate) -> str:
    name, size = largest_term(candidate.memory)
    return f"needs {gib(need)} of {gib(room)} GiB usable device memory (most: {name}, {gib(size)})"


def _judge(rows: Sequence[Candidate], room: float, need_of: Callable[[Candidate], float],
           text: Callable[[float, float, Candidate], str]) -> Limit:
    """The last tier up to which all fit, with its own need and that of the next."""
    fitting = 0
    for candidate in rows:
        if need_of(candidate) > room:
            break
        fitting += 1
    parts = []
    if fitting:
        last = rows[fitting - 1]
        parts.append(f"tier {last.tier} {text(need_of(last), room, last)}")
    if fitting < len(rows):
        first = rows[fitting]
        parts.append(f"{'even ' if not fitting else ''}tier {first.tier} {text(need_of(first), room, first)}")
    return Limit(tier=rows[fitting - 1].tier if fitting else 0, why="; ".join(parts))


def _tokens_limit(tiers: Sequence[Tier], room: int, why: str) -> Limit:
    reached = max((row.tier for row in tiers if row.context_tokens <= room), default=0)
    following = next((row for row in tiers if row.tier == reached + 1), None)
    more = f"; tier {following.tier} is a window of {following.context_tokens:,}" if following else ""
    return Limit(tier=reached, why=why + more)
