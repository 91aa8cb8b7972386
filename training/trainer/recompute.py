"""Which activations are kept for the backward pass and which are computed again, layer by layer.

A chain of L layers whose inputs are all kept needs L more forward computations of a layer; with fewer inputs
kept it needs more, and the least number for each memory is that of revolve (Griewank & Walther 2000, ACM TOMS
algorithm 799). The schedule is a tree of groups, carried out by torch's checkpoints inside one another: a
group keeps its input, and when its gradient is wanted its parts run again, each keeping its own.

Transformers calls layers one by one, each with arguments of its own. So all layers of a group but the last
write down what they were called with and hand the hidden states on, and the last one runs the group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from training.errors import UsageError
from training.longcontext.anatomy import Anatomy
from training.longcontext.errors import Unsupported
from training.trainer.loss import causal_lm

PROBE_TOKENS = 8
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Group:
    """Layers that are computed again from one input. `parts` are computed again in their turn; behind them
    the last layer of the group runs with its activations kept."""

    layers: int
    parts: tuple[Group, ...] = ()

    @property
    def forwards(self) -> int:
        """Forward computations of a layer until all its gradients are there."""
        return sum(part.layers + part.forwards for part in self.parts) + 1

    @property
    def inputs(self) -> int:
        """Most inputs held at once beside that of the layer whose gradient is computed."""
        behind = [index + part.inputs for index, part in enumerate(self.parts)]
        return max([*behind, len(self.parts)])


def schedule(layers: int, slots: int) -> tuple[Group, ...]:
    """Groups of `layers` layers of which `slots` inputs are held at once, with the fewest forward
    computations, and among those the fewest inputs beside a layer's own.

    By dynamic programming. F(l, s) computations serve a group of l layers whose input is one of s: an input
    is placed m layers on, what follows has one slot less, and then the first m layers have them all again
    (Griewank & Walther 2000, section 2). The run to the loss, which places the first inputs, counts for
    itself: with L slots all groups are single layers. Raises ValueError when `slots` is below 1.

    >>> [group.layers for group in schedule(10, 3)], sum(group.forwards for group in schedule(10, 3))
    ([4, 3, 3], 18)
    """
    if slots < 1 or layers < 1:
        raise ValueError(f"{layers} layers with {slots} inputs")
    if slots >= layers:
        return (Group(1),) * layers
    lengths = _lengths(layers, slots)
    groups, left, free = list[Group](), layers, slots
    while left:
        groups.append(_group(lengths[0][left, free], free, lengths[1]))
        left, free = left - groups[-1].layers, free - 1
    return tuple(groups)


Found = dict[tuple[int, int], int]


def _group(layers: int, slots: int, first: Found) -> Group:
    """The best group of so many layers with so many slots, its own input's among them."""
    parts, left, free = list[Group](), layers, slots
    while left > 1:
        parts.append(_group(first[left, free], free, first))
        left, free = left - parts[-1].layers, free - 1
    return Group(layers, tuple(parts))


def _lengths(layers: int, slots: int) -> tuple[Found, Found]:
    """The length of the first group of a run to the loss, and of the first part of a group, for each number
    of layers and of slots."""
    infinite = (layers ** 3, 0)
    inner = {(1, free): (1, 0) for free in range(slots + 1)}
    outer = {(0, free): (0, -1) for free in range(slots + 1)}
    first_inner, first_outer = Found(), Found()
    for left in range(1, layers + 1):
        for free in range(1, slots + 1):
            options = [(_joined(inner[size, free], inner.get((left - size, free - 1), infinite), size), size)
                       for size in range(1, left)]
            if options:
                inner[left, free], first_inner[left, free] = min(options)
            options = [(_joined(inner[size, free], outer.get((left - size, free - 1), infinite), 0), size)
                       for size in range(1, left + 1)]
            outer[left, free], first_outer[left, free] = min(options)
    return first_outer, first_inner


def _joined(before: tuple[int, int], behind: tuple[int, int], again: int) -> tuple[int, int]:
    """(computations, inputs beside a layer's own) of two neighbours, the first of which is kept meanwhile."""
    return before[0] + behind[0] + again, max(before[1], behind[1] + 1)


