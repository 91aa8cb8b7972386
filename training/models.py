"""Base models: the registry (`configs/models.yaml`), hub ids, local folders, and which of them to start from.

No torch: sizes come from `shapes`, the state of files from `weights`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training import weights
from training.errors import DataError, MissingInput
from training.records import GIB, BaseModel, HardwareProfile, ModelShape
from training.settings import BY_NAME, nearest
from training.shapes import NOT_ADAPTED, frozen_bytes, shape_from_config

__all__ = ["Chosen", "NotLoadable", "available", "choose", "embedded", "fetch", "registry", "resolve", "rows",
           "shape_from_config"]

EMBEDDED = "embedded"
EMBEDDED_CONTEXT = 16_384
REGISTRY = Path(__file__).resolve().parent.parent / "configs" / "models.yaml"
WANTED_TOKENS = 10_000_000       # what `auto` wants to be able to read in WANTED_HOURS
WANTED_HOURS = 12
TRAIN_EFFICIENCY = 0.4           # share of the measured matmul rate a whole training step reaches
MIN_AUTO_CONTEXT = 16_384        # tier 3
HEADROOM = 0.13                  # of device memory left free

Progress = Callable[[str, int, int, str], None]


class NotLoadable(MissingInput):
    """A base model that is known by form or name and whose files cannot be had now."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The base to start from. `fallback`: why the wanted base was replaced by the embedded one, or empty."""

    base: BaseModel
    why: str
    fallback: str = ""


@functools.cache
def _file() -> dict[str, Any]:
    # CSafeLoader reads the file in 6 ms, SafeLoader in 60.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data: dict[str, Any] = yaml.load(REGISTRY.read_text(encoding="utf-8"), Loader=loader)
    return data


@functools.cache
def registry() -> dict[str, BaseModel]:
    """Every model of `configs/models.yaml` by its short name, and `embedded`."""
    data = _file()
    known = {name: BaseModel(name=name, location=row["hub"], licence=row["licence"],
                             shape=shape_from_config(row["config"]),
                             lora_targets=tuple(data["lora"][row["lora"]]),
                             languages=tuple(row["languages"]), note=row.get("note", ""),
                             **_sentinels(data["fim"].get(row.get("fim"), {})))
             for name, row in data["models"].items()}
    return {EMBEDDED: embedded({}), **known}


def embedded(settings: Mapping[str, Any]) -> BaseModel:
    """The embedded model (trained from scratch on the repository), its sizes from the `embedded.*` keys."""
    def size(key: str) -> int:
        name = f"embedded.{key}"
        return int(settings.get(name, BY_NAME[name].default))
    shape = shape_from_config({
        "model_type": "llama", "hidden_size": size("hidden"), "num_hidden_layers": size("layers"),
        "num_attention_heads": size("heads"), "num_key_value_heads": size("kv_heads"),
        "intermediate_size": size("mlp"), "vocab_size": size("vocab_tokens"),
        "max_position_embeddings": EMBEDDED_CONTEXT, "tie_word_embeddings": True})
    return BaseModel(name=EMBEDDED, location=EMBEDDED, licence="yours: it is trained from "
                                                               "scratch", shape=shape,
                     lora_targets=tuple(_file()["lora"]["llama"]),
                     **_sentinels({**_file()["fim"]["qwen"], "order": "psm+spm"}))


def _sentinels(row: Mapping[str, str]) -> dict[str, Any]:
    """The two fields of a BaseModel that say how it fills in a middle."""
    named = {part: token for part, token in row.items() if part != "order"}
    return {"fim": named, "fim_order": row.get("order", "psm")}


def resolve(name: str) -> BaseModel:
    """A base model by registry name, hub id (`org/name`), local folder, or `embedded`.

    Raises MissingInput with the nearest name when nothing is known by it, NotLoadable for a hub id whose
    sizes cannot be read now, DataError when a config.json is no decoder's.
    """
    wanted = name.strip()
    by_hub = {base.location.lower(): base for base in registry().values()}
    known = registry().get(wanted.lower()) or by_hub.get(wanted.lower())
    if known is not None:
        return known
    folder = Path(os.path.expanduser(wanted))
    if wanted and os.path.isdir(folder):
        return _from_folder(folder)
    if wanted.startswith((".", "~", "/")) or wanted.count("/") > 1 or os.path.isfile(folder):
        raise MissingInput(f"Base model {name}: there is no such folder. It must hold config.json, a "
                           "tokenizer and "
                           "safetensors.")
    if "/" in wanted and weights.is_plain(wanted):
        return _from_hub(wanted)
    raise MissingInput(f"Unknown base model {name!r}.{nearest(wanted.lower(), tuple(registry()))} "
                       "docs/models.md "
                       f"lists the {len(registry())} known names; a hub id (org/name) or a local folder "
                       "serves too.")


