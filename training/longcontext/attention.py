"""Blockwise causal attention over pages, behind Transformers' attention interface.

Shapes: B batch, N query heads, G key heads, C queries of a chunk, D head dimension.

A chunk's row of the attention matrix is worked off in blocks (see `blocks`). Each gives an output and the
log-sum-exp of its scores; two of them merge exactly:

    lse = log(exp(lse_a) + exp(lse_b))        out = out_a + (out_b - out_a) sigmoid(lse_b - lse_a)

(the sigmoid is exp(lse_b - lse): Ring Attention, Liu et al. 2023; FlashAttention-2, Dao 2023, section 3.1).
The backward of a block, given the merged out and lse, is its exact share of the gradients. Attention is
causal, so when chunks are worked off in reverse every later chunk has already added its share to a chunk's
dk and dv.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from training.longcontext import kernels
from training.longcontext.blocks import Block, blocks
from training.longcontext.errors import Unsupported
from training.longcontext.pages import Pages

NAME = "streamed_step"
_here = threading.local()


class KeysKnown(Exception):
    """A layer's keys and values of this chunk are in the pages; the rest of the layer is not needed."""


@dataclass(kw_only=True)
class Visit:
    """One call of one layer on one chunk, as its attention sees it.

    `rows`: by batch row (or one entry for all rows) where its documents begin. `only_keys`: stop once keys
    and values are known. `write`: put them in the pages. `kept`: the output and log-sum-exp of the forward
    pass; after a forward, what may be kept. `calls`: how often attention ran; anything but 1 is not
    supported.
    """

    pages: Pages
    start: int
    stop: int
    rows: Sequence[Sequence[int]] = ((0,),)
    page: int = 0
    only_keys: bool = False
    write: bool = True
    kept: tuple[Tensor, Tensor] | None = None
    known: tuple[Tensor, Tensor] | None = None
    keys: tuple[Tensor, Tensor] | None = None
    kernel: kernels.Kernel = kernels.FLASH_CPU
    calls: int = 0
    plans: dict[int, list[tuple[slice, list[Block]]]] = field(default_factory=dict)

    def plan(self, window: int) -> list[tuple[slice, list[Block]]]:
        """(batch rows, their blocks)."""
        if window not in self.plans:
            whole = len(self.rows) == 1
            self.plans[window] = [
                (slice(None) if whole else slice(row, row + 1),
                 blocks(self.start, self.stop, documents=documents, window=window, page=self.page))
                for row, documents in enumerate(self.rows)]
        return self.plans[window]

    def put_keys(self) -> None:
        """Write the chunk's keys and values to the pages; the first chunk makes room for its layer."""
        k, v = self.keys  # type: ignore[misc]
        if self.start == 0:
            self.pages.begin(k, v)
        self.pages.write(self.start, k, v)


@contextmanager
def visiting(visit: Visit) -> Iterator[Visit]:
    """Make attention calls of this thread part of a visit."""
    before = getattr(_here, "visit", None)
    _here.visit = visit
    try:
        yield visit
    finally:
        _here.visit = before


def interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
              softcap: float | None = None, **others: Any) -> tuple[Tensor, None]:
    """What Transformers calls: (B, N, C, D), (B, G, C, D) x 2 -> (B, C, N, D)."""
    visit: Visit | None = getattr(_here, "visit", None)
    if visit is None:
        raise RuntimeError("the streamed step's attention was called outside of a streamed step")
    _refuse(module, dropout, others)
    visit.calls += 1
    query, key, value = _as_autocast(query, key, value)
    width = value.shape[-1]
    if width < query.shape[-1]:  # multi-head latent attention: narrower values
        value = F.pad(value, (0, query.shape[-1] - width))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = _window(attention_mask, sliding_window)
    out = _attend(visit, query, key, value, scale, window, softcap)
    return out[..., :width].transpose(1, 2).contiguous(), None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own attention does under autocast: rotary embeddings leave queries and keys in fp32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _refuse(module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
    if dropout and module.training:
        raise Unsupported(f"attention dropout {dropout:g} is active; set it to 0 in the model's config")
    if others.get("s_aux") is not None:
        raise Unsupported("attention sinks")
    if others.get("position_bias") is not None:
        raise Unsupported("a position bias on attention scores")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("attention that sees later tokens")
    if others.get("head_mask") is not None:
        raise Unsupported("a mask on attention heads")


class _Window(Tensor):
    """What the mask function hands to every layer: no values, only the sliding window (0: none)."""

    window: int | None = None  # a slice or a copy of it has none, and is refused
    problem = "an attention mask that the model builds or changes itself"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Without values most arithmetic fails."""
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:
            raise Unsupported(cls.problem) from error


def mask(mask_function: Callable[..., Any], attention_mask: Tensor | None = None,
         local_size: int | None = None, **_: Any) -> Tensor:
    """Transformers' mask interface: no mask, but the window it would have had. Raises Unsupported.

    Families make masks that no layer of theirs uses, so what is wrong with one is told when a layer does.
    """

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(*(torch.tensor(i) for i in (0, 0, query, key))))

    if attention_mask is not None:
        raise Unsupported("an attention mask")
    far = local_size or 0
    found = torch.empty(1, 1, 1, 0).as_subclass(_Window)
    found.window = None
    if sees(far, far + 1) or not sees(far, far):
        found.problem = "a mask that is not causal"
    elif far and (sees(far, 0) or not sees(far, 1)):
        found.problem = "attention in separate chunks"
    else:
        found.window = far
    return found


def _window(attention_mask: Tensor | None, sliding_window: int | None) -> int:
    if attention_mask is not None:
        found = getattr(attention_mask, "window", None)
        if found is None:
            raise Unsupported(getattr(attention_mask, "problem", _Window.problem))
        return int(found)
    return sliding_window or 0


def _attend(visit: Visit, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int,
            softcap: float | None) -> Tensor:
    visit.keys = (k.detach(), v.detach())
    if visit.write:
        visit.put_keys()
    if visit.only_keys:
        raise KeysKnown
    visit.kernel = kernels.choose(q.device, q.dtype, q.shape[-1], softcap)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _Attention.apply(q, k, v, visit, scale, window)
    visit.known = forward(visit, q, scale, window)
    return visit.known[0]


def forward(visit: Visit, q: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """out (B, N, C, D) in q's type and lse (B, N, C) in fp32 or better; keys are in the pages."""
    if visit.kept is not None:
        return visit.kept
    parts = [_forward_rows(visit, q[rows], rows, plan, scale) for rows, plan in visit.plan(window)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _forward_rows(visit: Visit, q: Tensor, rows: slice, plan: list[Block],
                  scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = lse = torch.empty(0)
    if len(plan) > 1:
        out = torch.empty(q.shape, dtype=wide, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for block, held in visit.pages.sweep(plan, gradients=False):
        part = slice(block.q0 - visit.start, block.q1 - visit.start)
        found = kernels.forward(visit.kernel, q[:, :, part], held.k[rows], held.v[rows], block.kind, scale)
        if len(plan) == 1:
            return found
        if block.kind == "causal":  # every row's first block
            out[:, :, part], lse[:, :, part] = found
        else:
            kernels.merge(out[:, :, part], lse[:, :, part], *found)
    return out.to(q.dtype), lse


class _Attention(torch.autograd.Function):
    """Differentiable in a chunk's q, k, v; shares of earlier chunks' dk and dv go to the pages."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visit: Visit, scale: float, window: int) -> Tensor:
        out, lse = forward(visit, q, scale, window)
        ctx.save_for_backward(q, out, lse)
        ctx.visit, ctx.scale, ctx.window = visit, scale, window
        ctx.types = k.dtype, v.dtype
        # A kept `out` belongs to `visit`, which this node holds: returned itself, both would stay for ever.
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, out, lse = ctx.saved_tensors
        visit: Visit = ctx.visit
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        dq = torch.empty(q.shape, dtype=wide, device=q.device)
        dout = dout.contiguous()
        for rows, plan in visit.plan(ctx.window):
            _backward_rows(visit, [t[rows] for t in (dout, q, out, lse, dq)], rows, plan, ctx.scale)
        dk, dv = visit.pages.gradients(visit.start, visit.stop)
        return dq.to(q.dtype), dk.to(ctx.types[0]), dv.to(ctx.types[1]), None, None, None


def _backward_rows(visit: Visit, given: list[Tensor], rows: slice, plan: list[Block], scale: float) -> None:
    """Add every block's share to dq and to the pages' dk and dv, the chunk's own among them."""
    for block, held in visit.pages.sweep(plan, gradients=True):
        part = slice(block.q0 - visit.start, block.q1 - visit.start)
        dout, q, out, lse, dq = (t[:, :, part] for t in given)
        shares = kernels.backward(visit.kernel, dout, q, held.k[rows], held.v[rows], out, lse, block.kind,
                                  scale)
        if block.kind == "causal":  # every row's first block
            dq.copy_(shares[0])
        else:
            dq += shares[0]
        held.dk[rows] += shares[1]  # type: ignore[index]
        held.dv[rows] += shares[2]  # type: ignore[index]


def register() -> None:
    """Make the name known to Transformers; more than once does no harm."""
    AttentionInterface.register(NAME, interface)
    AttentionMaskInterface.register(NAME, mask)
