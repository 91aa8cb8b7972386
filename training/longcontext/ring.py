"""Ring attention: devices share one sequence, and its keys and values travel around (Liu et al. 2023,
arXiv:2310.01889).

Shapes: B batch, S tokens of the sequence padded to a multiple of 2 R, R ranks, P = S / R tokens of one rank,
N query heads, G key heads, D head dimension.

Causal attention gives late tokens more work, so each rank holds an early and a late slice of 2 R equal ones
(zigzag; the balance of Striped Attention, Brandon et al. 2023, arXiv:2311.09431, with slices in place of
stripes, which need no mask of their own). Of 4 ranks:

    rank 0: slices 0 and 7    rank 1: 1 and 6    rank 2: 2 and 5    rank 3: 3 and 4

A rank's own block is causal as it lies. Of the block of an earlier rank all its queries see the early half
and none the late one; of a later rank's its late queries see everything and its early ones nothing. So every
visit is one unmasked kernel call on P x P/2 pairs, whoever visits whom.

Blocks merge as in `attention`. The backward pass sends keys and values around again, and with them the
gradients that they collect, home after R hops. A rank sends (R - 1) 2 B G P D numbers a layer forward, and
(R - 1) + R such pairs backward; each transfer runs beside the work on the block before it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from training.longcontext import attention, kernels
from training.longcontext.anatomy import Anatomy
from training.longcontext.errors import Unsupported
from training.longcontext.policy import StreamPolicy
from training.longcontext.step import _refuse
from training.longcontext.verification import TOLERANCES, _computed_in, _evaluating, _sequence

NAME = "ring_attention"
KEYS_TAG, GRADIENTS_TAG = 1, 2
_here = threading.local()


class Shared(NamedTuple):
    """One rank's part: ids (B, P), the tokens that follow them, -100 for none, and their positions (1, P)."""

    ids: Tensor
    targets: Tensor
    positions: Tensor


def positions_of(tokens: int, rank: int, ranks: int) -> Tensor:
    """Where a rank's P tokens lie in a sequence of `tokens`, a multiple of 2 R.

    >>> positions_of(8, 0, 2).tolist(), positions_of(8, 1, 2).tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])
    """
    size = tokens // (2 * ranks)
    early, late = rank * size, (2 * ranks - 1 - rank) * size
    return torch.cat([torch.arange(early, early + size), torch.arange(late, late + size)])


def shared(ids: Tensor, labels: Tensor, rank: int, ranks: int, ignored: int = -100) -> Shared:
    """A rank's part of (B, S) ids and unshifted labels, which are shifted and padded on the right first.

    No query sees a token on its right, so what the padding is does not matter; it has no targets.

    >>> shared(torch.arange(6)[None], torch.arange(6)[None], 0, 2).targets.tolist()
    [[1, 2, -100, -100]]
    """
    missing = -ids.shape[1] % (2 * ranks)
    targets = F.pad(labels[:, 1:], (0, missing + 1), value=ignored)
    where = positions_of(ids.shape[1] + missing, rank, ranks).to(ids.device)
    return Shared(F.pad(ids, (0, missing))[:, where], targets[:, where], where[None])


