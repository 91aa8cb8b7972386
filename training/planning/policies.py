"""Which streamed step to run: policies that fit the machine, and the fastest of them by the time formula."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.longcontext.costs import Costs, costs, pinned, step_s, weight_bytes
from training.longcontext.policy import StreamPolicy
from training.planning import streaming, timing
from training.planning.limits import Candidate
from training.planning.situation import Situation
from training.records import ModelShape
from training.settings import BY_NAME, most_targets

LEAST_CONTEXT = 4096             # shorter windows are streamed only when the user asks for it
# From here on the streamed step trains in less memory at more tokens a second than the plain one on a CPU: a
# Llama of hidden 256 grew by 452 MiB and took 32.7 s at 16,384 tokens; Hugging Face 2,977 MiB and 42.1 s.
CPU_CONTEXT = 16_384
FASTER = 1.1                     # the streamed step is preferred to a plain one that fits from this factor on
TIE = 1.03                       # policies this close in time count as equal, and the simpler one is taken
PINNED_SHARE = 0.5               # of all host memory may be pinned; drivers refuse more, and so does WSL
CHUNKS = {"cuda": (32_768, 16_384, 8192, 4096, 2048), "cpu": (4096, 1024)}
MLP_TILES = (0, 2048)
PLAIN = "the plain step fits and is not slower"
OPEN = dict.fromkeys(streaming.FIELDS, "not chosen yet")
# (inputs, pages), simplest first.
PLACES = {"cuda": (("device", "device"), ("pinned", "device"), ("pinned", "pinned"), ("pageable", "device"),
                   ("pageable", "pageable"), ("disk", "device"), ("disk", "pinned"), ("disk", "pageable")),
          "cpu": (("device", "device"), ("disk", "device"))}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One policy worked out. `over`: the largest of need over room, 1 or less when it fits."""

    policy: StreamPolicy
    step_s: float
    over: float

    @property
    def complexity(self) -> int:
        """How many things move: what ties are broken by."""
        p = self.policy
        return (3 * (p.weights == "streamed") + 3 * (p.inputs == "disk") + 2 * (p.keep_every > 1)
                + (p.inputs != "device") + (p.pages != "device") + (p.attention == "keep")
                + (p.mlp_tokens > 0))


def asked(situation: Situation) -> bool | None:
    """Whether the user asked for the streamed step: by its chunk size, or by any other choice of it."""
    user = {name: value for name, value in situation.user.items() if name.startswith("stream.")}
    if "stream.chunk_tokens" in user:
        return bool(user["stream.chunk_tokens"])
    return True if any(value != BY_NAME[name].default for name, value in user.items()) else None


def choose(situation: Situation, values: Mapping[str, Any], user: Mapping[str, Any]) -> Fit:
    """The best policy for a configuration: the fastest that fits, else the one that is least over.

    `user`: stream.* keys that are fixed. Policies that need more of the machine's patience (rebuilt layers,
    the disk, streamed weights) are looked at only when nothing simpler fits.
    """
    search = _Search(situation, values, user)
    best: Fit | None = None
    for weights, disk in (("resident", False), ("resident", True), ("streamed", False), ("streamed", True)):
        for fit in search.stage(weights, disk):
            best = fit if best is None else _better(best, fit)
        if best is not None and best.over <= 1:
            break
    return best or search.fixed()


def _better(a: Fit, b: Fit) -> Fit:
    """Fitting before not; then time, with ties to the simpler, the larger chunk, the first."""
    if a.over > 1 or b.over > 1:
        return b if b.over < a.over else a
    if not (b.step_s < a.step_s * TIE and a.step_s < b.step_s * TIE):
        return a if a.step_s <= b.step_s else b
    return min(a, b, key=lambda fit: (fit.complexity, -fit.policy.chunk_tokens))


