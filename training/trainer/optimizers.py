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

log = logging.getLogger(__name__)


def groups(trainable: Mapping[str, Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups, sorted by name: matrices, with weight decay, and the rest (norms, biases)."""
    matrices = [trainable[name] for name in sorted(trainable) if dimensions(trainable[name]) >= 2]
    rest = [trainable[name] for name in sorted(trainable) if dimensions(trainable[name]) < 2]
    both = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def dimensions(parameter: Parameter) -> int:
    """Number of dimensions; a ZeRO-3 parameter is flat and empty here and keeps its own in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build(trainable: Mapping[str, Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer named by `optimizer.name`, for parameters that lie where they are trained."""
    name = config["optimizer.name"]
    parameter_groups = groups(trainable, config["training.weight_decay"])
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
    parameter_groups = groups(trainable, config["training.weight_decay"])
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameter_groups, **_adam_options(config), adamw_mode=True)
    except Exception as error:  # a compiler, ninja or header that is missing: any of some twenty causes
        reason = error.__cause__ or error
        log.warning("optimizer adamw (torch) in place of DeepSpeed's CPU Adam, which did not build: %s",
                    " ".join(str(reason).split())[:300])
        # DeepSpeed hands over flat partitions on the host in place of these parameters, so fusing is safe.
        return torch.optim.AdamW(parameter_groups, **_adam_options(config), fused=True)


def _adam_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"lr": config["training.learning_rate"], "eps": config["optimizer.eps"],
            "betas": (config["optimizer.beta1"], config["optimizer.beta2"])}


def _can_fuse(trainable: Mapping[str, Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable.values())


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_of(optimizer: torch.optim.Optimizer,
             trainable: Mapping[str, Parameter]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as tensors named `<key>/<parameter>` on the CPU, and as plain numbers of the same names."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for name in sorted(trainable):
        for key, value in optimizer.state.get(trainable[name], {}).items():
            if torch.is_tensor(value):
                tensors[f"{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
            elif value is not None:
                numbers[f"{key}/{name}"] = value
    return tensors, numbers


def restore(optimizer: torch.optim.Optimizer, trainable: Mapping[str, Parameter],
            tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Put back what `state_of` gave, bit for bit. Parameters without a state keep none."""
    states: dict[str, dict[str, Any]] = {}
    for full_name, value in (*tensors.items(), *numbers.items()):
        key, _, name = full_name.partition("/")
        states.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in trainable.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if saved := states.get(names[id(parameter)]):
                _restore_one(optimizer, group, (group_index, index), saved)


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
