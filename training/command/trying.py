"""The trial between plan and configuration: a folder for it, its subprocess, and the plan that comes out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from training.command.request import Checked
from training.configuration import ConfigurationManager
from training.errors import EliteError
from training.manager import launcher
from training.manager.trial import NOTHING, TrialManager
from training.planning import convergence, situation, tiers, trial
from training.planning.calculator import OptimalConfigCalculator
from training.planning.evidence import Evidence
from training.planning.situation import Situation
from training.planning.tuning import AdvancedOptimizer
from training.records import BaseModel, HardwareProfile, Plan, Trial, TrialStep

Progress = Callable[[str, int, int, str], None]
PREFIX = ".elite-trial-"


def planned(plan: Plan, made: Checked, profile: HardwareProfile, base: BaseModel, argv: Sequence[str],
            progress: Progress, measured: tuple[Evidence, ...] = ()) -> Plan:
    """The plan with its ranges: measured by a trial where `training.trial` is true, else the formulas'."""
    trying = Trying(made=made, profile=profile, base=base, argv=tuple(argv), progress=progress,
                    measured=measured)
    plan = trying.tried(plan) if plan.choices["training.trial"].value else trial.assumed(plan)
    place = trying.place
    loss = convergence.before(place.base.shape, place.embedded, None, trial.tokens_of(plan, place))
    return replace(plan, ranges={**plan.ranges, "loss": loss})


@dataclass(frozen=True, kw_only=True)
class Trying:
    """What a trial is taken with. `script`: the trainer's file; `measured`: what the plan was made with."""

    made: Checked
    profile: HardwareProfile
    base: BaseModel
    argv: tuple[str, ...]
    progress: Progress
    script: Path = launcher.SCRIPT
    measured: tuple[Evidence, ...] = ()

    @property
    def place(self) -> Situation:
        """What the plan started from."""
        return situation.build(self.made.request, self.profile, self.base, self.made.facts, tiers.load())[0]

    def tried(self, plan: Plan) -> Plan:
        """The plan with what a trial measured; planned again once, for less memory, when it does not fit.

        Raises DoesNotFit when that does not help either (unless `request.anyway`), and what
        `TrialManager.take` raises.
        """
        calibrated, factor = self._measured(plan)
        if factor is None:
            return self._batched(plan, calibrated)
        if self.made.request.anyway:
            return calibrated
        smaller = self._smaller(plan, calibrated, factor)
        again, factor = self._measured(smaller)
        if factor is not None:
            raise trial.refusal(again, self.place.device_bytes)
        return replace(again, notes=(*again.notes, trial.replanned(plan, calibrated)))

    def _measured(self, plan: Plan) -> tuple[Plan, float | None]:
        """The calibrated plan, and by how much the room must shrink for one that fits (None: this does)."""
        place = self.place
        after = trial.calibrated(plan, self._take(plan, place), place)
        return after, trial.room_factor(plan, after, place.device_bytes)

    def _batched(self, plan: Plan, calibrated: Plan) -> Plan:
        """The plan with the micro-batch that real steps find best, where one is looked for at all.

        `plan`: by formulas; `calibrated`: with its trial, whose step of the planned size is the first tried.
        """
        place, values = self.place, trial.plan_values(calibrated)
        tuner, known = AdvancedOptimizer(self.profile, place.user), calibrated.trial
        if known is None or not known.confirmed or tuner.not_searched(values, place.embedded):
            return calibrated
        first = known.steps[-1]

        def try_step(micro: int) -> TrialStep:
            if micro == first.micro_batch:
                return first
            found = self._take(trial.with_batch(calibrated, micro, self.base), place, sizes=1)
            if found.steps:
                return found.steps[-1]
            return replace(first, micro_batch=micro, seconds=(), error=found.skipped or "no step was taken")

        best = tuner.search(try_step, values, place.device_bytes).choices
        changed = {name: choice for name, choice in best.items() if choice.value != values[name]}
        if not changed:
            return replace(calibrated, choices={**calibrated.choices, **best})
        wider = trial.with_batch(plan, int(best["training.micro_batch"].value), self.base)
        after, factor = self._measured(replace(wider, choices={**wider.choices, **best}))
        return calibrated if factor is not None else after

    def _smaller(self, plan: Plan, calibrated: Plan, factor: float) -> Plan:
        """Another plan, for less memory. Raises DoesNotFit when there is none."""
        calculator = OptimalConfigCalculator(trial.shrunk(self.profile, factor), self.measured)
        try:
            smaller = calculator.calculate(self.made.request, self.base, self.made.facts)
        except EliteError:
            raise trial.refusal(calibrated, self.place.device_bytes) from None
        if smaller.memory.device_bytes >= plan.memory.device_bytes:
            raise trial.refusal(calibrated, self.place.device_bytes)
        return smaller

    def _take(self, plan: Plan, place: Situation, sizes: int = 0) -> Trial:
        """A trial of this plan; `sizes`: only so many of the longest lengths."""
        with folder_near(self.made.output) as folder:
            if folder is None:
                return replace(NOTHING, skipped=f"neither a folder near {self.made.output} nor one for "
                                                "temporary files can be written")
            ConfigurationManager(folder).write(plan, self.profile, [*self.argv])
            order = trial.order(plan, place)
            order = replace(order, lengths=order.lengths[-sizes:])
            return TrialManager(folder, script=self.script).take(order, self.progress)


@contextlib.contextmanager
def folder_near(output: Path) -> Iterator[Path | None]:
    """A folder on the run's own disk, since layer inputs may go there, else among temporary files; removed
    afterwards. None when neither can be written."""
    nearest = output.absolute().parent
    while not nearest.is_dir() and nearest != nearest.parent:
        nearest = nearest.parent
    for parent in (nearest, Path(tempfile.gettempdir())):
        if not os.access(parent, os.W_OK):
            continue
        with contextlib.suppress(OSError):
            made = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
            break
    else:
        yield None
        return
    with made as path:
        yield Path(path)