class Ring:
    """This rank's place in its ring. Made by every rank of the default process group, together.

    `size`: ranks of a ring, neighbours in the default group. `longest`: tokens of the longest sequence to
    come; a sliding window of as many changes nothing.
    """

    def __init__(self, size: int, longest: int = 0):
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % size:
            raise ValueError(f"{world} ranks cannot form rings of {size}")
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        first = rank - rank % size
        self.group: Any = groups[rank // size]
        self.rank, self.size, self.longest = rank - first, size, longest
        self._next, self._before = first + (self.rank + 1) % size, first + (self.rank - 1) % size
        self.calls = 0  # of the attention function
        AttentionInterface.register(NAME, self.attention)
        AttentionMaskInterface.register(NAME, self.mask)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, a forward pass of the model is this rank's part of a sequence."""
        _here.sharing = True
        try:
            yield
        finally:
            _here.sharing = False

    def pass_on(self, tensor: Tensor, tag: int) -> Callable[[], Tensor]:
        """Send a contiguous tensor to the next rank; what is returned waits for the one from the rank before.

        Together, in the same order.
        """
        if self.size == 1:
            return lambda: tensor
        found = torch.empty_like(tensor)
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, tensor, self._next, self.group, tag),
            dist.P2POp(dist.irecv, found, self._before, self.group, tag)])
        return functools.partial(_received, works, found, tensor)

    def mask(self, mask_function: Callable[..., Any], attention_mask: Tensor | None = None,
             local_size: int | None = None, **_: Any) -> Tensor:
        """Transformers' mask interface: none is made. Raises Unsupported for what is not plainly causal.

        The zigzag's positions look like packed documents; they are one.
        """
        if not getattr(_here, "sharing", False):
            raise RuntimeError("ring attention was called outside of a shared step")
        if attention_mask is not None:
            raise Unsupported("an attention mask")
        self._check_window(local_size)
        first, second = torch.tensor(0), torch.tensor(1)
        if mask_function(first, first, first, second) or not mask_function(first, first, first, first):
            raise Unsupported("a mask that is not causal")
        return torch.empty(1, 1, 1, 0).as_subclass(_None)

    def _check_window(self, window: int | None) -> None:
        if window and window < self.longest:
            raise Unsupported(f"attention over windows of {window:,} tokens, shorter than the sequences of "
                              f"{self.longest:,}")

    @torch.compiler.disable
    def attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                  attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                  sliding_window: int | None = None, softcap: float | None = None,
                  **others: Any) -> tuple[Tensor, None]:
        """What Transformers calls: (B, N, P, D), (B, G, P, D) x 2 -> (B, P, N, D). Together."""
        attention._refuse(module, dropout, others)
        self._check_window(sliding_window)
        if not isinstance(attention_mask, _None):
            raise Unsupported("an attention mask that the model builds or changes itself")
        self.calls += 1
        query, key, value = attention._as_autocast(query, key, value)
        width = value.shape[-1]
        if width < query.shape[-1]:  # multi-head latent attention: narrower values
            value = F.pad(value, (0, query.shape[-1] - width))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        kernel = kernels.choose(query.device, query.dtype, query.shape[-1], softcap)
        out: Tensor = _Attention.apply(query, key, value, self, kernel, scale)
        return out[..., :width].transpose(1, 2).contiguous(), None


def _received(works: Sequence[Any], found: Tensor, sent: Tensor) -> Tensor:
    """Wait for both directions: `sent` is held until it has left."""
    for work in works:
        work.wait()
    return found


class _None(attention._Window):
    """What the mask function hands to every layer: no values, so that a slice of it means the same."""


class _Visit(NamedTuple):
    """One block: the queries and keys of it that meet, as slices of P, and the kind for `kernels`."""

    queries: slice
    keys: slice
    kind: str


