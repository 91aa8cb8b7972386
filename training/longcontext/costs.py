"""Bytes, operations and seconds of a streamed step, term by term, from a model's sizes and a policy.

Symbols: B batch, S sequence, c chunk, p page, L layers, H hidden, A = query heads x head dimension, K = key
heads x head dimension, N query heads, V vocabulary, I inner width of the MLP, e bytes of a number, k
`keep_every`. A multiply-add is 2 FLOP. Weights, optimizer and runtime are not counted here, but for what
streaming takes off the device (`weight_bytes`). Tests hold the terms against real steps. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.longcontext.flops import attention_flops, linear_flops, moved_bytes
from training.longcontext.geometry import Geometry, encoded_bytes
from training.longcontext.policy import StreamPolicy

CALLS_BYTES = 8 << 20            # rotary embeddings kept for all chunks (passes.CALLS_BYTES)
SLAB_BYTES = 64 << 20            # of one host allocation (transfer.SLAB_BYTES)
INDEX_BYTES = 24                 # token id, target and position, int64 each
DISK_COPIES = 6                  # chunks in host memory: writes under way (inputs.WRITES_AHEAD), one read
GRADIENTS = 1                    # inner tensors whose gradients exist at once beside what autograd kept


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine does in a second: FLOP in linear layers and in attention, bytes between device and host
    (`down` from the device), through device memory, and to and from the disk of the store."""

    linear: float
    attention: float
    up: float
    down: float
    memory: float
    disk_write: float
    disk_read: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Terms by name: bytes where they are held, FLOP, and bytes moved in one step.

    `moved`: up, down (between device and host), written, read (disk), merged (through device memory).
    `overlapped`: copies run beside the computation, which pinned memory allows.
    """

    device: Mapping[str, float]
    host: Mapping[str, float]
    disk: Mapping[str, float]
    attention_flops: Mapping[str, float]
    linear_flops: Mapping[str, float]
    moved: Mapping[str, float]
    overlapped: bool

    @property
    def device_bytes(self) -> float:
        """All terms on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """All terms in host memory."""
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> float:
        """All terms on disk."""
        return sum(self.disk.values())


def costs(geometry: Geometry, policy: StreamPolicy, length: int, *, targets: int = 0,
          batch: int = 1) -> Costs:
    """Everything about one step over (batch, length) tokens, `targets` of them with a label (0: all)."""
    targets = targets or length
    device = working_bytes(geometry, policy, length, targets, batch)
    host: dict[str, float] = {}
    disk: dict[str, float] = {}
    places = {"device": device, "pinned": host, "pageable": host, "disk": disk}
    places[policy.inputs].update(store_bytes(geometry, policy, length, batch))
    places[policy.pages].update(page_bytes(geometry, policy, length, batch))
    if policy.pages != "device":
        device["page buffers"] = ring_bytes(geometry, policy, length, batch)
    if policy.weights == "streamed":
        host["weights"] = float(geometry.layers * geometry.layer_bytes)
    if host:
        host["host slabs"] = slab_bytes(geometry, policy, length, batch, host)
    if policy.inputs == "disk":
        chunk = batch * min(policy.chunk_tokens, length)
        host["disk copies"] = float(DISK_COPIES * chunk * geometry.state_bytes)
    return Costs(device=device, host=host, disk=disk,
                 attention_flops=attention_flops(geometry, policy, length, batch),
                 linear_flops=linear_flops(geometry, policy, length, targets, batch),
                 moved=moved_bytes(geometry, policy, length, batch),
                 overlapped=pinned(policy) or {policy.inputs, policy.pages} <= {"device", "disk"})


def step_s(found: Costs, rates: Rates) -> float:
    """Seconds of a step: computation and merging one after the other; copies beside them when pinned, else
    after them; the disk, which reads and writes on a thread, beside them.

    >>> quick = Rates(linear=1e12, attention=1e12, up=1e9, down=1e9, memory=1e12, disk_write=1e9,
    ...               disk_read=1e9)
    >>> one = Costs(device={}, host={}, disk={}, attention_flops={"a": 3e12}, linear_flops={"b": 1e12},
    ...             moved={"up": 1e9, "down": 1e9}, overlapped=True)
    >>> step_s(one, quick)
    4.0
    """
    moved = found.moved
    work = moved.get("merged", 0.0) / rates.memory + sum(found.attention_flops.values()) / rates.attention
    work += sum(found.linear_flops.values()) / rates.linear
    up, down = moved.get("up", 0.0) / rates.up, moved.get("down", 0.0) / rates.down
    disk = moved.get("written", 0.0) / rates.disk_write + moved.get("read", 0.0) / rates.disk_read
    return max(work, up, down, disk) if found.overlapped else max(work + up + down, disk)


# -- what is stored ------------------------------------------------------------------------------------------