class _Search:
    """Policies of one configuration. What does not depend on the policy is worked out once."""

    def __init__(self, situation: Situation, values: Mapping[str, Any], user: Mapping[str, Any]):
        self._values, self._shape, self._device = values, situation.base.shape, str(values["device.kind"])
        self._user = {name.split(".")[1]: value for name, value in user.items() if name.startswith("stream.")}
        self._geometry = streaming.geometry(self._shape, values)
        self._outer = streaming.outer_bytes(self._shape, values)
        self._rates = {fast: timing.stream_rates(values, situation.profile, fast) for fast in (True, False)}
        self._length, self._batch = int(values["dataset.context_tokens"]), int(values["training.micro_batch"])
        self._room = _Room.of(situation, values)

    def stage(self, weights: str, disk: bool) -> Iterator[Fit]:
        """Policies of one stage, simplest place first; ends where nothing faster can follow."""
        if not self._allowed("weights", weights) or (weights == "streamed" and not self._can_stream()):
            return
        for inputs, pages in self._places():
            if (inputs == "disk") != disk and "inputs" not in self._user:
                continue
            found: list[Fit] = []
            for attention in self._options("attention", ("recompute", "keep")):
                found = list(self._line(inputs=inputs, pages=pages, attention=attention, weights=weights))
                yield from found
                if found[-1].over > 1:
                    break
            if any(_hard_to_beat(fit, self._length) for fit in found):
                return

    def _line(self, **choices: Any) -> Iterator[Fit]:
        """The fewest rebuilt layers that fit, with every chunk that fits beside them. The last one yielded
        fits, or nothing does."""
        strides, (least, *larger) = self._options("keep_every", _strides(self._shape.layers)), self._sizes()
        smallest = self._fit(keep_every=strides[-1], **least, **choices)
        if smallest.over > 1:
            yield smallest
            return
        for stride in strides:
            first = self._fit(keep_every=stride, **least, **choices)
            if first.over <= 1:
                break
        for size in larger:
            fit = self._fit(keep_every=stride, **size, **choices)
            if fit.over <= 1:
                yield fit
        yield first

    def _sizes(self) -> list[dict[str, int]]:
        """Chunks and the MLP tiles inside them, the one that takes least memory first."""
        return [{"chunk_tokens": chunk, "mlp_tokens": tile}
                for chunk in sorted(self._chunks()) for tile in self._tiles(chunk)]

    def fixed(self) -> Fit:
        """What the user asked for, as it is."""
        return self._fit(chunk_tokens=self._chunks()[0])

    def _places(self) -> list[tuple[str, str]]:
        known = PLACES[self._device]
        found = [(i, p) for i, p in known if self._allowed("inputs", i) and self._allowed("pages", p)]
        wanted = (self._user.get("inputs", "device"), self._user.get("pages", "device"))
        return found or [wanted]

    def _chunks(self) -> list[int]:
        if self._user.get("chunk_tokens"):
            return [int(self._user["chunk_tokens"])]
        return [chunk for chunk in CHUNKS[self._device] if chunk < self._length] or [self._length]

    def _tiles(self, chunk: int) -> list[int]:
        tiles = self._options("mlp_tokens", MLP_TILES)
        return sorted((t for t in tiles if t < chunk or "mlp_tokens" in self._user), reverse=True)

    def _options(self, name: str, known: Any) -> list[Any]:
        return [self._user[name]] if name in self._user else list(known)

    def _allowed(self, name: str, value: str) -> bool:
        return self._user.get(name, value) == value

    def _can_stream(self) -> bool:
        if "weights" in self._user:
            return True
        return (self._device == "cuda" and bool(self._values["lora.enabled"])
                and self._values["deepspeed.stage"] != 3)

    def _fit(self, **choices: Any) -> Fit:
        loss = int(self._values["training.loss_chunk_tokens"])
        policy = StreamPolicy(loss_tokens=loss or choices["chunk_tokens"], **{**choices, **self._user})
        found = costs(self._geometry, policy, self._length, batch=self._batch,
                      targets=most_targets(self._values))
        outer = self._outer - weight_bytes(self._geometry, policy)
        rates = self._rates[found.overlapped]
        return Fit(policy=policy, over=self._room.over(policy, found, outer),
                   step_s=step_s(found, rates) if rates.linear else math.inf)


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What a machine has for one process, and what it needs whatever the policy."""

    shape: ModelShape
    values: Mapping[str, Any]
    device_bytes: int
    host_bytes: float
    pinned_bytes: float
    disk_bytes: float

    @classmethod
    def of(cls, situation: Situation, values: Mapping[str, Any]) -> _Room:
        """The room of a situation. On a CPU host memory is the device's and is not counted again."""
        count, shape = int(values["device.count"]), situation.base.shape
        host = (situation.host_bytes - streaming.memory.host_bytes(shape, values, 0)) / count
        disk = situation.profile.disk_free_bytes - streaming.memory.disk_bytes(
            shape, values, situation.repository_tokens)
        pinned_bytes = min(PINNED_SHARE * situation.profile.ram_total_bytes,
                           situation.profile.rate("host.pinned_limit") or math.inf)
        return cls(shape=shape, values=values, device_bytes=situation.device_bytes, disk_bytes=disk / count,
                   host_bytes=math.inf if values["device.kind"] == "cpu" else host,
                   pinned_bytes=pinned_bytes / count)

    def over(self, policy: StreamPolicy, found: Costs, outer: float) -> float:
        """The largest of need over room."""
        device, host = outer + found.device_bytes, found.host_bytes
        device += streaming.fragmentation(self.shape, self.values, policy, found)
        if self.values["device.kind"] == "cpu":
            device, host = device + host, 0.0
        over = [(device, self.device_bytes), (host, self.host_bytes), (found.disk_bytes, self.disk_bytes)]
        if pinned(policy):
            over.append((host, self.pinned_bytes))
        return max(need / max(1.0, room) for need, room in over)


