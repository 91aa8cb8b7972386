"""An MLP inside a chunk, a tile of positions at a time, so that its wide inner activations stay small.

The tile's inner activations are rebuilt in the backward pass, which costs one more MLP forward (TiledMLP,
Arctic Long Sequence Training, Bekman et al. 2025). Exact: an MLP treats every position by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.longcontext.errors import Unsupported

NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def mlps(layer: nn.Module) -> list[nn.Module]:
    """The MLPs of a decoder layer, by their usual names."""
    return [child for name, child in layer.named_children() if name in NAMES]


@contextmanager
def tiled(modules: list[nn.Module], tile: int) -> Iterator[None]:
    """Run these modules tile by tile for a while; (B, C, H) -> (B, C, H). `tile` 0 changes nothing.

    A forward that others put on the module itself (fused kernels do) is there again afterwards.
    """
    if not tile:
        yield
        return
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = _wrapped(module, module.forward, tile)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _wrapped(module: nn.Module, plain: Callable[..., Any], tile: int) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or x.dim() != 3 or x.shape[1] <= tile:
            return plain(x, *args, **kwargs)
        parameters = [p for p in module.parameters() if p.requires_grad]
        return _Tiled.apply(x, plain, tile, *parameters)
    return forward


def _one(plain: Callable[..., Any], x: Tensor) -> Tensor:
    found = plain(x)
    if not isinstance(found, Tensor):
        raise Unsupported("mlp_tokens: this family's MLP returns more than hidden states; set it to 0")
    return found


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: Callable[..., Any], tile: int, *parameters: Tensor) -> Tensor:
        ctx.plain, ctx.tile, ctx.random, found = plain, tile, [], torch.empty_like(x)
        for start in range(0, x.shape[1], tile):
            ctx.random.append(_state(x.device))
            found[:, start:start + tile] = _one(plain, x[:, start:start + tile].contiguous())
        ctx.save_for_backward(x, *parameters)
        return found

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        by_x = torch.empty_like(x)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        after = _state(x.device)
        for index, start in enumerate(range(0, x.shape[1], ctx.tile)):
            part = slice(start, start + ctx.tile)
            piece = x[:, part].detach().contiguous().requires_grad_()
            _set_state(x.device, ctx.random[index])
            with torch.enable_grad():
                found = ctx.plain(piece)
            grads = torch.autograd.grad(found, (piece, *parameters), given[:, part], allow_unused=True)
            by_x[:, part] = grads[0]
            for held, new in zip(sums, grads[1:], strict=True):
                if new is not None:
                    held += new
        _set_state(x.device, after)
        return by_x, None, None, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
