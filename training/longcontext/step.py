"""The streamed step: `loss = StreamedStep(model, policy)(input_ids, labels)`, then `loss.backward()`.

The forward pass runs without a graph and leaves layer inputs in a store. What autograd sees is a chain of one
node per decoder layer, with that layer's trainable parameters as its inputs: each parameter's gradient leaves
once per step, so the hooks of DeepSpeed and DistributedDataParallel fire once.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.longcontext import attention, inputs, kernels, pages
from training.longcontext.anatomy import Anatomy
from training.longcontext.errors import StreamError, Unsupported
from training.longcontext.loss import IGNORED, Sums, shifted
from training.longcontext.passes import Machine, Run
from training.longcontext.policy import StreamPolicy
from training.longcontext.transfer import Transfer
from training.longcontext.weights import StreamedWeights

Gather = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]
UNSUPPORTED_LAYERS = ("linear_attention", "chunked_attention", "mamba", "conv", "recurrent", "hybrid")


class StreamedStep(nn.Module):
    """Exact training steps of a Hugging Face causal LM, PEFT-wrapped or not, in little device memory.

    `policy`: sizes and places. `device`: where the work is done; the input embeddings' device by default.
    `gather(parameters)`: a context in which partitioned parameters are whole (DeepSpeed's ZeRO-3); it is
    entered once per decoder layer in the forward and once in the backward pass.

    Raises Unsupported when the model has a feature that could not be exact, StreamError when the policy
    cannot be met here.
    """

    def __init__(self, model: nn.Module, policy: StreamPolicy | None = None, *,
                 device: torch.device | str | None = None, gather: Gather | None = None):
        super().__init__()
        self.model = model
        self.policy = policy or StreamPolicy()
        anatomy = Anatomy(model)
        self._device = torch.device(device) if device is not None else anatomy.device
        _refuse(anatomy, self.policy)
        attention.register()
        kernels.activate_newer_flash(self._device)
        self._gather = gather
        self._transfer = Transfer(self._device, pinned="pinned" in (self.policy.inputs, self.policy.pages),
                                  overlap=self.policy.overlap)
        store = inputs.build(self.policy.inputs, self._device, self._transfer, self.policy.directory)
        weights = None
        if self.policy.weights == "streamed":
            weights = StreamedWeights(anatomy.layers, self._device, self._transfer)
        self._machine = Machine(anatomy, self.policy, store, weights)
        self._pages: tuple[int, pages.Pages] | None = None
        self._current: Run | None = None

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, reduction: str = "mean",
                smoothing: float = 0.0) -> Tensor:
        """Loss of (B, S) ids against (B, S) labels, -100 for no loss; fp32 or better, shifted as
        Transformers does.

        `position_ids` (B, S) or (1, S): a position that does not follow its left neighbour begins a document,
        and documents do not see each other. `attention_mask` (B, S): only padding on the right, which changes
        nothing. `reduction`: "mean" over label tokens, or "sum". `smoothing`: of the labels, as
        F.cross_entropy's `label_smoothing`.
        """
        _check(input_ids, labels, attention_mask, reduction)
        _in_vocabulary(input_ids, labels, self._machine.anatomy)
        targets = shifted(labels).to(self._device)
        count = int((targets != IGNORED).sum())
        if not count and reduction == "mean":
            raise StreamError("No label is left to train on: all are -100, or only the first position has "
                              "one.")
        positions, rows = _documents(input_ids, position_ids, self._device)
        anatomy = self._machine.anatomy
        self._machine.store.clear()
        training = torch.is_grad_enabled() and any(p.requires_grad for p in anatomy.model.parameters())
        room = self._room(input_ids.shape[1])
        run = Run(self._machine, room, input_ids.to(self._device), targets, positions, rows, training)
        run.gathered, run.smoothing = self.gathered, smoothing
        self._current = run
        with torch.inference_mode(False), torch.set_grad_enabled(training), run.at_work():
            total = _Chain(self, run).loss() if training else _value(self, run)
        return total / count if reduction == "mean" else total

    def _room(self, length: int) -> pages.Pages:
        """Pages for a length, reused while it stays the same."""
        if self._pages is None or self._pages[0] != length:
            policy = self.policy
            self._pages = length, pages.build(policy.pages, length, policy.keys_per_call, self._device,
                                              self._transfer)
        return self._pages[1]

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The context that `gather` makes, or none."""
        return self._gather(parameters) if self._gather else ExitStack()

    def check_current(self, run: Run) -> None:
        """A step's stores hold one step. Raises StreamError."""
        if run is not self._current:
            raise StreamError("This loss belongs to an earlier step: call backward() before the next step, "
                              "once.")

    def finish(self) -> None:
        """Forget what the step stored; buffers stay for the next one."""
        self._machine.store.clear()
        self._current = None


def _value(step: StreamedStep, run: Run) -> Tensor:
    """The loss alone."""
    anatomy = run.anatomy
    with step.gathered(anatomy.outside):
        run.embed()
    for index, layer in enumerate(anatomy.layers):
        with step.gathered(list(layer.parameters())):
            run.forward_layer(index)
    with step.gathered(anatomy.outside):
        return run.loss((), early=False)[0]


class _Chain:
    """The forward pass, and the autograd nodes that will run the backward pass."""

    def __init__(self, step: StreamedStep, run: Run):
        self._step, self._run = step, run
        anatomy = run.anatomy
        self._outside = [p for p in anatomy.outside if p.requires_grad]
        self._inside = [[p for p in layer.parameters() if p.requires_grad] for layer in anatomy.layers]
        self._front: list[Tensor] = []
        self._open = ExitStack()

    def loss(self) -> Tensor:
        """Summed loss with its graph."""
        run, outside = self._run, self._run.anatomy.outside
        with self._step.gathered(outside):
            run.embed()
            self._front = run.front(self._outside)
            token = torch.zeros((), device=run.ids.device, requires_grad=True)
            if self._front:
                token = _Node.apply(token, token, self._embed_backward, *self._front)
            else:
                run.lowest = next((i for i, trained in enumerate(self._inside) if trained), len(self._inside))
        for layer, trained in enumerate(self._inside):
            with self._step.gathered(list(run.anatomy.layers[layer].parameters())):
                run.forward_layer(layer)
                if layer >= run.lowest:
                    token = _Node.apply(token, token, self._layer_backward(layer), *trained)
        with self._step.gathered(outside):
            return self._head_loss(token)

    def _head_loss(self, token: Tensor) -> Tensor:
        run = self._run
        early = run.hidden_type != torch.float16
        total, sums = run.loss(self._outside, early)
        found: Tensor = _Node.apply(token, total, lambda scale: self._loss_backward(sums, scale, early),
                                    *self._outside)
        return found

    def _enter(self, parameters: Sequence[Tensor]) -> None:
        """Gather what follows; what came before has left its gradients by now and is let go."""
        self._open.close()
        self._open.enter_context(self._step.gathered(parameters))
        torch.autograd.Variable._execution_engine.queue_callback(self._open.close)

    def _loss_backward(self, sums: Sums, scale: Tensor, early: bool) -> list[Tensor | None]:
        self._step.check_current(self._run)
        self._enter(self._run.anatomy.outside)
        self._scale: Tensor | None = scale if early else None
        if not early:
            with self._run.at_work():
                self._run.backward_loss(sums, scale)
        if self._run.lowest == len(self._inside):
            self._step.finish()
        return sums.result(scale if early else 1.0)

    def _layer_backward(self, layer: int) -> Callable[[Tensor], list[Tensor | None]]:
        def backward(_: Tensor) -> list[Tensor | None]:
            run, top = self._run, layer == len(self._inside) - 1
            self._enter(list(run.anatomy.layers[layer].parameters()))
            by_input = layer > run.lowest or bool(self._front)
            with run.at_work():
                found = run.backward_layer(layer, self._inside[layer], by_input, self._scale if top else None)
            if not by_input:
                self._step.finish()
            return found
        return backward

    def _embed_backward(self, _: Tensor) -> list[Tensor | None]:
        self._enter(self._run.anatomy.outside)
        with self._run.at_work():
            found = self._run.backward_embed(self._front)
        self._step.finish()
        return found


class _Node(torch.autograd.Function):
    """Hands `value` on; its backward calls `work` and gives the parameters the gradients that it returns."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, value: Tensor, work: Callable[[Tensor], list[Tensor | None]],
                *parameters: Tensor) -> Tensor:
        ctx.work = work
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.zeros_like(grad, dtype=torch.float32), None, None, *ctx.work(grad)


def _refuse(anatomy: Anatomy, policy: StreamPolicy) -> None:
    """Raise Unsupported or StreamError for what can be seen before any work."""
    config = anatomy.config
    for kind in getattr(config, "layer_types", None) or ():
        if any(word in kind for word in UNSUPPORTED_LAYERS):
            raise Unsupported(f"layers of type {kind}")
    if not anatomy.uses_interface:
        raise Unsupported(f"{type(anatomy.model).__name__} does not use Transformers' attention interface")
    if any(isinstance(module, nn.Conv1d) for layer in anatomy.layers for module in layer.modules()):
        raise Unsupported("convolutions over tokens")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise Unsupported("token embeddings that enter at every layer")
    if getattr(config, "num_kv_shared_layers", 0):
        raise Unsupported("layers that share keys and values")
    if getattr(config, "output_router_logits", False):
        raise Unsupported("the router's auxiliary loss; set output_router_logits to false in the model's "
                          "config")
    if policy.keep_every > len(anatomy.layers):
        raise StreamError(f"keep_every is {policy.keep_every} and the model has {len(anatomy.layers)} "
                          "layers.")


def _check(ids: Tensor, labels: Tensor, mask: Tensor | None, reduction: str) -> None:
    """Bad input, before any work. Raises StreamError or Unsupported."""
    if ids.dim() != 2 or ids.shape != labels.shape:
        raise StreamError(f"input_ids is {tuple(ids.shape)} and labels {tuple(labels.shape)}; both must be "
                          "(B, S).")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise StreamError(f"input_ids is {tuple(ids.shape)}; a sequence needs two tokens at least.")
    if reduction not in ("mean", "sum"):
        raise StreamError(f"reduction is {reduction!r}; it must be mean or sum.")
    if mask is None:
        return
    if mask.shape != ids.shape:
        raise StreamError(f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids.shape)}.")
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise Unsupported("padding on the left or in the middle; put it on the right")
    if bool(((mask == 0) & (labels != IGNORED))[:, 1:].any()):
        raise StreamError("Padding has labels; set them to -100.")


def _in_vocabulary(ids: Tensor, labels: Tensor, anatomy: Anatomy) -> None:
    """A GPU tells of a row that does not exist long after, and without its number. Raises StreamError."""
    size = getattr(anatomy.model.get_input_embeddings(), "num_embeddings", None)
    if size is None:
        return
    for name, values in (("input_ids", ids), ("labels", labels.masked_fill(labels == IGNORED, 0))):
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high >= size:
            raise StreamError(f"{name} has the token {low if low < 0 else high}; the vocabulary has {size}.")


def _documents(ids: Tensor, positions: Tensor | None,
               device: torch.device) -> tuple[Tensor, Sequence[Sequence[int]]]:
    """Positions (1 or B, S) on the device and, by row or once for all, where documents begin."""
    if positions is None:
        return torch.arange(ids.shape[1], device=device)[None], ((0,),)
    if positions.shape not in ((1, ids.shape[1]), ids.shape):
        raise StreamError(f"position_ids is {tuple(positions.shape)} and input_ids {tuple(ids.shape)}.")
    begins = (positions[:, 1:] != positions[:, :-1] + 1).cpu()
    rows = [(0, *(row.nonzero().flatten() + 1).tolist()) for row in begins]
    same = all(row == rows[0] for row in rows)
    return positions.to(device), rows[:1] if same else rows
