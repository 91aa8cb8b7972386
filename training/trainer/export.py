"""The result in Hugging Face's layout: `adapter/` or `model/`, complete or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from training.errors import CannotWrite
from training.rundir import read_data, write_text
from training.settings import Config
from training.trainer import grouped
from training.trainer.card import card, load_lines
from training.trainer.imports import unwrapped
from training.trainer.loading import DTYPES, LoadedModel
from training.trainer.loss import causal_lm
from training.trainer.weightfiles import publish


def export(loaded: LoadedModel, config: Config, store_path: str | Path, run_path: str | Path,
           result_facts: Mapping[str, Any]) -> str:
    """Write the result with tokenizer and model card into the run directory; the folder's name.

    Written aside, synced and renamed. `result_facts`: figures for the card, nested as wanted. Raises
    CannotWrite.
    """
    run, dataset, name = Path(run_path), Path(store_path), loaded.kind
    aside = run / f".staging-{name}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _weights(loaded, config, aside)
        for file in sorted((dataset / "tokenizer").iterdir()):
            shutil.copy(file, aside / file.name)
        (aside / "README.md").write_text(_card(loaded, config, dataset, run / name, result_facts), "utf-8")
        publish(aside, run / name)
    except (OSError, SafetensorError) as error:  # safetensors has its own class for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(f"Cannot write the result to {run / name}: {reason}.") from error
    return name


def _weights(loaded: LoadedModel, config: Config, folder: Path) -> None:
    model: Any = loaded.model
    if loaded.kind == "adapter":
        # Embeddings carry no adapter; asking whether they changed would look the base up on the hub.
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    dtype = DTYPES[config["model.dtype"]]
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
             for name, tensor in model.state_dict().items() if name not in tied}
    with unwrapped():
        model.save_pretrained(folder, state_dict=state)
    described = read_data(folder / "config.json")  # its type is that of the weights in memory
    described["dtype"] = config["model.dtype"]
    write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")


def _card(loaded: LoadedModel, config: Config, dataset: Path, folder: Path, facts: Mapping[str, Any]) -> str:
    settings = causal_lm(loaded.model).config.get_text_config()
    facts = {**facts, **grouped.facts_of(folder.parent)}
    rope = getattr(settings, "rope_parameters", None) or {}
    yarn = rope if rope.get("rope_type") == "yarn" and config["model.rope_factor"] > 1 else None
    loading = load_lines(str(folder), loaded.kind, loaded.base or config["model.base"], yarn,
                         getattr(settings, "max_position_embeddings", 0))
    return card(config, loaded.kind, loading, facts, read_data(dataset / "manifest.json"), yarn)


def weights_digest(trainable: Mapping[str, Tensor]) -> str:
    """sha256 over name, type, shape and bytes of each tensor, by sorted name."""
    state = hashlib.sha256()
    for name in sorted(trainable):
        tensor = trainable[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
