"""The keys of single optimizations: off unless they were measured to help on a machine like this one."""

from __future__ import annotations

from typing import Any

from training.records import Choice

NOT_SHOWN = "off: not measured to help (docs/optimizations.md)"
# Value and reason of what no machine or base decides.
FIXED: dict[str, tuple[Any, str]] = {
    "model.kv_heads": (0, "pooling heads changes the model, so only on request"),
    "model.heal_steps": (0, "unused: no heads are pooled"),
    "model.fused_kernels": (False, NOT_SHOWN),
    "lora.plus_ratio": (1.0, NOT_SHOWN),
    "lora.rank_stabilized": (False, "alpha is the same for every rank"),
    "lora.dora": (False, NOT_SHOWN),
    "dataset.packing": (True, "no window is padded with what could be trained on"),
    "dataset.curriculum_pace": ("fixed", "unused: one stage"),
    "training.adaptive_clip": (0.0, "made for networks without normalization (arXiv:2102.06171)"),
    "training.gradient_noise": (0.0, NOT_SHOWN),
    "training.label_smoothing": (0.0, NOT_SHOWN),
    "training.averaging": ("none", NOT_SHOWN),
    "training.ema_decay": (0.99, "unused: no average"),
    "training.averaging_start": (0.75, "unused: no average"),
    "training.spike_sigma": (6.0, "one bad update in 128 must not undo the others"),
    "training.spike_window": (128, "long enough for a deviation, short enough to follow the loss"),
    "training.kept_layers": (0, "unused: the planned step keeps all or recomputes all"),
    "training.kept_inputs": (0, "each layer's input is kept"),
    "training.compile": (False, NOT_SHOWN),
    "training.keep_best": (True, "the last checkpoint need not be the best one"),
    "optimizer.lookahead_steps": (0, NOT_SHOWN),
    "optimizer.lookahead_share": (0.5, "unused: no slow weights"),
    "parallel.compression": ("none", "gradients are small beside the links of one machine"),
    "parallel.compression_rank": (4, "unused: gradients travel whole"),
    "parallel.ring": (1, "a window is worked on by one device"),
    "stream.overlap": (True, "copies cost no time while they hide behind the computation"),
}


def recipe_choices() -> dict[str, Choice]:
    """Every key of this file as it is planned without evidence."""
    return {name: Choice(value, "preset", why) for name, (value, why) in FIXED.items()}