def _from_folder(folder: Path) -> BaseModel:
    problems = weights.folder_problems(folder)
    if problems:
        raise MissingInput(f"Base model {folder} is not whole: {'; '.join(problems)}.")
    config = weights.read_config(folder) or {}
    base = _from_config(folder.resolve().name, str(folder.resolve()), config, "see the folder")
    return _with_fim(base, weights.added_tokens(folder))


def _from_hub(hub_id: str) -> BaseModel:
    cached = weights.cached_folder(hub_id)
    config = weights.read_config(cached) if cached else None
    if config is None and not weights.offline():
        config = weights.hub_config(hub_id)
    if config is None:
        state = "the environment forbids the hub" if weights.offline() else "the hub does not serve it"
        raise NotLoadable(f"Base model {hub_id}: its config.json is not in the Hugging Face cache and "
                          f"{state}. "
                          f"Download it with `hf download {hub_id}` or give a local folder.")
    base = _from_config(hub_id.split("/")[-1].lower(), hub_id, config, "see the model card")
    return _with_fim(base, weights.added_tokens(cached) if cached else set())


def _from_config(name: str, location: str, config: Mapping[str, Any], licence: str) -> BaseModel:
    try:
        shape = shape_from_config(config)
    except DataError as error:
        raise DataError(f"Base model {location}: {error}") from error
    # LoRA on every linear layer serves best (QLoRA, arXiv:2305.14314, section 4).
    targets = dict.fromkeys(x.name for x in shape.linears if x.name not in NOT_ADAPTED)
    return BaseModel(name=name, location=location, licence=licence, shape=shape, lora_targets=tuple(targets),
                     note=shape.note)


def _with_fim(base: BaseModel, tokens: set[str]) -> BaseModel:
    """The base with the first sentinel set whose three tokens its tokenizer declares."""
    for row in _file()["fim"].values():
        found = _sentinels(row)
        if set(found["fim"].values()) <= tokens:
            return BaseModel(**{**vars(base), **found})
    return base


def available(base: BaseModel, online: bool) -> str:
    """Empty when the weights can be loaded (whole local files, the cache, or the hub), else the reason in
    one line."""
    if base.location == EMBEDDED:
        return ""
    if os.path.isabs(base.location):
        return "; ".join(weights.folder_problems(Path(base.location)))
    cached = weights.cached_folder(base.location)
    problems = weights.folder_problems(cached) if cached else ["not in the Hugging Face cache"]
    if not problems:
        return ""
    if not online or weights.offline():
        return f"{'; '.join(problems)}, and this run is offline"
    unreachable = weights.hub_problem(base.location)
    return f"{'; '.join(problems)}, and {unreachable}" if unreachable else ""


def choose(name: str, profile: HardwareProfile, online: bool, must_load: bool = True) -> Chosen:
    """The base for this machine. `auto` picks by measured memory and speed.

    Without a GPU a base that cannot be loaded is replaced by the embedded one and `fallback` says why; with
    a GPU that raises MissingInput, because a GPU run of the embedded model must be asked for. Local folders
    must be whole. `must_load` False: a plan for another machine, where it does not matter which files are
    here.
    """
    if name == EMBEDDED:
        return Chosen(base=registry()[EMBEDDED], why="asked for")
    if name == "auto":
        return _auto_gpu(profile, online, must_load) if profile.gpus else _auto_cpu(profile)
    try:
        base = resolve(name)
        problem = available(base, online) if must_load else ""
    except NotLoadable as error:
        if profile.gpus:
            raise
        return _fallback(f"{error}")
    if not problem:
        return Chosen(base=base, why="asked for")
    if os.path.isabs(base.location):
        raise MissingInput(f"Base model {base.location} is not whole: {problem}.")
    if not profile.gpus:
        return _fallback(f"Base model {base.location} cannot be loaded: {problem}.")
    raise MissingInput(f"Base model {base.location} cannot be loaded: {problem}. {_way_out(base.location)}")


def _way_out(hub_id: str) -> str:
    return (f"Connect and run `hf download {hub_id}`, give a local folder, or ask for the small built-in "
            "model with "
            "`--base-model embedded`.")


def _fallback(reason: str) -> Chosen:
    return Chosen(base=registry()[EMBEDDED], why="no GPU and the wanted base cannot be loaded",
                  fallback=f"{reason} Training the embedded model instead.")


def _auto_cpu(profile: HardwareProfile) -> Chosen:
    base, rate = registry()["phi-2"], profile.rate("cpu.train_fp32")
    how = "measured training rate"
    if rate is None and (matmul := profile.rate("cpu.matmul_fp32")):
        rate, how = TRAIN_EFFICIENCY * matmul, f"{TRAIN_EFFICIENCY:g} of the measured matmul rate"
    if not rate:
        return Chosen(base=registry()[EMBEDDED], why="no GPU was found")
    token_s = 6 * base.shape.total_parameters / rate
    why = (f"no GPU was found; on this CPU ({rate / 1e9:,.0f} GFLOP/s, {how}) phi-2 would take 6 x 2.78e9 / "
           f"{rate:.2g} = {token_s:.2g} s a token, {token_s * 1e6 / 86400:,.0f} days for a million tokens")
    return Chosen(base=registry()[EMBEDDED], why=why)


