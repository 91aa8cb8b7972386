"""What a Hugging Face causal LM is made of, found without a line of code for any family.

Its own `forward` is run with a stand-in for every decoder layer. On the way in, the stand-ins write down what
each layer would be called with (rotary embeddings, positions, masks, whatever the family passes). On the way
out, the last one returns a chunk of final hidden states, so that the model applies its own norm, head, logit
scale and soft-cap. Only where the decoder keeps its list of layers has to be known: it is the one list that
is as long as the config says.

Shapes: B batch, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from training.longcontext.errors import Unsupported

# Rotary embeddings whose frequencies depend on the longest position of the call.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class Call(NamedTuple):
    """What one decoder layer is called with after its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _NoLayers(list[Any]):
    """A cache without layers, for families that look for one of their own kind there."""

    def __getitem__(self, index: Any) -> Any:
        raise Unsupported("layers that keep more than keys and values in the cache")


class Passing(Cache):
    """A cache that keeps nothing: the attention function sees a chunk's own keys and values."""

    def __init__(self, seen: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.layers = _NoLayers()
        self.seen = seen

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The chunk's own."""
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens before the chunk."""
        return self.seen

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """Tokens before the chunk."""
        return self.seen

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """(keys, their offset)."""
        return self.seen + query_length, 0


class _Recorded(Exception):
    """Every stand-in was called; the rest of the forward is not needed."""


class _StandIn(nn.Module):
    """Takes a decoder layer's place in its list."""

    def __init__(self, layer: nn.Module, index: int, tape: _Tape):
        super().__init__()
        object.__setattr__(self, "_real", layer)  # not registered as a submodule
        object.__setattr__(self, "_tape", tape)
        self._index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_real"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the call down; hand the hidden states on."""
        return object.__getattribute__(self, "_tape").pass_through(self._index, hidden_states, args, kwargs)


class _Tape:
    """What the stand-ins write to and read from."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.calls: list[Call] = []
        self.first: Tensor | None = None
        self.final: Tensor | None = None

    def pass_through(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record, or on the way out hand in the final hidden states."""
        last = index == self._layers - 1
        if self.final is not None:
            return self.final if last else hidden
        if index == 0:
            self.first = hidden
        self.calls.append(Call(args, kwargs))
        if last:
            raise _Recorded
        return hidden


class Anatomy:
    """The parts of one model. `model` may be PEFT-wrapped. Raises Unsupported."""

    def __init__(self, model: nn.Module):
        outer: Any = model
        self.model: Any = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
        if not hasattr(self.model, "get_decoder") or not hasattr(self.model, "config"):
            raise Unsupported(f"{type(model).__name__} is not a Transformers causal language model")
        if getattr(getattr(outer, "active_peft_config", None), "is_prompt_learning", False):
            raise Unsupported("prompt learning puts tokens in front of every sequence")
        if self.model.get_output_embeddings() is None:
            raise Unsupported(f"{type(self.model).__name__} has no language-modelling head")
        self.config = self.model.config.get_text_config()
        self.decoder: Any = self.model.get_decoder()
        self._home, self._name = self._stack()
        self.layers: list[nn.Module] = list(getattr(self._home, self._name))
        self._tape = _Tape(len(self.layers))
        self._stand_ins = nn.ModuleList(_StandIn(layer, i, self._tape) for i, layer in enumerate(self.layers))
        self._configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        self._compared = False
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        self.outside = [p for p in self.model.parameters() if id(p) not in inside]
        embeddings = self.model.get_input_embeddings().weight
        self._width = getattr(embeddings, "ds_shape", embeddings.shape)[-1]  # ZeRO-3 leaves an empty tensor

    def _stack(self) -> tuple[nn.Module, str]:
        """The module that holds the list of decoder layers, and the list's name there."""
        count = self.config.num_hidden_layers
        found = [(home, name) for home in self.decoder.modules() for name, child in home.named_children()
                 if isinstance(child, nn.ModuleList) and len(child) == count and not _inside_layer(home)]
        if len(found) != 1:
            raise Unsupported(f"{type(self.model).__name__} has {len(found)} lists of {count} decoder "
                              "layers; one was looked for")
        return found[0]

    @property
    def device(self) -> torch.device:
        """Where hidden states live: the input embeddings' device."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def uses_interface(self) -> bool:
        """Whether the module that defines a layer's attention knows Transformers' attention interface."""
        homes = {type(module).__module__ for module in self.layers[0].modules()}
        return any(hasattr(sys.modules.get(home), "ALL_ATTENTION_FUNCTIONS") for home in homes)

    def length_dependent(self) -> str:
        """The rotary type whose frequencies depend on the sequence's length, or ''."""
        ropes = _ropes(getattr(self.config, "rope_parameters", None))
        found = [value.get("rope_type", "") for value in ropes]
        return next((kind for kind in found if kind in LENGTH_DEPENDENT), "")

    @contextmanager
    def mounted(self, attention: str) -> Iterator[None]:
        """The registered attention function in place, gradient checkpointing off, for a while."""
        before = {key: config._attn_implementation_internal for key, config in self._configs.items()}
        checkpointed = [m for m in self.model.modules() if m.__dict__.get("gradient_checkpointing", False)]
        for config in self._configs.values():
            config._attn_implementation_internal = attention
        for module in checkpointed:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for key, config in self._configs.items():
                config._attn_implementation_internal = before[key]
            for module in checkpointed:
                module.gradient_checkpointing = True

    @contextmanager
    def _standing_in(self) -> Iterator[_Tape]:
        modules: Any = self._home._modules
        real = modules[self._name]
        modules[self._name] = self._stand_ins
        self._tape.calls, self._tape.first, self._tape.final = [], None, None
        try:
            yield self._tape
        finally:
            modules[self._name] = real

    def enter(self, ids: Tensor, positions: Tensor, seen: int) -> tuple[Tensor, list[Call]]:
        """Embed (B, C) ids at (B, C) positions: hidden states (B, C, H) and every layer's call."""
        hidden, calls = self._record({"input_ids": ids}, positions, seen)
        if not self._compared:
            self._compared = True
            _same(calls, self.calls(ids.shape[0], positions, seen, hidden.dtype))
        return hidden, calls

    def calls(self, batch: int, positions: Tensor, seen: int, dtype: torch.dtype) -> list[Call]:
        """Every layer's call for a chunk, without its embeddings."""
        return self._record({"inputs_embeds": self._blank(batch, positions, dtype)}, positions, seen)[1]

    def _record(self, inputs: dict[str, Tensor], positions: Tensor, seen: int) -> tuple[Tensor, list[Call]]:
        with self._standing_in() as tape, _following(self.decoder):
            with suppress(_Recorded):
                self.decoder(**inputs, position_ids=positions, past_key_values=Passing(seen), use_cache=True)
            if tape.first is None or len(tape.calls) != len(self.layers):
                raise Unsupported(f"{type(self.decoder).__name__} calls {len(tape.calls)} of its "
                                  f"{len(self.layers)} layers")
            return tape.first, tape.calls

    def _blank(self, batch: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
        blank = torch.zeros((), dtype=dtype, device=positions.device)
        return blank.expand(batch, positions.shape[1], self._width)

    def leave(self, hidden: Tensor, positions: Tensor, seen: int) -> Tensor:
        """The model's own logits (B, C, V) of final hidden states (B, C, H), before the norm."""
        with self._standing_in() as tape, _following(self.model):
            tape.final = hidden
            blank = self._blank(hidden.shape[0], positions, hidden.dtype)
            logits: Tensor = self.model(inputs_embeds=blank, position_ids=positions,
                                        past_key_values=Passing(seen), use_cache=True).logits
            return logits


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors(inner)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _same(calls: list[Call], blank: list[Call]) -> None:
    """Calls are made again without the tokens, so they must not depend on them. Raises Unsupported."""
    found, again = (list(tensors([[call.args, call.kwargs] for call in made])) for made in (calls, blank))
    if len(found) != len(again) or not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        raise Unsupported("layers that are given more of the tokens than their hidden states")


@contextmanager
def _following(module: nn.Module) -> Iterator[None]:
    """A forward that fails on the stand-ins does more than call its layers one after the other."""
    try:
        yield
    except Unsupported:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise Unsupported(f"{type(module).__name__} does more with its layers than call them in turn "
                          f"({str(error).splitlines()[0][:80]})") from error
    except RuntimeError as error:
        if "single memory location" not in str(error):
            raise
        raise Unsupported(f"{type(module).__name__} changes its input embeddings in place") from error


def _inside_layer(home: nn.Module) -> bool:
    """A list of heads or experts inside a layer may happen to be as long as the stack."""
    return type(home).__name__.endswith(("Layer", "Block", "MoE", "MLP", "Experts"))


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """Rotary parameters, which a family with two kinds of layers nests by kind."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