def store_bytes(geometry: Geometry, policy: StreamPolicy, length: int, batch: int = 1) -> dict[str, float]:
    """The input store at its fullest.

    n = ceil(L / k) inputs are kept, B S H e each (or their codes). Beside them, in full precision: while the
    forward pass ends, the running state; while a segment of m layers is worked off backwards, the m - 1
    inputs that were rebuilt and the running gradient. The first segment worked off has what k leaves of L.
    With kept attention each layer adds B S (A e + 4 N), with kept keys 2 B S K e, until it is worked off.

    >>> phi2 = Geometry(layers=32, hidden=2560, heads=32, key_heads=32, head_dim=80, inner=10240,
    ...     vocabulary=51200, element_bytes=2)
    >>> found = store_bytes(phi2, StreamPolicy(keep_every=6), 524_288)
    >>> found["layer inputs"] / (524_288 * 2560 * 2), found["running states"] / (524_288 * 2560 * 2)
    (5.0, 6.0)
    >>> round(sum(store_bytes(phi2, StreamPolicy(), 524_288).values()) / 2**30, 1)      # 33 x 2.5 GiB
    82.5
    """
    rows, state = batch * length, batch * length * geometry.state_bytes
    kept = state if policy.exact else rows * encoded_bytes(geometry.hidden, policy.encoding)
    attention = rows * (geometry.queries * geometry.element_bytes + geometry.wide_bytes * geometry.heads)
    keys = 2 * rows * geometry.keys * geometry.element_bytes
    best: dict[str, float] = {}
    for inputs, states, layers in _moments(geometry.layers, policy.keep_every):
        terms = {"layer inputs": inputs * kept, "running states": states * state}
        if policy.attention == "keep":
            terms["attention outputs"] = layers * attention
        if policy.keys == "keep":
            terms["kept keys"] = layers * keys
        best = max(best, terms, key=lambda found: sum(found.values()))
    return best


