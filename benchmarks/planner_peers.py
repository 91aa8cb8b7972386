"""What other tools' estimators answer to a request that the planner is asked: bytes of device memory.

Each formula is written anew as arithmetic from the source named in its docstring, read in November 2026, and
takes exact parameter counts, which is what these tools read from a checkpoint. A peer that has no answer to a
request gives None; `reasons` says why. No torch.

| peer | version | context | logits | LoRA | NF4 | checkpointing | 8-bit optimizer | fixed part |
|---|---|---|---|---|---|---|---|---|
| accelerate | 1.15 estimate-memory | no | no | no answer | no answer | no | no answer | none |
| deepspeed zero-2, zero-3 | 0.19.8 | no | no | no answer | no answer | no | no answer | none |
| unsloth | Studio, 015bdef | linear | no | 7 projections | 5 bits a weight | one layer | 4 bytes | 1.4 GiB |
| soup profile | 2428453 | linear | no | 7 squares H x H | 4 bits, all | sqrt(layers) | half | 1.5 GiB |
| soup fit | 2428453 | linear | no | 1 % of weights | 4 bits, all | half | 2 bytes | 0.5 GB + 5 % |

None of them counts logits, windows, buffers of the step or a streamed step. Unsloth and Soup count weights in
16 bits whatever `dtype` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.records import GIB, ModelShape
from training.shapes import shape_from_config

# What each peer adds whatever the request: not tensors of the step. `soup fit` adds 5 % of the weights more.
FIXED_BYTES = {"unsloth": int(1.4 * GIB), "soup profile": int(1.5 * GIB), "soup fit": 500_000_000}
TRAINS_ALL = "it counts a training of all weights with Adam in 16 or 32 bits; of {} it knows nothing"
# Sizes in billions with their hidden size and layers, as `soup profile` looks them up.
SOUP_KNOWN = {0.5: (896, 24), 1.0: (2048, 22), 1.5: (2048, 28), 3.0: (3072, 28), 7.0: (4096, 32),
              8.0: (4096, 32), 13.0: (5120, 40), 14.0: (5120, 40), 32.0: (5120, 64), 34.0: (8192, 48),
              70.0: (8192, 80)}
UNSLOTH_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request. `rank` 0: all weights train. `targets`: layers with an adapter, () for the peer's own."""

    shape: ModelShape
    context: int
    batch: int = 1
    rank: int = 0
    quantization: str = "none"
    checkpointing: bool = False
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    streamed: bool = False
    targets: tuple[str, ...] = ()


class NoAnswer(Exception):
    """The peer has no figure for this request; the message says why."""


def _only_full_adam(asked: Asked) -> None:
    """Raise NoAnswer for what accelerate and DeepSpeed do not take."""
    other = {"LoRA": asked.rank, "NF4": asked.quantization != "none",
             "8-bit optimizers": asked.optimizer != "adamw"}
    for name, wanted in other.items():
        if wanted:
            raise NoAnswer(TRAINS_ALL.format(name))


def accelerate(asked: Asked) -> int:
    """`accelerate estimate-memory`, column "Training using Adam" (huggingface/accelerate 1.15,
    src/accelerate/commands/estimate.py, estimate_training_usage).

    The model without its head (AutoModel) in fp32: four times that in fp32, twice that in mixed precision.
    Batch size 1, no activations. The buffers of rotary embeddings, some hundred bytes, are left out here.
    """
    _only_full_adam(asked)
    parts = asked.shape.parameters
    model = 4 * (asked.shape.total_parameters - parts.get("head", 0))
    return model * (4 if asked.dtype == "float32" else 2)


def deepspeed_zero2(asked: Asked) -> int:
    """deepspeedai/DeepSpeed 0.19.8, deepspeed/runtime/zero/stage_1_and_2.py,
    estimate_zero2_model_states_mem_needs, one GPU, no offload: 2 + 18 bytes a parameter."""
    _only_full_adam(asked)
    return 20 * asked.shape.total_parameters


