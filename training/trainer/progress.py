"""Where a run is: what each checkpoint keeps of it beside weights and optimizer state, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from training.errors import DataError
from training.trainer import guard, pacing
from training.trainer.batches import Curriculum, Layout


@dataclass(kw_only=True)
class Progress:
    """Updates made and what they told. Fields that a checkpoint is older than take their defaults.

    `seconds`: of all sessions, until it was written. `losses`: the last applied updates', for `guard`.
    `passed_over`: updates whose windows were left out when loss spikes made the run go back, so that update i
    takes the windows of place i + passed_over. `anchor`: the step of the newest checkpoint to go back to.
    `ahead`: updates that the stages of growing context are before their schedule; `stage_losses`: the last
    ones of this stage, for `pacing`.
    """

    step: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    steps_fitted: int | None = None
    fitted_from: int = 0
    spikes: int = 0
    spikes_in_a_row: int = 0
    rollbacks: int = 0
    passed_over: int = 0
    anchor: int = 0
    losses: list[float] = field(default_factory=list)
    ahead: int = 0
    stage_losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, state: Mapping[str, Any], where: str) -> Progress:
        """From a checkpoint's state. Raises DataError for one that is not of this version or a later one."""
        try:
            return cls(**state)
        except TypeError as error:
            raise DataError(f"The state in {where} is not one that this version reads ({error}); remove it "
                            "to go on from the one before.") from error

    @property
    def place(self) -> int:
        """Where the next update's windows are in the data, in updates."""
        return self.step + self.passed_over

    def course(self, curriculum: Curriculum) -> Curriculum:
        """The stages of growing context, counted by updates made and not by windows passed over."""
        return replace(curriculum, ahead=self.ahead - self.passed_over)

    def learn(self, loss: float, window: int) -> None:
        """Keep the loss of an applied update, before it is counted."""
        self.spikes_in_a_row = 0
        self.losses = guard.remembered(self.losses, loss, window)

    def pace(self, loss: float, curriculum: Curriculum, layout: Layout) -> int:
        """Let the stage of growing context end once its loss no longer falls: how many updates early, else 0.

        Called after an applied update, before it is counted. Never in the last stage, that of full context.
        """
        course, place, early = self.course(curriculum), self.place, 0
        stage = course.stage_of(place, layout)
        if stage == course.stages - 1:
            return 0
        self.stage_losses = [*self.stage_losses, loss][-2 * pacing.HALF:]
        following = place + 1
        if pacing.levelled(self.stage_losses):
            while course.stage_of(following + early, layout) == stage:
                early += 1
            self.ahead += early
        if course.stage_of(following + early, layout) != stage:
            self.stage_losses = []
        return early

    def gone_back(self, then: Progress) -> Progress:
        """From an update that spiked to a checkpoint's progress: its windows and all since are passed over.

        >>> now = Progress(step=57, spikes=2, spikes_in_a_row=2)
        >>> now.gone_back(Progress(step=50)).place
        58
        """
        return replace(then, spikes=self.spikes, rollbacks=self.rollbacks + 1,
                       passed_over=self.place + 1 - then.step,
                       steps_fitted=self.steps_fitted, fitted_from=self.fitted_from)
