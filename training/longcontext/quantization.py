"""Group-wise integers for kept layer inputs: a quarter or an eighth of fp32, with an error that is named.

64 neighbours along the hidden dimension share one fp16 scale, their largest magnitude over 127 or 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.longcontext.policy import QUANTIZATION_GROUP

LARGEST = {"int8": 127, "int4": 7}


class Packed(NamedTuple):
    """`codes`: int8 (groups, 64), or 4-bit pairs, uint8 (groups, 32); `scales`: fp16 (groups, 1)."""

    codes: Tensor
    scales: Tensor


def pack(x: Tensor, encoding: str) -> Packed:
    """Quantize (..., H); a hidden size that 64 does not divide is filled up with zeros."""
    groups = F.pad(x, (0, -x.shape[-1] % QUANTIZATION_GROUP)).reshape(-1, QUANTIZATION_GROUP).float()
    largest = LARGEST[encoding]
    scales = (groups.abs().amax(-1, keepdim=True) / largest).clamp_(min=6e-5).to(torch.float16)
    codes = (groups / scales.float()).round_().clamp_(-largest, largest).to(torch.int8)
    if encoding == "int4":
        halves = (codes + 8).to(torch.uint8).unflatten(1, (2, -1))
        codes = halves[:, 0] | halves[:, 1] << 4
    return Packed(codes, scales)


def unpack(packed: Packed, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Back to (..., H)."""
    codes = packed.codes
    if codes.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), 1).flatten(1).to(torch.int8) - 8
    groups = codes.float() * packed.scales.float()
    padded = shape[-1] + -shape[-1] % QUANTIZATION_GROUP
    return groups.reshape(*shape[:-1], padded)[..., :shape[-1]].to(dtype)