def visit(rank: int, owner: int, tokens: int) -> _Visit:
    """What a rank's queries see of the keys of `owner`, `tokens` = P each.

    >>> visit(1, 0, 8)
    _Visit(queries=slice(0, 8, None), keys=slice(0, 4, None), kind='full')
    """
    half, whole = tokens // 2, slice(0, tokens)
    if owner == rank:
        return _Visit(whole, whole, "causal")
    if owner < rank:
        return _Visit(whole, slice(0, half), "full")
    return _Visit(slice(half, tokens), whole, "full")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Attention(torch.autograd.Function):
    """Attention of this rank's queries to the whole ring's keys, differentiable on every rank."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, kernel: kernels.Kernel,
                scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=_wide(q.dtype), device=q.device)
        lse = torch.empty(q.shape[:3], dtype=out.dtype, device=q.device)
        for part, keys, values in _around(ring, k, v):
            found = kernels.forward(kernel, q[:, :, part.queries], keys, values, part.kind, scale)
            if part.kind == "causal":  # the first visit, to its own
                out.copy_(found[0])
                lse.copy_(found[1])
            else:
                kernels.merge(out[:, :, part.queries], lse[:, :, part.queries], *found)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.ring, ctx.kernel, ctx.scale = ring, kernel, scale
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        dout, dq = dout.contiguous(), torch.zeros(q.shape, dtype=_wide(q.dtype), device=q.device)
        arriving: Callable[[], Tensor] | None = None
        for part, keys, values in _around(ring, k, v):
            mine = (t[:, :, part.queries] for t in (dout, q, out, lse))
            given, queries, merged, sums = mine
            shares = kernels.backward(ctx.kernel, given, queries, keys, values, merged, sums, part.kind,
                                      ctx.scale)
            dq[:, :, part.queries] += shares[0]
            if arriving is None:
                collected = torch.stack(shares[1:]).to(dq.dtype)
            else:
                collected = arriving()
                collected[0, :, :, part.keys] += shares[1]
                collected[1, :, :, part.keys] += shares[2]
            arriving = ring.pass_on(collected, GRADIENTS_TAG)
        assert arriving is not None
        dk, dv = arriving()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _around(ring: Ring, k: Tensor, v: Tensor) -> Iterator[tuple[_Visit, Tensor, Tensor]]:
    """(visit, its keys, its values), this rank's own first, then those of the ranks before it."""
    held = torch.stack([k, v])
    for hop in range(ring.size):
        arriving = ring.pass_on(held, KEYS_TAG) if hop < ring.size - 1 else None
        part = visit(ring.rank, (ring.rank - hop) % ring.size, k.shape[2])
        yield part, held[0][:, :, part.keys], held[1][:, :, part.keys]
        if arriving is not None:
            held = arriving()


class Mount:
    """Which attention a model calls: the ring's, or its own. Gradient checkpoints stay as they are.

    Raises Unsupported for a model whose tokens meet elsewhere than in attention as the ring knows it.
    """

    def __init__(self, model: nn.Module):
        anatomy = Anatomy(model)
        _refuse(anatomy, StreamPolicy())
        if kind := anatomy.length_dependent():  # each rank would see another longest position
            raise Unsupported(f"rotary embeddings of type {kind}")
        self._layers = len(anatomy.layers)
        self._configs = {id(m.config): m.config for m in anatomy.model.modules() if hasattr(m, "config")}
        self._own = {key: config._attn_implementation_internal for key, config in self._configs.items()}

    def on(self) -> None:
        """From now on the ring's, inside `Ring.sharing`."""
        for config in self._configs.values():
            config._attn_implementation_internal = NAME

    def off(self) -> None:
        """From now on the model's own."""
        for key, config in self._configs.items():
            config._attn_implementation_internal = self._own[key]

    def verify(self, model: nn.Module, ring: Ring) -> tuple[float, float]:
        """The summed loss of a short sequence by the model itself and by the ring. Together.

        In evaluation mode and without gradients; all stays as it was, and the model's own attention is on.
        Raises Unsupported when the two differ.
        """
        ids = _sequence(model, 8 * ring.size - 1)  # one token is padding
        part = shared(ids, ids, ring.rank, ring.size)
        with torch.no_grad(), _evaluating(model):
            self.off()
            plain = float(_summed(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]))
            before = ring.calls
            self.on()
            try:
                with ring.sharing():
                    logits = model(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
            finally:
                self.off()
        found = _summed(logits, part.targets)
        dist.all_reduce(found, group=ring.group)
        if ring.calls - before != self._layers:
            raise Unsupported(f"{ring.calls - before} calls of attention in {self._layers} layers")
        self._judge(plain, float(found), _computed_in(model))
        return plain, float(found)

    def _judge(self, plain: float, found: float, dtype: torch.dtype) -> None:
        tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])[0]
        if not abs(found - plain) <= tolerance * max(1.0, abs(plain)):
            raise Unsupported(f"on a short sequence its loss is {plain:.6f} on one device and {found:.6f} "
                              "on the ring")


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, float64, of (B, P, V) logits and (B, P) targets."""
    return F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum")
