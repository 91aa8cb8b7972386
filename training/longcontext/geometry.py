"""The sizes of a model that the costs of a streamed step follow from. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from training.longcontext.policy import QUANTIZATION_GROUP


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A decoder's sizes. Weights are counts of numbers that multiply a token in one layer.

    `weights`: all frozen or trained ones without adapters, of which `key_weights` make q, k and v and
    `mlp_weights` are the MLP's. `adapter`: of a layer's LoRA; 0 with `trained` when every weight is trained.
    `layer_bytes`: frozen bytes of one layer. `kept`, `kept_inner`: bytes that autograd keeps of a layer for
    one token, outside and inside the MLP. `windows`: sliding window of each layer, 0 for none; () for none.
    """

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    element_bytes: int
    weights: int = 0
    key_weights: int = 0
    mlp_weights: int = 0
    kept: float = 0.0
    kept_inner: float = 0.0
    adapter: int = 0
    trained: bool = False
    layer_bytes: int = 0
    windows: tuple[int, ...] = ()

    @property
    def queries(self) -> int:
        """A."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """K."""
        return self.key_heads * self.head_dim

    @property
    def wide_bytes(self) -> int:
        """Bytes of the type that sums are made in: fp32, or fp64 for fp64."""
        return max(4, self.element_bytes)

    @property
    def state_bytes(self) -> int:
        """H e: one token's hidden state."""
        return self.hidden * self.element_bytes

    def window(self, layer: int) -> int:
        """The layer's sliding window; 0 for none."""
        return self.windows[layer] if self.windows else 0


@lru_cache(256)
def rebuilt(layers: int, keep_every: int) -> tuple[int, ...]:
    """Layers that run forward once more so that the inputs above them exist again.

    >>> rebuilt(7, 3)      # inputs 0, 3, 6 were kept
    (0, 1, 3, 4)
    """
    return tuple(i for i in range(layers - 1) if (i + 1) % keep_every)


def kept_layers(layers: int, keep_every: int) -> range:
    """Layers whose inputs are kept."""
    return range(0, layers, keep_every)


def encoded_bytes(hidden: int, encoding: str) -> float:
    """One encoded hidden state: groups of 64 codes of 8 or 4 bits, and an fp16 scale for each group.

    >>> encoded_bytes(2560, "int8"), encoded_bytes(2560, "int4")        # 40 groups; 5,120 in bf16
    (2640, 1360)
    """
    groups = -(-hidden // QUANTIZATION_GROUP)
    return groups * (QUANTIZATION_GROUP // (2 if encoding == "int4" else 1) + 2)
