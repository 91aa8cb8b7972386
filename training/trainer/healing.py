"""Healing a base whose key and value heads were pooled: a short training of those projections alone.

Ainslie et al. 2023, arXiv:2305.13245, section 2.1, "uptrain" all weights for 5% of the pre-training; here the
projections that were averaged take in what is left to a run: some hundred updates on its own windows. The
base is as it was stored, in 16 bits or float32, before anything is quantized; the trained projections are
float32.

Shapes: B windows (1 at a time), S tokens.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.errors import DoesNotFit, UsageError
from training.rundir import write_text
from training.settings import Config
from training.trainer import schedules
from training.trainer.batches import IGNORED, Layout, read_update
from training.trainer.evaluation import evenly_spaced
from training.trainer.grouped import HEALING
from training.trainer.loading import DTYPES, pretrained
from training.trainer.loss import causal_loss, held_still
from training.trainer.optimizers import set_rate
from training.trainer.weightfiles import PROJECTION, STORED, Tell, header, rewrite, shards

if TYPE_CHECKING:
    from training.dataset.store import WindowStore

# Learning rate of a base WIDTH wide; it falls with the root of the width. By trial on Llamas of 2 layers that
# had learned to repeat, pooled from 4 heads to 2. 64 wide: held-out loss of the base 1.791, pooled 2.841,
# after 100 updates at 1e-4, 3e-4, 1e-3, 3e-3, 1e-2: 2.639, 2.433, 2.105, 1.857, 1.931. 256 wide: 1.613,
# pooled 2.025, after 25 updates at 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3: 1.885, 1.831, 1.767, 1.704, 1.729. At a
# width of 4,096 the rule gives 3.8e-4; Llama 7B was trained at up to 3e-4. No wider base was tried.
RATE, WIDTH = 3e-3, 64
WARMUP_SHARE = 0.1               # of the updates, in which the rate rises
BETAS, CLIP_NORM = (0.9, 0.95), 1.0
# Longer windows keep their end: a projection sees one token at a time, and unquantized weights leave less
# room for activations than the plan counted on.
TOKENS = 2048
HELD_OUT_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class Healing:
    """What `healing.json` says. Losses: nats a target token of the same held-out windows, by the original
    base, after pooling, after healing. `kept`: whether the healed weights are the better ones and in place.
    """

    steps: int
    seconds: float
    learning_rate: float
    held_out_windows: int
    loss_base: float
    loss_pooled: float
    loss_healed: float
    kept: bool


def heal(config: Config, store: WindowStore, device: torch.device, original: Path, folder: Path,
         tell: Tell = lambda _: None) -> Healing:
    """Train the pooled projections of the base in `folder` for `model.heal_steps` updates and write them
    there.

    Nothing is written before the last update, so a killed healing starts over. Raises as loading does,
    DoesNotFit, CannotWrite, and what `tell` raises.
    """
    try:
        found, trained = _healed(Config({**config, "model.quantization": "none"}), store, device, original,
                                 folder, tell)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(f"Healing {config['model.base']} ran out of memory: it takes the whole base in "
                         f"{config['model.dtype']}. Set model.heal_steps=0.") from error
    kept = trained if found.kept else {}
    rewrite(folder, folder, 1, lambda name, stored: _as(stored, kept.get(name)), lambda aside: write_text(
        aside / HEALING, json.dumps(asdict(found), indent=2) + "\n"), tell)
    return found


def _healed(config: Config, store: WindowStore, device: torch.device, original: Path, folder: Path,
            tell: Tell) -> tuple[Healing, dict[str, nn.Parameter]]:
    """What came out, and the trained projections by their names in the files, rounded as they are stored."""
    start, notes = time.monotonic(), list[str]()
    tell(f"the held-out loss of {config['model.base']}, before its heads are pooled")
    model = pretrained(config, device, str(original), notes)
    before = _held_out(model, store, config, device)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = pretrained(config, device, str(folder), notes)
    rate = min(RATE, RATE * math.sqrt(WIDTH / model.config.hidden_size))
    pooled = _held_out(model, store, config, device)
    trained = _projections(model, folder)
    _train(model, trained, store, config, rate, tell)
    with torch.no_grad():
        for path in shards(folder):
            for name, entry in header(path)[0].items():
                if name in trained:
                    trained[name].copy_(trained[name].to(STORED[entry["dtype"]]))
    healed = _held_out(model, store, config, device)
    return Healing(steps=config["model.heal_steps"], seconds=time.monotonic() - start, learning_rate=rate,
                   held_out_windows=min(HELD_OUT_WINDOWS, store.count("held_out")), loss_base=before,
                   loss_pooled=pooled, loss_healed=healed, kept=healed < pooled), trained


def _as(stored: Tensor, trained: Tensor | None) -> Tensor:
    return stored if trained is None else trained.detach().to("cpu", stored.dtype)


def _projections(model: Any, folder: Path) -> dict[str, nn.Parameter]:
    """Key and value projections by their names in the files, trainable and float32; the rest is frozen.

    A file may hold the decoder alone, whose names then lack the model's first part. Raises UsageError when a
    family loads them under other names.
    """
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    names = [name for path in shards(folder) for name in header(path)[0] if PROJECTION.search(name)]
    found = {}
    for name in names:
        held = [own for own in parameters if own == name or own.endswith(f".{name}")]
        if len(held) != 1:
            raise UsageError(f"The {model.config.model_type} family loads {name} under another name, so it "
                             "cannot be healed; set model.heal_steps=0.")
        found[name] = parameters[held[0]]
        found[name].data = found[name].data.float()
        found[name].requires_grad_(True)
    return found


def _train(model: Any, trained: Mapping[str, nn.Parameter], store: WindowStore, config: Config, rate: float,
           tell: Tell) -> None:
    """Plain AdamW at a constant rate after a warm-up, on as many windows an update as a device of the run."""
    device = model.device
    model.train()
    if config["training.checkpointing"]:
        with suppress(ValueError):  # a family that cannot takes more memory
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, betas=BETAS, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=config["model.dtype"] == "float16")
    layout = Layout(windows=store.count("train"), micro=1, ranks=1,
                    accumulation=config["training.micro_batch"] * config["training.accumulation"])
    steps, seed = int(config["model.heal_steps"]), config["run.seed"]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for step in range(steps):
            set_rate(optimizer, rate * schedules.share("constant", step, steps, WARMUP_SHARE, 1.0))
            windows, _ = read_update(store, step, layout, 0, seed)
            batches = [_end(window.ids, window.labels) for window in windows]
            targets = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches)
            for ids, labels in batches:
                tell(f"healing keys and values, update {step + 1:,} of {steps:,}")
                summed = _loss(model, ids.to(device), labels.to(device), config)[0]
                scaler.scale(summed / max(targets, 1)).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trained.values(), CLIP_NORM)
            if math.isfinite(norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def _loss(model: Any, ids: Tensor, labels: Tensor, config: Config) -> tuple[Tensor, int]:
    """`causal_loss` of (B, S) ids and labels, computed in `model.dtype`."""
    dtype = DTYPES[config["model.dtype"]]
    narrow = nullcontext() if dtype == torch.float32 else torch.autocast(ids.device.type, dtype=dtype)
    with narrow:
        return causal_loss(model, ids, labels, None, config["training.loss_chunk_tokens"])


def _end(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The last tokens of (B, S) ids and labels: targets stand at a window's end."""
    return ids[:, -TOKENS:], labels[:, -TOKENS:]


def _held_out(model: Any, store: WindowStore, config: Config, device: torch.device) -> float:
    """Mean loss a target token of a few held-out windows, nats."""
    nats, tokens = 0.0, 0
    with held_still(model):
        for index in evenly_spaced(store.count("held_out"), HELD_OUT_WINDOWS):
            ids, labels = (torch.from_numpy(part)[None] for part in store.window("held_out", index))
            ids, labels = _end(ids.to(device), labels.to(device))
            summed, count = _loss(model, ids, labels, config)
            nats, tokens = nats + float(summed), tokens + count
    return nats / max(tokens, 1)
