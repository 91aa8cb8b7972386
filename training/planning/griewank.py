"""How much of a recomputing step to keep: what each choice costs in memory and in forward computations.

Symbols: L layers, n inputs held at once. The schedule itself is training/trainer/recompute.py; these are its
figures in closed form (Griewank & Walther 2000, ACM TOMS algorithm 799, proposition 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True, kw_only=True)
class Kept:
    """A choice of training.kept_layers and training.kept_inputs. `forwards`: of a layer, beside the L of the
    run to the loss; `held_bytes`: activations at their fullest. `recomputed` False: every layer is kept
    without the help of either key."""

    forwards: int
    held_bytes: float
    kept_layers: int = 0
    kept_inputs: int = 0
    recomputed: bool = True


def forwards(layers: int, slots: int) -> int:
    """Fewest forward computations of a layer in a backward pass that holds n inputs at once.

    r l - C(n + r, r - 1) of a chain of l = L + 1 steps, the loss its last; r is the least with
    C(n + r, n) >= l. Of n = L inputs it is L.

    >>> forwards(32, 32), forwards(32, 8), forwards(32, 4), forwards(32, 1)
    (32, 56, 78, 528)
    """
    steps, slots = layers + 1, min(slots, layers)
    repeats = 1
    while math.comb(slots + repeats, slots) < steps:
        repeats += 1
    return repeats * steps - math.comb(slots + repeats, repeats - 1)


def inputs(layers: int, slots: int) -> int:
    """Most inputs alive at once, with that of the layer whose gradient is computed: n, or one more where the
    last group is longer than a layer, as it is beyond L = n (n + 1) / 2.

    >>> inputs(32, 32), inputs(32, 8), inputs(32, 4)
    (32, 8, 5)
    """
    return slots if layers <= slots * (slots + 1) // 2 else slots + 1


def options(layers: int, bytes_per_input: float, bytes_per_layer: float) -> Iterator[Kept]:
    """Every choice. A layer's activations hold its input: `bytes_per_layer` is with it.

    Kept layers are the last ones, whose activations are gone before a recomputed layer's are there again.
    """
    yield Kept(forwards=0, held_bytes=layers * bytes_per_layer, recomputed=False)
    for count in range(layers):
        kept = count * bytes_per_layer + (layers - count) * bytes_per_input
        again = (layers - count - 1) * bytes_per_input + bytes_per_layer
        yield Kept(forwards=layers - count, held_bytes=max(kept, again), kept_layers=count)
    for slots in range(1, layers):
        held = (inputs(layers, slots) - 1) * bytes_per_input + bytes_per_layer
        yield Kept(forwards=forwards(layers, slots), kept_inputs=slots,
                   held_bytes=max(held, slots * bytes_per_input))


def best(layers: int, bytes_per_input: float, bytes_per_layer: float, room_bytes: float) -> Kept | None:
    """The choice with the fewest forward computations, among those the smallest, that fits a room; None when
    not even one input and one layer do.

    >>> best(32, 10, 160, 2000).kept_layers, best(32, 10, 160, 400).kept_inputs, best(32, 10, 160, 100)
    (11, 25, None)
    """
    fitting = [kept for kept in options(layers, bytes_per_input, bytes_per_layer)
               if kept.held_bytes <= room_bytes]
    return min(fitting, default=None)
