"""Operations and bytes moved of a streamed step. Symbols as in `costs`. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from training.longcontext.geometry import Geometry, encoded_bytes, kept_layers, rebuilt
from training.longcontext.policy import StreamPolicy

WINDOW_PIECE = 1024              # queries a sliding window is worked off in (blocks.WINDOW_PIECE)


def attention_flops(geometry: Geometry, policy: StreamPolicy, length: int,
                    batch: int = 1) -> dict[str, float]:
    """Scores and weighted values, 4 A FLOP for each (query, key) pair that is seen; backward 2.5 times that
    (FlashAttention-2, Dao 2023, section 4.1). Once more for the recomputation and once more for a layer that
    is rebuilt, unless the output was kept.

    >>> one = Geometry(layers=1, hidden=8, heads=2, key_heads=2, head_dim=4, inner=8, vocabulary=9,
    ...     element_bytes=4)
    >>> attention_flops(one, StreamPolicy(), 1000)["forward"] / (2 * 1000**2 * 8)      # S (S + 1) / 2 pairs
    1.001
    """
    each, again = 4.0 * batch * geometry.queries, rebuilt(geometry.layers, policy.keep_every)
    forward = each * all_pairs(geometry, range(geometry.layers), length)
    found = {"forward": forward, "backward": 2.5 * forward}
    if policy.attention == "recompute":
        found["recomputed"] = forward
        found["rebuilt"] = each * all_pairs(geometry, again, length)
    return found


def pairs(length: int, window: int = 0) -> int:
    """(query, key) pairs of causal attention, each query seeing `window` keys at most (0: all).

    >>> pairs(4), pairs(4, window=2)
    (10, 7)
    """
    seen = min(window, length) if window else length
    return seen * (seen + 1) // 2 + (length - seen) * seen


def all_pairs(geometry: Geometry, layers: Sequence[int], length: int) -> int:
    """Pairs of several layers."""
    if not geometry.windows:
        return len(layers) * pairs(length)
    return sum(pairs(length, geometry.window(layer)) for layer in layers)


def linear_flops(geometry: Geometry, policy: StreamPolicy, length: int, targets: int,
                 batch: int = 1) -> dict[str, float]:
    """2 FLOP for each weight W and token: forward, and recomputed; q, k and v alone when a layer's keys are
    rebuilt, which the last layer's need not be; backward once by inputs and once by trained weights W'.

    An adapter is computed, recomputed, and has both gradients: 8 W' of it in all. Below frozen q, k and v of
    the first layer nothing wants a gradient. The head is computed for targets only. A tiled MLP runs forward
    once more.

    >>> toy = Geometry(layers=10, hidden=8, heads=2, key_heads=2, head_dim=4, inner=8, vocabulary=9,
    ...     element_bytes=4, weights=100, key_weights=30, mlp_weights=50)
    >>> found = linear_flops(toy, StreamPolicy(), 1, 1)
    >>> found["forward"], found["keys"], found["recomputed"], found["backward"]
    (2000.0, 540.0, 2000.0, 1940.0)
    """
    tokens, layers = float(batch * length), geometry.layers
    once = 2 * tokens * (geometry.weights + geometry.adapter)
    found = {"forward": layers * once, "recomputed": layers * once}
    if policy.keys == "recompute":
        found["keys"] = _keyed(layers, policy.keep_every) * 2 * tokens * geometry.key_weights
    found["rebuilt"] = len(rebuilt(layers, policy.keep_every)) * once
    passes = 2 if geometry.trained else 1
    found["backward"] = layers * 2 * tokens * (passes * geometry.weights + 2 * geometry.adapter)
    if not geometry.trained:
        found["backward"] -= 2 * tokens * geometry.key_weights
    if 0 < policy.mlp_tokens < min(policy.chunk_tokens, length):
        found["tiles"] = layers * 2 * tokens * geometry.mlp_weights
    head = 2.0 * batch * targets * geometry.vocabulary * geometry.hidden
    found["head"] = head * (3 if geometry.trained else 2)
    return found


def _keyed(layers: int, keep_every: int) -> int:
    """Layers whose keys are brought back to be worked off: all but the last, whose keys the forward pass left
    there, unless its input had to be rebuilt meanwhile."""
    return layers - 1 if layers - 1 in kept_layers(layers, keep_every) else layers


# -- bytes moved ---------------------------------------------------------------------------------------------


def moved_bytes(geometry: Geometry, policy: StreamPolicy, length: int, batch: int = 1) -> dict[str, float]:
    """Bytes between device, host and disk in one step, and through device memory where blocks are merged.

    >>> toy = Geometry(layers=2, hidden=4, heads=1, key_heads=1, head_dim=4, inner=8, vocabulary=9,
    ...     element_bytes=4)
    >>> found = moved_bytes(toy, StreamPolicy(inputs="pinned"), 100)
    >>> found["down"] / (100 * 4 * 4)      # x0 x1 x2, dy2 dy1
    5.0
    """
    down, up = _store_traffic(geometry, policy, batch * length)
    found = {"up": 0.0, "down": 0.0, "merged": _merged(geometry, policy, length, batch)}
    if policy.inputs != "device":
        found["up"], found["down"] = up, down
    if policy.inputs == "disk":
        found["written"], found["read"] = down, up
    if policy.pages != "device":
        loaded, saved = _page_traffic(geometry, policy, length, batch)
        found["up"], found["down"] = found["up"] + loaded, found["down"] + saved
    if policy.weights == "streamed":
        visits = 2 * geometry.layers + len(rebuilt(geometry.layers, policy.keep_every))
        found["up"] += float(visits * geometry.layer_bytes)
    return found


def _store_traffic(geometry: Geometry, policy: StreamPolicy, rows: int) -> tuple[float, float]:
    """(down, up). Down: L + 1 states forward, the gradient of the last, and of each layer's input that
    something below needs. Up: a state per layer forward, one for the loss, and a gradient per layer; what
    each layer was given is read once to work it off, once for its keys unless they were kept or are still
    there, and once if it is rebuilt from.
    """
    layers, state = geometry.layers, float(rows * geometry.state_bytes)
    again, below = rebuilt(layers, policy.keep_every), int(geometry.trained)
    inputs = kept_layers(layers, policy.keep_every)
    keyed = _keyed(layers, policy.keep_every)
    down, up = (2 * layers + 1 + len(again) + below) * state, (3 * layers + 1 + below + len(again)) * state
    if policy.keys == "recompute":
        up += keyed * state
    else:
        keys = 2 * rows * geometry.keys * geometry.element_bytes
        down, up = down + layers * keys, up + keyed * keys
    if not policy.exact:
        codes = rows * encoded_bytes(geometry.hidden, policy.encoding)
        reads = len(inputs) + sum(layer in inputs for layer in again)
        reads += len(inputs) - (layers - keyed) if policy.keys == "recompute" else 0
        down, up = down + len(inputs) * codes, up + reads * (codes - state)
    if policy.attention == "keep":
        outputs = rows * (geometry.queries * geometry.element_bytes + geometry.wide_bytes * geometry.heads)
        down, up = down + layers * outputs, up + (layers + len(again)) * outputs
    return down, up


def _sweeps(policy: StreamPolicy, layers: int) -> float:
    """How often attention goes forward through a layer's pages."""
    again = 0 if policy.attention == "keep" else layers + len(rebuilt(layers, policy.keep_every))
    return layers + again


