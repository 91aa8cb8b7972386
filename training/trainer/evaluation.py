"""What a model does on held-out text: loss, bits a byte, and completions of spans it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from training.errors import DataError
from training.settings import Config
from training.trainer import context_curve
from training.trainer.completion import Completer, lines_of, open_tokenizer, parses, score
from training.trainer.loss import LossFunction, causal_loss, held_still

if TYPE_CHECKING:
    from training.dataset.store import WindowStore

Progress = Callable[[str, int, int, str], None]
SHOWN_LINES = 8


def evaluate(model: nn.Module, store: WindowStore, config: Config, device: torch.device,
             progress: Progress, loss_function: LossFunction = causal_loss,
             curve: str = "") -> dict[str, Any]:
    """`records.Quality`'s figures, `windows`, and `samples` (path, language, prefix, completion, expected).

    `loss_function`: of the held-out windows, the one that is trained with. Completions call the model itself,
    inside the loss function's `aside()` if it has one. `curve`: of the context curve nothing, its `ends` or
    the `whole`.
    Rates without a span to count are None. The model's modes and the random state are as before when it
    returns or when `progress("evaluate", done, total, detail)`, called between windows, raises. Raises
    DataError when no held-out window has a target.
    """
    chosen = evenly_spaced(store.count("held_out"), config["evaluation.windows"])
    spans = store.completions()
    spans = [spans[i] for i in evenly_spaced(len(spans), config["evaluation.completions"])]
    wanted = _curve(store, config, curve)
    total = len(chosen) + len(spans) + wanted.reads
    with held_still(model):
        scorer = Scorer(model, store, device, loss_function, config["training.loss_chunk_tokens"])
        loss, bits = scorer.likelihood(
            chosen, lambda done: progress("evaluate", done, total, "held-out windows"))
        completer = Completer(model, open_tokenizer(store.path / "tokenizer"), device,
                              config["dataset.context_tokens"], config["evaluation.completion_tokens"])
        with getattr(loss_function, "aside", nullcontext)():
            samples = _complete(completer, spans,
                                lambda done: progress("evaluate", len(chosen) + done, total, "completions"))
        before = len(chosen) + len(spans)
        contexts = context_curve.measure(
            store, wanted, scorer.score, config["run.seed"],
            lambda done: progress("evaluate", before + done, total, "context curve"))
    progress("evaluate", total, total, f"loss {loss:.3f}")
    return {"loss": loss, "bits_per_byte": bits, "exact_match": _mean([s["exact"] for s in samples]),
            "edit_similarity": _mean([s["similarity"] for s in samples]),
            "parse_rate": _mean([s["parses"] for s in samples if s["parses"] is not None]),
            "context_curve": contexts, "windows": len(chosen), "samples": [_shown(s) for s in samples]}


def _curve(store: WindowStore, config: Config, wanted: str) -> context_curve.Curve:
    """What is read of the context curve."""
    items: list[int] = []
    if wanted:
        items = evenly_spaced(store.curve()["items"], config["evaluation.context_targets"])
    tokens = config["dataset.context_tokens"]
    return (context_curve.whole(items, store.curve()["kinds"], tokens) if wanted == "whole"
            else context_curve.ends(items, tokens))


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices spread over `count`.

    >>> evenly_spaced(10, 4)
    [0, 2, 5, 7]
    """
    return [i * count // wanted for i in range(wanted)] if wanted < count else list(range(count))


@dataclass
class Scorer:
    """Scores held-out windows with a loss function."""

    model: nn.Module
    store: WindowStore
    device: torch.device
    loss_function: LossFunction
    chunk_tokens: int

    def likelihood(self, chosen: list[int], tell: Callable[[int], None]) -> tuple[float, float]:
        """Mean loss a target token (nats) and bits a byte of target text."""
        nats, tokens, size_bytes = 0.0, 0, 0
        for done, index in enumerate(chosen):
            tell(done)
            summed, count = self.score(*self.store.window("held_out", index))
            nats, tokens = nats + summed, tokens + count
            size_bytes += self.store.target_bytes("held_out", index)
        if not tokens:
            raise DataError(f"The dataset's {len(chosen)} held-out windows have no target token; raise "
                            "dataset.held_out_share.")
        return nats / tokens, nats / math.log(2) / max(size_bytes, 1)

    def score(self, ids: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
        """Summed loss (nats) and target tokens of one window, ids and labels (S,)."""
        one, other = (torch.from_numpy(part)[None].to(self.device) for part in (ids, labels))
        summed, count = self.loss_function(self.model, one, other, None, self.chunk_tokens)
        return float(summed), count


def _complete(completer: Completer, spans: list[dict[str, Any]],
              tell: Callable[[int], None]) -> list[dict[str, Any]]:
    """Each span with its completion and the completion's scores."""
    completed = []
    for done, span in enumerate(spans):
        tell(done)
        text = completer.complete(span["header"] + span["prefix"], lines_of(span["middle"]))
        exact, similarity = score(span["middle"], text)
        completed.append({**span, "completion": text, "exact": float(exact), "similarity": similarity,
                          "parses": parses(span, text)})
    return completed


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(sample: dict[str, Any]) -> dict[str, str]:
    """What a report shows of a completed span: the last lines of its prefix, what was expected, what came."""
    tail = "".join(sample["prefix"].splitlines(keepends=True)[-SHOWN_LINES:])
    return {"path": sample["path"], "language": sample["language"], "prefix": tail,
            "completion": sample["completion"], "expected": sample["middle"]}