def _auto_gpu(profile: HardwareProfile, online: bool, must_load: bool) -> Chosen:
    candidates = [registry()[name] for name, row in _file()["models"].items() if row.get("auto")]
    candidates.sort(key=lambda base: -base.shape.total_parameters)
    free_bytes = min(profile.rate(f"gpu{gpu.index}.allocatable_bytes") or gpu.free_bytes
                     for gpu in profile.gpus)
    usable_bytes = int((1 - HEADROOM) * free_bytes)
    fitting = [base for base in candidates if _floor_bytes(base.shape) <= usable_bytes]
    timely = [base for base in fitting if _hours(base.shape, profile) <= WANTED_HOURS] or fitting[-1:]
    if not timely:
        least = _floor_bytes(candidates[-1].shape)
        raise MissingInput(f"No base model fits {usable_bytes / GIB:.1f} GiB of free device memory; the "
                           "smallest "
                           f"({candidates[-1].name}) needs {least / GIB:.1f} GiB. Use `--base-model "
                           "embedded`.")
    problem = ""
    for base in timely:
        problem = available(base, online) if must_load else ""
        if not problem:
            hours = _hours(base.shape, profile)
            return Chosen(base=base, why=(
                f"the largest that fits with NF4 and LoRA at {MIN_AUTO_CONTEXT:,} tokens: about "
                f"{_floor_bytes(base.shape) / GIB:.1f} GiB of {usable_bytes / GIB:.1f} usable; about "
                f"{hours:.1f} h "
                f"for {WANTED_TOKENS / 1e6:.0f} M tokens"))
    raise MissingInput(f"Base model {timely[0].location} cannot be loaded: {problem}. "
                       f"{_way_out(timely[0].location)}")


def _floor_bytes(shape: ModelShape) -> int:
    """Rough device bytes of an NF4 + LoRA step with recompute at 16,384 tokens; the planner counts it
    exactly.

    Frozen weights; each layer's input, 2H bytes a token; one layer's kept tensors, about 45H + 18I; half a
    GiB of logits; 1 GiB for the CUDA context and the adapter.
    """
    tokens = MIN_AUTO_CONTEXT
    inputs = shape.layers * tokens * shape.hidden * 2
    layer = tokens * (45 * shape.hidden + 18 * shape.intermediate)
    return frozen_bytes(shape, "nf4", 2) + inputs + layer + GIB // 2 + GIB


def _hours(shape: ModelShape, profile: HardwareProfile) -> float:
    """Hours for WANTED_TOKENS at 6 FLOP a parameter and token; 0 when no rate was measured."""
    rates = [profile.rate(f"gpu0.matmul_{kind}") or 0.0 for kind in ("bf16", "fp16")]
    if not max(rates):
        return 0.0
    return 6 * shape.active_parameters * WANTED_TOKENS / (TRAIN_EFFICIENCY * max(rates)) / 3600


def fetch(base: BaseModel, progress: Progress, revision: str = "") -> str:
    """The local folder of a base's weights, downloaded when needed; empty for the embedded model.

    Raises MissingInput when they are neither here nor on the hub.
    """
    if base.location == EMBEDDED:
        return ""
    if os.path.isabs(base.location):
        _from_folder(Path(base.location))
        return base.location
    cached = weights.cached_folder(base.location, revision)
    if cached and not weights.folder_problems(cached):
        return str(cached)
    problem = available(base, online=True)
    if problem:
        raise MissingInput(f"Base model {base.location} cannot be loaded: {problem}. "
                           f"{_way_out(base.location)}")
    return _download(base, progress, revision)


def _download(base: BaseModel, progress: Progress, revision: str) -> str:
    from huggingface_hub import snapshot_download  # 0.7 s to import
    progress("download", 0, 0, base.location)
    try:
        folder = snapshot_download(base.location, revision=revision or None,
                                   allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except Exception as error:  # the hub's client raises some twenty classes, network and disk alike
        raise MissingInput(f"Downloading {base.location} failed: {' '.join(str(error).split())[:300]} "
                           f"{_way_out(base.location)}") from error
    problems = weights.folder_problems(Path(folder))
    if problems:
        raise MissingInput(f"Base model {base.location} is not whole after the download: "
                           f"{'; '.join(problems)}.")
    progress("download", 1, 1, base.location)
    return str(folder)


def rows() -> list[dict[str, Any]]:
    """The registry as table rows for docs/models.md."""
    return [{"name": base.name, "hub": base.location, "parameters": base.shape.total_parameters,
             "licence": base.licence, "native_context": base.shape.native_context, "fim": bool(base.fim),
             "family": base.shape.family, "lora_targets": list(base.lora_targets),
             "languages": list(base.languages), "nf4_bytes": frozen_bytes(base.shape, "nf4", 2)}
            for base in registry().values()]
