"""Checkpoints that are complete or absent.

    <run>/.staging-<step>-<pid>/   written here, every file fsynced, MANIFEST.json last
    <run>/checkpoint-<step>/       the same folder, renamed once it is whole
        weights.safetensors        trainable weights, fp32, by parameter name
        optimizer.safetensors      optimizer state, `<key>/<parameter>`
        state.json                 step, tokens, seconds, steps decided, counters, the last losses, the
                                   optimizer's plain numbers
        MANIFEST.json              {files: {name: {bytes, sha256}}, step, identity}

Nothing is pickled, so loading one runs no code. There are no generator states in it: the loop seeds Python,
NumPy and torch at each update from (run.seed, step, rank).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from training.errors import CannotWrite, DataError, EliteError, UsageError, raise_all
from training.keys import KEYS
from training.trainer.engine import Captured, Engine

MANIFEST = "MANIFEST.json"
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"^checkpoint-(\d+)$")
STAGING, TRASH = ".staging-", "trash-"
READ_BYTES = 1 << 20

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


def identity(config: Mapping[str, Any], data_digest: str) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation: the deciding keys, and the data."""
    values = {name: config[name] for name in config if not name.startswith(HARMLESS) and name not in BATCH}
    ranks = config["device.count"] // config["parallel.ring"]  # that hold windows of their own
    values["windows per update"] = config["training.micro_batch"] * config["training.accumulation"] * ranks
    return {"config": values, "data": data_digest}


def digest_of(data: Any) -> str:
    """sha256 over the canonical JSON of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def refuse_changes(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for each configuration key that changed since, DataError when the windows did.

    A key that the checkpoint is older than counts as its default, which is what was done then.
    """
    problems: list[EliteError] = []
    defaults = {key.name: key.default for key in KEYS}
    before, after = defaults | then["config"], defaults | now["config"]
    for name in sorted(before.keys() | after.keys()):
        if name.startswith(HARMLESS) or name in BATCH:
            continue
        if before.get(name) != after.get(name):
            problems.append(UsageError(f"{name} was {before.get(name)!r} in {where} and is "
                                       f"{after.get(name)!r} now; set it back, or start a new run with "
                                       "--fresh."))
    if then["data"] != now["data"]:
        problems.append(DataError(f"The dataset changed since {where} (digest {then['data'][:12]}, now "
                                  f"{now['data'][:12]}); put it back, or start a new run with --fresh."))
    raise_all(problems)


def save(run: Path, captured: Captured, state: Mapping[str, Any], identity_now: Mapping[str, Any]) -> Path:
    """Write `checkpoint-<step>`; raises CannotWrite, and leaves nothing of it, when the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    step = state["step"]
    final, staging = run / f"checkpoint-{step}", run / f"{STAGING}{step}-{os.getpid()}"
    if final.exists():
        return final
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file(captured.weights, staging / WEIGHTS)
        save_file(captured.optimizer, staging / OPTIMIZER)
        _write(staging / STATE, {**state, "optimizer": captured.numbers})
        _commit(staging, final, {"step": step, "identity": dict(identity_now)})
    except (OSError, SafetensorError) as error:  # safetensors has its own class for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotWrite(f"Cannot write {final}: {reason}.") from error
    return final


def _commit(staging: Path, final: Path, facts: dict[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(staging.iterdir())}
    for name in files:
        _sync(staging / name)
    _write(staging / MANIFEST, {"files": files, **facts})
    _sync(staging / MANIFEST)
    _sync(staging)
    os.rename(staging, final)
    _sync(final.parent)


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def retain(run: Path, keep: int, also: Collection[int | None] = ()) -> None:
    """Delete all checkpoints but the `keep` newest and those of the steps in `also`."""
    for step, path in _by_step(run)[keep:]:
        if step not in also:
            _delete(path)


def drop_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which are about to be made anew."""
    for later, path in _by_step(run):
        if later > step:
            _delete(path)


