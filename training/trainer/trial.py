"""A trial: real steps of the planned model on random tokens at growing lengths, timed and weighed.

`trial-order.json` in the run directory says which; `trial.json` holds what was found, rewritten after each
length, so that a process killed for want of memory leaves what it knew.

Shapes: B windows of a micro-batch, S tokens.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.errors import CannotWrite
from training.records import Trial, TrialStep
from training.rundir import TRIAL, TRIAL_ORDER, TrialLength, TrialOrder, read_record, write_record
from training.trainer import phases
from training.trainer.batches import IGNORED, Batch
from training.trainer.completion import PREFIX_TOKENS, greedy
from training.trainer.failing import is_out_of_memory
from training.trainer.loading import LoadedModel
from training.trainer.loop import Training, seed_all
from training.trainer.loss import held_still
from training.trainer.resources import measured_bytes, reset_peak
from training.trainer.session import Session

log = logging.getLogger(__name__)

SMALL_BATCHES = 3                # a warm-up and two that are timed, in one update
# At the planned size micro-batches are repeated while they take this long in all, at most so often: the first
# tells a GPU's peak, more tell the spread, and how far a CPU's heap grows.
REPEAT_S, REPEATS = {"cpu": 12.0, "cuda": 4.0}, 8
# Real windows differ in length, and a block freed at one length does not hold the next longer one, which a
# CPU's heap shows: its peak grew by a tenth over 4 micro-batches of 2,025-2,034 tokens.
SHORTEST = 0.96
HEAP_BATCHES = 4
COMPLETION_TOKENS = 8            # generated to time one more token of a completion


class RandomStore:
    """Stands in for the dataset: windows of the planned length of random tokens. What the loop and the loader
    read of WindowStore."""

    pad_id = 0
    eos_id = 0
    digest = "0" * 64

    def __init__(self, vocab_tokens: int, length: TrialLength, seed: int):
        self.vocab_tokens, self._length = vocab_tokens, length
        self._generator = np.random.default_rng((seed, 1))

    def count(self, split: str) -> int:
        """Windows of a split."""
        return 64

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The train windows' order."""
        return np.arange(64)

    def written_to(self) -> str:
        """No file: these windows are made up."""
        return ""

    def window(self, split: str, index: int, seed: int = 0, epoch: int = 0,
               context_limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), int64 (S,)."""
        batch = self.batch(1, self._length)
        return batch.ids[0].numpy(), batch.labels[0].numpy()

    def varied(self, length: TrialLength, count: int) -> list[TrialLength]:
        """Slightly shorter lengths, ascending as the loop sorts them, and the whole one."""
        shares = np.sort(self._generator.uniform(SHORTEST, 1.0, count - 1))
        tokens = [max(2, int(length.context_tokens * share)) for share in shares]
        return [*(replace(length, context_tokens=each, target_tokens=min(length.target_tokens, each))
                  for each in tokens), length]

    def batch(self, windows: int, length: TrialLength) -> Batch:
        """Random ids (B, S); the last tokens of each window are its targets, as in the plan."""
        ids = self._generator.integers(0, self.vocab_tokens, (windows, length.context_tokens), dtype=np.int64)
        labels = ids.copy()
        labels[:, :length.context_tokens - length.target_tokens] = IGNORED
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


@dataclass(kw_only=True)
class Trying:
    """A trial under way. `found` is what trial.json holds so far."""

    session: Session
    order: TrialOrder
    store: RandomStore
    loaded: LoadedModel
    training: Training
    found: Trial
    peaks: list[int] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.training.engine.device

    def keep(self, **changes: Any) -> None:
        """More is known: write it, on rank 0."""
        self.found = replace(self.found, **changes)
        if self.session.rank == 0:
            write_record(self.session.run.path / TRIAL, self.found)

    def beat(self, detail: str) -> None:
        """Tell the command where the trial is; raises when a stop was asked for."""
        done, total = len(self.found.steps), len(self.order.lengths)
        self.session.heartbeat.progress("trial", self.session.watch.check)("trial", done, total, detail)


def run(session: Session) -> None:
    """Load the model as the run would, take the steps, and write trial.json. Raises as the training would."""
    phases.with_folder(session, _run)


def _run(session: Session) -> None:
    session.mark("import")
    order = read_record(TrialOrder, session.run.path / TRIAL_ORDER)
    device = phases.choose_device(session)
    store: Any = RandomStore(order.vocab_tokens, order.lengths[-1], session.config["run.seed"])
    loaded, training, first = phases.prepare(session, store, {}, device)
    seed_all(session.config["run.seed"], 0, session.rank)
    loading_bytes = measured_bytes(device)
    reset_peak(device)
    trying = Trying(session=session, order=order, store=store, loaded=loaded, training=training, found=Trial(
        steps=(), load_s=session.marks["load"], resident_bytes=measured_bytes(device),
        other_bytes=loading_bytes, date=datetime.now(timezone.utc).isoformat(timespec="seconds")))
    trying.keep()
    with session.watch.at_once():
        if take_lengths(trying):
            _around(trying)
    training.engine.close()
    del first  # kept until here, as the training keeps it


def take_lengths(trying: Trying) -> bool:
    """Every length in turn; False when memory ran out. The planned one is left out when it would take too
    long."""
    *small, planned = trying.order.lengths
    for length in small:
        if not _take(trying, length, [SMALL_BATCHES]):
            return False
    expected_s = extrapolated(trying.found.steps, trying.order.lengths)
    expected_s = float(trying.training.engine.share(expected_s))
    if expected_s > trying.order.limit_s:
        trying.keep(skipped=f"a micro-batch of {planned.context_tokens:,} tokens would take about "
                            f"{expected_s:,.0f} s; the trial has {trying.order.limit_s:,.0f} s for it")
        return True
    whole = _take(trying, planned, _sizes(trying, expected_s))
    trying.keep(confirmed=whole)
    return whole


def extrapolated(steps: tuple[TrialStep, ...], lengths: tuple[TrialLength, ...]) -> float:
    """Seconds of a micro-batch of the planned length, along the line through the last two lengths over what
    the formulas expect of them; 0 when nothing was measured."""
    measured = [(length.expected_s, statistics.median(step.seconds))
                for step, length in zip(steps, lengths, strict=False) if step.seconds and length.expected_s]
    if not measured:
        return 0.0
    (x, y), target = measured[-1], lengths[-1].expected_s
    slope = y / x
    if len(measured) > 1 and x > measured[-2][0] and y > measured[-2][1]:
        slope = (y - measured[-2][1]) / (x - measured[-2][0])
    return y + slope * max(0.0, target - x)


def _sizes(trying: Trying, micro_s: float) -> list[int]:
    """Micro-batches of each update at the planned length. Two in one update where there is time: from the
    second on, gradients are added to those that are there."""
    accumulation = int(trying.session.config["training.accumulation"])
    repeats = max(1, min(REPEATS, int(REPEAT_S[trying.device.type] / max(micro_s, 1e-3))))
    if trying.device.type == "cpu" and HEAP_BATCHES * micro_s <= trying.order.limit_s / 4:
        repeats = max(repeats, HEAP_BATCHES)
    per_update = min(accumulation, repeats if repeats > 1 or 2 * micro_s > trying.order.limit_s else 2)
    return [per_update] * max(1, repeats // per_update)


def _take(trying: Trying, length: TrialLength, updates: list[int]) -> bool:
    """Updates at one length, into `found.steps`; False when memory ran out (which is then written there).

    Ranks that wait for one another cannot go on without one: with several the error ends the process.
    """
    trying.beat(f"{length.context_tokens:,} tokens")
    gc.collect()
    reset_peak(trying.device)
    step = TrialStep(context_tokens=length.context_tokens, target_tokens=length.target_tokens, update_s=0.0,
                     micro_batch=int(trying.session.config["training.micro_batch"]), seconds=(), peak_bytes=0)
    try:
        step = _measured(trying, step, length, updates)
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())[:300]
        if trying.session.ranks > 1 or not is_out_of_memory(error):
            raise
        step = replace(step, peak_bytes=measured_bytes(trying.device), error=f"out of memory: {text}")
    trying.keep(steps=(*trying.found.steps, step))
    log.info("%s", step)
    return not step.error


def _measured(trying: Trying, step: TrialStep, length: TrialLength, updates: list[int]) -> TrialStep:
    micro_s: list[float] = []
    update_s: list[float] = []
    loss = 0.0
    for batches in updates:
        seconds, last_s, loss = _update(trying, length, batches)
        micro_s += seconds
        update_s.append(last_s)
    live = torch.cuda.max_memory_allocated(trying.device) if trying.device.type == "cuda" else None
    return replace(step, seconds=tuple(micro_s[1:] or micro_s), update_s=statistics.median(update_s),
                   peak_bytes=measured_bytes(trying.device), live_bytes=live, loss=loss)


def _update(trying: Trying, length: TrialLength, batches: int) -> tuple[list[float], float, float]:
    """One update that leaves the weights as they are (its rate is 0): seconds by micro-batch, seconds of the
    optimizer, mean loss."""
    engine, micro = trying.training.engine, int(trying.session.config["training.micro_batch"])
    targets = batches * micro * min(length.target_tokens, length.context_tokens - 1)
    planned = length == trying.order.lengths[-1]
    lengths = trying.store.varied(length, batches) if planned else [length] * batches
    seconds, summed = list[float](), 0.0
    for index in range(batches):
        trying.session.watch.check()
        batch = trying.store.batch(micro, lengths[index])
        start = time.monotonic()
        loss = trying.training.loss(batch)
        engine.backward(loss / targets, last=index == batches - 1)
        summed += float(loss.detach())
        _wait_for(trying.device)
        seconds.append(time.monotonic() - start)
        del loss
    start = time.monotonic()
    engine.step(0.0)
    _wait_for(trying.device)
    return seconds, time.monotonic() - start, summed / targets


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _around(trying: Trying) -> None:
    """What a run does besides its steps: an evaluation and a checkpoint."""
    reset_peak(trying.device)
    trying.beat("an evaluation")
    evaluation_s = trying.training.engine.share(_evaluation_s(trying))
    trying.beat("a checkpoint")
    save_s = _save_s(trying)
    trying.keep(evaluation_s=evaluation_s, save_s=save_s,
                other_bytes=max(trying.found.other_bytes, measured_bytes(trying.device)))


def _evaluation_s(trying: Trying) -> float | None:
    """Seconds of one evaluation, from one window and one short completion. Together; None off rank 0 where
    only that one evaluates."""
    config, order = trying.session.config, trying.order
    length = order.lengths[-1]
    if not trying.found.confirmed:  # the longest that was tried, scaled as the formulas say
        length = order.lengths[max(0, len(trying.found.steps) - 1)]
    scale = order.lengths[-1].expected_s / length.expected_s if length.expected_s else 1.0

    def work(model: Any) -> float:
        with held_still(model):
            window_s = _timed(trying, lambda: _score(trying, model, length))
            if not order.completions:
                return window_s * scale * order.held_out_windows
            first_s, token_s = _completion_s(trying, model)
        whole_s = first_s + token_s * (config["evaluation.completion_tokens"] - 1)
        return window_s * scale * order.held_out_windows + whole_s * order.completions

    return trying.training.engine.on_model(work)


def _score(trying: Trying, model: Any, length: TrialLength) -> None:
    batch, chunk = trying.store.batch(1, length), trying.session.config["training.loss_chunk_tokens"]
    ids, labels = batch.ids.to(trying.device), batch.labels.to(trying.device)
    trying.training.loss_function(model, ids, labels, None, chunk)


def _completion_s(trying: Trying, model: Any) -> tuple[float, float]:
    """Seconds until a completion's first token, and of each further one."""
    room = trying.session.config["dataset.context_tokens"] - 1
    limit = max(1, min(trying.session.config["evaluation.completion_tokens"], room))
    prefix = max(1, min(PREFIX_TOKENS, room - limit))
    ids = trying.store.batch(1, TrialLength(context_tokens=prefix, target_tokens=1, expected_s=0.0)).ids
    before: Tensor = ids.to(trying.device)
    with getattr(trying.training.loss_function, "aside", nullcontext)():
        first_s = _timed(trying, lambda: greedy(model, before, 1, lambda made: False))
        more_s = _timed(trying, lambda: greedy(model, before, 1 + COMPLETION_TOKENS, lambda made: False))
    return first_s, max(0.0, more_s - first_s) / COMPLETION_TOKENS


def _timed(trying: Trying, act: Callable[[], object]) -> float:
    start = time.monotonic()
    act()
    _wait_for(trying.device)
    return time.monotonic() - start


def _save_s(trying: Trying) -> float | None:
    """Seconds of a real checkpoint; None where it cannot be written."""
    start = time.monotonic()
    trying.training.progress.step = 1
    try:
        trying.training.save()
    except CannotWrite as error:
        log.warning("%s", error)
        return None
    return time.monotonic() - start
