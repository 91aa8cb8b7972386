"""What is done to gradients between the backward pass and the update: noise, and clipping unit by unit.

Both take the trainable parameters by name and change their gradients in place; one without a gradient is
left out. Gradients are whole and unscaled here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from training.errors import UsageError
from training.trainer.optimizers import in_decoder_layer

# Least norm of a unit's weights that counts, so that units which start at zero can grow (arXiv:2102.06171,
# section 4.1), and the authors' guard against a division by zero.
LEAST_WEIGHT_NORM = 1e-3
LEAST_GRADIENT_NORM = 1e-6
# How fast the variance falls with the updates (arXiv:1511.06807, section 3).
DECAY = 0.55


def unit_norms(tensor: Tensor, inputs: int = -1) -> Tensor:
    """Norms (float32) that broadcast over the tensor: of each output unit; of a vector, the whole.

    `inputs` is the dimension of a unit's inputs: the last one of a weight (..., outputs, inputs).

    >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist()
    [[5.0], [2.0]]
    >>> unit_norms(torch.tensor([3.0, 4.0])).tolist()
    5.0
    """
    vector = tensor.squeeze().ndim <= 1
    return torch.linalg.vector_norm(tensor, dim=None if vector else inputs, keepdim=not vector,
                                    dtype=torch.float32)


@torch.no_grad()
def clip_units(trainable: Mapping[str, Parameter], limit: float, inputs_first: Collection[str] = ()) -> None:
    """Scale each unit's gradient down to `limit` times the norm of its weights.

    Only parameters of decoder layers: the last linear layer is not clipped, nor are embeddings.
    `inputs_first` names matrices of shape (inputs, outputs). Source: arXiv:2102.06171, section 4.1, eq. 3.
    """
    for name, parameter in trainable.items():
        gradient = parameter.grad
        if gradient is None or not in_decoder_layer(name):
            continue
        inputs = 0 if name in inputs_first else -1
        most = unit_norms(parameter, inputs).clamp(min=LEAST_WEIGHT_NORM) * limit
        norms = unit_norms(gradient, inputs)
        share = torch.where(norms < most, 1.0, most / norms.clamp(min=LEAST_GRADIENT_NORM))
        gradient.mul_(share)


def inputs_first(model: Module, trainable: Collection[str]) -> frozenset[str]:
    """Names of the weights of shape (inputs, outputs): those of Transformers' Conv1D, as GPT-2 has.

    Raises UsageError when no trainable parameter is in a numbered layer, so that nothing would be clipped.
    """
    if not any(map(in_decoder_layer, trainable)):
        raise UsageError("training.adaptive_clip is for parameters of decoder layers and none is trained; "
                         "set it to 0.")
    return frozenset(f"{name}.weight" for name, module in model.named_modules()
                     if type(module).__name__ == "Conv1D")


def noise_deviation(variance: float, update: int) -> float:
    """Standard deviation at an update counted from 0. Source: arXiv:1511.06807, equation 1.

    >>> noise_deviation(0.01, 0), round(noise_deviation(0.01, 99), 4)
    (0.1, 0.0282)
    """
    return float((variance / (1 + update) ** DECAY) ** 0.5)


@torch.no_grad()
def add_noise(trainable: Mapping[str, Parameter], variance: float, update: int, seed: int) -> None:
    """Add Gaussian noise, drawn from (seed, update, position of the name) alone: no other generator moves."""
    deviation = noise_deviation(variance, update)
    for index, name in enumerate(sorted(trainable)):
        gradient = trainable[name].grad
        if gradient is None:
            continue
        mixed = int(np.random.SeedSequence((seed, update, index)).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device=gradient.device).manual_seed(mixed)
        noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
        gradient.add_(noise, alpha=deviation)
