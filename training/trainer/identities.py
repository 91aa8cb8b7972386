"""What must not change between a checkpoint and its continuation, and what was allowed to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from training.errors import CannotWrite, DataError, EliteError, UsageError, raise_all
from training.keys import KEYS
from training.rundir import RunDirectory, read_data, write_text
from training.weights import cached_folder

# Keys whose change leaves the course of the training as it was. Those of BATCH may change while their
# product stays: an update is the mean over all target tokens of its windows, however they are dealt out.
HARMLESS = ("run.name", "model.attention", "dataset.repo", "training.checkpointing", "training.trial",
            "training.keep_checkpoints", "training.save_steps", "training.eval_steps",
            "training.loss_chunk_tokens", "training.keep_best", "training.compile", "training.kept_layers",
            "training.kept_inputs", "model.fused_kernels", "stream.overlap", "deepspeed.", "device.",
            "evaluation.",
            *(f"stream.{name}" for name in (  # all but the encoding, which may be lossy
                "chunk_tokens", "page_tokens", "mlp_tokens", "inputs", "keep_every", "pages", "attention",
                "keys", "weights")))
BATCH = ("training.micro_batch", "training.accumulation", "device.count", "parallel.ring")
DATA, BASE, VERSIONS = "data", "base", "versions."
READ_BYTES = 1 << 20
WEIGHT_SUFFIXES = (".safetensors", ".bin")
# Beside the weights, what decides what they compute; the tokenizer is in the dataset's digest.
PARTS = ("config.json", "generation_config.json")


def identity(config: Mapping[str, Any], data_digest: str, base_digest: str = "",
             versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The deciding keys, the digests of data and base model, and the versions of what computes."""
    values = {name: config[name] for name in config if not name.startswith(HARMLESS) and name not in BATCH}
    ranks = config["device.count"] // config["parallel.ring"]  # that hold windows of their own
    values["windows per update"] = config["training.micro_batch"] * config["training.accumulation"] * ranks
    return {"config": values, DATA: data_digest, BASE: base_digest, "versions": dict(versions or {})}


def versions_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the packages that this run computes with, without what says where torch was built."""
    names = ["torch", "transformers"]
    names += ["peft"] * bool(config["lora.enabled"]) + ["deepspeed"] * bool(config["deepspeed.stage"])
    eight_bit = "8bit" in str(config["optimizer.name"])
    names += ["bitsandbytes"] * (eight_bit or config["model.quantization"] == "nf4")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def digest_of(data: Any) -> str:
    """sha256 over the canonical JSON of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def refuse_changes(then: Mapping[str, Any], now: Mapping[str, Any], where: str,
                   allowed: Collection[str] = ()) -> list[dict[str, Any]]:
    """What changed since and was allowed by name, as `{"key", "before", "after"}`.

    Raises, all at once, UsageError for each key or version that changed and was not allowed, DataError for
    the windows and the base model. A key, digest or version that the checkpoint is older than counts as
    unchanged: a key as its default, which is what was done then.
    """
    found, problems = list(_changes(then, now)), list[EliteError]()
    for key, before, after in found:
        if key not in allowed:
            problems.append(_refusal(key, before, after, where))
    raise_all(problems)
    return [{"key": key, "before": before, "after": after} for key, before, after in found]


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    defaults = {key.name: key.default for key in KEYS}
    before, after = defaults | then["config"], defaults | now["config"]
    for name in sorted(before.keys() | after.keys()):
        if not name.startswith(HARMLESS) and name not in BATCH and before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)
    for part in (DATA, BASE):
        if then.get(part) and now.get(part) and then[part] != now[part]:
            yield part, then[part], now[part]
    one, other = then.get("versions") or {}, now.get("versions") or {}
    for name in sorted(one.keys() & other.keys()):
        if one[name] != other[name]:
            yield VERSIONS + name, one[name], other[name]


def _refusal(key: str, before: Any, after: Any, where: str) -> EliteError:
    ways = f"allow it with --allow-change {shlex.quote(key)}, or start a new run with --fresh."
    if key == DATA:
        return DataError(f"The dataset changed since {where} (digest {before[:12]}, now {after[:12]}); put "
                         f"it back, {ways}")
    if key == BASE:
        return DataError(f"The base model's files changed since {where} (digest {before[:12]}, now "
                         f"{after[:12]}); put them back, {ways}")
    if key.startswith(VERSIONS):
        return UsageError(f"{key.removeprefix(VERSIONS)} was {before} in {where} and is {after} now, which "
                          f"may round otherwise; install {before}, {ways}")
    return UsageError(f"{key} was {before!r} in {where} and is {after!r} now; set it back, {ways}")


def base_digest(config: Mapping[str, Any], run: RunDirectory) -> str:
    """sha256 over the base model's configuration and weights; empty where it has no folder.

    A file that was hashed before, with the size and times it had then, is not read again
    (`base-digests.json` in the run directory).
    """
    base = config["model.base"]
    named = Path(base).expanduser()
    folder = named if named.is_dir() else cached_folder(base, config["model.revision"])
    if base == "embedded" or folder is None:
        return ""
    known = _known(run)
    found = {path.name: _entry(path, known.get(path.name)) for path in sorted(folder.iterdir())
             if path.suffix in WEIGHT_SUFFIXES or path.name in PARTS}
    if found != known:
        with contextlib.suppress(CannotWrite):  # it is only read faster with it
            write_text(run.base_digests, json.dumps(found, indent=1) + "\n")
    return digest_of({name: entry["sha256"] for name, entry in found.items()})


def _known(run: RunDirectory) -> dict[str, Any]:
    try:
        found = read_data(run.base_digests)
    except EliteError:
        return {}
    return found if isinstance(found, dict) else {}


def _entry(path: Path, known: Any) -> dict[str, Any]:
    facts = path.stat()
    entry = {"bytes": facts.st_size, "modified_ns": facts.st_mtime_ns, "changed_ns": facts.st_ctime_ns}
    if isinstance(known, dict) and {**known, "sha256": ""} == {**entry, "sha256": ""}:
        return known
    return {**entry, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
