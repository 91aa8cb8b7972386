"""Optimizer and rate, and the keys of single optimizations: off unless they were measured to help here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from training.planning.situation import Situation
from training.planning.tuning import AdvancedOptimizer
from training.records import Choice

NOT_SHOWN = "off: not measured to help (docs/optimizations.md)"
# Value and reason of what no machine or base decides.
FIXED: dict[str, tuple[Any, str]] = {
    "model.kv_heads": (0, "pooling heads changes the model, so only on request"),
    "model.fused_kernels": (False, NOT_SHOWN),
    "lora.plus_ratio": (1.0, NOT_SHOWN),
    "lora.rank_stabilized": (False, "alpha is the same for every rank"),
    "lora.dora": (False, NOT_SHOWN),
    "dataset.packing": (True, "no window is padded with what could be trained on"),
    "training.adaptive_clip": (0.0, "made for networks without normalization (arXiv:2102.06171)"),
    "training.gradient_noise": (0.0, NOT_SHOWN),
    "training.label_smoothing": (0.0, NOT_SHOWN),
    "training.averaging": ("none", NOT_SHOWN),
    "training.spike_sigma": (6.0, "one bad update in 128 must not undo the others"),
    "training.spike_window": (128, "long enough for a deviation, short enough to follow the loss"),
    "training.kept_layers": (0, "unused: the planned step keeps all or recomputes all"),
    "training.kept_inputs": (0, "each layer's input is kept"),
    "training.compile": (False, NOT_SHOWN),
    "training.keep_best": (True, "the last checkpoint need not be the best one"),
    "optimizer.lookahead_steps": (0, NOT_SHOWN),
    "parallel.compression": ("none", "gradients are small beside the links of one machine"),
    "parallel.ring": (1, "a window is worked on by one device"),
    "stream.overlap": (True, "copies cost no time while they hide behind the computation"),
}
PRESET = {name: Choice(value, "preset", why) for name, (value, why) in FIXED.items()}
# Value of what only counts while another key is not off: that key, its value for off, and both reasons.
DEPENDENT: dict[str, tuple[Any, str, Any, str, str]] = {
    "model.heal_steps": (0, "model.kv_heads", 0, "no updates are set aside for pooled heads",
                         "unused: no heads are pooled"),
    "dataset.curriculum_pace": ("fixed", "dataset.curriculum_stages", 1, "each stage ends at its share",
                                "unused: one stage"),
    "training.ema_decay": (0.99, "training.averaging", "none", "an average of about the last 100 updates",
                           "unused: no average"),
    "training.averaging_start": (0.75, "training.averaging", "none", "the last quarter is near the end",
                                 "unused: no average"),
    "optimizer.lookahead_share": (0.5, "optimizer.lookahead_steps", 0, "the paper's (arXiv:1907.08610)",
                                  "unused: no slow weights"),
    "parallel.compression_rank": (4, "parallel.compression", "none", "the paper's largest "
                                  "(arXiv:1905.13727)", "unused: gradients travel whole"),
}


def optimizer_choices(values: Mapping[str, Any], situation: Situation) -> dict[str, Choice]:
    """The optimizer's constants, the learning rate and its course, for optimizer and batch in `values`."""
    embedded, lora = situation.embedded, bool(values["lora.enabled"])
    windows = math.prod(int(values[name]) for name in ("training.micro_batch", "training.accumulation",
                                                       "device.count"))
    muon = values["optimizer.name"] == "muon"
    tuning = AdvancedOptimizer(situation.profile, situation.user)
    return {
        "training.learning_rate": tuning.learning_rate(situation.base, lora, windows, embedded, muon),
        "training.schedule": Choice("cosine", "preset", "ends low, so the last step is the best one"),
        "training.warmup_share": Choice(0.05 if embedded else 0.03, "preset", "Adam's moments settle first"),
        "training.min_lr_share": Choice(0.1, "preset", "the last updates still move"),
        "training.weight_decay": Choice(0.0, "preset", "an adapter is small and starts at zero") if lora else
        Choice(0.01, "preset", "on matrices only"),
        "optimizer.beta1": Choice(0.9, "preset", "Adam's usual first decay"),
        "optimizer.beta2": Choice(0.999, "preset", "QLoRA's (arXiv:2305.14314, appendix B)") if lora else
        Choice(0.95, "preset", "follows short runs faster than 0.999"),
        "optimizer.eps": Choice(1e-8, "preset", "Adam's usual value"),
    }


def optimizer_name(values: Mapping[str, Any], situation: Situation) -> Choice:
    """Which optimizer, as it is planned without evidence."""
    lora, zero = values["lora.enabled"], values["deepspeed.stage"]
    if situation.embedded and not zero and not lora:
        return Choice("muon", "preset", "held-out loss after 0.1 M tokens 4.30, AdamW's 5.84 (one "
                                        "run of each)")
    eight_bit = (lora and values["device.kind"] == "cuda" and not zero
                 and "bitsandbytes_8bit" in situation.profile.supports
                 and situation.works("bitsandbytes_8bit")[0])
    if eight_bit:
        return Choice("paged_adamw_8bit", "derived",
                      "2 bytes of state a weight instead of 8, paged out when memory runs short")
    return Choice("adamw", "derived",
                  "its state is small beside the rest" if lora else "exact moments in fp32")
