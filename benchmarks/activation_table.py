"""Derives configs/activations.yaml, what autograd keeps of a decoder layer by family, from real layers.

    python benchmarks/activation_table.py [FAMILY]...      all listed families, or some; rewrites their rows

A tiny model of the family is made in several sizes and runs one forward and backward pass at two lengths. The
bytes that its middle layer keeps grow with the length by a sum of its widths, whose coefficients are found
by least squares; so does what the peak of the backward pass holds beside the kept tensors. Bytes are counted
by storage, once each. Random weights; a minute for all families on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from benchmarks.measured_steps import live_bytes  # noqa: E402
from training.planning.activations import MODES, TABLE, WIDTHS, widths  # noqa: E402
from training.records import ModelShape  # noqa: E402
from training.settings import Config  # noqa: E402
from training.shapes import FAMILIES, shape_from_config  # noqa: E402
from training.trainer.loading import load  # noqa: E402
from training.trainer.loss import causal_lm, causal_loss  # noqa: E402

KEPT_LENGTHS = (64, 128)
PEAK_LENGTHS = {"32": (384, 768), "16": (256, 512)}    # 16-bit products are slow on most CPUs
RANK, LAYERS, TARGETS = 4, 3, 8
Table = dict[str, dict[str, list[float]]]
BASE: dict[str, Any] = {
    "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
    "intermediate_size": 320, "vocab_size": 64, "num_hidden_layers": LAYERS, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
NO_DROPOUT = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop",
                            "attn_pdrop", "embd_pdrop", "hidden_dropout", "dropout", "ffn_dropout",
                            "activation_dropout", "classifier_dropout", "layerdrop"), 0.0)
# One size varied at a time; the kept tensors are counted in all of them.
KEPT_SIZES: tuple[dict[str, Any], ...] = (
    {}, {"hidden_size": 144}, {"head_dim": 24}, {"num_key_value_heads": 6},
    {"num_attention_heads": 12, "num_key_value_heads": 6}, {"intermediate_size": 480})
# Wide and narrow MLPs, so that each of the two moments that can be the peak shows alone.
PEAK_SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "mlp": ({"intermediate_size": 640}, {"intermediate_size": 640, "hidden_size": 72},
            {"intermediate_size": 640, "hidden_size": 120}, {"intermediate_size": 800}),
    "norm": ({"intermediate_size": 64}, {"intermediate_size": 64, "hidden_size": 144},
             {"intermediate_size": 64, "hidden_size": 192}, {"intermediate_size": 96})}
NAMED: dict[str, dict[str, str]] = {
    "gpt2": {"intermediate_size": "n_inner"}, "gpt_bigcode": {"intermediate_size": "n_inner"},
    "gptj": {"intermediate_size": "n_inner"}, "codegen": {"intermediate_size": "n_inner"},
    "opt": {"intermediate_size": "ffn_dim"}}
EXTRA: dict[str, dict[str, Any]] = {"stablelm": {"partial_rotary_factor": 1.0},
                                    "opt": {"word_embed_proj_dim": None}}


def settings_of(mode: str) -> dict[str, Any]:
    """Configuration keys of a mode."""
    lora = mode.startswith("lora")
    return {"lora.enabled": lora, "model.dtype": "float32" if mode.endswith("32") else "bfloat16",
            "deepspeed.stage": 2 if mode == "full16" else 0}


@contextlib.contextmanager
def made(family: str, sizes: Mapping[str, Any]) -> Iterator[tuple[Path, ModelShape]]:
    """A checkpoint of random weights, and its shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**BASE, **NO_DROPOUT, **EXTRA.get(family, {}), **sizes}
    if "word_embed_proj_dim" in given:
        given["word_embed_proj_dim"] = given["hidden_size"]
    given = {NAMED.get(family, {}).get(name, name): value for name, value in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **given)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        yield Path(folder), shape_from_config(json.loads((Path(folder) / "config.json").read_text()))


def loaded(folder: Path, mode: str, attention: str) -> Any:
    """The trainer's model."""
    config = Config({"model.base": str(folder), "dataset.context_tokens": 768, "lora.rank": RANK,
                     "dataset.target_tokens": TARGETS, "training.checkpointing": False,
                     "model.attention": attention, **settings_of(mode)})
    store: Any = SimpleNamespace(vocab_tokens=64, pad_id=0, eos_id=0)
    return load(config, store, torch.device("cpu")).model


