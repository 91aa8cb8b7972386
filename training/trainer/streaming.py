"""Training through the streamed step: its policy from a configuration, and its loss in the loop's own shape.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import CannotWrite
from training.longcontext import StreamPolicy
from training.longcontext.step import StreamedStep
from training.longcontext.verification import verify
from training.longcontext.weights import StreamedWeights
from training.settings import KEYS, Config
from training.trainer.engine import Gather
from training.trainer.loading import autocast_type
from training.trainer.loss import IGNORED

log = logging.getLogger(__name__)

Aside = Callable[[], AbstractContextManager[Any]]
FOLDER = "stream"
SAME = ("page_tokens", "mlp_tokens", "inputs", "keep_every", "encoding", "pages", "attention", "keys",
        "weights", "overlap")


def policy_of(config: Config, directory: Path) -> StreamPolicy:
    """The policy that the stream.* keys describe. Raises StreamError."""
    chunk = config["stream.chunk_tokens"]
    same = {name: config[f"stream.{name}"] for name in SAME}
    return StreamPolicy(chunk_tokens=chunk, loss_tokens=config["training.loss_chunk_tokens"] or chunk,
                        directory=str(directory) if same["inputs"] == "disk" else "", **same)


def described(config: Config) -> str:
    """The stream.* keys that differ from their defaults, in one line."""
    return ", ".join(f"{key.name}={config[key.name]}" for key in KEYS
                     if key.name.startswith("stream.") and config[key.name] != key.default)


@contextmanager
def directory(config: Config, run: Path) -> Iterator[Path]:
    """`<run>/stream` while layer inputs are kept on disk; the input store's file in it has no name."""
    folder = run / FOLDER
    if not config["stream.chunk_tokens"] or config["stream.inputs"] != "disk":
        yield folder
        return
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"Cannot make {folder} for layer inputs: {error.strerror}.") from error
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # another rank may have removed it
            folder.rmdir()


def computed_in(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast of a model whose float32 weights are trained in 16 bits without DeepSpeed."""
    dtype = autocast_type(config)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check(model: nn.Module, config: Config, run: Path, device: torch.device) -> str:
    """Compare the streamed step with the plain one on a short sequence; what was found, in one line.

    Weights that will be streamed are still on the device here. Raises Unsupported when the two differ.
    """
    policy = policy_of(config, run / FOLDER)
    with computed_in(config, device):
        found = verify(model, replace(policy, weights="resident"))
    return (f"streamed step ({described(config)}): on {found.tokens} tokens its loss is "
            f"{found.streamed_loss:.6f} and the plain step's {found.plain_loss:.6f}, its gradient "
            f"{found.gradient_distance:.1e} off")


class StreamedLoss:
    """The loop's loss function, computed by a StreamedStep. Made once the engine has placed the model.

    `gather`: makes partitioned parameters whole (see `Engine.streamed`). `aside`: the engine's context for
    calls of the model that are not streamed.
    """

    def __init__(self, model: nn.Module, config: Config, run: Path, device: torch.device,
                 gather: Gather | None = None, aside: Aside = nullcontext):
        self._config, self._device, self._aside = config, device, aside
        self.step = StreamedStep(model, policy_of(config, run / FOLDER), device=device, gather=gather)

    def __call__(self, model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None,
                 chunk_tokens: int, smoothing: float = 0.0) -> tuple[Tensor, int]:
        """`causal_loss` of (B, S) ids and labels; the size of the loss's pieces is the policy's."""
        tokens = int((labels[:, 1:] != IGNORED).sum())
        with computed_in(self._config, self._device):
            if not tokens:
                return self._nothing(input_ids), 0
            return self.step(input_ids, labels, attention_mask=attention_mask, reduction="sum",
                             smoothing=smoothing), tokens

    def _nothing(self, input_ids: Tensor) -> Tensor:
        """Zero, with a gradient of zero for each parameter: other ranks wait for all of them."""
        zero: Tensor = self.step(input_ids, input_ids, reduction="sum") * 0.0
        return zero

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model can be called as it is: completions are too short to be streamed."""
        with self._aside(), _visited(self.step):
            yield


@contextmanager
def _visited(step: StreamedStep) -> Iterator[None]:
    """Streamed weights come to the device for each plain call of their layer."""
    weights, handles = step._machine.weights, list[Any]()
    for index, layer in enumerate(step._machine.anatomy.layers if weights is not None else ()):
        visits = ExitStack()
        handles += [layer.register_forward_pre_hook(_entering(visits, weights, index)),
                    layer.register_forward_hook(lambda *_, visits=visits: visits.close())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(visits: ExitStack, weights: StreamedWeights | None, index: int) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        if weights is not None:
            visits.enter_context(weights.on_device(index, index + 1))
    return enter
