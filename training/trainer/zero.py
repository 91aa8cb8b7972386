"""DeepSpeed's ZeRO-1, 2 and 3 behind the loop's engine interface (read against DeepSpeed 0.19.8).

Three of its habits are undone here, so that one update equals the plain engine's:
- gradients are averaged over ranks: the loss is multiplied by their number first;
- `backward` divides by gradient_accumulation_steps: `scale_wrt_gas=False`;
- the accumulation boundary is counted: it is set by hand, since the last update of an epoch may be shorter.

Checkpoints hold whole tensors by parameter name (gathered one parameter at a time), not ZeRO's partitions:
no pickle, and the number of ranks or the stage may change between two starts.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from training.rundir import read_data
from training.trainer import optimizers
from training.trainer.device import Defragmenter
from training.trainer.engine import FLOAT16_PATIENCE, PATIENCE, Captured, Gather, Returned
from training.trainer.ops import prepare_cpu_adam
from training.trainer.partitions import Partitions
from training.trainer.processes import WAIT, Together, backend_of, watch_ranks

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_processes(device: torch.device, tell: Callable[[str], None]) -> tuple[int, int]:
    """Join the process group that the launcher described, or be one of one; (rank, ranks)."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(_free_port()))
    tell("importing deepspeed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renamed two collectives and says so at each of DeepSpeed's calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory all-reduce for CPU ranks would be compiled here unasked (some 30 s) and spins while
    # it waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend_of(device), timeout=WAIT, verbose=False)
    watch_ranks(device)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Root(Module):
    """The module given to DeepSpeed: any work on the model is one forward pass, so that hooks fire."""

    def __init__(self, model: Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *tensors: Tensor) -> Any:
        """`work(model, *tensors)`."""
        return work(self.model, *tensors)


class ZeroEngine(Together):
    """DeepSpeed over one or more ranks, each with its own device."""

    def __init__(self, model: Module, trainable: Mapping[str, Parameter], config: Mapping[str, Any],
                 device: torch.device, ds_config: Path, tell: Callable[[str], None]):
        import deepspeed

        self.device = device
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.patience = FLOAT16_PATIENCE if config["model.dtype"] == "float16" else PATIENCE
        self._trainable = trainable
        self._stage = config["deepspeed.stage"]
        self.evaluates_together = self._stage == 3
        self.captures_alone = self.ranks == 1 and self._stage != 3
        optimizer = self._optimizer(config, tell)
        self._engine, *_ = deepspeed.initialize(model=Root(model), optimizer=optimizer,
                                                config=read_data(ds_config))
        self._zero = self._engine.optimizer
        self._partitions: Partitions | None = None
        self._defragmenter = Defragmenter(config, device)
        self._engine.train()

    def _optimizer(self, config: Mapping[str, Any], tell: Callable[[str], None]) -> torch.optim.Optimizer:
        """DeepSpeed's CPU Adam beside a GPU that offloads to the host; torch's fused AdamW anywhere else.

        On a CPU the two are the same speed (20 million parameters on 2 cores: 23.9 ms and 20.4 ms a step,
        torch 2.13), and DeepSpeed's is compiled for a minute or more first.
        """
        if not config["deepspeed.offload_optimizer"] or self.device.type == "cpu":
            return optimizers.build(self._trainable, config)
        prepare_cpu_adam(tell)
        return optimizers.build_offloaded(self._trainable, config)

    def loss(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`work(model, *tensors)` through DeepSpeed's forward."""
        loss: Tensor = self._engine(work, *tensors)
        return loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; they are reduced over ranks on the way."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)

    def step(self, rate: float) -> float | None:
        """One update; DeepSpeed clips and skips it when the norm is not finite."""
        optimizers.set_rate(self._zero, rate)
        self._engine.step()
        self._defragmenter.after_update()
        if not self._engine.was_step_applied():
            return None
        return float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        """Drop the reduced gradients and start counting micro-batches anew, as `step` does when it skips.

        Its own way there, an overflow, would also lower the loss scale. What offloading keeps on the host is
        overwritten by the next update's first micro-batch.
        """
        zero = self._zero
        if self._stage == 3:
            zero._pre_step()
            zero._overflow_clean_up(zero.loss_scale)
            return
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            for group in kept:
                kept[group] = None
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()

    def on_model(self, work: Callable[[Module], Returned]) -> Returned | None:
        """Evaluate on rank 0 while the others wait; on all ranks at once where weights are partitioned."""
        self._engine.eval()
        try:
            with torch.no_grad():
                if self._stage == 3:
                    return self._on_root(work)
                return self.on_main(lambda: work(self._engine.module.model))
        finally:
            self._engine.train()

    def _on_root(self, work: Callable[[Module], Returned]) -> Returned:
        """Run through the root module, for ZeRO-3's bookkeeping; its hooks want a tensor to come back."""
        values: list[Returned] = []

        def kept(model: Module) -> Tensor:
            values.append(work(model))
            return torch.zeros((), device=self.device)

        self._engine.module(kept)
        return values[0]

    def with_whole_weights(self, work: Callable[[], Returned], everything: bool) -> Returned | None:
        """Gather partitioned weights (stage 3) around `work` on rank 0."""
        if self._stage != 3:
            return self.on_main(work)
        import deepspeed

        wanted = self._engine.module.parameters() if everything else self._trainable.values()
        with deepspeed.zero.GatheredParameters(list(wanted)):
            return self.on_main(work)

    def capture(self) -> Captured:
        """Whole tensors by name on rank 0; the other ranks only take part in gathering them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        captured = Captured()
        steps = self._steps_taken()
        self._link_state()
        for name in sorted(self._trainable):
            parameter = self._trainable[name]
            self._keep(captured.weights, name, safe_get_full_fp32_param(parameter))
            for key in MOMENTS if steps else ():
                self._keep(captured.optimizer, f"{key}/{name}", safe_get_full_optimizer_state(parameter, key))
            if steps and self.rank == 0:
                captured.optimizer[f"step/{name}"] = torch.tensor(float(steps))
        if self.rank == 0 and self.patience == FLOAT16_PATIENCE:
            captured.numbers["scaler/scale"] = float(self._zero.loss_scale)
        return captured

    def _keep(self, where: dict[str, Tensor], name: str, value: Tensor) -> None:
        if self.rank == 0:
            where[name] = value.detach().to("cpu", copy=True).contiguous()

    def restore(self, captured: Captured) -> None:
        """Fill fp32 weights and Adam's moments; every rank takes its own part of the whole tensors."""
        from deepspeed.utils import safe_set_full_fp32_param

        counts = [int(value) for name, value in captured.optimizer.items() if name.startswith("step/")]
        steps = max(counts, default=0)
        if steps:
            self._create_state(steps)
        for name, parameter in self._trainable.items():
            if self._stage == 3:
                self._fill_partition(parameter, captured.weights[name], None)
            else:
                safe_set_full_fp32_param(parameter, captured.weights[name])
            for key in MOMENTS if steps else ():
                self._set_moment(parameter, captured.optimizer[f"{key}/{name}"], key)
        if "scaler/scale" in captured.numbers:
            self._zero.loss_scaler.cur_scale = captured.numbers["scaler/scale"]

    def _flat(self) -> list[Tensor]:
        """The flat fp32 partitions of this rank, which are what the optimizer really steps."""
        return list(self._zero.fp32_partitioned_groups_flat if self._stage == 3
                    else self._zero.single_partition_of_fp32_groups)

    def _steps_taken(self) -> int:
        states = [self._zero.optimizer.state.get(flat, {}) for flat in self._flat()]
        return max((int(state.get("step", 0)) for state in states), default=0)

    def _create_state(self, steps: int) -> None:
        """Adam makes its state at its first step; make it now, with the count of the steps taken."""
        base = self._zero.optimizer
        native = type(base).__name__ == "DeepSpeedCPUAdam"  # counts in a Python int; torch in a tensor
        for flat in self._flat():
            count: Any = steps if native else torch.tensor(float(steps), device=flat.device)
            empty = {key: torch.zeros_like(flat, dtype=torch.float32) for key in MOMENTS}
            base.state[flat] = {"step": count} | empty
        self._link_state()

    def _link_state(self) -> None:
        """Link parameters to their optimizer state, so that it can be read and set by parameter.

        ZeRO-1 and 2 do so once, after the first group's first step, when the other groups have no state yet.
        """
        if self._stage != 3 and self._steps_taken():
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if self._stage == 3:
            self._fill_partition(parameter, value, key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _fill_partition(self, parameter: Parameter, value: Tensor, key: str | None) -> None:
        """Set this rank's part. ZeRO-3's own setter fails for a tensor that the ranks do not divide."""
        sharded: Any = parameter
        size = sharded.ds_tensor.numel()
        padded = torch.zeros(size * self.ranks, dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        part = padded[self.rank * size:(self.rank + 1) * size]
        sharded._z3_optimizer.set_local_hp_param(part, parameter, key)

    def streamed(self) -> Gather | None:
        """Stage 3: `Partitions` in place of DeepSpeed's hooks on modules; nothing to gather before it."""
        if self._stage == 3:
            self._partitions = Partitions(self._zero.parameter_offload)
            self._partitions.detach()
        return self._partitions

    def aside(self) -> AbstractContextManager[Any]:
        """DeepSpeed's hooks on modules in place again."""
        return self._partitions.attached() if self._partitions else nullcontext()