def deepspeed_zero3(asked: Asked) -> int:
    """deepspeedai/DeepSpeed 0.19.8, deepspeed/runtime/zero/stage3.py, estimate_zero3_model_states_mem_needs,
    one GPU, no offload: 18 bytes a parameter and 4 for each of the largest module's own."""
    _only_full_adam(asked)
    return 18 * asked.shape.total_parameters + 4 * _largest_module(asked.shape)


def _largest_module(shape: ModelShape) -> int:
    """Parameters of the largest module; biases of linear layers are left out."""
    linears = [x.inputs * x.outputs for x in shape.linears]
    return max([shape.vocab * shape.hidden, shape.parameters.get("positions", 0), *linears])


def unsloth(asked: Asked) -> int:
    """unslothai/unsloth at 015bdef, studio/backend/utils/hardware/vram_estimation.py and its
    VRAM_ESTIMATION.md, attention in memory linear in the context (SDPA): weights, adapter, optimizer,
    gradients with their floor, activations, 1.4 GiB.

    Dense models with separate or counted-as-separate projections; mixtures and latent attention, which the
    source counts by rules of their own, are not written out here.
    """
    shape = asked.shape
    if "experts" in shape.parameters or any(x.name == "kv_b_proj" for x in shape.linears):
        raise NoAnswer("its rules for mixtures and latent attention are not written out here")
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inside = 2 * shape.hidden * (query + keys) + 3 * shape.hidden * shape.intermediate
    embedded = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    outside = 2 * shape.hidden * shape.layers + embedded
    bits16 = 2 * (inside * shape.layers + outside)
    weights = bits16
    if asked.quantization == "nf4":
        weights = int(inside * shape.layers * 2 / (16 / 5) + outside * 2)
    adapter = _unsloth_adapter(asked, query, keys)
    trained = adapter if asked.rank else inside * shape.layers + outside
    states = trained * (6 if asked.optimizer == "adamw" else 4)
    tokens = asked.context * asked.batch
    layer = int(tokens * (query + 2 * keys + 2 + 2 * shape.intermediate) * 2 * 1.25)
    at_once = (1.0 if asked.rank else 2.0) if asked.checkpointing else shape.layers
    activations = int(layer * at_once)
    floor = int(weights * 0.15)
    if asked.rank:
        floor = min(floor, max(activations, states))
    return weights + 2 * adapter + states + max(2 * trained, floor) + activations + FIXED_BYTES["unsloth"]


def _unsloth_adapter(asked: Asked, query: int, keys: int) -> int:
    """Weights of the adapter on the seven projections of a Llama, of which `targets` may choose."""
    h, i = asked.shape.hidden, asked.shape.intermediate
    attention = (h + query, h + keys, h + keys, query + h)
    sizes = dict(zip(UNSLOTH_TARGETS, (*attention, h + i, h + i, i + h), strict=True))
    chosen = [name for name in asked.targets if name in sizes] or list(sizes)
    return asked.rank * asked.shape.layers * sum(sizes[name] for name in chosen)


def soup_profile(asked: Asked) -> int:
    """`soup profile` (MakazhanAlpamys/Soup at 2428453, src/soup_cli/utils/profiler.py, estimate_total).

    Hidden size and layers come from a table by parameter count, or from 12 x 32 x H^2 parameters, not from
    the model. Weights are counted in 10^9 bytes, the rest in 2^30, and the sum is printed as GB and compared
    with a card's 2^30: so here.
    """
    if not asked.rank:
        raise NoAnswer("it knows adapters only")
    billions = asked.shape.total_parameters / 1e9
    hidden, layers = _soup_sizes(billions)
    trained = 7 * 2 * asked.rank * hidden * layers
    states = trained * 2 * (2 if asked.optimizer == "adamw" else 1)
    deep = max(1, math.isqrt(layers)) if asked.checkpointing else layers
    activations = asked.batch * asked.context * hidden * 4 * 2 * deep
    weights = billions * (0.5 if asked.quantization == "nf4" else 2.0)
    return int(weights * GIB) + 2 * trained + states + activations + FIXED_BYTES["soup profile"]


