"""Which GPUs of a machine train together, and what a profile says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from training.records import GIB, Gpu, HardwareProfile

INDICES = re.compile(r"\d+(,\d+)*")


def supported(profile: HardwareProfile, name: str) -> tuple[bool, str]:
    """Whether an optimization works on a machine, and why not. What was not examined is taken to work."""
    support = profile.supports.get(name)
    return (support.works, support.why) if support else (True, "not examined")


def capability(gpu: Gpu) -> float:
    """Compute capability as a number; 0 when the driver does not tell it."""
    return float(gpu.capability) if re.fullmatch(r"\d+\.\d+", gpu.capability) else 0.0


def weakest(gpus: Sequence[Gpu]) -> float:
    """The lowest compute capability; 0 without a GPU."""
    return min((capability(gpu) for gpu in gpus), default=0.0)


def chosen(profile: HardwareProfile, user: Mapping[str, Any]) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that train together, and why these. `user`: device.gpus and device.count, where they were set.

    Every device works on windows of one size at one pace: k cards do k times the work of the slowest, in
    windows that fit the smallest. So the set with the largest k x rate x memory is taken, of equal ones the
    one with fewer cards. Where a card's rate was not measured, memory alone counts.
    """
    gpus = profile.gpus
    if str(user.get("device.gpus", "")):
        wanted = [int(index) for index in str(user["device.gpus"]).split(",") if index.strip().isdigit()]
        return tuple(gpu for gpu in gpus if gpu.index in wanted), "set by the user"
    if len(gpus) < 2:
        return gpus, "the only one" if gpus else "no GPU is used"
    count = user.get("device.count")
    best = _best(profile, [int(count)] if count else range(1, len(gpus) + 1))
    left_out = [gpu for gpu in gpus if gpu not in best]
    if not left_out:
        return best, f"all {len(best)}: none slows the others down or is too small beside them"
    if count:
        return best, f"the {len(best)} that do most together, as device.count asks"
    named = ", ".join(f"{gpu.index} ({gpu.name}, {gpu.total_bytes / GIB:.3g} GiB)" for gpu in left_out)
    return best, f"left out {named}: each device waits for the slowest, in windows that fit the smallest"


def _best(profile: HardwareProfile, counts: Sequence[int]) -> tuple[Gpu, ...]:
    """The set of the largest product. For each least memory the fastest cards with that much are enough."""
    rates = _rates(profile)
    found: tuple[float, tuple[Gpu, ...]] = (0.0, ())
    for count in counts:
        for floor in sorted({gpu.free_bytes for gpu in profile.gpus}, reverse=True):
            able = [gpu for gpu in profile.gpus if gpu.free_bytes >= floor]
            able = sorted(able, key=lambda gpu: (-rates[gpu.index], gpu.index))[:count]
            score = len(able) * min(rates[gpu.index] for gpu in able) * floor
            if len(able) == count and score > found[0]:
                found = (score, tuple(sorted(able, key=lambda gpu: gpu.index)))
    return found[1] or profile.gpus[:counts[0]]


def _rates(profile: HardwareProfile) -> dict[int, float]:
    """FLOP/s of each card in the type it would compute in; all 1 where one was not measured."""
    found = {}
    for gpu in profile.gpus:
        fp16 = profile.rate(f"gpu{gpu.index}.matmul_fp16") or 0.0
        bf16 = profile.rate(f"gpu{gpu.index}.matmul_bf16") or 0.0
        found[gpu.index] = max(fp16, bf16) if capability(gpu) >= 8 else fp16
    return found if all(found.values()) else dict.fromkeys(found, 1.0)


def named(gpus: Sequence[Gpu], profile: HardwareProfile) -> str:
    """The value of device.gpus: indices, or nothing where they are simply the first ones."""
    first = [gpu.index for gpu in profile.gpus[:len(gpus)]]
    indices = [gpu.index for gpu in gpus]
    return "" if indices == first == list(range(len(indices))) else ",".join(map(str, indices))


def problems(profile: HardwareProfile, user: Mapping[str, Any]) -> list[str]:
    """What is wrong with the GPUs that the user named."""
    text = str(user.get("device.gpus", ""))
    if not text:
        return []
    if not INDICES.fullmatch(text):
        return [f"device.gpus is {text!r}; give indices such as 0,2."]
    known = [gpu.index for gpu in profile.gpus]
    absent = [index for index in text.split(",") if int(index) not in known]
    if not absent:
        return []
    have = ", ".join(map(str, known)) or "none"
    return [f"device.gpus names {', '.join(absent)}; the GPUs found have the indices {have}."]
