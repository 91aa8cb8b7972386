"""What to change when memory ran out: one rung at a time, with the same updates of the same windows.

Every rung leaves the course of the training as it was up to rounding (`trainer.identities.HARMLESS`): as many
windows in an update, the same ones in the same order, as many updates. A shorter context would be another
training, so it is never taken here; the last line says how to ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.settings import contradictions

LEAST_LOSS_CHUNK, LEAST_CHUNK = 64, 256
STREAM_CHUNK = 4096
# Where layer inputs go next, the nearest first.
AWAY = {"cuda": {"device": "pinned", "pinned": "disk", "pageable": "disk"}, "cpu": {"device": "disk"}}
EVALUATION = ("evaluate_before", "evaluate_after", "evaluate_average", "evaluate")
DEVICE, HOST = "device", "host"

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One change: keys with their new values, and what it is in a few words."""

    name: str
    changes: dict[str, Any]


def next_rung(values: Values, memory: str, phase: str) -> Rung | None:
    """The first rung that this configuration has left; None when there is none.

    `memory`: whose ran out, "device" or "host". `phase`: the trainer's; what ran out in an evaluation leaves
    the training's own choices alone as long as that helps.
    """
    for rung in _rungs(values, memory, phase):
        after = {**values, **rung.changes}
        if any(values[name] != value for name, value in rung.changes.items()) and not contradictions(after):
            return rung
    return None


def _rungs(values: Values, memory: str, phase: str) -> Iterator[Rung]:
    if phase in EVALUATION:
        yield from _less_evaluation(values)
    if memory == HOST and values["device.kind"] == "cuda":
        yield from _less_host(values)
        return
    for rung in (_smaller_batch, _segments, _recomputed, _smaller_loss, _streamed, _smaller_chunks, _away,
                 _offloaded):
        found = rung(values)
        if found is not None:
            yield found


def _less_evaluation(values: Values) -> Iterator[Rung]:
    if values["evaluation.context_targets"]:
        yield Rung(name="no context curve in the evaluation", changes={"evaluation.context_targets": 0})
    if values["evaluation.completions"]:
        yield Rung(name="no completions in the evaluation", changes={"evaluation.completions": 0})


def _less_host(values: Values) -> Iterator[Rung]:
    """On a GPU machine whose main memory ran out: what was put there goes to the disk or back."""
    if values["stream.chunk_tokens"] and values["stream.inputs"] in ("pinned", "pageable"):
        yield Rung(name="layer inputs on disk", changes={"stream.inputs": "disk"})
    if values["deepspeed.offload_parameters"]:
        yield Rung(name="weights stay on the device", changes={"deepspeed.offload_parameters": False})
    if values["deepspeed.offload_optimizer"]:
        yield Rung(name="optimizer state stays on the device", changes={"deepspeed.offload_optimizer": False})


def _smaller_batch(values: Values) -> Rung | None:
    micro, total = values["training.micro_batch"], values["training.micro_batch"] * values[
        "training.accumulation"]
    smaller = next((size for size in range(micro // 2, 0, -1) if total % size == 0), 0)
    if not smaller:
        return None
    return Rung(name=f"micro-batches of {smaller} in place of {micro}",
                changes={"training.micro_batch": smaller, "training.accumulation": total // smaller})


def _segments(values: Values) -> Rung | None:
    if values["device.kind"] != "cuda" or values["device.allocator"] in ("default", "expandable"):
        return None
    return Rung(name="expandable segments", changes={"device.allocator": "expandable"})


def _recomputed(values: Values) -> Rung | None:
    if values["training.checkpointing"] or values["stream.chunk_tokens"]:
        return None
    return Rung(name="activations computed again", changes={
        "training.checkpointing": True, "training.kept_layers": 0, "training.kept_inputs": 0})


def _smaller_loss(values: Values) -> Rung | None:
    chunk = values["training.loss_chunk_tokens"] or values["dataset.context_tokens"]
    if chunk <= LEAST_LOSS_CHUNK:
        return None
    return Rung(name=f"the loss in pieces of {max(LEAST_LOSS_CHUNK, chunk // 4):,} tokens",
                changes={"training.loss_chunk_tokens": max(LEAST_LOSS_CHUNK, chunk // 4)})


def _streamed(values: Values) -> Rung | None:
    """The streamed step, which is exact; a model that it cannot train is refused before its first step."""
    context = values["dataset.context_tokens"]
    if values["stream.chunk_tokens"] or context <= LEAST_CHUNK:
        return None
    return Rung(name="the streamed step", changes={
        "stream.chunk_tokens": min(STREAM_CHUNK, context // 2), "training.checkpointing": False,
        "training.compile": False, "training.kept_layers": 0, "training.kept_inputs": 0})


def _smaller_chunks(values: Values) -> Rung | None:
    chunk = values["stream.chunk_tokens"]
    if chunk < 2 * LEAST_CHUNK:
        return None
    smaller = max(LEAST_CHUNK, chunk // 4)
    return Rung(name=f"chunks of {smaller:,} tokens", changes={"stream.chunk_tokens": smaller})


def _away(values: Values) -> Rung | None:
    place = AWAY[values["device.kind"]].get(values["stream.inputs"], "")
    if not values["stream.chunk_tokens"] or not place:
        return None
    return Rung(name=f"layer inputs in {'pinned host memory' if place == 'pinned' else 'a file on disk'}",
                changes={"stream.inputs": place})


def _offloaded(values: Values) -> Rung | None:
    if values["device.kind"] != "cuda" or not values["deepspeed.stage"]:
        return None
    return Rung(name="optimizer state in host memory", changes={"deepspeed.offload_optimizer": True})

