"""Checkpoints that are complete or absent.

    <run>/.staging-<step>-<pid>/   written here, every file fsynced, MANIFEST.json last
    <run>/checkpoint-<step>/       the same folder, renamed once it is whole
        weights.safetensors        trainable weights, fp32, by parameter name
        optimizer.safetensors      optimizer state, `<key>/<parameter>`
        state.json                 step, tokens, seconds, steps decided, counters, the last losses, the
                                   optimizer's plain numbers
        MANIFEST.json              {files: {name: {bytes, sha256}}, step, identity, sha256 of these three}

Nothing is pickled, so loading one runs no code. There are no generator states in it: the loop seeds Python,
NumPy and torch at each update from (run.seed, step, rank).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from training.errors import CannotWrite, DataError
from training.rundir import ASIDE
from training.trainer.engine import Captured, Engine
from training.trainer.identities import sha256

MANIFEST = "MANIFEST.json"
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"^checkpoint-(\d+)$")
STAGING, TRASH = ".staging-", "trash-"
FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(CannotWrite):
    """The disk has no room for a checkpoint."""


def save(run: Path, captured: Captured, state: Mapping[str, Any], identity_now: Mapping[str, Any]) -> Path:
    """Write `checkpoint-<step>`, in place of a damaged one of that step.

    Raises CannotWrite, NoRoom if for that, and leaves nothing of it, when the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    step = state["step"]
    final, staging = run / f"checkpoint-{step}", run / f"{STAGING}{step}-{os.getpid()}"
    if final.exists():
        if not fault(final, step):
            return final
        _delete(final)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        save_file(captured.weights, staging / WEIGHTS)
        save_file(captured.optimizer, staging / OPTIMIZER)
        text = _text({**state, "optimizer": captured.numbers})
        (staging / STATE).write_text(text, encoding="utf-8")
        _commit(staging, final, {"step": step, "identity": dict(identity_now)})
    except (OSError, SafetensorError) as error:  # safetensors has its own class for a full disk
        many = _holds_no_more_files(run)
        shutil.rmtree(staging, ignore_errors=True)
        if final.exists():  # renamed, and then the folder that it is in could not be synced
            _delete(final)
        raise _refused(final, error, captured, many) from error
    return final


def _refused(final: Path, error: Exception, captured: Captured, many: bool) -> CannotWrite:
    reason = getattr(error, "strerror", None) or str(error)
    number = getattr(error, "errno", None)
    if number not in FULL and not any(os.strerror(each) in reason for each in FULL):
        return CannotWrite(f"Cannot write {final}: {reason}.")
    if many:
        return NoRoom(f"Cannot write {final}: the disk can hold no more files, whatever their size (its "
                      "inodes are used up); delete some, and resume.")
    free_bytes = shutil.disk_usage(final.parent).free
    return NoRoom(f"Cannot write {final}: {reason}. It takes {size_bytes(captured) / 2**20:,.1f} MiB and "
                  f"{free_bytes / 2**20:,.1f} MiB is free; free some room, and resume.")


def _holds_no_more_files(folder: Path) -> bool:
    """Some file systems have no such limit, and say 0 of 0."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_files > 0 and found.f_favail == 0


def size_bytes(captured: Captured) -> int:
    """Of a checkpoint's tensors; the rest of it is some kilobytes."""
    return sum(value.numel() * value.element_size()
               for part in (captured.weights, captured.optimizer) for value in part.values())