def _soup_sizes(billions: float) -> tuple[int, int]:
    """Hidden size and layers of a model with so many parameters."""
    nearest = min(SOUP_KNOWN, key=lambda size: abs(size - billions))
    if abs(nearest - billions) / max(billions, 0.1) <= 0.2:
        return SOUP_KNOWN[nearest]
    hidden = max(128, int(math.sqrt(billions * 1e9 / (12 * 32))) // 128 * 128)
    return hidden, max(1, int(billions * 1e9 / (12 * hidden * hidden)))


def soup_fit(asked: Asked) -> int:
    """The check before `soup train` (MakazhanAlpamys/Soup at 2428453, src/soup_cli/utils/hardware_fit.py,
    estimate_peak_vram_gb), without its margin of 10 %. One layer's activations, whatever the depth."""
    parameters = asked.shape.total_parameters
    weights = parameters * (0.5 if asked.quantization == "nf4" else 2.0)
    trained = parameters * (0.01 if asked.rank else 1.0)
    states = trained * (8.0 if asked.optimizer == "adamw" else 2.0)
    hidden = 64 * math.sqrt(max(parameters / 1024, 1.0))
    activations = asked.context * asked.batch * hidden * 4 * (0.5 if asked.checkpointing else 1.0)
    return int(weights + states + 4 * trained + activations + FIXED_BYTES["soup fit"] + 0.05 * weights)


PEERS: dict[str, Callable[[Asked], int]] = {
    "accelerate": accelerate, "deepspeed zero-2": deepspeed_zero2, "deepspeed zero-3": deepspeed_zero3,
    "unsloth": unsloth, "soup profile": soup_profile, "soup fit": soup_fit}


def peers(config: Mapping[str, Any], context: int, batch: int, rank: int, quantization: str,
          checkpointing: bool, optimizer: str, *, dtype: str = "bfloat16", streamed: bool = False,
          targets: tuple[str, ...] = (), fixed: bool = True) -> dict[str, int | None]:
    """Bytes that each peer answers, None where it has no answer. `config`: with its `model_type`.

    `fixed` False takes the constant for driver and runtime off, as measured tensor bytes hold none.
    """
    asked = Asked(shape=shape_from_config(config), context=context, batch=batch, rank=rank,
                  quantization=quantization, checkpointing=checkpointing, optimizer=optimizer, dtype=dtype,
                  streamed=streamed, targets=targets)
    answers = _answers(asked, fixed)
    return {name: answer if isinstance(answer, int) else None for name, answer in answers.items()}


def peers_of(combination: Mapping[str, Any], fixed: bool = True) -> dict[str, int | None]:
    """`peers` for a combination of the planner's benchmark."""
    answers = _answers(_asked(combination), fixed)
    return {name: answer if isinstance(answer, int) else None for name, answer in answers.items()}


def reasons(combination: Mapping[str, Any]) -> dict[str, str]:
    """Why a peer has no answer to a combination, by peer."""
    answers = _answers(_asked(combination), True)
    return {name: answer for name, answer in answers.items() if isinstance(answer, str)}


def _asked(combination: Mapping[str, Any]) -> Asked:
    config = {"model_type": combination["family"], **combination["config"]}
    return Asked(shape=shape_from_config(config), context=combination["context_tokens"],
                 batch=combination["micro_batch"], rank=combination["rank"],
                 quantization=combination["quantization"], checkpointing=combination["checkpointing"],
                 optimizer=combination["optimizer"], dtype=combination["dtype"],
                 streamed=combination["streamed"], targets=tuple(combination.get("targets", ())))


def _answers(asked: Asked, fixed: bool) -> dict[str, int | str]:
    if asked.streamed:
        return dict.fromkeys(PEERS, "it knows no streamed step")
    found: dict[str, int | str] = {}
    for name, ask in PEERS.items():
        try:
            found[name] = ask(asked) - (0 if fixed else FIXED_BYTES.get(name, 0))
        except NoAnswer as reason:
            found[name] = str(reason)
    return found