def kept_bytes(model: Any, length: int) -> int:
    """Bytes of the storages that autograd keeps inside the middle layer, parameters left out."""
    seen = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    layers = next(m for m in causal_lm(model).modules()
                  if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    inside, held, total = [False], list[Any](), [0]
    hooks = [layers[1].register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
             layers[1].register_forward_hook(lambda *_: inside.__setitem__(0, False))]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(storage)
            total[0] += inside[0] * storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _loss(model, length)
    for hook in hooks:
        hook.remove()
    return total[0]


def _loss(model: Any, length: int) -> torch.Tensor:
    ids = torch.arange(length)[None] % 60
    labels = ids.clone()
    labels[:, :-TARGETS] = -100
    return causal_loss(model, ids, labels, None, TARGETS)[0]


def peak_bytes(model: Any, length: int) -> int:
    """Most bytes alive in one forward and backward pass; gradients of weights exist already."""
    def run() -> None:
        _loss(model, length).backward()
    run()
    return live_bytes(run)[0]


def slope(count: Any, model: Any, lengths: tuple[int, int]) -> float:
    """Bytes a token."""
    short, long = lengths
    return float(count(model, long) - count(model, short)) / (long - short)


def solved(columns: str, rows: list[dict[str, float]], found: list[float]) -> list[float] | None:
    """Coefficients of WIDTHS, of which only `columns` are asked; rounded to quarters: tensors of 4, 2 and 1
    bytes. A width that follows from others gets 0. None when no sum of them gives what was found."""
    chosen = list[str]()
    matrix = np.zeros((len(rows), 0))
    for name in columns:
        wider = np.column_stack([matrix, [row[name] for row in rows]])
        if np.linalg.matrix_rank(wider) > len(chosen):
            matrix, chosen = wider, [*chosen, name]
    answer = np.linalg.lstsq(matrix, np.array(found), rcond=None)[0]
    if np.abs(matrix @ answer - found).max() > 0.02 * max(found):
        return None
    by_name = dict(zip(chosen, answer, strict=True))
    return [round(4 * float(by_name.get(name, 0.0))) / 4 for name in WIDTHS]


def derive(family: str, attention: str = "sdpa") -> Table:
    """The rows of one family: by mode `kept` by a layer, and what the peak holds beside the kept tensors of
    all layers, in the last MLP's backward pass (`mlp`) or in the final norm's (`norm`)."""
    table = kept_rows(family, attention)
    for moment, variants in PEAK_SIZES.items():
        rows, found = list[dict[str, float]](), dict[str, list[float]]()
        for shape, mode, model in models(family, variants, attention):
            value = slope(peak_bytes, model, PEAK_LENGTHS[mode[-2:]])
            value -= LAYERS * slope(kept_bytes, model, KEPT_LENGTHS)
            found.setdefault(mode, []).append(value)
            rows += [widths(shape)] if mode == MODES[0] else []
        for mode, values in found.items():
            if (row := solved("1HI", rows, values)) is not None:
                table[mode][moment] = row
    return table


def kept_rows(family: str, attention: str = "sdpa") -> Table:
    """What a layer keeps, by mode; the adapters' ranks, which differ by run, are taken off."""
    rows, found = list[dict[str, float]](), dict[str, list[float]]()
    for shape, mode, model in models(family, KEPT_SIZES, attention):
        ranks = 4.0 * RANK * adapters(shape) if mode.startswith("lora") else 0.0
        found.setdefault(mode, []).append(slope(kept_bytes, model, KEPT_LENGTHS) - ranks)
        rows += [widths(shape)] if mode == MODES[0] else []
    return {mode: {"kept": solved("1HIKAN", rows, values) or []} for mode, values in found.items()}


def models(family: str, variants: tuple[dict[str, Any], ...],
           attention: str) -> Iterator[tuple[ModelShape, str, Any]]:
    """Each size of a family in each mode."""
    for sizes in variants:
        with made(family, sizes) as (folder, shape):
            for mode in MODES:
                yield shape, mode, loaded(folder, mode, attention)


def adapters(shape: ModelShape) -> float:
    """Adapted linear layers in a decoder layer."""
    return sum(x.count for x in shape.linears) / shape.layers


def main() -> None:
    """Derive and write."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = yaml.safe_load(TABLE.read_text()) if TABLE.exists() else {}
    for family in sys.argv[1:] or list(FAMILIES):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                table[family] = derive(family)
        except Exception as error:
            sys.stdout.write(f"{family}: {type(error).__name__}: {str(error)[:200]}\n")
            continue
        sys.stdout.write(f"{family}: {json.dumps(table[family])}\n")
        TABLE.write_text(yaml.safe_dump(table, default_flow_style=None, sort_keys=True, width=110))


if __name__ == "__main__":
    main()
