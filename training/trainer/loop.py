"""The training loop: updates until the last step, a stop, three updates in a row that are not finite, or loss
spikes that two returns to a checkpoint did not end."""

from __future__ import annotations

import logging
import math
import random
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.errors import CannotWrite, DataError, EliteError, Interrupted, StoppedByUser
from training.rundir import RunDirectory
from training.settings import Config
from training.trainer import checkpoints, guard, identities, pacing, schedules
from training.trainer.averaging import Average
from training.trainer.batches import Batch, Curriculum, Layout, Store, planned_steps, read_update
from training.trainer.engine import Captured, Engine
from training.trainer.failing import is_out_of_memory
from training.trainer.journal import Heartbeat, Journal
from training.trainer.loss import LossFunction
from training.trainer.progress import Progress as Progress
from training.trainer.resources import device_peak_bytes, resident_bytes
from training.trainer.stopping import Watch, stop_error

log = logging.getLogger(__name__)

_SIGNALS = {"": 0, "SIGINT": 1, "SIGTERM": 1 << 20}


def _cannot_go_back(captured: Captured) -> None:
    raise EliteError("This training was made without a way to put a checkpoint's weights back.")


@dataclass(kw_only=True)
class Training:
    """Everything one run trains with. Called by all ranks: `evaluate(step)` every training.eval_steps,
    `put_back` to go on with a checkpoint's weights and optimizer state. Only rank 0 has an `average`."""

    run: RunDirectory
    config: Config
    store: Store
    engine: Engine
    loss_function: LossFunction
    heartbeat: Heartbeat
    journal: Journal
    watch: Watch
    identity: dict[str, Any]
    session_start: float
    progress: Progress = field(default_factory=Progress)
    evaluate: Callable[[int], Any] = lambda step: None
    put_back: Callable[[Captured], None] = _cannot_go_back
    average: Average | None = None
    _earlier_s: float = 0.0
    _durations: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.layout = Layout(windows=self.store.count("train"), micro=config["training.micro_batch"],
                             accumulation=config["training.accumulation"], ring=config["parallel.ring"],
                             ranks=self.engine.ranks // config["parallel.ring"])
        self.curriculum = Curriculum(stages=config["dataset.curriculum_stages"],
                                     share=config["dataset.curriculum_share"],
                                     context_tokens=config["dataset.context_tokens"],
                                     target_tokens=config["dataset.target_tokens"])
        self.planned = planned_steps(config, self.layout)
        self._earlier_s = self.progress.seconds
        self._tell_steps()

    @property
    def steps(self) -> int:
        """The last step of the run, as far as it is known."""
        return self.planned if self.progress.steps_fitted is None else self.progress.steps_fitted

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.progress.step / self.layout.updates_per_epoch

    def seconds(self) -> float:
        """Of this and all earlier sessions; a killed session counts up to its last checkpoint."""
        return self._earlier_s + time.monotonic() - self.session_start

    def train(self) -> None:
        """Go on to the last step. Raises StoppedByUser or Interrupted after a stop's checkpoint."""
        self._evaluate_if_due()  # what ended the start before may have cut it off
        while (before := self.progress.step) < self.steps:
            if asked := self._asked_in_one():
                self.save()
                raise stop_error(asked, self.progress.step)
            if self.progress.step > before:  # not after a return to a checkpoint, which has had all this
                self._fit_steps()
                self._after_step()
        if self.progress.step:
            self.save(regular=True)

    def _asked_in_one(self) -> str:
        """One update, or the name of the signal that ended it. Memory that ran out leaves a checkpoint, so
        that no update is made twice; then it is raised."""
        try:
            return self._train_one()
        except (StoppedByUser, Interrupted):
            self.engine.discard()
            return self.watch.poll()
        except Exception as error:
            self._save_without_memory(error, "train")
            raise

    def _save_without_memory(self, error: Exception, phase: str) -> None:
        """A checkpoint where memory ran out in this phase, if rank 0 can make it without the others."""
        if is_out_of_memory(error) and self.engine.captures_alone:
            traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
            self.engine.discard()
            self._save_or_warn(regular=False)
            self.heartbeat.beat(phase, self.progress.step, self.steps)  # where it ran out

    def _after_step(self) -> None:
        step, config = self.progress.step, self.config
        if step >= self.steps:
            return
        if config["training.save_steps"] and step % config["training.save_steps"] == 0:
            self._save_or_warn()
        self._evaluate_if_due()

    def _evaluate_if_due(self) -> None:
        """The evaluation of the step just reached, if it has one; one that is recorded is not made again."""
        step, every = self.progress.step, self.config["training.eval_steps"]
        if not every or step % every or not 0 < step < self.steps:
            return
        try:
            self.evaluate(step)
        except Exception as error:
            self._save_without_memory(error, "evaluate")
            raise
        self._keep_best()
        self.heartbeat.beat("train", step, self.steps)

    def _train_one(self) -> str:
        """One update. The signal's name when a stop was asked for: the update is then left to the resume."""
        start, step, engine = time.monotonic(), self.progress.step, self.engine
        self.heartbeat.beat("train", step, self.steps)
        seed = self.config["run.seed"]
        seed_all(seed, step, engine.rank)
        batches, own_targets = read_update(self.store, self.progress.place, self.layout, engine.rank, seed,
                                           self.progress.course(self.curriculum))
        targets = int(engine.total(own_targets))
        if not targets:
            raise EliteError(f"Update {step + 1} has no target token in its {len(batches)} micro-batches.")
        summed = torch.zeros((), device=engine.device)
        for index, batch in enumerate(batches):
            if asked := self._stop_asked():
                return asked
            self.heartbeat.beat("train", step, self.steps)
            summed += self._micro_batch(batch, targets, last=index == len(batches) - 1)
        mean = engine.total(float(summed)) / targets
        rate = self._rate(step)
        if spike := guard.judge(self.progress.losses, mean, self.config["training.spike_sigma"],
                                self.config["training.spike_window"]):
            engine.discard()
            self._bear(spike, rate, targets, time.monotonic() - start)
            return ""
        norm = engine.step(rate)  # skips by itself: a loss that is not finite has a gradient that is not
        if norm is not None and not math.isfinite(mean):
            raise EliteError(f"The loss of update {step + 1} is {mean} and its gradient's norm is {norm:g}.")
        if norm is not None:
            self._learn_from(mean)
            if self.average is not None:
                self.average.update(step + 1, self._steps_at(step))
        self._record(mean, norm, rate, targets, time.monotonic() - start)
        return ""

    def _micro_batch(self, batch: Batch, targets: int, last: bool) -> Tensor:
        """Its summed loss; its gradients are added. A stop ends it where it is, if this process can save
        without the others: at the longest contexts it takes minutes."""
        with self.watch.at_once() if self.engine.captures_alone else nullcontext():
            loss = self.loss(batch)
            self.engine.backward(loss / targets, last=last)
            return loss.detach()  # without its graph, which keeps what bitsandbytes holds outside of it

    def _learn_from(self, mean: float) -> None:
        """What the loss of an applied update tells the guard and the stages of growing context."""
        progress, config = self.progress, self.config
        progress.learn(mean, config["training.spike_window"])
        if config["dataset.curriculum_pace"] == "dynamic":
            early = progress.pace(mean, self.curriculum, self.layout)
            if early and self.engine.rank == 0:
                log.info("step %d: the loss no longer falls; the next stage of growing context begins %d "
                         "updates early", progress.step + 1, early)

    def _bear(self, spike: guard.Spike, rate: float, targets: int, seconds: float) -> None:
        """Skip the update, or go back to a checkpoint. Raises EliteError when that has not helped."""
        progress = self.progress
        progress.spikes += 1
        progress.spikes_in_a_row += 1
        if progress.spikes_in_a_row >= guard.IN_A_ROW and self._go_back(spike):
            return
        if self.engine.rank == 0:
            log.warning("step %d: the %s; the update is skipped", progress.step + 1, spike)
        self._record(spike.loss, None, rate, targets, seconds, skipped="spike")

    def _go_back(self, spike: guard.Spike) -> bool:
        """Take the weights of the last checkpoint before the spikes, and windows after theirs. Together.

        False when there is no checkpoint and the update is to be skipped. A run that is killed after this
        goes on from the same checkpoint as it lies there, meets the spikes again, and comes back here.
        """
        now, run, config, main = self.progress, self.run, self.config, self.engine.rank == 0
        name = self.engine.share(checkpoints.before_spikes(run.path, now.anchor) if main else "")
        if now.rollbacks >= guard.ROLLBACKS or (not name and now.spikes_in_a_row >= guard.IN_A_ROW_ALONE):
            raise EliteError(guard.hopeless(spike, now.step + 1, now.rollbacks,
                                            config["training.learning_rate"], config["training.spike_sigma"]))
        if not name:
            return False
        captured, state = checkpoints.load(run.path / name)
        self.put_back(captured)
        if self.average is not None:
            self.average.restore(captured)
        self.progress = now.gone_back(Progress.of(state, name))
        if main:
            checkpoints.drop_after(run.path, self.progress.step)
            self.journal.rewind(self.progress.step, identities.digest_of(self.identity))
            log.warning("step %d: the %s, as was the one before; back to %s, and on with windows after these",
                        now.step + 1, spike, name)
        self._tell_steps()
        return True

    def loss(self, batch: Batch) -> Tensor:
        """A micro-batch's summed loss on the device, ready for `engine.backward`."""
        chunk, smoothing = self.config["training.loss_chunk_tokens"], self.config["training.label_smoothing"]
        more = {"smoothing": smoothing} if smoothing else {}

        def work(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
            return self.loss_function(model, ids, labels, None, chunk, **more)[0]

        device = self.engine.device
        return self.engine.loss(work, batch.ids.to(device), batch.labels.to(device))

    def _stop_asked(self) -> str:
        """The signal that any rank was sent; all ranks leave together."""
        total = self.engine.total(_SIGNALS[self.watch.poll()])
        return "SIGTERM" if total >= _SIGNALS["SIGTERM"] else "SIGINT" if total else ""

    def _steps_at(self, step: int) -> int:
        """The last step of the run, as far as it was known at update `step` (from 0)."""
        return self.planned if step < self.progress.fitted_from else self.steps

    def _rate(self, step: int) -> float:
        config = self.config
        share = schedules.share(config["training.schedule"], step, self._steps_at(step),
                                config["training.warmup_share"], config["training.min_lr_share"])
        return float(config["training.learning_rate"]) * share

    def _record(self, mean: float, norm: float | None, rate: float, targets: int, seconds: float,
                skipped: str = "") -> None:
        """One update more; `norm` None: it was skipped, for `skipped` or because it was not finite."""
        progress = self.progress
        epoch = progress.step / self.layout.updates_per_epoch
        progress.step += 1
        broken = norm is None and not skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if broken else 0
        progress.skipped += broken
        progress.tokens_trained += targets if norm is not None else 0
        self._durations.append(seconds)
        self._tell_steps()
        if self.engine.rank == 0:
            peak = device_peak_bytes(self.engine.device)
            self.journal.metrics({"step": progress.step, "epoch": epoch, "loss": mean, "lr": rate,
                                  "grad_norm": norm, "tokens": targets, "tokens_per_s": targets / seconds,
                                  "device_bytes": peak, "host_bytes": resident_bytes(), "time": time.time(),
                                  **({"skipped": skipped} if skipped else {})})
            shown = f"{norm:.3f}" if norm is not None else f"{skipped or 'not finite'}, update skipped"
            log.info("step %d of %d: loss %.4f, rate %.3g, norm %s, %.0f tokens/s", progress.step, self.steps,
                     mean, rate, shown, targets / seconds)
        self._give_up_if_hopeless(mean)

    def _give_up_if_hopeless(self, mean: float) -> None:
        if self.progress.skipped_in_a_row >= self.engine.patience:
            progress, rate = self.progress, self.config["training.learning_rate"]
            raise EliteError(f"{progress.skipped_in_a_row} updates in a row were not finite (loss {mean}, up "
                             f"to step {progress.step}). Lower training.learning_rate (now {rate:g}); no "
                             "checkpoint holds anything of them.")

    def _fit_steps(self) -> None:
        progress, durations = self.progress, self._durations
        if (not self.config["training.budget_s"] or progress.steps_fitted is not None
                or progress.step < pacing.FIT_AFTER or len(durations) < 2):
            return
        decision: dict[str, Any] = {}
        if self.engine.rank == 0:
            decision = pacing.fit(self.config["training.budget_s"], self.planned, progress.step, durations)
            decision["from_step"] = progress.step
            pacing.record(self.run, decision, identities.digest_of(self.identity))
            log.info(pacing.explain(decision))
        self.adopt(self.engine.share(decision))

    def adopt(self, decision: dict[str, Any]) -> None:
        """Use a decided number of steps; the schedule follows it from the step of the decision on."""
        self.progress.steps_fitted, self.progress.fitted_from = decision["steps"], decision["from_step"]
        self._tell_steps()

    def _tell_steps(self) -> None:
        self.heartbeat.step, self.heartbeat.steps = self.progress.step, self.steps

    def save(self, regular: bool = False, tries: int = 2) -> None:
        """Write a checkpoint of this step, then let go of old ones. By all ranks; before step 1 nothing.

        `regular`: an uninterrupted run makes it, too, so it is one to go back to from loss spikes. A disk's
        error that passes does not end the training: after one try of the last save comes another.
        """
        if not self.progress.step:
            return
        self._check_windows()
        failure, earlier = "", self.progress.anchor
        self.progress.seconds = self.seconds()
        if regular and not self.progress.spikes_in_a_row:
            self.progress.anchor = self.progress.step
        captured = self.engine.capture()
        if self.average is not None:
            self.average.capture(captured)
        if self.engine.rank == 0:
            self.heartbeat.beat("save", detail=f"checkpoint-{self.progress.step}")
            try:
                path = self._write(captured, earlier, tries)
                self.prune()
                log.info("saved %s", path.name)
            except CannotWrite as error:
                failure = str(error)
        if failure := self.engine.share(failure):
            self.progress.anchor = earlier
            raise CannotWrite(failure)

    def _check_windows(self) -> None:
        """No checkpoint is made of windows that changed on the way. By all ranks. Raises DataError."""
        if name := self.engine.share(self.store.written_to()):
            raise DataError(f"dataset/{name} was written to during the training, so no checkpoint is made of "
                            f"step {self.progress.step:,}; put the dataset back, or start anew with --fresh.")

    def _write(self, captured: Captured, anchor: int, tries: int = 1) -> Path:
        """Where the disk is full, all but the newest valid checkpoint and those needed make room first."""
        run, state = self.run.path, asdict(self.progress)
        try:
            return checkpoints.save(run, captured, state, self.identity)
        except checkpoints.NoRoom as error:
            newest, _ = checkpoints.newest_valid(run)
            kept = {anchor, self._best(), checkpoints.step_of(newest)}
            if not checkpoints.retain(run, 0, kept):
                raise
            log.warning("%s Older checkpoints were deleted for it.", error)
            return checkpoints.save(run, captured, state, self.identity)
        except CannotWrite as error:
            if tries < 2:
                raise
            log.warning("%s It is tried once more, since no other save follows.", error)
            return self._write(captured, anchor)

    def prune(self) -> None:
        """Delete the checkpoints that need not be kept. On rank 0; elsewhere nothing."""
        if self.engine.rank == 0:
            checkpoints.retain(self.run.path, self.config["training.keep_checkpoints"],
                               {self.progress.anchor, self._best()})

    def _best(self) -> int | None:
        """The step with the lowest held-out loss, if it is to be kept."""
        if not self.config["training.keep_best"]:
            return None
        return checkpoints.best(self.journal.evaluations(), identities.digest_of(self.identity))

    def _keep_best(self) -> None:
        """Save the step just evaluated when none was better: else the best weights have no checkpoint."""
        if not self.engine.share(self._best() == self.progress.step):
            return
        if self.progress.anchor == self.progress.step:  # saved already
            self.prune()
        else:
            self._save_or_warn()

    def _save_or_warn(self, regular: bool = True) -> None:
        try:
            self.save(regular, tries=1)
        except CannotWrite as error:
            log.warning("%s The training goes on; the next checkpoint is tried at its own step.", error)


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed every generator from the step itself, so that dropout is the same after any number of resumes."""
    mixed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint32)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