def _hard_to_beat(fit: Fit, length: int) -> bool:
    """Nothing computed twice that could be kept, in large pieces."""
    p = fit.policy
    return (fit.over <= 1 and p.keep_every == 1 and p.attention == "keep" and not p.mlp_tokens
            and p.chunk_tokens >= min(8192, length))


def worth_a_try(situation: Situation, context: int) -> bool:
    """Whether the streamed step can be better than a plain one that fits."""
    return situation.device == "cuda" or context >= CPU_CONTEXT


def preferred(situation: Situation, plain: Candidate, streamed: Candidate) -> bool:
    """Whether the streamed step is better than a plain one that fits."""
    return situation.device == "cpu" or plain.schedule.step_s > FASTER * streamed.schedule.step_s


def step_why(situation: Situation, context: int) -> str:
    """Why a window is trained through the streamed step."""
    if asked(situation):
        return "the streamed step, as you asked"
    if situation.device == "cpu" and context >= CPU_CONTEXT:
        return (f"the streamed step: from {CPU_CONTEXT:,} tokens on it takes less memory and time on a CPU "
                "than the plain one")
    return "the streamed step: the plain one does not fit, or is slower"


def _strides(layers: int) -> list[int]:
    """1, 2, 4 and so on up to the root of the layers, near which the least is stored (Griewank 1992)."""
    root = max(1, math.isqrt(layers))
    return sorted({1, *(2**i for i in range(1, root.bit_length()) if 2**i <= root), root})


def why(fit: Fit, device: str) -> dict[str, str]:
    """The reason for each stream.* choice, by field."""
    policy = fit.policy
    away = "host memory" if policy.inputs in ("pinned", "pageable") else policy.inputs
    held = "main memory" if device == "cpu" else "device memory"
    return {
        "chunk_tokens": "the fastest that fits, by operations and measured rates" if fit.over <= 1 else
                        "the nearest to fitting",
        "page_tokens": "as many keys as queries a kernel call: nothing to gain from less",
        "mlp_tokens": "an MLP's inner activations of a whole chunk fit" if not policy.mlp_tokens else
                      "tiles keep the MLP's inner activations small, for one more forward of it",
        "inputs": f"they fit in {held}" if policy.inputs == "device" else
                  f"{held} is short, so they go to {away}",
        "keep_every": "every layer's input fits" if policy.keep_every == 1 else
                      f"1/{policy.keep_every} of them fit; the rest is computed again",
        "encoding": "exact: the gradients equal the plain step's up to rounding",
        "pages": f"one layer's fit in {held}" if policy.pages == "device" else
                 f"one layer's keys, values and gradients leave {held} and stream back page by page",
        "attention": "its output does not fit beside the inputs, or saves no time"
                     if policy.attention == "recompute" else
                     "its output fits beside the inputs, and saves a forward pass",
        "keys": "two projections are cheaper than keeping them",
        "weights": f"they fit in {held}" if policy.weights == "resident" else
                   f"{held} is short; each layer's weights visit it twice a step",
    }