def _page_traffic(geometry: Geometry, policy: StreamPolicy, length: int, batch: int) -> tuple[float, float]:
    """(up, down): chunk i sweeps over all keys up to its own, K and V forward, their sums too backward."""
    layers, e, wide = geometry.layers, geometry.element_bytes, geometry.wide_bytes
    windows = [geometry.window(i) for i in range(layers)] if geometry.windows else [0]
    swept = batch * sum(_swept(policy, length, window) for window in windows) / len(windows)
    writes = layers + _keyed(layers, policy.keep_every) + len(rebuilt(layers, policy.keep_every))
    up = 2 * geometry.keys * (_sweeps(policy, layers) * swept * e
                              + layers * (swept * (e + wide) + batch * length * wide))
    down = 2 * geometry.keys * (writes * batch * length * e + layers * (swept + batch * length) * wide)
    return up, down


def _swept(policy: StreamPolicy, length: int, window: int) -> float:
    """Keys that the chunks of a sequence sweep over together."""
    if window and window < length:
        return length * (window / min(window, WINDOW_PIECE) + 2)
    return length * (length / policy.chunk_tokens + 1) / 2


def _merged(geometry: Geometry, policy: StreamPolicy, length: int, batch: int) -> float:
    """Merging a block's result: out is read and written in fp32 and the block's read, per query; backward the
    same for dq per query, and for dk and dv per key."""
    e, wide, page = geometry.element_bytes, geometry.wide_bytes, min(policy.keys_per_call, length)
    seen = batch * all_pairs(geometry, range(geometry.layers), length) / geometry.layers
    queries, keys = seen / page * geometry.queries, seen / min(policy.chunk_tokens, length) * geometry.keys
    forward = _sweeps(policy, geometry.layers) * queries * (2 * wide + e)
    return forward + geometry.layers * (2 * wide + e) * (queries + 2 * keys)
