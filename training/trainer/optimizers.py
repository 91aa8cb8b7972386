"""Optimizers over the trainable parameters, and their state as named tensors.

The state is kept per parameter name, so that a checkpoint does not depend on the order of the parameters, on
the number of processes, or on which engine wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter

from training.trainer.lookahead import Lookahead

log = logging.getLogger(__name__)

SLOW = "slow/"
MOVES = "lookahead/updates"


def groups(trainable: Mapping[str, Parameter], weight_decay: float, plus_ratio: float = 1.0,
           muon: bool = False) -> list[dict[str, Any]]:
    """Parameter groups, each sorted by name: matrices, with weight decay, then the rest (norms, biases).

    `plus_ratio` above 1 sets the adapters' B apart, with that `rate_share` (LoRA+, arXiv:2402.12354, section
    4); `muon` sets apart, as `orthogonal`, the matrices of decoder layers that are no adapter's.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in sorted(trainable):
        count = dimensions(trainable[name])
        group: dict[str, Any] = {"params": [], "weight_decay": weight_decay if count >= 2 else 0.0}
        if plus_ratio > 1 and is_adapter_b(name):
            group["rate_share"] = plus_ratio
        if muon:
            group["orthogonal"] = count == 2 and in_decoder_layer(name) and "lora_" not in name
        kind = (count < 2, group.get("rate_share", 1.0), not group.get("orthogonal"))
        found.setdefault(kind, group)["params"].append(trainable[name])
    return [found[kind] for kind in sorted(found)]


def is_adapter_b(name: str) -> bool:
    """Whether a parameter belongs to the B of a LoRA adapter, by PEFT's names.

    >>> is_adapter_b("model.layers.0.self_attn.q_proj.lora_B.default.weight")
    True
    """
    return "lora_B" in name or "lora_embedding_B" in name


def in_decoder_layer(name: str) -> bool:
    """Whether a parameter is inside one of the numbered layers; embeddings, head and last norm are not.

    >>> in_decoder_layer("model.layers.0.mlp.up_proj.weight"), in_decoder_layer("lm_head.weight")
    (True, False)
    """
    return any(part.isdigit() for part in name.split("."))


def dimensions(parameter: Parameter) -> int:
    """Number of dimensions; a ZeRO-3 parameter is flat and empty here and keeps its own in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build(trainable: Mapping[str, Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer named by `optimizer.name`, for parameters that lie where they are trained.

    Inside Lookahead where optimizer.lookahead_steps is set.
    """
    optimizer = _build(trainable, config)
    steps = config["optimizer.lookahead_steps"]
    return Lookahead(optimizer, steps, config["optimizer.lookahead_share"]) if steps else optimizer


def _build(trainable: Mapping[str, Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    name = config["optimizer.name"]
    parameter_groups = _groups(trainable, config)
    if name == "muon":
        from training.trainer.muon import Muon

        if not any(group["orthogonal"] for group in parameter_groups):
            log.warning("optimizer.name muon makes AdamW's updates here: no matrix of a decoder layer is "
                        "trained (adapters are not orthogonalized).")
        return Muon(parameter_groups, **_adam_options(config))
    if name == "adamw":
        return torch.optim.AdamW(parameter_groups, **_adam_options(config), fused=_can_fuse(trainable))
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    paged = name == "paged_adamw_8bit"
    if paged and config["device.kind"] == "cpu":
        log.info("optimizer.name paged_adamw_8bit: paging needs a GPU; adamw_8bit makes the same updates.")
        paged = False
    kind = PagedAdamW8bit if paged else AdamW8bit
    return kind(parameter_groups, **_adam_options(config))


def build_offloaded(trainable: Mapping[str, Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW with its state in host memory (ZeRO-Offload): DeepSpeed's, or torch's where that is not built."""
    parameter_groups = _groups(trainable, config)
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameter_groups, **_adam_options(config), adamw_mode=True)
    except Exception as error:  # a compiler, ninja or header that is missing: any of some twenty causes
        reason = error.__cause__ or error
        log.warning("optimizer adamw (torch) in place of DeepSpeed's CPU Adam, which did not build: %s",
                    " ".join(str(reason).split())[:300])
        # DeepSpeed hands over flat partitions on the host in place of these parameters, so fusing is safe.
        return torch.optim.AdamW(parameter_groups, **_adam_options(config), fused=True)


def _groups(trainable: Mapping[str, Parameter], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return groups(trainable, config["training.weight_decay"], config["lora.plus_ratio"],
                  muon=config["optimizer.name"] == "muon")


def _adam_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"lr": config["training.learning_rate"], "eps": config["optimizer.eps"],
            "betas": (config["optimizer.beta1"], config["optimizer.beta2"])}


def _can_fuse(trainable: Mapping[str, Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable.values())


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: `rate`, times the group's own `rate_share` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_share", 1.0)


def state_of(optimizer: torch.optim.Optimizer,
             trainable: Mapping[str, Parameter]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as tensors named `<key>/<parameter>` on the CPU, and as plain numbers of the same names."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    if isinstance(optimizer, Lookahead):
        tensors, numbers = state_of(optimizer.inner, trainable)
        numbers[MOVES] = optimizer.updates
    for name in sorted(trainable):
        for key, value in optimizer.state.get(trainable[name], {}).items():
            if torch.is_tensor(value):
                tensors[f"{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
            elif value is not None:
                numbers[f"{key}/{name}"] = value
    return tensors, numbers


def restore(optimizer: torch.optim.Optimizer, trainable: Mapping[str, Parameter],
            tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Put back what `state_of` gave, bit for bit. Parameters without a state there have none afterwards."""
    if isinstance(optimizer, Lookahead):
        optimizer.updates = numbers.get(MOVES, 0)
        slow = {name: value for name, value in tensors.items() if name.startswith(SLOW)}
        fast = {name: value for name, value in tensors.items() if name not in slow}
        restore(optimizer.inner, trainable, fast, {key: numbers[key] for key in numbers if key != MOVES})
        tensors, numbers = slow, {}
    states: dict[str, dict[str, Any]] = {}
    for full_name, value in (*tensors.items(), *numbers.items()):
        key, _, name = full_name.partition("/")
        states.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in trainable.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if saved := states.get(names[id(parameter)]):
                _restore_one(optimizer, group, (group_index, index), saved)
            else:
                optimizer.state.pop(parameter, None)


def _restore_one(optimizer: torch.optim.Optimizer, group: dict[str, Any], place: tuple[int, int],
                 saved: Mapping[str, Any]) -> None:
    parameter = group["params"][place[1]]
    if hasattr(optimizer, "init_state"):  # bitsandbytes: a paged buffer must be its own, so it is filled
        optimizer.init_state(group, parameter, *place)
    state = optimizer.state[parameter]
    for key, value in saved.items():
        present = state.get(key)
        if torch.is_tensor(value) and torch.is_tensor(present) and present.shape == value.shape:
            present.copy_(value)
        elif torch.is_tensor(value) and key != "step":
            state[key] = value.to(parameter.device, copy=True)
        else:  # torch's AdamW keeps `step` as a tensor: on the device when fused there, else on the host
            where = _step_device(group, parameter)
            state[key] = value.to(where, copy=True) if torch.is_tensor(value) else value


def _step_device(group: Mapping[str, Any], parameter: Parameter) -> torch.device:
    return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