def _moments(layers: int, keep_every: int) -> list[tuple[int, int, int]]:
    """(inputs kept, states in full precision beside them, layers not yet worked off) when the store may be
    fullest.

    >>> _moments(32, 6)
    [(6, 1, 32), (6, 2, 32), (5, 6, 30)]
    """
    count = -(-layers // keep_every)
    last = layers - (count - 1) * keep_every
    found = [(count, 1, layers), (count, last, layers)]
    return [*found, (count - 1, keep_every, layers - last)] if count > 1 else found


def page_bytes(geometry: Geometry, policy: StreamPolicy, length: int, batch: int = 1) -> dict[str, float]:
    """One layer's K and V, and their gradients summed in fp32; off the device in whole pages.

    >>> llama8b = Geometry(layers=32, hidden=4096, heads=32, key_heads=8, head_dim=128, inner=14336,
    ...     vocabulary=128256, element_bytes=2)
    >>> {name: size / 2**30 for name, size in page_bytes(llama8b, StreamPolicy(), 1 << 20).items()}
    {'keys and values': 4.0, 'their gradients': 8.0}
    """
    page = policy.keys_per_call
    tokens = batch * (length if policy.pages == "device" else -(-length // page) * page)
    return {"keys and values": 2.0 * tokens * geometry.keys * geometry.element_bytes,
            "their gradients": 2.0 * tokens * geometry.keys * geometry.wide_bytes}


def ring_bytes(geometry: Geometry, policy: StreamPolicy, length: int, batch: int = 1) -> float:
    """The device's share of pages on the host: two blocks of keys, values and fp32 gradients, and a chunk's
    gradients in fp32. A block is a page, or the chunk's own keys.

    >>> mha = Geometry(layers=32, hidden=2560, heads=32, key_heads=32, head_dim=80, inner=10240,
    ...     vocabulary=51200, element_bytes=2)
    >>> policy = StreamPolicy(chunk_tokens=32768, pages="pinned")
    >>> ring_bytes(mha, policy, 524_288) / 32768      # (2 x 12 + 8) x 2560
    81920.0
    """
    page, chunk = min(policy.keys_per_call, length), min(policy.chunk_tokens, length)
    both = 2 * (geometry.element_bytes + geometry.wide_bytes)
    blocks = max(page, chunk) + page
    return float(batch * geometry.keys * (blocks * both + chunk * 2 * geometry.wide_bytes))


def slab_bytes(geometry: Geometry, policy: StreamPolicy, length: int, batch: int,
               host: Mapping[str, float]) -> float:
    """What host buffers leave unused of the slabs that they are cut from, 64 MiB or one buffer each; PyTorch
    rounds a pinned allocation up to a power of two.

    >>> wide = Geometry(layers=32, hidden=2560, heads=32, key_heads=32, head_dim=80, inner=10240,
    ...     vocabulary=51200, element_bytes=2)
    >>> policy = StreamPolicy(chunk_tokens=32768, inputs="pinned")      # 160 MiB a chunk takes 256
    >>> round(slab_bytes(wide, policy, 1 << 19, 1, {"layer inputs": 10.0}), 3)
    6.0
    """
    e, chunk = geometry.element_bytes, batch * min(policy.chunk_tokens, length)
    page = batch * policy.keys_per_call
    buffers = {"layer inputs": chunk * geometry.state_bytes, "running states": chunk * geometry.state_bytes,
               "attention outputs": chunk * geometry.queries * e, "kept keys": chunk * geometry.keys * e,
               "keys and values": page * geometry.keys * e,
               "their gradients": page * geometry.keys * geometry.wide_bytes}
    return sum(size * (_slab_share(buffers[name], pinned(policy)) - 1) for name, size in host.items()
               if name in buffers)


def _slab_share(buffer: int, is_pinned: bool) -> float:
    """Bytes allocated for each byte of buffers of this size."""
    if buffer <= SLAB_BYTES:
        return SLAB_BYTES / (SLAB_BYTES // buffer * buffer)
    return (1 << (buffer - 1).bit_length()) / buffer if is_pinned else 1.0


def pinned(policy: StreamPolicy) -> bool:
    """Whether host buffers are pinned: one setting serves all of a step (transfer.Transfer)."""
    return "pinned" in (policy.inputs, policy.pages)


# -- what is worked with -------------------------------------------------------------------------------------


def working_bytes(geometry: Geometry, policy: StreamPolicy, length: int, targets: int,
                  batch: int = 1) -> dict[str, float]:
    """What a step works with on the device. Chunk and logits do not exist at once: the larger is counted."""
    terms = {"rotary": rotary_bytes(geometry, policy, length), "tokens": float(INDEX_BYTES * batch * length)}
    chunk, head = chunk_bytes(geometry, policy, length, batch), logits_bytes(geometry, policy, targets, batch)
    return {**terms, "chunk": chunk} if chunk >= head else {**terms, "logits": head}


def chunk_bytes(geometry: Geometry, policy: StreamPolicy, length: int, batch: int = 1) -> float:
    """A chunk while a layer's backward pass works on it, at the fuller of two moments.

    Both: what autograd kept outside the MLP, and of width H e: input, output, their gradients, and off the
    device the next chunk's input and gradient, which are under way. In the MLP: what it kept, and gradients
    of three inner tensors (or those of one tile). In attention: dq in fp32; dout twice, a folded q and a
    block's dq, A e each; for grouped heads k, v and their gradients once for every query head, and in fp32
    for every key head.
    """
    e, wide, state = geometry.element_bytes, geometry.wide_bytes, geometry.state_bytes
    chunk = batch * min(policy.chunk_tokens, length)
    states = 4 + (2 if policy.inputs != "device" else 0)
    mlp = chunk * geometry.kept_inner + GRADIENTS * inner_bytes(geometry, chunk)
    if 0 < policy.mlp_tokens < policy.chunk_tokens:
        tile = batch * min(policy.mlp_tokens, length)
        mlp = tile * geometry.kept_inner + GRADIENTS * inner_bytes(geometry, tile) + 2 * chunk * state
    keys = 2 * geometry.keys * e
    if geometry.heads != geometry.key_heads:
        keys = 4 * geometry.queries * e + 2 * geometry.keys * wide
    attention = chunk * (geometry.queries * (wide + 4 * e) + keys)
    return chunk * (states * state + geometry.kept) + max(mlp, attention)


def inner_bytes(geometry: Geometry, tokens: int) -> float:
    """One tensor of the MLP's inner width."""
    return float(tokens * geometry.inner * geometry.element_bytes)


def logits_bytes(geometry: Geometry, policy: StreamPolicy, targets: int, batch: int = 1) -> float:
    """Of `loss_tokens` positions, in fp32 or wider: log-probabilities, their gradient and the logits'
    gradient; two gradients of a trained head; and a chunk's input and gradient.

    >>> coder = Geometry(layers=28, hidden=1536, heads=12, key_heads=2, head_dim=128, inner=8960,
    ...     vocabulary=151936, element_bytes=2)
    >>> round(logits_bytes(coder, StreamPolicy(loss_tokens=256, chunk_tokens=256), 4096) / 2**20)
    447
    """
    positions = batch * min(policy.loss_tokens, policy.chunk_tokens, targets)
    each = 3 * geometry.wide_bytes
    head = 2 * geometry.vocabulary * geometry.hidden * geometry.wide_bytes if geometry.trained else 0
    chunk = batch * min(policy.chunk_tokens, targets)
    return float(positions * geometry.vocabulary * each + head + 3 * chunk * geometry.state_bytes)


def rotary_bytes(geometry: Geometry, policy: StreamPolicy, length: int) -> float:
    """Cosines and sines of all positions while they take 8 MiB at most, else of one chunk."""
    each = 2 * geometry.head_dim * geometry.element_bytes
    return float(each * (length if each * length <= CALLS_BYTES else min(policy.chunk_tokens, length)))


def weight_bytes(geometry: Geometry, policy: StreamPolicy) -> int:
    """What streaming takes off the device: all layers but the one worked on and the one under way."""
    return max(0, geometry.layers - 2) * geometry.layer_bytes if policy.weights == "streamed" else 0
