"""Liger's Triton kernels in a loaded model: rotary embedding, norms, and the product inside a gated MLP.

Hsu et al. 2024, arXiv:2410.10989, section 3. A fused kernel reads and writes its activations once instead of
once an operation. Its fused cross-entropy stays off: the loss of this project is computed in chunks already.

Shapes: P tokens of the comparison, H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from training.errors import UsageError
from training.trainer.loss import held_still

KERNELS = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared")
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
TOKENS = 16
# Largest distance of the logits and of the input's gradient, relative to their norms: float32, 16 bits. Those
# of a streamed step, which differs from the plain one as kernels do, by rounding.
TOLERANCES = {4: (1e-3, 1e-2), 2: (5e-2, 0.25)}


def apply(model: Any) -> str:
    """Put Liger's kernels into a Transformers model that has no adapter yet; which, as a note.

    Liger looks neither at an MLP's activation nor at how much of a head is rotated when it changes a model
    that is there, so logits and gradient of a few tokens are compared before and after. Raises UsageError
    when the package does not load, knows no kernel for the family, or changes what the model computes.
    """
    patch, family = _package(), model.config.model_type
    known = patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    defaults = inspect.signature(known).parameters if known else {}
    chosen = [name for name in KERNELS if name in defaults and defaults[name].default is True]
    if not chosen:
        raise UsageError(f"model.fused_kernels is true and Liger has no kernels for the {family} family; set "
                         "model.fused_kernels=false.")
    before = _answers(model)
    patch._apply_liger_kernel_to_instance(
        model=model, **dict.fromkeys(chosen, True), **dict.fromkeys(LOSSES, False))
    logits, gradient = (_distance(a, b) for a, b in zip(_answers(model), before, strict=True))
    by_logits, by_gradient = TOLERANCES[min(4, model.dtype.itemsize)]
    if not (logits <= by_logits and gradient <= by_gradient):  # NaN is no agreement
        raise UsageError(
            f"model.fused_kernels is true and with Liger's kernels ({', '.join(chosen)}) this {family} model "
            f"computes something else: its logits are {logits:.1e} off, their gradient {gradient:.1e}; set "
            "model.fused_kernels=false.")
    return (f"Liger's fused kernels: {', '.join(chosen)}; on {TOKENS} tokens the logits are {logits:.1e} off "
            f"the model's own, their gradient {gradient:.1e}.")


def _package() -> Any:
    """Liger's module of patches. A missing driver is a RuntimeError of Triton's."""
    try:
        return importlib.import_module("liger_kernel.transformers.monkey_patch")
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"model.fused_kernels needs liger-kernel and Triton, which do not load here ({reason}); install "
            "with `pip install liger-kernel==0.8.0 --no-deps` beside a torch for CUDA, which brings Triton, "
            "or set model.fused_kernels=false.") from error


def _answers(model: Any) -> tuple[Tensor, Tensor]:
    """Logits (1, P, V) of made-up tokens, and the gradient (1, P, H) of their mean square by the input."""
    embeddings = model.get_input_embeddings()
    ids = torch.arange(TOKENS, device=embeddings.weight.device)[None] * 7 % embeddings.weight.shape[0]
    with held_still(model), torch.enable_grad():
        given = embeddings(ids).detach().requires_grad_()
        logits = model(inputs_embeds=given, use_cache=False).logits
        gradient, = torch.autograd.grad(logits.float().square().mean(), given)
    return logits.detach().float(), gradient.float()


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
