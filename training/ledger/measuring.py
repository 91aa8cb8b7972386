"""What each optimization does on this machine: the same run with it on and with it off, in pairs.

Both arms share repository, windows, seed and number of steps. Speed and memory are measured over a few steps,
arms in turn (off, on, off, on, ...), since a shared machine drifts. Where quality is at stake each pair has a
seed of its own, and entries whose arms without it are the same share that run while it is recent.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import EliteError, Interrupted, StoppedByUser
from training.ledger.arms import Runs
from training.ledger.catalogue import Optimization
from training.ledger.judging import ABSENT, FAILED, Arm
from training.ledger.records import Entry, entry
from training.models import resolve
from training.records import HardwareProfile

Progress = Callable[[str, int, int, str], None]
PAIRS = 3
# How long a shared arm without the optimization is taken for as fast as the machine is now.
RECENT_S = 90.0
# Seconds of a run on 2 idle cores, for the first estimate; then those measured take over.
TRAINED_S, TIMED_S = 6.0, 4.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both arms of an optimization with one seed. `off`: what its arm without it is configured as."""

    item: Optimization
    seed: int
    off: str


class Ledger:
    """Measures optimizations on one repository and machine, in folders below `work`.

    `pairs`: of each optimization, at least 2. `reduced`: see `Runs`.
    """

    def __init__(self, repo: str, profile: HardwareProfile, work: Path, pairs: int = PAIRS,
                 reduced: dict[str, Any] | None = None):
        if pairs < 2:
            raise ValueError("one pair tells nothing of the spread")
        self.profile, self.pairs = profile, pairs
        self.runs = Runs(repo=repo, profile=profile, work=work, reduced=reduced or {})
        self._shared: dict[tuple[str, int], tuple[float, Arm]] = {}
        self._spent_s: dict[bool, list[float]] = {True: [], False: []}

    def measure(self, items: Sequence[Optimization], progress: Progress) -> Iterator[Entry]:
        """The entries, each as soon as its last pair is done; what cannot run here comes first."""
        found: list[Pair] = []
        for item in items:
            missing = missing_needs(item, self.profile)
            try:
                found += [] if missing else self._pairs(item, progress)
            except EliteError as error:     # a plan that is refused here: two devices where there is one, say
                missing = str(error)
            if missing:
                yield entry(item, self.profile, ABSENT, missing)
        pairs, failed = ordered(found), set[str]()
        arms: dict[str, tuple[list[Arm], list[Arm]]] = {pair.item.id: ([], []) for pair in pairs}
        for index, pair in enumerate(pairs):
            if pair.item.id in failed:
                continue
            on, off = arms[pair.item.id]
            told = self._told(progress, pairs, index)
            try:
                off.append(self._off(pair, told))
                on.append(self._run(pair, "on", told))
            except (StoppedByUser, Interrupted):
                raise
            except EliteError as error:
                failed.add(pair.item.id)
                yield entry(pair.item, self.profile, FAILED, str(error))
                continue
            if len(on) == self.pairs:
                yield entry(pair.item, self.profile, steps=self._steps(pair.item), on=on, off=off)

    def _pairs(self, item: Optimization, progress: Progress) -> list[Pair]:
        base = self._base(item, lambda detail: progress("ledger", 0, 0, f"{item.id}: {detail}"))
        self.runs.config(self._settings(item, "on"), base, 0)
        config = self.runs.config(self._settings(item, "off"), base, 0)
        off = json.dumps(dict(config), sort_keys=True)
        return [Pair(item=item, seed=seed, off=off) for seed in range(self.pairs)]

    def estimate_s(self, pairs: Sequence[Pair]) -> float:
        """Seconds that pairs will take, by those measured so far."""
        total = 0.0
        for pair in pairs:
            known = self._spent_s[pair.item.trains]
            each = sum(known) / len(known) if known else TRAINED_S if pair.item.trains else TIMED_S
            total += each * (1.3 if pair.item.trains else 2.0)   # of shared arms one in three is run again
        return total

    def _told(self, progress: Progress, pairs: Sequence[Pair], index: int) -> Callable[[str], None]:
        item, left_min = pairs[index].item, max(1, round(self.estimate_s(pairs[index:]) / 60))
        head = f"{item.id}, pair {pairs[index].seed + 1} of {self.pairs}"

        def told(detail: str) -> None:
            progress("ledger", index, len(pairs), f"{head}: {detail}; about {left_min} min left")
        return told

    def _off(self, pair: Pair, told: Callable[[str], None]) -> Arm:
        key = (pair.off, pair.seed)
        made_s, arm = self._shared.get(key, (0.0, None))
        if arm is None or not pair.item.trains or time.monotonic() - made_s > RECENT_S:
            arm = self._run(pair, "off", told)
            self._shared[key] = (time.monotonic(), arm)
        return arm

    def _run(self, pair: Pair, arm: str, told: Callable[[str], None]) -> Arm:
        start = time.monotonic()
        item = pair.item
        folder, config = self.runs.folder(self._settings(item, arm), self._base(item, told), pair.seed, told)
        made = self.runs.train(folder, config, lambda detail: told(f"{arm}, {detail}"))
        shutil.rmtree(folder, ignore_errors=True)
        self._spent_s[item.trains].append(time.monotonic() - start)
        return made

    def _settings(self, item: Optimization, arm: str) -> dict[str, Any]:
        return self.runs.settings(item.model, item.trains, item.arm(arm))

    def _base(self, item: Optimization, told: Callable[[str], None]) -> Any:
        return self.runs.base(item.base, told) if item.model == "adapter" else resolve("embedded")

    def _steps(self, item: Optimization) -> int:
        return int(self._settings(item, "on")["training.max_steps"])


def ordered(found: Sequence[Pair]) -> list[Pair]:
    """Few-step pairs by optimization; training runs by what they are measured against, then by seed, so that
    a shared arm without the optimization is recent."""
    groups = {pair.off: index for index, pair in reversed(list(enumerate(found)))}
    timed = [pair for pair in found if not pair.item.trains]
    trained = [pair for pair in found if pair.item.trains]
    return timed + sorted(trained, key=lambda pair: (groups[pair.off], pair.seed))


def missing_needs(item: Optimization, profile: HardwareProfile) -> str:
    """Why this machine cannot run an optimization, or nothing."""
    for name in item.needs:
        support = profile.supports.get(name)
        if support is None or not support.works:
            if item.why_not_here:
                return f"needs hardware: {item.why_not_here}; `{item.script}` measures it there"
            return f"needs {name}: {support.why if support else 'not measured'}"
    return ""
