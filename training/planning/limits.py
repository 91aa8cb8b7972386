"""What each limit allows, tier by tier, and in words: device memory, host memory, disk, hours, repository,
model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from training.planning.memory import largest_term
from training.planning.situation import Situation, model_reason
from training.planning.tiers import Tier
from training.planning.timing import Schedule
from training.records import GIB, Choice, Limit, Memory

NAMES = ("device_memory", "host_memory", "disk", "hours", "repository", "model")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One window length worked out: all choices, memory and length of the run."""

    context_tokens: int
    target_tokens: int
    tier: int
    choices: dict[str, Choice]
    memory: Memory
    schedule: Schedule

    @property
    def step(self) -> str:
        """How a window is computed: plain, recomputed or streamed."""
        if self.choices["stream.chunk_tokens"].value:
            return "streamed"
        return "recomputed" if self.choices["training.checkpointing"].value else "plain"

    def told(self, source: str, why: str) -> Candidate:
        """The same with another reason for its window."""
        choice = Choice(self.context_tokens, source, why)
        return replace(self, choices={**self.choices, "dataset.context_tokens": choice})


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The highest tier within every limit (0: not even the first), and the limits that the next one
    breaks."""

    row: Candidate | None
    by: tuple[str, ...]

    @property
    def tier(self) -> int:
        """Its number; 0 below the table."""
        return self.row.tier if self.row else 0


def gib(size_bytes: float) -> str:
    """Bytes as GiB with one digit; below a tenth, with two significant ones.

    >>> gib(8589934592), gib(20 << 20)
    ('8.0', '0.02')
    """
    size = size_bytes / GIB
    return f"{size:,.1f}" if size >= 0.1 or not size else f"{size:.1g}"


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


def fits(situation: Situation, candidate: Candidate) -> dict[str, bool]:
    """The verdict of each limit on one candidate."""
    room = rooms(situation)
    return {"device_memory": candidate.memory.device_bytes <= room["device_memory"],
            "host_memory": candidate.memory.host_bytes <= room["host_memory"],
            "disk": candidate.memory.disk_bytes <= room["disk"],
            "hours": candidate.schedule.uncut_s <= situation.hours * 3600,
            "repository": candidate.context_tokens <= situation.repository_tokens,
            "model": candidate.context_tokens <= situation.max_context}


def rooms(situation: Situation) -> dict[str, int]:
    """Usable bytes by limit."""
    return {"device_memory": situation.device_bytes, "host_memory": situation.host_bytes,
            "disk": situation.profile.disk_free_bytes}


def reached(situation: Situation, rows: Iterable[Candidate]) -> Reached:
    """The last of the leading rows that are within every limit. `rows`: ascending; none is read after the
    first that is not."""
    last: Candidate | None = None
    for row in rows:
        verdict = fits(situation, row)
        if not all(verdict.values()):
            return Reached(row=last, by=tuple(name for name, fitting in verdict.items() if not fitting))
        last = row
    return Reached(row=last, by=())


def verdicts(situation: Situation, rows: Sequence[Candidate],
             fitting: Sequence[Mapping[str, bool]]) -> dict[str, Limit]:
    """The highest tier each limit alone allows. `rows`: one candidate for each tier, ascending; `fitting`:
    their verdicts."""
    room = rooms(situation)

    def judge(name: str, text: Callable[[Candidate], str]) -> Limit:
        return _judge(rows, [verdict[name] for verdict in fitting], text)
    return {
        "device_memory": judge("device_memory", lambda c: _device_text(c, room["device_memory"])),
        "host_memory": judge("host_memory", lambda c: f"needs {gib(c.memory.host_bytes)} of "
                                                      f"{gib(room['host_memory'])} GiB usable host memory"),
        "disk": judge("disk", lambda c: f"needs {gib(c.memory.disk_bytes)} of {gib(room['disk'])} GiB free "
                                        "on disk"),
        "hours": judge("hours", lambda c: f"takes {hours(c.schedule.uncut_s)} of "
                                          f"{hours(situation.hours * 3600)} granted"),
        "repository": _tokens_limit(situation.tiers, situation.repository_tokens,
                                    f"the repository has about {situation.repository_tokens:,} tokens"),
        "model": _tokens_limit(situation.tiers, situation.max_context, model_reason(situation)),
    }


def _device_text(candidate: Candidate, room: float) -> str:
    name, size = largest_term(candidate.memory)
    return (f"needs {gib(candidate.memory.device_bytes)} of {gib(room)} GiB usable device memory "
            f"(most: {name}, {gib(size)})")


def _judge(rows: Sequence[Candidate], fitting: Sequence[bool], text: Callable[[Candidate], str]) -> Limit:
    """The last tier up to which all fit, with its own need and that of the next."""
    count = fitting.index(False) if False in fitting else len(rows)
    parts = []
    if count:
        parts.append(f"tier {rows[count - 1].tier} {text(rows[count - 1])}")
    if count < len(rows):
        parts.append(f"{'even ' if not count else ''}tier {rows[count].tier} {text(rows[count])}")
    return Limit(tier=rows[count - 1].tier if count else 0, why="; ".join(parts))


def _tokens_limit(tiers: Sequence[Tier], room: int, why: str) -> Limit:
    reached_tier = max((row.tier for row in tiers if row.context_tokens <= room), default=0)
    following = next((row for row in tiers if row.tier == reached_tier + 1), None)
    more = f"; tier {following.tier} is a window of {following.context_tokens:,}" if following else ""
    return Limit(tier=reached_tier, why=why + more)