def _delete(path: Path) -> None:
    """Renamed first: no part of a checkpoint keeps its name."""
    trash = path.with_name(f"{TRASH}{path.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def best(evaluations: Iterable[Mapping[str, Any]], digest: str) -> int | None:
    """The step of the lowest held-out loss after training began, the later one of two that are equal.

    Of lines of evaluations.jsonl made under the identity with this digest; None when there is none.

    >>> best([{"step": 4, "loss": 1.5, "identity": "d"}, {"step": 8, "loss": 1.25, "identity": "d"}], "d")
    8
    """
    found = [(line["loss"], -line["step"]) for line in evaluations
             if line.get("identity") == digest and line["step"] and line.get("loss") is not None]
    return -min(found)[1] if found else None


def before_spikes(run: Path, anchor: int) -> str:
    """The name of the checkpoint to go back to from loss spikes: that of step `anchor`, else the newest.

    It must be whole, and not have been saved between one spike and the next. Empty: there is none.
    """
    for step, path in sorted(_by_step(run), key=lambda found: (found[0] != anchor, -found[0])):
        if not fault(path, step):
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if not state.get("spikes_in_a_row"):
                return path.name
    return ""


def remove_leftovers(run: Path) -> list[str]:
    """Delete what a killed process left half-made or half-deleted; the names."""
    left = [path for path in run.iterdir() if path.name.startswith((STAGING, TRASH)) and path.is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left)


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files all have their manifest's sizes and hashes; why newer ones do not."""
    skipped: list[str] = []
    for step, path in _by_step(run):
        reason = fault(path, step)
        if not reason:
            return path, skipped
        skipped.append(f"{path.name} is skipped: {reason}.")
    return None, skipped


def _by_step(run: Path) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in run.iterdir()
             if (match := NAME.match(path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def fault(path: Path, step: int) -> str:
    """Why a checkpoint cannot be trusted, or nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        whole = {WEIGHTS, OPTIMIZER, STATE} <= files.keys() and "identity" in manifest
        if manifest["step"] != step or not whole:
            return f"its {MANIFEST} is not that of step {step}"
        for name, facts in files.items():
            size = (path / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size:,} bytes, its {MANIFEST} says {facts['bytes']:,}"
            if sha256(path / name) != facts["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{getattr(error, 'strerror', None) or 'its ' + MANIFEST + ' is torn'}"
    return ""


def read_identity(path: Path) -> dict[str, Any]:
    """The identity a checkpoint was written under."""
    found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["identity"]
    return found


def load(path: Path) -> tuple[Captured, dict[str, Any]]:
    """The tensors and the state of a checkpoint that `newest_valid` accepted."""
    from safetensors.torch import load_file

    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    numbers = state.pop("optimizer")
    tensors = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    return Captured(weights=tensors[0], optimizer=tensors[1], numbers=numbers), state


def put_weights(weights: Mapping[str, Tensor], trainable: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the model's parameters. Raises DataError when their names differ."""
    import torch

    if weights.keys() != trainable.keys():
        odd = sorted(weights.keys() ^ trainable.keys())
        raise DataError(f"The checkpoint and the model differ in {len(odd)} trainable parameters, the first "
                        f"being {odd[0]}; start a new run with --fresh.")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])


def put_back(captured: Captured, trainable: Mapping[str, Tensor], engine: Engine) -> None:
    """A checkpoint's weights and optimizer state into a training under way. Together."""
    if any(hasattr(parameter, "ds_id") for parameter in trainable.values()):
        import deepspeed  # ZeRO-3: `restore` sets the partitions that are stepped, not those computed with

        with deepspeed.zero.GatheredParameters(list(trainable.values()), modifier_rank=0):
            if engine.rank == 0:
                put_weights(captured.weights, trainable)
    else:
        put_weights(captured.weights, trainable)
    engine.restore(captured)