class Layers:
    """The decoder layers of a model, called group by group while gradients are wanted.

    In evaluation, without gradients and with a cache of keys and values every layer is its own forward pass,
    as is a layer behind the last group while it is trained. `own`: what runs for each layer otherwise.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]):
        self.layers = decoder_layers(model)
        self.plain: list[Forward] = [layer.forward for layer in self.layers]
        self.own = list(self.plain)
        self._calls: dict[int, Forward] = {}
        self._tuples: dict[int, int] = {}
        self._group: dict[int, tuple[Group, int]] = {}
        self.forwards = sum(group.forwards for group in groups)
        self.grouping = True
        start = 0
        for group in groups:
            self._group |= dict.fromkeys(range(start, start + group.layers), (group, start))
            start += group.layers
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._forward, index)

    def _forward(self, index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One layer's (B, S, H) hidden states, or for all but the last of a group those it was given."""
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return self.plain[index](hidden_states, *args, **kwargs)
        trained = self.layers[index].training and torch.is_grad_enabled()
        if not trained or not self.grouping or index not in self._group:
            return self.own[index](hidden_states, *args, **kwargs)
        group, start = self._group[index]
        self._calls[index] = lambda hidden: self.own[index](hidden, *args, **kwargs)
        if index < start + group.layers - 1:
            more = self._tuples.get(index, 0)
            return (hidden_states, *[None] * more) if more else hidden_states
        try:
            calls = [self._calls.pop(each) for each in range(start, index + 1)]
        except KeyError as error:
            raise UsageError("A decoder layer was left out of a training step, and recomputed groups need "
                             "all of theirs; set training.kept_inputs=0.") from error
        return checkpoint(_run, group, calls, hidden_states, use_reentrant=False)

    def probe(self, work: Callable[[], Tensor]) -> None:
        """Learn which layers return more than hidden states, and compare `work` with groups and without.

        Raises UsageError when the decoder does more with its layers than call them one after the other.
        """
        handles = [layer.register_forward_hook(functools.partial(self._learn, index))
                   for index, layer in enumerate(self.layers)]
        try:
            with self.whole():
                expected = work()
        finally:
            for handle in handles:
                handle.remove()
        if not torch.equal(work(), expected):
            raise UsageError("This family's decoder does more than call its layers one after the other, so "
                             "groups of them cannot be recomputed; set training.kept_inputs=0.")

    def _learn(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        self._tuples[index] = len(output) - 1 if isinstance(output, tuple) else 0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every layer runs by itself and keeps its activations."""
        self.grouping = False
        try:
            yield
        finally:
            self.grouping = True


def _run(group: Group, calls: Sequence[Forward], hidden: Tensor) -> Any:
    """Hidden states (B, S, H), or what the last layer returns, after a group's calls."""
    done = 0
    for part in group.parts:
        found = checkpoint(_run, part, calls[done:done + part.layers], hidden, use_reentrant=False)
        hidden = found[0] if isinstance(found, tuple) else found
        done += part.layers
    return calls[-1](hidden)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order, of a PEFT model too. Raises UsageError where they cannot be told."""
    try:
        return Anatomy(causal_lm(model)).layers
    except Unsupported as error:
        raise UsageError(f"The decoder layers of this model cannot be told ({error}); set "
                         "training.kept_layers=0, training.kept_inputs=0 and "
                         "training.compile=false.") from error


def select(model: nn.Module, kept_layers: int, kept_inputs: int) -> Layers:
    """Recompute all but the last `kept_layers` layers, with `kept_inputs` (0: all) of their inputs held.

    The last layers are kept because their activations are given back first. Evaluation and generation are as
    before, and so are gradients, to the bit. Raises UsageError when there are fewer layers, or where the
    family's decoder does more than call them in turn.
    """
    count = len(decoder_layers(model))
    for name, value in (("training.kept_layers", kept_layers), ("training.kept_inputs", kept_inputs)):
        if value > count:
            raise UsageError(f"{name} is {value} and the model has {count} layers; set it to {count} at "
                             "most.")
    if kept_layers == count:
        return Layers(model, ())
    layers = Layers(model, schedule(count - kept_layers, kept_inputs or count))
    if any(group.layers > 1 for group, _ in layers._group.values()):
        layers.probe(lambda: _final(causal_lm(model)))
    return layers


def _final(model: Any) -> Tensor:
    """Final hidden states (1, P, H) of made-up tokens in training mode, the same each time."""
    embeddings = model.get_input_embeddings().weight
    modes = [(module, module.training) for module in model.modules()]
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=embeddings.device)[None] * 7 % vocab
    devices = [embeddings.device] if embeddings.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(0)
        try:
            found: Tensor = model.train().get_decoder()(input_ids=ids, use_cache=False)[0].detach()
        finally:
            for module, mode in modes:
                module.training = mode
    return found
