"""Contexts beyond a model's own: YaRN on the rotary embedding (Peng et al. 2023, arXiv:2309.00071, 3.4)."""

from __future__ import annotations

import math
from typing import Any

from training.errors import UsageError


def native_context(config: Any) -> int | None:
    """The longest context a Transformers configuration says its model knows, tokens; None: no limit given."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def extend(config: Any, context_tokens: int, factor: float) -> str:
    """Set YaRN in a Transformers configuration when the context needs it; the note says what and why.

    Nothing is changed, and the note is empty, when the context fits. Raises UsageError when it neither fits
    nor can be reached: no factor given, factor too small, no rotary embedding, or one scaled already.
    """
    native = native_context(config)
    if native is None or context_tokens <= native:
        return ""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    over = (f"The context of {context_tokens:,} tokens is beyond the {native:,} that this "
            f"{config.model_type} model knows")
    if not rope or "rope_type" not in rope:
        raise UsageError(f"{over}, and it has no rotary embedding of one kind to scale; "
                         f"use --context {native}.")
    if rope["rope_type"] != "default":
        raise UsageError(f"{over}, and its rotary embedding is already scaled ({rope['rope_type']}); "
                         f"use --context {native}.")
    needed = context_tokens / native
    if factor <= 1:
        raise UsageError(f"{over}; set model.rope_factor={_round_up(needed):g}, or use --context {native}.")
    if factor < needed:
        raise UsageError(f"{over}, and model.rope_factor {factor:g} reaches {int(native * factor):,}; "
                         f"set model.rope_factor={_round_up(needed):g}.")
    text.rope_parameters = yarn_parameters(rope, native, factor)
    text.max_position_embeddings = round(native * factor)
    return (f"YaRN factor {factor:g} on the rotary embedding: the context of {context_tokens:,} tokens is "
            f"beyond the model's own {native:,}.")


def yarn_parameters(rope: dict[str, Any], native: int, factor: float) -> dict[str, Any]:
    """`rope_parameters` of a configuration with YaRN in place of the plain rotary embedding.

    >>> yarn_parameters({"rope_type": "default", "rope_theta": 10000.0}, 2048, 4.0)["factor"]
    4.0
    """
    return {**rope, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": native}


def _round_up(factor: float) -> float:
    """The next half: 1.1 -> 1.5."""
    return math.ceil(factor * 2) / 2


def verify(model: Any) -> None:
    """Make sure that YaRN is in effect, since a family may ignore the setting. Raises UsageError if not."""
    rope = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not rope or not all(getattr(module, "rope_type", "") == "yarn" for module in rope):
        native = model.config.get_text_config().rope_parameters["original_max_position_embeddings"]
        raise UsageError(f"The {model.config.model_type} family ignores YaRN in this version of "
                         f"Transformers; use --context {native}.")
