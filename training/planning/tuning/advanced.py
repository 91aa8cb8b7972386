"""Batch, learning rate, precision and devices of a run, each a choice with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.planning.tuning import cards
from training.planning.tuning.search import BatchFit, TryStep, search
from training.records import BaseModel, Choice, HardwareProfile

STEP_WINDOWS = 8                 # windows of an update
LEAST_WINDOWS, MOST_WINDOWS = 4, 64
EPOCH_STEPS = 8                  # least updates in an epoch, where the windows allow
SCRATCH_TOKENS = 2048            # of an update, and at once, of a model made from nothing
SCRATCH_RATE, MUON_RATE = 2e-3, 1e-2


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A published learning rate: at how many windows an update, and where it stands."""

    rate: float
    windows: int
    source: str


# QLoRA's rows for OASST1 have 16 windows an update at every size: 2e-4 up to 13 B, 1e-4 from 33 B on.
LORA = Rate(rate=2e-4, windows=16, source="QLoRA, arXiv:2305.14314, table 9")
LORA_LARGE = Rate(rate=1e-4, windows=16, source=LORA.source)
LARGE_PARAMETERS = 20e9
FULL = Rate(rate=2e-5, windows=64, source="Llama 2's supervised tuning, arXiv:2307.09288, section 3.1")
# QLoRA's, whose rate is used. The update is (alpha / rank) B A: with alpha the same for every rank its first
# step does not depend on the rank, and so the best rate hardly does (Schulman et al., LoRA Without Regret,
# 2025).
LORA_ALPHA = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the batch depends on. `windows` of an epoch; `scratch`: a model made from nothing, plain step;
    `affordable`: windows of an update that leave enough updates in the time granted."""

    windows: int
    context_tokens: int
    devices: int = 1
    scratch: bool = False
    affordable: float = math.inf
    affordable_why: str = ""


class AdvancedOptimizer:
    """Batch, learning rate, precision and devices for a machine. `user`: configuration keys that were set."""

    def __init__(self, profile: HardwareProfile, user: Mapping[str, Any] | None = None):
        self.profile, self.user = profile, dict(user or {})

    def devices(self) -> dict[str, Choice]:
        """device.kind, device.count, device.gpus and device.threads."""
        gpus, why = cards.chosen(self.profile, self.user)
        kind = str(self.user.get("device.kind", self.profile.device))
        found = f"{len(self.profile.gpus)} x {self.profile.gpus[0].name}" if self.profile.gpus else ""
        cuda = kind == "cuda"
        return {
            "device.kind": Choice(self.profile.device, "measured", found or "no GPU was found"),
            "device.count": Choice(max(1, len(gpus)) if cuda else 1, "measured",
                                   f"one process for each GPU; {why}" if cuda else
                                   "one process uses every core"),
            "device.gpus": Choice(cards.named(gpus, self.profile) if cuda else "", "measured",
                                  why if cuda else "not applicable here, because no GPU is used"),
            "device.threads": Choice(0, "derived",
                                     f"all {self.profile.cpu_cores} cores, shared out among the processes")}

    def precision(self, device: str, scratch: bool = False) -> Choice:
        """The type of the computation. `scratch`: a model made from nothing, which keeps fp32 on a CPU."""
        if device == "cpu":
            return self._cpu_precision(scratch)
        works, why = cards.supported(self.profile, "bf16")
        lowest = cards.weakest(cards.chosen(self.profile, self.user)[0])
        if lowest >= 8 and works:
            return Choice("bfloat16", "measured",
                          f"compute capability {lowest:g} multiplies bf16 in tensor cores")
        reason = f"compute capability {lowest:g} has no bf16 tensor cores" if lowest < 8 else why
        return Choice("float16", "measured", f"{reason}; fp16 with a scaled loss")

    def _cpu_precision(self, scratch: bool) -> Choice:
        fp32, bf16 = self.profile.rate("cpu.matmul_fp32"), self.profile.rate("cpu.matmul_bf16")
        if not fp32 or not bf16:
            return Choice("float32", "derived", "the safe type on a CPU; bf16 was not measured")
        if bf16 >= 2 * fp32 and not scratch:
            return Choice("bfloat16", "measured", f"bf16 multiplies {bf16 / fp32:.1f} times as fast as fp32 "
                                                  "here")
        return Choice("float32", "measured", f"fp32 multiplies at {fp32 / 1e9:,.0f} GFLOP/s on this CPU, "
                                             f"bf16 at {bf16 / 1e9:,.3g}")

    def batch(self, work: Work) -> dict[str, Choice]:
        """training.micro_batch and training.accumulation: windows of an update as a power of two, between
        LEAST_WINDOWS and MOST_WINDOWS; fewer where the epoch or the time granted has too few."""
        micro = self._micro(work)
        own = int(self.user.get("training.micro_batch", micro.value)) * work.devices
        unit = (f"{SCRATCH_TOKENS:,} tokens" if work.scratch else f"{_windows(max(own, STEP_WINDOWS))}, of "
                f"{LEAST_WINDOWS} to {MOST_WINDOWS} that published recipes take")
        wanted = SCRATCH_TOKENS // work.context_tokens if work.scratch else STEP_WINDOWS
        limits = [(wanted // own, f"an update of about {unit}"),
                  (int(min(work.affordable, 1e9)) // own, work.affordable_why),
                  (work.windows // (EPOCH_STEPS * own),
                   f"{_windows(work.windows)}, so that an epoch still has {EPOCH_STEPS} updates")]
        least, why = min(limits, key=lambda limit: max(1, limit[0]))
        return {"training.micro_batch": micro,
                "training.accumulation": Choice(power_of_two(least), "derived", why)}

    def _micro(self, work: Work) -> Choice:
        if not work.scratch:
            return Choice(1, "derived", "long windows fill the device one at a time")
        fits = max(1, SCRATCH_TOKENS // work.context_tokens)
        return Choice(max(1, min(fits, work.windows // EPOCH_STEPS)), "derived",
                      f"about {SCRATCH_TOKENS:,} tokens at once; more is no faster on a CPU")

    def learning_rate(self, base: BaseModel, lora: bool, windows: int, scratch: bool = False,
                      muon: bool = False) -> Choice:
        """The highest learning rate, for updates of so many windows on all devices together.

        A published rate times sqrt(windows / its windows): the square-root rule for Adam (Malladi et al.,
        arXiv:2205.10287), of which only the rate is scaled here, since the factor stays between 1/4 and 2
        where the betas hardly move. The rates of a model made from nothing were measured on this one.
        """
        if scratch and muon:
            return Choice(MUON_RATE, "preset",
                          "held-out loss after 0.1 M tokens: 4.43 at 5e-3, 4.30 at 1e-2, 4.52 at 2e-2")
        if scratch:
            return Choice(SCRATCH_RATE, "preset",
                          "1.5e-3 and 3e-3 gave one held-out loss after 0.26 M tokens, 6e-3 more")
        large = base.shape.total_parameters > LARGE_PARAMETERS
        known = (LORA_LARGE if large else LORA) if lora else FULL
        return Choice(scaled_rate(known, windows), "derived", _rate_why(known, windows, lora))

    def not_searched(self, values: Mapping[str, Any], scratch: bool = False) -> str:
        """Why the micro-batch is not searched for by real steps; "" when it is."""
        if "training.micro_batch" in self.user or "training.accumulation" in self.user:
            return "set by the user"
        if values["stream.chunk_tokens"]:
            return "the streamed step works through one window in chunks, and more of them fill nothing"
        if scratch:
            return "its size was measured once; timing it again would make a run differ from its repetition"
        if values["device.kind"] == "cpu":
            return "a CPU is filled by one window, and a step too large would end the process, not the search"
        return ""

    def search(self, try_step: TryStep, values: Mapping[str, Any], room_bytes: int) -> BatchFit:
        """The micro-batch by real steps; see `search.search`."""
        return search(try_step, values, room_bytes)


def scaled_rate(known: Rate, windows: int) -> float:
    """The square-root rule, to three digits.

    >>> scaled_rate(LORA, 16), scaled_rate(LORA, 8), scaled_rate(FULL, 4)
    (0.0002, 0.000141, 5e-06)
    """
    return float(f"{known.rate * math.sqrt(windows / known.windows):.3g}")


def _rate_why(known: Rate, windows: int, lora: bool) -> str:
    rank = "; alpha / rank keeps it for every rank" if lora else ""
    if windows == known.windows:
        return f"{known.rate:g} for {_windows(windows)} an update ({known.source}){rank}"
    return (f"{known.rate:g} at {known.windows} windows an update ({known.source}), times sqrt({windows} / "
            f"{known.windows}) by the square-root rule for Adam (arXiv:2205.10287){rank}")


def power_of_two(number: float) -> int:
    """The largest power of two within a number, at least 1.

    >>> [power_of_two(n) for n in (0, 1, 3, 8, 31.5)]
    [1, 1, 2, 8, 16]
    """
    return 1 << max(0, int(number).bit_length() - 1)


def _windows(count: int) -> str:
    return f"{count:,} window{'s' if count != 1 else ''}"
