"""What a Hugging Face causal LM is made of, found without a line of code for any family.

Its own `forward` is run with a stand-in for every decoder layer. On the way in, the stand-ins write down what
each layer would be called with (rotary embeddings, positions, masks, whatever the family passes). On the way
out, the last one returns a chunk of final hidden states, so that the model applies its own norm, head, logit
scale and soft-cap. Only where the decoder keeps its list of layers has to be known: it is the one list that is
as long as the config says.

Shapes: B batch, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


class Passing(Cache):
    """A cache that keeps nothing: the attention function sees a chunk's own keys and values."""

    def __init__(self, seen: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
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
        if getattr(outer, "active_peft_config", None) is not None and outer.active_peft_config.is_prompt_learning:
            raise Unsupported("prompt learning puts tokens in front of every sequence")
        self.config = self.model.config.get_text_config()
        self.decoder: Any = self.model.get_decoder()
        self._home, self._name = self._stack()
        self.layers: list[nn.Module] = list(getattr(self._home, self._name))
        self._tape = _Tape(len(self.layers))
        self._stand_ins = nn.ModuleList(_StandIn(layer, i, self._tape) for i, layer in enumerate(self.layers))
        self._configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        self.outside = [p for p in self.model.parameters() if id(p) not in inside]

    def _stack(self) -> tuple[nn.Module, str]:
        """The module that holds the list of decoder layers, and the list's name there."""
        count = self.config.num_hidden_layers
        found = [(home, name) for home in self.decoder.modules() for name, child in home.named_children()
                 if isinstance(child, nn.ModuleList) and len(child) == count and not _inside_layer(home)]
        if len(found) != 1:
            raise Unsupported(f"{type(self.model).__name__} has {len(found)} lists of {count} decoder layers; "
                              "one was looked for")
        return found[0]

    @property
    def device(self) -> torch.device:
        """Where hidden states live: the input embeddings' device."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def length_dependent(self) -> str:
        """The rotary type whose frequencies depend on the sequence's length, or ''."""
        found = [value.get("rope_type", "") for value in _ropes(getattr(self.config, "rope_parameters", None))]
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
        return self._record({"input_ids": ids}, positions, seen)

    def calls(self, batch: int, positions: Tensor, seen: int, dtype: torch.dtype) -> list[Call]:
        """Every layer's call for a chunk, without its embeddings."""
        return self._record({"inputs_embeds": self._blank(batch, positions, dtype)}, positions, seen)[1]

    def _record(self, inputs: dict[str, Tensor], positions: Tensor, seen: int) -> tuple[Tensor, list[Call]]:
        with self._standing_in() as tape:
            try:
                self.decoder(**inputs, position_ids=positions, past_key_values=Passing(seen), use_cache=True)
            except _Recorded:
                pass
            if tape.first is None or len(tape.calls) != len(self.layers):
                raise Unsupported(f"{type(self.decoder).__name__} calls {len(tape.calls)} of its "
                                  f"{len(self.layers)} layers")
            return tape.first, tape.calls

    def _blank(self, batch: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
        width = self.model.get_input_embeddings().weight.shape[-1]
        return torch.zeros((), dtype=dtype, device=positions.device).expand(batch, positions.shape[1], width)

    def leave(self, hidden: Tensor, positions: Tensor, seen: int) -> Tensor:
        """The model's own logits (B, C, V) of final hidden states (B, C, H), before the norm."""
        with self._standing_in() as tape:
            tape.final = hidden
            blank = self._blank(hidden.shape[0], positions, hidden.dtype)
            logits: Tensor = self.model(inputs_embeds=blank, position_ids=positions,
                                        past_key_values=Passing(seen), use_cache=True).logits
            return logits


def _inside_layer(home: nn.Module) -> bool:
    """A list of heads or experts inside a layer may happen to be as long as the stack."""
    return type(home).__name__.endswith(("Layer", "Block", "MoE", "MLP", "Experts"))


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """Rotary parameters, which a family with two kinds of layers nests by kind."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
