"""Real updates of small models on this CPU and the bytes that they hold: the measured side of the planner.

A checkpoint of the family is made on disk with random weights and read by the trainer's own loader; the
update is the trainer's own (engine, chunked loss, clipping, optimizer). Bytes are PyTorch's allocations as
its profiler reports them: every tensor and every temporary inside an operator, and nothing of Python, of the
libraries or of the allocator's own reserve.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from training.longcontext import transfer
from training.planning import streaming
from training.records import BaseModel, ModelShape
from training.settings import Config
from training.shapes import shape_from_config
from training.trainer.engine import PlainEngine
from training.trainer.loading import load
from training.trainer.loss import causal_loss
from training.trainer.streaming import StreamedLoss


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One request: a family at a size, and how it is trained. `values`: configuration keys that differ."""

    family: str
    sizes: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The whole configuration."""
        return Config({"model.base": "x", "dataset.context_tokens": 512, "dataset.target_tokens": 128,
                       "training.accumulation": 1, "training.loss_chunk_tokens": 64, "lora.enabled": True,
                       "lora.rank": 8, "training.checkpointing": False, "training.schedule": "constant",
                       **self.values})


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one combination held: bytes before an update (weights, adapter, optimizer), at its peak; the sizes
    of what was alive at the peak."""

    shape: ModelShape
    resting_bytes: int
    peak_bytes: int
    alive: Counter[int]


def measured(combination: Combination) -> Step:
    """Load, take one update to warm up, and measure the next one."""
    with tempfile.TemporaryDirectory() as folder:
        shape = _write(combination, Path(folder))
        config = Config({**combination.config, "model.base": folder})
        run = Update(config, Path(folder))
        run()
        run.anew()
        gc.collect()
        resting = run.resting()
        peak, alive = live_bytes(run)
    return Step(shape=shape, resting_bytes=resting, peak_bytes=resting + peak, alive=alive)


def timed(combination: Combination, lengths: tuple[int, ...],
          repeats: int) -> tuple[ModelShape, list[list[float]]]:
    """Seconds of updates at each length, in turns, after one that is left out; target tokens keep their
    share."""
    with tempfile.TemporaryDirectory() as folder:
        shape = _write(combination, Path(folder))
        run = Update(Config({**combination.config, "model.base": folder}), Path(folder))
        found: list[list[float]] = [[] for _ in lengths]
        for _ in range(repeats):
            for length, seconds in zip(lengths, found, strict=True):
                run.at_length(length)
                run()
                # A short update is over before a neighbour's burst is, so it is taken more often.
                seconds += [_seconds(run) for _ in range(max(1, min(4, lengths[-1] // length // 2)))]
    return shape, found


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _write(combination: Combination, folder: Path) -> ModelShape:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(combination.family, **combination.sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return shape_from_config(json.loads((folder / "config.json").read_text()))


class Update:
    """One update of a loaded model, as the trainer's loop takes it."""

    def __init__(self, config: Config, folder: Path):
        store: Any = SimpleNamespace(vocab_tokens=64, pad_id=0, eos_id=0)
        device = torch.device("cpu")
        self.loaded, self.config = load(config, store, device), config
        self.engine = PlainEngine(self.loaded.model, self.loaded.trainable, config, device)
        self._folder = folder
        self.anew()
        self.at_length(config["dataset.context_tokens"])

    def at_length(self, length: int) -> None:
        """Windows of so many tokens, as many of them targets as in the configured window."""
        targets = self.config["dataset.target_tokens"] * length // self.config["dataset.context_tokens"]
        self.ids = torch.randint(0, 64, (self.config["training.micro_batch"], length))
        self.labels = self.ids.clone()
        self.labels[:, :length - targets] = -100

    def anew(self) -> None:
        """A streamed step without the buffers that it keeps from update to update, which then count."""
        self.loss: Any = causal_loss
        if self.config["stream.chunk_tokens"]:
            transfer.SLAB_BYTES = 64  # buffers of their own size, so that what is alive is what is used
            (self._folder / "stream").mkdir(exist_ok=True)
            self.loss = StreamedLoss(self.loaded.model, self.config, self._folder, torch.device("cpu"))

    def __call__(self) -> None:
        """Forward and backward of every micro-batch, clipping, and the optimizer's step."""
        chunk = self.config["training.loss_chunk_tokens"]
        for index in range(self.config["training.accumulation"]):
            ids, labels = self.ids.clone(), self.labels.clone()
            loss = self.engine.loss(lambda m, i, t: self.loss(m, i, t, None, chunk)[0], ids, labels)
            self.engine.backward(loss / ids.numel(), last=index == self.config["training.accumulation"] - 1)
            del loss
        self.engine.step(1e-4)

    def resting(self) -> int:
        """Bytes of weights with their constants, and of the optimizer's state."""
        seen: dict[int, int] = {}
        for tensor in [*self.loaded.model.parameters(), *self.loaded.model.buffers(), *self._more()]:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def _more(self) -> list[torch.Tensor]:
        found = []
        for parameter in self.loaded.model.parameters():
            if (state := getattr(parameter, "quant_state", None)) is not None:
                found += [state.absmax, *([state.state2.absmax] if state.nested else [])]
        outer = self.engine._optimizer
        for state in (*outer.state.values(), *getattr(getattr(outer, "inner", None), "state", {}).values()):
            found += [value for name, value in state.items()
                      if torch.is_tensor(value) and not name.startswith("qmap")]
        return found


def live_bytes(run: Callable[[], None]) -> tuple[int, Counter[int]]:
    """Most bytes alive at once on top of what was there, and the sizes of the pieces alive at that moment."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    alive: Counter[int] = Counter()
    at_peak: Counter[int] = Counter()
    for event in sorted(events, key=lambda e: e.start_ns()):
        size = event.nbytes()
        now += size
        alive[abs(size)] += 1 if size > 0 else -1
        if now > most:
            most, at_peak = now, alive.copy()
    return most, +at_peak


def predicted(combination: Combination, shape: ModelShape) -> dict[str, int]:
    """The planner's terms for it, without what is not PyTorch's: the runtime and the allocator's reserve."""
    base = BaseModel(name="x", location="x", licence="", shape=shape, lora_targets=())
    terms = streaming.estimate(base, combination.config).terms
    return {name: size for name, size in terms.items() if name not in ("runtime", "fragmentation")}


def changed(combination: Combination, **values: Any) -> Combination:
    """The same with other values."""
    return dataclasses.replace(combination, values={**combination.values, **values})
