"""Cross-entropy of a causal language model without its logits: only one chunk of them exists at a time.

Shapes: B batch, S sequence, H hidden, V vocabulary, N positions that are trained on. A vocabulary of 151,936
makes 4,096 positions of float32 logits 2.5 GB, and as much for their gradient; a chunk of 1,024 a quarter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
LossFunction = Callable[..., tuple[Tensor, int]]  # as causal_loss
PROBE_TOKENS = 8
_chunkable: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def causal_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None,
                chunk_tokens: int, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Summed cross-entropy and the number of target tokens; their ratio is Hugging Face's mean loss.

    `input_ids`, `labels` (B, S), labels unshifted with -100 for no loss; `attention_mask` (B, S) or None.
    Windows padded on the right need no mask: attention is causal and padding carries no label.
    `chunk_tokens` 0: one chunk. The head is computed for target positions only. A family whose logits are not
    its head on its decoder's output goes through its own forward, with all logits at once.
    `smoothing`: share of each target's probability that all V tokens divide among them (label smoothing,
    arXiv:1512.00567 section 7); only a training loss has it. V is the width of the logits: the rows that pad
    an embedding take part.
    """
    targets = labels[:, 1:] != IGNORED
    tokens = int(targets.sum())
    expected = labels[:, 1:][targets]
    if not verify_chunked(model):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return _summed(logits[:, :-1][targets], expected, smoothing), tokens
    decoder, head = parts(model)
    hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    chunk = chunk_tokens or max(tokens, 1)
    return _chunked(hidden[:, :-1][targets], expected, head, chunk, smoothing), tokens


def causal_lm(model: nn.Module) -> Any:
    """The Transformers model inside a DeepSpeed engine, a data-parallel wrapper or a PEFT model."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class _LogitHead:
    """The output layer and the family's scaling of logits: (N, H) -> (N, V)."""

    def __init__(self, model: Any):
        config = model.config.get_text_config()
        self.layer: nn.Module = model.get_output_embeddings()
        self.divisor = getattr(config, "logits_scaling", None)          # Granite
        self.scale = getattr(config, "logit_scale", None)               # Cohere
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.layer(hidden)
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def parts(model: nn.Module) -> tuple[nn.Module, _LogitHead]:
    """The decoder stack (its output has `last_hidden_state`) and the head on top of it."""
    inner = causal_lm(model)
    return inner.get_decoder(), _LogitHead(inner)


def verify_chunked(model: nn.Module) -> bool:
    """Whether head(decoder(ids)) gives this model's own logits, compared once on 8 tokens and remembered.

    Neither the random state nor the modules' modes are changed.
    """
    inner = causal_lm(model)
    if inner not in _chunkable:
        _chunkable[inner] = _matches(inner)
    return _chunkable[inner]


def _matches(inner: Any) -> bool:
    embeddings = inner.get_input_embeddings()
    if inner.get_output_embeddings() is None or embeddings is None:
        return False
    vocab = inner.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=embeddings.weight.device)[None] * 7 % vocab
    with held_still(inner):
        decoder, head = parts(inner)
        own = inner(input_ids=ids, use_cache=False).logits.float()
        output = decoder(input_ids=ids, use_cache=False)
        if not hasattr(output, "last_hidden_state"):
            return False
        ours = head(output.last_hidden_state).float()
    wide = embeddings.weight.dtype in (torch.float32, torch.float64)
    tolerance = (1e-4 if wide else 2e-2) * own.abs().max().item()
    return own.shape == ours.shape and (own - ours).abs().max().item() <= tolerance


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode and the random state are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters(), None)
    devices = [parameter.device] if parameter is not None and parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _chunked(hidden: Tensor, labels: Tensor, head: _LogitHead, chunk: int, smoothing: float) -> Tensor:
    """(N, H), (N,) -> summed loss, differentiable in `hidden` and in the head's parameters."""
    if not torch.is_grad_enabled():
        pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        return sum((_summed(head(h), y, smoothing) for h, y in pieces),
                   start=hidden.new_zeros((), dtype=_wide(hidden)))
    trained = [p for p in head.layer.parameters() if p.requires_grad]
    if any(hasattr(p, "ds_id") for p in head.layer.parameters()):
        return _recomputed(hidden, labels, head, chunk, smoothing)
    return _HeadLoss.apply(hidden, labels, head, chunk, smoothing, *trained)


def _recomputed(hidden: Tensor, labels: Tensor, head: _LogitHead, chunk: int, smoothing: float) -> Tensor:
    """The same for ZeRO-3, whose parameters exist only while a module's forward or backward runs."""
    from torch.utils.checkpoint import checkpoint

    total = hidden.new_zeros((), dtype=_wide(hidden))
    for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(lambda x, t: _summed(head(x), t, smoothing), h, y, use_reentrant=False)
    return total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _summed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of (N, V) logits, summed in float32 or better, as Hugging Face's loss does."""
    return F.cross_entropy(logits.to(_wide(logits)), labels, reduction="sum", label_smoothing=smoothing)


class _HeadLoss(torch.autograd.Function):
    """Takes each chunk's gradient right after its loss: nothing is computed twice and no logits are kept.

    The gradient is that of the sum; backward multiplies it by what comes in. A sum's gradient does not shrink
    with the number of tokens, so a float16 loss scale applied later comes early enough.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: _LogitHead, chunk: int, smoothing: float,
                *trained: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=_wide(hidden))
        by_hidden = torch.empty_like(hidden)
        by_weight = [torch.zeros_like(p, dtype=_wide(p)) for p in trained]
        for start in range(0, len(hidden), chunk):
            piece = hidden[start:start + chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = _summed(head(piece), labels[start:start + chunk], smoothing)
                found = torch.autograd.grad(loss, (piece, *trained))
            total += loss.detach()
            by_hidden[start:start + chunk] = found[0]
            for held, new in zip(by_weight, found[1:], strict=True):
                held += new
        ctx.save_for_backward(by_hidden, *by_weight)
        ctx.dtypes = [p.dtype for p in trained]
        return total

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        by_hidden, *by_weight = ctx.saved_tensors
        weights = [(g * incoming).to(dtype) for g, dtype in zip(by_weight, ctx.dtypes, strict=True)]
        return ((by_hidden * incoming).to(by_hidden.dtype), None, None, None, None, *weights)
