"""What a plan starts from: the request, the machine, the base and the repository, checked together."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training import models, weights
from training.errors import EliteError, UsageError
from training.planning import mix, streaming
from training.planning.evidence import Evidence, applicable
from training.planning.memory import CUDA_RUNTIME_BYTES
from training.planning.tiers import Tier, tier_of
from training.planning.timing import TOKENS_PER_BYTE
from training.planning.tuning import cards
from training.records import BaseModel, Gpu, HardwareProfile, RepositoryFacts, Request
from training.settings import BY_NAME, problems_in

DEFAULT_HOURS = 48.0
MIN_CONTEXT = 64
HEADROOM = {"cuda": 0.12, "cpu": 0.15}     # of device memory, left for what no formula sees
HOST_HEADROOM = 0.10
# YaRN was tested up to 32 times the native context (arXiv:2309.00071, section 4: 4k to 128k).
MAX_ROPE_FACTOR = 32
_FLAGS = {"training.epochs": "epochs", "run.seed": "seed", "run.name": "model_name",
          "dataset.context_tokens": "context_tokens"}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The inputs of one plan. `user`: every configuration key the user set, flags before settings;
    `measured`: what the ledger says of this machine."""

    request: Request
    profile: HardwareProfile
    base: BaseModel
    facts: RepositoryFacts
    tiers: tuple[Tier, ...]
    user: Mapping[str, Any]
    measured: tuple[Evidence, ...] = ()

    @functools.cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """What the ledger says of this kind of model on this device, largest gain first."""
        lora = bool(self.user.get("lora.enabled", not self.embedded))
        kind = "embedded" if self.embedded else "adapter" if lora else "full"
        return applicable(self.measured, kind, self.device, self.user)

    @property
    def embedded(self) -> bool:
        """Whether the base is the embedded model, trained from scratch."""
        return self.base.location == models.EMBEDDED

    @property
    def device(self) -> str:
        """`cuda` or `cpu`: what the user set, else the GPU when there is one."""
        return str(self.user.get("device.kind", self.profile.device))

    @property
    def hours(self) -> float:
        """Hours granted."""
        return DEFAULT_HOURS if self.request.max_hours is None else self.request.max_hours

    @property
    def repository_tokens(self) -> int:
        """The repository's size in tokens, estimated from its bytes."""
        return int(self.facts.code_bytes * TOKENS_PER_BYTE)

    @property
    def max_context(self) -> int:
        """The longest context the base can be trained at: native, or 32 times that where YaRN can be set, or
        as far as the model.rope_factor that the user set."""
        shape = self.base.shape
        if self.embedded or not shape.rope or shape.rope_scaled:
            return shape.native_context
        return int(max(MAX_ROPE_FACTOR, self.rope_factor) * shape.native_context)

    @property
    def rope_factor(self) -> float:
        """YaRN's factor as the user set it; 0 when not."""
        return float(self.user.get("model.rope_factor", 0.0))

    @property
    def gpus_used(self) -> tuple[Gpu, ...]:
        """The GPUs that run a process each."""
        return cards.chosen(self.profile, self.user)[0]

    @functools.cached_property
    def device_total_bytes(self) -> int:
        """Device memory as measured: allocatable (or free), of the smallest of several GPUs; no headroom."""
        if self.device == "cpu":
            return self.profile.ram_available_bytes
        # The probe that measured `allocatable_bytes` held a CUDA context itself, which the terms count again.
        rooms: list[float] = []
        for gpu in self.gpus_used:
            measured = self.profile.rate(f"gpu{gpu.index}.allocatable_bytes")
            rooms.append(measured + CUDA_RUNTIME_BYTES if measured else gpu.free_bytes)
        return int(min(rooms, default=0))

    @functools.cached_property
    def device_bytes(self) -> int:
        """Device memory a plan may use: `device_total_bytes` less headroom."""
        return int((1 - HEADROOM["cpu" if self.device == "cpu" else "cuda"]) * self.device_total_bytes)

    @functools.cached_property
    def download_bytes(self) -> int:
        """16-bit weights still to be fetched; 0 for local folders, cached models and the embedded one."""
        local = self.embedded or os.path.isabs(self.base.location)
        return 0 if local or weights.cached_folder(self.base.location) else (
            2 * self.base.shape.total_parameters)

    @property
    def host_bytes(self) -> int:
        """Host memory a plan may use."""
        return int((1 - HOST_HEADROOM) * self.profile.ram_available_bytes)

    def works(self, name: str) -> tuple[bool, str]:
        """Whether an optimization works here, and why not. What was not examined is taken to work."""
        return cards.supported(self.profile, name)


