"""NF4 storage of frozen weights with bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314), GPU and CPU."""

from __future__ import annotations

from typing import Any

import torch

from training.errors import UsageError
from training.settings import Config


def nf4(config: Config, compute_dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` for `model.quantization` nf4. Embeddings and head are left as they are by it.

    Raises UsageError when bitsandbytes cannot be imported.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"model.quantization nf4 needs bitsandbytes, which does not load here ({error}); "
                         "install it or set model.quantization=none.") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_compute_dtype=compute_dtype,
                              bnb_4bit_use_double_quant=config["model.double_quant"])


def keep_trainable_layout(model: torch.nn.Module) -> int:
    """Forbid bitsandbytes' repacking of weights for CPU inference; returns the number of 4-bit layers.

    On CPUs with AVX512-BF16, a `Linear4bit` in eval mode rewrites its weight in place for a kernel that has
    no backward, so a first evaluation would break the training after it (bitsandbytes 0.50, nn/modules.py).
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
