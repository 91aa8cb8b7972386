"""The sliding window of each layer, read from a config.json as transformers 5.23 reads it: no torch.

Llama 4's chunked attention counts as a window of one chunk, its upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.families import Window

CHUNK = "attention_chunk_size"
NO_ROPE_EVERY = 4                # smollm3, llama4_text: `no_rope_layer_interval`


def windows_of(config: Mapping[str, Any], window: Window | None, layers: int) -> tuple[int, ...]:
    """Tokens each layer's queries see, 0 for all before them; () when every layer sees all.

    >>> windows_of({"sliding_window": 512}, Window(rule="every", step=3), 4)
    (512, 512, 0, 512)
    >>> windows_of({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]},
    ...            Window(rule="every", step=2), 2)
    (0, 512)
    """
    if window is None or (window.switch and not config.get(window.switch)):
        return ()
    width = int(config.get(window.size) or 0)
    if not width:
        return ()
    listed = config.get("layer_types") if window.listed else None
    if listed:
        seen = "chunked_attention" if window.size == CHUNK else "sliding_attention"
        found = tuple(width if kind == seen else 0 for kind in listed)
    else:
        found = tuple(width if _slides(config, window, layer) else 0 for layer in range(layers))
    return found if any(found) else ()


def _slides(config: Mapping[str, Any], window: Window, layer: int) -> bool:
    """Whether a layer has a window where `layer_types` does not say."""
    if window.rule == "all":
        return True
    if window.rule == "every":
        return (layer + 1) % int(config.get(window.pattern) or window.step) != 0
    if window.rule == "but_first":
        return layer % window.step != 0
    if window.rule == "after":
        return layer >= int(config["max_window_layers"])
    if window.rule == "alternate":
        return layer % 2 == 0 and layer < int(config["max_window_layers"])
    if window.rule == "no_rope":
        return _rotary(config, layer) == (window.size == CHUNK)
    return window.rule == "local" and _local(config)[layer] == "local"


def _rotary(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer rotates queries and keys; 1 in `no_rope_layers` says that it does."""
    given = config.get("no_rope_layers")
    if given:
        return bool(given[layer])
    return (layer + 1) % int(config.get("no_rope_layer_interval") or NO_ROPE_EVERY) != 0


def _local(config: Mapping[str, Any]) -> list[str]:
    """GPT-Neo's kind of each layer: `attention_types` holds (kinds, repeats)."""
    given = config.get("attention_layers")
    types = config.get("attention_types") or [[["global", "local"], 12]]
    return given or [kind for kinds, repeats in types for _ in range(repeats) for kind in kinds]
