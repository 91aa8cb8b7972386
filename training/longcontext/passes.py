"""One streamed step at work: the forward pass over layers and chunks, and each layer's backward.

Order: layer-major, chunk-minor. Only one layer's keys and values exist at a time; what a layer was given is
in the store. Shapes: B batch, S sequence, C chunk, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from training.longcontext import attention, loss, quantization, tiles
from training.longcontext.anatomy import Anatomy, Call, tensors
from training.longcontext.errors import Unsupported
from training.longcontext.inputs import Store
from training.longcontext.loss import Sums
from training.longcontext.pages import Pages
from training.longcontext.policy import StreamPolicy
from training.longcontext.weights import StreamedWeights

# Rotary embeddings of all chunks are kept up to this size, and otherwise computed again at every visit.
CALLS_BYTES = 8 << 20


class Machine:
    """What steps share: the model's parts and the rooms that tensors live in."""

    def __init__(self, anatomy: Anatomy, policy: StreamPolicy, store: Store, weights: StreamedWeights | None):
        self.anatomy, self.policy, self.store, self.weights = anatomy, policy, store, weights
        self.mlps = [module for layer in anatomy.layers for module in tiles.mlps(layer)]


class Run:
    """One step. `positions` (B or 1, S); `rows`: by batch row where its documents begin."""

    def __init__(self, machine: Machine, pages: Pages, ids: Tensor, targets: Tensor, positions: Tensor,
                 rows: Sequence[Sequence[int]], training: bool):
        self.machine, self.anatomy, self.policy = machine, machine.anatomy, machine.policy
        self.store, self.pages = machine.store, pages
        self.ids, self.targets, self.positions, self.rows = ids, targets, positions, rows
        self.training = training
        size, length = self.policy.chunk_tokens, ids.shape[1]
        self.chunks = [(start, min(start + size, length)) for start in range(0, length, size)]
        self.lowest = 0
        self.gathered: Callable[[Sequence[Tensor]], AbstractContextManager[Any]] = nullcontext
        self.smoothing = 0.0
        self.seed = int(torch.randint(1 << 62, ()).item()) if self.anatomy.model.training else None
        self._length_dependent = bool(self.anatomy.length_dependent())
        self._calls: dict[int, list[Call]] = {}
        self._call_bytes = 0
        self._paged_layer = -1
        self.hidden_type = torch.float32
        device = ids.device.type
        self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    # -- what every part of a step runs inside -----------------------------------------------------

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model prepared for chunks, under the forward's own autocast."""
        enabled, dtype = self._autocast
        device = self.ids.device.type
        around = torch.autocast(device, dtype=dtype) if enabled else nullcontext()
        tiling = tiles.tiled(self.machine.mlps, self.policy.mlp_tokens)
        with self.anatomy.mounted(attention.NAME), around, tiling:
            yield

    @contextmanager
    def _random(self, layer: int, chunk: int) -> Iterator[None]:
        """The same random numbers at every visit of a chunk by a layer: dropout is replayed."""
        if self.seed is None:
            yield
            return
        device = self.ids.device
        # The CPU generator reads the lowest 32 bits of a seed, and hash(-1) is hash(-2). `torch.manual_seed`
        # would seed the other devices too, and on a machine without them format a stack for each (1 ms).
        seed = hash((self.seed, layer + 2, chunk)) & (1 << 62) - 1
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index].manual_seed(seed)
            yield

    # -- calls of the model ------------------------------------------------------------------------

    def _span(self, chunk: int) -> tuple[Tensor, int, int]:
        """Positions of a chunk (with the last one of all added where frequencies depend on it), start, stop.
        """
        start, stop = self.chunks[chunk]
        positions = self.positions[:, start:stop]
        if self._length_dependent:
            positions = torch.cat((positions, self.positions.max(1, keepdim=True).values), 1)
        return positions, start, stop

    def _call(self, chunk: int, layer: int) -> Call:
        if chunk in self._calls:
            return self._calls[chunk][layer]
        positions, start, stop = self._span(chunk)
        calls = self.anatomy.calls(self.ids.shape[0], positions, start, self.hidden_type)
        return self._remember(chunk, calls, stop - start)[layer]

    def _remember(self, chunk: int, calls: list[Call], length: int) -> list[Call]:
        if self._length_dependent:
            calls = [_cut(call, length) for call in calls]
        self._call_bytes = self._call_bytes or _bytes(calls)
        if self._call_bytes * len(self.chunks) <= CALLS_BYTES:
            self._calls[chunk] = calls
        return calls

    def _layer(self, layer: int, chunk: int, hidden: Tensor,
               **options: Any) -> tuple[Tensor, attention.Visit]:
        """A layer's output (B, C, H) for a chunk. Raises KeysKnown with `only_keys`."""
        start, stop = self.chunks[chunk]
        call = self._call(chunk, layer)
        visit = attention.Visit(pages=self.pages, start=start, stop=stop, rows=self.rows,
                                page=self.policy.keys_per_call, **options)
        with attention.visiting(visit), self._random(layer, chunk):
            found = self.anatomy.layers[layer](hidden, *call.args, **call.kwargs)
        if visit.calls != 1:
            name = type(self.anatomy.layers[layer]).__name__
            raise Unsupported(f"{name} runs attention {visit.calls} times through Transformers' attention "
                              "interface; once was expected")
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output, visit

    # -- forward -----------------------------------------------------------------------------------

    def embed(self) -> None:
        """Hidden states of the first layer into the store."""
        with torch.no_grad():
            for chunk, (start, stop) in enumerate(self.chunks):
                hidden = self._embedded(chunk, start, stop)
                self.hidden_type = hidden.dtype
                self.store.put(("x", 0, chunk), hidden)

    def _embedded(self, chunk: int, start: int, stop: int) -> Tensor:
        positions, _, _ = self._span(chunk)
        ids = self.ids[:, start:stop]
        if self._length_dependent:
            ids = torch.cat((ids, ids[:, -1:]), 1)
        with self._random(-1, chunk):
            hidden, calls = self.anatomy.enter(ids, positions, start)
        self._remember(chunk, calls, stop - start)
        return hidden[:, :stop - start]

    def front(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Those of `parameters` that the first layer's input depends on."""
        if not parameters:
            return []
        with torch.enable_grad(), self._random(-1, 0):
            hidden, _ = self.anatomy.enter(self.ids[:, :1], self.positions[:, :1], 0)
        found = _leaves(hidden.grad_fn)
        return [parameter for parameter in parameters if id(parameter) in found]

    def kept(self, layer: int) -> bool:
        """Whether a layer's input is kept for the backward pass."""
        return self.training and layer >= self.lowest and (layer - self.lowest) % self.policy.keep_every == 0

    def forward_layer(self, layer: int, again: bool = False) -> None:
        """All chunks through one layer. `again`: to rebuild the inputs of layers above it."""
        needed = self.training and layer >= self.lowest
        with self._weights(layer, layer + 1), torch.no_grad():
            for chunk in range(len(self.chunks)):
                self._fetch(layer, chunk + 1)
                hidden = self._input(layer, chunk)
                output, visit = self._layer(layer, chunk, hidden, kept=self._kept_attention(layer, chunk))
                if needed and not again:
                    self._keep(layer, chunk, visit)
                if not (again or self._keep_input(layer, chunk, hidden)):
                    self.store.drop(("x", layer, chunk))
                self.store.put(("x", layer + 1, chunk), output)
        self._paged_layer = layer

    def _keep_input(self, layer: int, chunk: int, hidden: Tensor) -> bool:
        """Whether the entry itself stays; a lossy copy takes its place."""
        if self.kept(layer) and not self.policy.exact:
            packed = quantization.pack(hidden, self.policy.encoding)
            self.store.put(("codes", layer, chunk), packed.codes)
            self.store.put(("scales", layer, chunk), packed.scales)
        return self.kept(layer) and self.policy.exact

    def _keep(self, layer: int, chunk: int, visit: attention.Visit) -> None:
        if self.policy.attention == "keep" and visit.known is not None:
            self.store.put(("out", layer, chunk), visit.known[0])
            self.store.put(("lse", layer, chunk), visit.known[1])
        if self.policy.keys == "keep" and visit.keys is not None:
            self.store.put(("k", layer, chunk), visit.keys[0])
            self.store.put(("v", layer, chunk), visit.keys[1])

    def _fetch(self, layer: int, chunk: int) -> None:
        for name in ("x", "codes", "scales", "out", "lse"):
            self.store.fetch((name, layer, chunk))

    def _input(self, layer: int, chunk: int) -> Tensor:
        """What a layer is given, (B, C, H)."""
        if ("x", layer, chunk) in self.store:
            return self.store.get(("x", layer, chunk))
        start, stop = self.chunks[chunk]
        packed = quantization.Packed(self.store.get(("codes", layer, chunk)),
                                     self.store.get(("scales", layer, chunk)))
        shape = torch.Size((self.ids.shape[0], stop - start, self._width()))
        return quantization.unpack(packed, shape, self.hidden_type)

    def _width(self) -> int:
        return int(self.anatomy.config.hidden_size)

    def _kept_attention(self, layer: int, chunk: int) -> tuple[Tensor, Tensor] | None:
        if ("out", layer, chunk) not in self.store:
            return None
        return self.store.get(("out", layer, chunk)), self.store.get(("lse", layer, chunk))

    @contextmanager
    def _weights(self, layer: int, following: int) -> Iterator[None]:
        with ExitStack() as stack:
            if self.machine.weights is not None:
                stack.enter_context(self.machine.weights.on_device(layer, following))
            yield

    # -- loss --------------------------------------------------------------------------------------

    def _head(self, chunk: int) -> Callable[[Tensor, slice], Tensor]:
        start, _ = self.chunks[chunk]

        def head(hidden: Tensor, part: slice) -> Tensor:
            a, b = start + part.start, start + part.stop
            with self._random(-2, chunk):
                return self.anatomy.leave(hidden, self.positions[:, a:b], a)
        return head

    def loss(self, parameters: Sequence[Tensor], early: bool) -> tuple[Tensor, Sums]:
        """Summed loss. `early`: the gradient of final hidden states replaces them in the store."""
        total = torch.zeros((), dtype=loss.wide(self.hidden_type), device=self.ids.device)
        sums = Sums(parameters)
        for chunk in range(len(self.chunks)):
            self.store.fetch(("x", len(self.anatomy.layers), chunk + 1))
            total += self._chunk_loss(chunk, sums, None) if early else self._chunk_value(chunk)
        return total, sums

    def _chunk_value(self, chunk: int) -> Tensor:
        start, stop = self.chunks[chunk]
        key = ("x", len(self.anatomy.layers), chunk)
        found = loss.summed(self._head(chunk), self.store.get(key), self.targets[:, start:stop],
                            self.policy.loss_tokens, self.smoothing)
        if not self.training:
            self.store.drop(key)
        return found

    def _chunk_loss(self, chunk: int, sums: Sums, scale: Tensor | None) -> Tensor:
        start, stop = self.chunks[chunk]
        key = ("x", len(self.anatomy.layers), chunk)
        targets, size = self.targets[:, start:stop], self.policy.loss_tokens
        found, gradient = loss.with_gradients(self._head(chunk), self.store.get(key), targets, size, sums,
                                              scale, self.smoothing)
        self.store.drop(key)
        self.store.put(("dy", chunk), gradient)
        return found

    # -- backward ----------------------------------------------------------------------------------

    def backward_loss(self, sums: Sums, scale: Tensor) -> None:
        """For fp16: through the head with the incoming scale."""
        for chunk in range(len(self.chunks)):
            self._chunk_loss(chunk, sums, scale)

    def backward_layer(self, layer: int, parameters: Sequence[Tensor], by_input: bool,
                       scale: Tensor | None) -> list[Tensor | None]:
        """Gradients of a layer's parameters; the running gradient becomes that of its input."""
        self._rebuild_input(layer)
        sums = Sums(parameters)
        with self._weights(layer, layer - 1):
            self._rebuild_keys(layer)
            for chunk in reversed(range(len(self.chunks))):
                self._fetch(layer, chunk - 1)
                self.store.fetch(("dy", chunk - 1))
                self._backward_chunk(layer, chunk, sums, by_input, scale)
        return sums.result()

    def _backward_chunk(self, layer: int, chunk: int, sums: Sums, by_input: bool,
                        scale: Tensor | None) -> None:
        hidden = self._input(layer, chunk).detach().requires_grad_(by_input)
        given = self.store.get(("dy", chunk))
        if scale is not None:
            given = (given * scale).to(given.dtype)
        with torch.enable_grad():
            kept = self._kept_attention(layer, chunk)
            output, _ = self._layer(layer, chunk, hidden, write=False, kept=kept)
        wanted = [*([hidden] if by_input else []), *sums.parameters]
        found = torch.autograd.grad(output, wanted, given, allow_unused=True)
        if by_input:
            self.store.put(("dy", chunk), found[0])
        sums.add(found[1:] if by_input else found)
        for name in ("x", "codes", "scales", "out", "lse"):
            self.store.drop((name, layer, chunk))

    def _rebuild_input(self, layer: int) -> None:
        """Inputs that were not kept, forward again from the nearest one that was."""
        if self._has_input(layer):
            return
        nearest = layer
        while not self._has_input(nearest):
            nearest -= 1
        for below in range(nearest, layer):
            with self.gathered(list(self.anatomy.layers[below].parameters())):
                self.forward_layer(below, again=True)

    def _has_input(self, layer: int) -> bool:
        return ("x", layer, 0) in self.store or ("codes", layer, 0) in self.store

    def _rebuild_keys(self, layer: int) -> None:
        """The layer's keys and values into the pages, unless the forward pass has just left them there."""
        if self._paged_layer == layer:
            return
        self._paged_layer = layer
        for chunk in range(len(self.chunks)):
            if ("k", layer, chunk) in self.store:
                self._reload_keys(layer, chunk)
            else:
                self.store.fetch(("x", layer, chunk + 1))
                self._compute_keys(layer, chunk)

    def _reload_keys(self, layer: int, chunk: int) -> None:
        start, stop = self.chunks[chunk]
        keys = self.store.get(("k", layer, chunk)), self.store.get(("v", layer, chunk))
        attention.Visit(pages=self.pages, start=start, stop=stop, keys=keys).put_keys()
        self.store.drop(("k", layer, chunk))
        self.store.drop(("v", layer, chunk))

    def _compute_keys(self, layer: int, chunk: int) -> None:
        with torch.no_grad(), suppress(attention.KeysKnown):
            self._layer(layer, chunk, self._input(layer, chunk), only_keys=True)

    def backward_embed(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of what is in front of the first layer."""
        sums = Sums(parameters)
        for chunk, (start, stop) in enumerate(self.chunks):
            with torch.enable_grad():
                hidden = self._embedded(chunk, start, stop)
            given = self.store.get(("dy", chunk))
            sums.add(torch.autograd.grad(hidden, parameters, given, allow_unused=True))
        return sums.result()


def _leaves(last: Any) -> set[int]:
    """Ids of the parameters that a graph begins with."""
    nodes, seen, found = [last], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        nodes += [following for following, _ in node.next_functions]
    return found


def _bytes(calls: Sequence[Call]) -> int:
    """Bytes of all distinct tensors that layers are called with."""
    found = {id(t): t.numel() * t.element_size() for call in calls for t in tensors([call.args, call.kwargs])}
    return max(1, sum(found.values()))


def _cut(call: Call, length: int) -> Call:
    """Without the position that was added to each chunk."""
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:, :length] if value.dim() > 1 and value.shape[1] == length + 1 else value
        if isinstance(value, (tuple, list)):
            return type(value)(cut(inner) for inner in value)
        return {key: cut(inner) for key, inner in value.items()} if isinstance(value, dict) else value
    return Call(cut(call.args), cut(call.kwargs))