def build(request: Request, profile: HardwareProfile, base: BaseModel, facts: RepositoryFacts,
          tiers: tuple[Tier, ...], measured: tuple[Evidence, ...] = ()) -> tuple[Situation, list[EliteError]]:
    """The situation and everything that is wrong with the request."""
    found = problems_in(request.settings)
    wrong = {name for name in request.settings if problems_in({name: request.settings[name]})}
    user = {name: value for name, value in request.settings.items() if name not in wrong}
    for key, attribute in _FLAGS.items():
        value = getattr(request, attribute)
        if value not in (None, ""):
            found += _flag_problems(key, value)
            user[key] = value
    if base.location == models.EMBEDDED:
        base = models.embedded(user)
    situation = Situation(request=request, profile=profile, base=base, facts=facts, tiers=tiers, user=user,
                          measured=measured)
    found += _tier_problems(request, tiers) + _context_problems(situation) + _device_problems(situation)
    found += [UsageError(text) for text in streaming.problems(user, base.shape.layers, situation.device)]
    found += [UsageError(text) for text in mix.problems(user, base.name, bool(base.fim))]
    if request.max_hours is not None and not (math.isfinite(request.max_hours) and request.max_hours > 0):
        found.append(UsageError(f"--max-hours {request.max_hours:g} grants no time; give a number above 0 "
                                f"(default {DEFAULT_HOURS:g})."))
    return situation, found


def _flag_problems(key: str, value: Any) -> list[EliteError]:
    if key == "dataset.context_tokens":
        return []
    entry = BY_NAME[key]
    flag = {"training.epochs": "--epochs", "run.seed": "--seed", "run.name": "--model-name"}[key]
    if entry.low is not None and value < entry.low:
        return [UsageError(f"{flag} {value}: the least is {entry.low:g}.")]
    if entry.high is not None and value > entry.high:
        return [UsageError(f"{flag} {value}: the most is {entry.high:,.15g}.")]
    return []


def _tier_problems(request: Request, tiers: tuple[Tier, ...]) -> list[EliteError]:
    number, last = request.tier, tiers[-1].tier
    if number is None:
        return []
    if not 1 <= number <= last:
        return [UsageError(f"--tier {number}: the table (configs/tiers.yaml) has tiers 1 to {last}; leave "
                           "it out and "
                           "the highest that fits is chosen.")]
    context = request.context_tokens
    if context is not None and context >= 1 and tier_of(context, tiers) != number:
        return [UsageError(f"--tier {number} is {tiers[number - 1].context_tokens:,} tokens and --context "
                           f"{context:,} "
                           f"is tier {tier_of(context, tiers)}; give one of them.")]
    return []


def _context_problems(situation: Situation) -> list[EliteError]:
    context, base = situation.user.get("dataset.context_tokens"), situation.base
    if context is None:
        return _native_problems(situation)
    if context < MIN_CONTEXT:
        return [UsageError(f"--context {context}: a window has at least {MIN_CONTEXT} tokens.")]
    if context > situation.max_context:
        return [UsageError(f"--context {context:,} is beyond what {base.name} can be trained at: "
                           f"{situation.max_context:,} tokens ({_max_reason(situation)}). "
                           f"Use --context {situation.max_context}{_further(situation, context)}.")]
    return []


def _native_problems(situation: Situation) -> list[EliteError]:
    number = situation.request.tier
    if number is None or not 1 <= number <= len(situation.tiers):
        return []
    context = situation.tiers[number - 1].context_tokens
    if context <= situation.max_context:
        return []
    return [UsageError(f"--tier {number} is {context:,} tokens, beyond what {situation.base.name} can be "
                       "trained at: "
                       f"{situation.max_context:,} ({_max_reason(situation)}). "
                       f"Use --context {situation.max_context}{_further(situation, context)}.")]


def _further(situation: Situation, context: int) -> str:
    """The way past what YaRN was tested at."""
    shape = situation.base.shape
    if situation.embedded or not shape.rope or shape.rope_scaled:
        return ""
    return f", or try --set model.rope_factor={math.ceil(context / shape.native_context)}"


def _max_reason(situation: Situation) -> str:
    shape = situation.base.shape
    if situation.embedded:
        return "the embedded model's limit"
    if not shape.rope:
        return "it has no rotary embedding to stretch"
    if shape.rope_scaled:
        return "its rotary embedding is already scaled"
    if situation.rope_factor > MAX_ROPE_FACTOR:
        return f"{situation.rope_factor:g} times its native {shape.native_context:,}, as you set it"
    return f"{MAX_ROPE_FACTOR} times its native {shape.native_context:,}, the most YaRN was tested at"


def model_reason(situation: Situation) -> str:
    """Why the base stops at its longest context."""
    return f"{situation.base.name} reaches {situation.max_context:,} tokens: {_max_reason(situation)}"


def _device_problems(situation: Situation) -> list[EliteError]:
    profile = situation.profile
    if situation.device == "cuda" and not profile.gpus:
        return [UsageError("device.kind is cuda and no GPU was found; leave it out or set device.kind=cpu.")]
    count = situation.user.get("device.count", 1)
    if situation.device == "cuda" and count > len(profile.gpus):
        return [UsageError(f"device.count is {count} and {len(profile.gpus)} GPUs were found.")]
    return [UsageError(text) for text in cards.problems(profile, situation.user)]
