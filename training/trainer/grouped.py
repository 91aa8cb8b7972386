"""Grouped-query attention from a multi-head base: key and value heads pooled by their mean, on disk.

Ainslie et al. 2023, arXiv:2305.13245, section 2.1: "the projection matrices for key and value heads are mean
pooled". The pooled base is an ordinary model folder, so that everything after it (NF4, adapters, streaming,
PEFT elsewhere) loads it as it loads any other.

    <run>/base/                 the base with fewer key and value heads, complete or absent
        pooled.json             from what, how many heads, bytes of keys and values a token
        healing.json            what training the pooled projections gave back (`healing`)

Shapes: N key/value heads of the base, G of the pooled one, D numbers of a head, H hidden.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import weights
from training.errors import DataError, EliteError, MissingInput, Problems, UsageError
from training.rundir import read_data, write_text
from training.settings import Config
from training.trainer.imports import quick_imports
from training.trainer.loading import DTYPES, not_loadable
from training.trainer.weightfiles import PROJECTION, STORED, Tell, header, rewrite, shards

if TYPE_CHECKING:
    from training.dataset.store import WindowStore
    from training.trainer.session import Session

log = logging.getLogger(__name__)

FOLDER, RECORD, HEALING = "base", "pooled.json", "healing.json"
HEAD_NORM = re.compile(r"\.[kv]_(?:layer)?norm\.")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A base's attention: `layers` of `key_heads` keys and as many values, each `head_dim` numbers."""

    layers: int
    key_heads: int
    head_dim: int

    def bytes_per_token(self, key_heads: int, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers.

        >>> Heads(layers=32, key_heads=32, head_dim=80).bytes_per_token(8, torch.bfloat16)
        81920
        """
        return 2 * self.layers * key_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What `pooled.json` says. `bytes_before`, `bytes_after`: keys and values of a token in all layers, in
    `model.dtype`."""

    base: str
    source: str
    layers: int
    heads_before: int
    heads_after: int
    bytes_before: int
    bytes_after: int


def prepare(session: Session, store: WindowStore, device: torch.device) -> str:
    """The folder to load the base from, pooled and healed once a run; empty where no heads are pooled.

    Rank 0 makes it while the others wait, and what it raises is raised on every rank: UsageError (a base that
    cannot be pooled), MissingInput, DataError, CannotWrite, or a stop. A trial pools and does not heal.
    """
    if not session.config["model.kv_heads"]:
        return ""
    failure: EliteError | None = None
    if session.rank == 0:
        try:
            _make(session, store, device)
        except EliteError as error:
            failure = error
    _told(failure, device)
    return str((session.run.path / FOLDER).resolve())


def _told(failure: EliteError | None, device: torch.device) -> None:
    """Raise on every rank what rank 0 met; the others wait here for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        kind = type(failure.problems[0] if isinstance(failure, Problems) else failure)
        box: list[Any] = [None if failure is None else (kind, str(failure))]
        torch.distributed.broadcast_object_list(box, src=0, device=device)
        if failure is None and box[0] is not None:
            raise box[0][0](box[0][1])
    if failure is not None:
        raise failure


def _make(session: Session, store: WindowStore, device: torch.device) -> None:
    """`<run>/base/`: taken as it is when it is whole and this configuration's, else pooled, then healed."""
    config, folder, tell = session.config, session.run.path / FOLDER, session.tell("load")
    steps = 0 if session.trial else int(config["model.heal_steps"])
    source = source_of(config)
    if not _is_of(folder, config, source, steps):
        with session.watch.at_once():
            convert(source, config["model.kv_heads"], folder, config=config, tell=tell)
    if steps and not (folder / HEALING).is_file():
        from training.trainer.healing import heal

        heal(config, store, device, source, folder, tell)
    log.info("%s", described(folder))


def source_of(config: Config) -> Path:
    """The base's folder: a local one, or its snapshot in the hub's cache. Raises MissingInput."""
    base = str(config["model.base"])
    folder = Path(base).expanduser()
    found = folder if folder.is_dir() else weights.cached_folder(base, config["model.revision"])
    if found is None:
        raise not_loadable(base, OSError("not in the cache"))
    return found.resolve()


def _is_of(folder: Path, config: Config, source: Path, heal_steps: int) -> bool:
    """Whether a pooled base is whole, of this base and number of heads, and healed as asked or not at all."""
    try:
        record = Pooled(**read_data(folder / RECORD))
        healed = read_data(folder / HEALING)["steps"] if (folder / HEALING).exists() else heal_steps
    except (MissingInput, DataError, TypeError, KeyError):
        return False
    same = (record.source, record.heads_after) == (str(source), config["model.kv_heads"])
    return same and healed == heal_steps and not weights.folder_problems(folder)


def described(folder: Path) -> str:
    """What pooling and healing cost and gave, in one line."""
    found = Pooled(**read_data(folder / RECORD))
    line = (f"Key/value heads pooled from {found.heads_before} to {found.heads_after} in each of "
            f"{found.layers} layers: {found.bytes_before:,} bytes a token become {found.bytes_after:,}")
    if not (folder / HEALING).is_file():
        return f"{line}; not healed."
    healed = read_data(folder / HEALING)
    return (f"{line}; held-out loss of the base {healed['loss_base']:.4f}, pooled "
            f"{healed['loss_pooled']:.4f}, after {healed['steps']:,} updates in {healed['seconds']:,.0f} s "
            f"{healed['loss_healed']:.4f}{'' if healed['kept'] else ', which is no gain, so not kept'}.")


def facts_of(run: Path) -> dict[str, Any]:
    """What a model card tells of a run's pooled base; empty when there is none."""
    if not (run / FOLDER / RECORD).is_file():
        return {}
    found = Pooled(**read_data(run / FOLDER / RECORD))
    healed = read_data(run / FOLDER / HEALING) if (run / FOLDER / HEALING).is_file() else {}
    return {"key_value_heads": {"of_the_base": found.heads_before, "pooled_to": found.heads_after},
            "healing": {name: healed[name] for name in
                        ("steps", "loss_base", "loss_pooled", "loss_healed") if name in healed}}


def convert(source: Path, kv_heads: int, target: Path, *, config: Config, tell: Tell = lambda _: None
            ) -> Pooled:
    """Write `target`, a model folder like `source` with `kv_heads` key and value heads, aside and renamed.

    One tensor is in memory at a time; other weights are copied byte for byte, and so is every file that holds
    no weights. Raises UsageError when the base cannot be pooled so, CannotWrite when the disk refuses.
    """
    heads = heads_of(source, kv_heads)
    shrink, dtype = heads.key_heads // kv_heads, DTYPES[config["model.dtype"]]
    record = Pooled(base=str(config["model.base"]), source=str(source), layers=heads.layers,
                    heads_before=heads.key_heads, heads_after=kv_heads,
                    bytes_before=heads.bytes_per_token(heads.key_heads, dtype),
                    bytes_after=heads.bytes_per_token(kv_heads, dtype))

    def fill(aside: Path) -> None:
        described = read_data(source / "config.json")
        write_text(aside / "config.json", json.dumps({**described, "num_key_value_heads": kv_heads}, indent=2)
                   + "\n")
        write_text(aside / RECORD, json.dumps(asdict(record), indent=2) + "\n")
        (aside / HEALING).unlink(missing_ok=True)  # of a base that was pooled before

    rewrite(source, target, shrink, lambda _, tensor: pooled(tensor, kv_heads, shrink, heads.head_dim), fill,
            tell)
    return record


def pooled(tensor: Tensor, groups: int, size: int, head_dim: int) -> Tensor:
    """The mean over each group of `size` heads: (G size D, ...) -> (G D, ...), summed in float64.

    >>> pooled(torch.tensor([1.0, 2.0, 3.0, 4.0]), groups=1, size=2, head_dim=2)
    tensor([2., 3.])
    """
    heads = tensor.reshape(groups, size, head_dim, -1).double()
    return heads.mean(dim=1).to(tensor.dtype).reshape(groups * head_dim, *tensor.shape[1:])


def heads_of(source: Path, kv_heads: int) -> Heads:
    """The attention of the base in a folder, once it is known that its heads can be pooled to `kv_heads`.

    Raises UsageError with what stands against it, MissingInput when the folder is not whole.
    """
    if problems := weights.folder_problems(source):
        raise MissingInput(f"The base model folder {source} is not whole: {'; '.join(problems)}.")
    with quick_imports():
        from transformers import AutoConfig
    try:
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise not_loadable(str(source), error) from error
    number = getattr(shape, "num_key_value_heads", None)
    if shape.get_text_config() is not shape or not isinstance(number, int):
        raise _refusal(shape, kv_heads, "its configuration has no num_key_value_heads")
    heads = Heads(layers=shape.num_hidden_layers, key_heads=number,
                  head_dim=getattr(shape, "head_dim", None) or
                  shape.hidden_size // shape.num_attention_heads)
    if number <= kv_heads or number % kv_heads:
        fewer = [str(n) for n in range(1, number) if number % n == 0]
        way = f"set model.kv_heads to one of {', '.join(fewer)}, or" if fewer else "there are no fewer;"
        raise _refusal(shape, kv_heads, f"it has {number}", way)
    if fault := _fault(source, heads, shape):
        raise _refusal(shape, kv_heads, fault)
    return heads


def _refusal(shape: Any, kv_heads: int, why: str, way: str = "to train this base,") -> UsageError:
    return UsageError(f"model.kv_heads is {kv_heads} and the key/value heads of this {shape.model_type} base "
                      f"cannot be pooled to that: {why}; {way} leave model.kv_heads out.")


def _fault(source: Path, heads: Heads, shape: Any) -> str:
    """Why the weights are not what pooling knows; empty when they are."""
    if getattr(shape, "quantization_config", None):
        return "its weights are stored quantized"
    if not shards(source):
        return "its weights are not in safetensors files"
    entries = {name: entry for path in shards(source) for name, entry in header(path)[0].items()}
    found = {name: entry for name, entry in entries.items() if PROJECTION.search(name)}
    matrices = [name for name in found if name.endswith("weight")]
    if len(matrices) != 2 * heads.layers:
        return f"{len(matrices)} k_proj and v_proj weights in {heads.layers} layers, where two each are known"
    rows = heads.key_heads * heads.head_dim
    for name, entry in found.items():
        if entry["shape"][0] != rows or entry["dtype"] not in STORED:
            return (f"{name} is {entry['dtype']} with {entry['shape'][0]:,} rows, where floating point with "
                    f"{heads.key_heads} heads of {heads.head_dim} was looked for")
    for name, entry in entries.items():
        if HEAD_NORM.search(name) and entry["shape"] != [heads.head_dim]:
            return f"{name} has the shape {entry['shape']}, so each head has a norm of its own"
    return ""