def _commit(staging: Path, final: Path, facts: dict[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(staging.iterdir())}
    for name in files:
        _sync(staging / name)
    (staging / MANIFEST).write_text(sealed({"files": files, **facts}), encoding="utf-8")
    _sync(staging / MANIFEST)
    _sync(staging)
    os.rename(staging, final)
    _sync(final.parent)


def sealed(facts: Mapping[str, Any]) -> str:
    """The text of a manifest: its facts, and the sha256 of their own text."""
    return _text({**facts, "sha256": hashlib.sha256(_text(facts).encode()).hexdigest()})


def _text(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def retain(run: Path, keep: int, also: Collection[int | None] = ()) -> int:
    """Delete all checkpoints but the `keep` newest and those of the steps in `also`; how many.

    One that is not even complete by its manifest does not count as one of the newest.
    """
    found = _by_step(run)
    whole = [step for step, path in found if not fault(path, step, hashes=False)]
    gone = [path for step, path in found if step not in whole[:keep] and step not in also]
    for path in gone:
        _delete(path)
    return len(gone)


def step_of(path: Path | None) -> int | None:
    """The step of a checkpoint by its name.

    >>> step_of(Path("runs/a/checkpoint-12")), step_of(None)
    (12, None)
    """
    match = NAME.match(path.name) if path else None
    return int(match[1]) if match else None


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
    folders = [path for path in run.iterdir() if path.name.startswith((STAGING, TRASH)) and path.is_dir()]
    files = [path for path in run.iterdir() if ASIDE.fullmatch(path.name) and path.is_file()]
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink()
    return sorted(path.name for path in (*folders, *files))


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


def fault(path: Path, step: int, hashes: bool = True) -> str:
    """Why a checkpoint cannot be trusted, or nothing. Without `hashes` by its files' sizes alone."""
    try:
        manifest = _manifest(path)
        files = manifest["files"]
        if manifest["step"] != step or not {WEIGHTS, OPTIMIZER, STATE} <= files.keys():
            return f"its {MANIFEST} is not that of step {step}"
        for name, facts in files.items():
            found = os.lstat(path / name)
            if os.path.basename(name) != name or not stat.S_ISREG(found.st_mode):
                return f"{name!r} is no file of its own"
            size = found.st_size
            if size != facts["bytes"]:
                return f"{name} has {size:,} bytes, its {MANIFEST} says {facts['bytes']:,}"
            if hashes and sha256(path / name) != facts["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{getattr(error, 'strerror', None) or 'its ' + MANIFEST + ' is torn'}"
    return ""


def _manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError unless its text is, byte for byte, as `save` wrote it; older ones have no seal."""
    text = (path / MANIFEST).read_bytes().decode()
    facts: dict[str, Any] = json.loads(text)
    seal = facts.pop("sha256", None)
    if facts.keys() != {"files", "step", "identity"} or text != (sealed if seal else _text)(facts):
        raise ValueError(f"{MANIFEST} is not what was written")
    return facts


def read_identity(path: Path) -> dict[str, Any]:
    """The identity a checkpoint was written under."""
    found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["identity"]
    return found


def load(path: Path) -> tuple[Captured, dict[str, Any]]:
    """The tensors and the state of a checkpoint that `newest_valid` accepted.

    Raises DataError for one whose manifest is right and whose content this trainer did not write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        numbers = state.pop("optimizer")
        tensors = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        return Captured(weights=tensors[0], optimizer=tensors[1], numbers=dict(numbers)), dict(state)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path.name} has its manifest's hashes and cannot be read ({error}); remove it to "
                        "go on from the one before.") from error


def put_weights(weights: Mapping[str, Tensor], trainable: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the model's parameters. Raises DataError when their names differ."""
    import torch

    if weights.keys() != trainable.keys():
        odd = sorted(weights.keys() ^ trainable.keys())
        raise DataError(f"The checkpoint and the model differ in {len(odd)} trainable parameters, the first "
                        f"being {odd[0]}; start a new run with --fresh.")
    whole = [name for name, parameter in trainable.items() if not hasattr(parameter, "ds_id")]
    if odd := [name for name in whole if weights[name].shape != trainable[name].shape]:
        raise DataError(f"{odd[0]} is {tuple(weights[odd[0]].shape)} in the checkpoint and "
                        f"{tuple(trainable[odd[0]].shape)} in the model; start a new run with --fresh.")
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
