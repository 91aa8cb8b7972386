"""Model folders written anew with other key and value projections, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from training.errors import CannotWrite
from training.rundir import read_data, write_text
from training.trainer.checkpoints import STAGING, TRASH

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROJECTION = re.compile(r"(?:^|\.)[kv]_proj\.(?:weight|bias)$")
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
COPY_BYTES = 1 << 24

Entries = dict[str, dict[str, Any]]
Make = Callable[[str, Tensor], Tensor]
Tell = Callable[[str], None]


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order of name."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_data(folder / INDEX)["weight_map"].values()))]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else []


def header(path: Path) -> tuple[Entries, dict[str, str], int]:
    """A safetensors file's tensors in order of place, its metadata, and where its data begins, bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        described: dict[str, Any] = json.loads(file.read(size))
    metadata = described.pop("__metadata__", {})
    return dict(sorted(described.items(), key=lambda item: item[1]["data_offsets"])), metadata, 8 + size


def rewrite(source: Path, target: Path, shrink: int, make: Make, fill: Callable[[Path], None],
            tell: Tell = lambda _: None) -> None:
    """`target` as a copy of `source` whose key and value projections have 1/`shrink` of their rows, as `make`
    gives them by name and stored tensor. `fill` adds files to the folder before it is renamed.

    `target` holds the old folder, the new one, or none. Raises CannotWrite.
    """
    aside = target.with_name(f"{STAGING}{target.name}-{os.getpid()}")
    trash = target.with_name(f"{TRASH}{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _copy_others(source, aside)
        for path in shards(source):
            tell(f"writing {target.name}/{path.name}")
            _rewrite_file(path, aside / path.name, shrink, make)
        if (source / INDEX).is_file():
            _index(source, aside)
        fill(aside)
        if target.exists():
            os.rename(target, trash)
        publish(aside, target)
    except OSError as error:
        raise CannotWrite(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(trash, ignore_errors=True)


def _copy_others(source: Path, aside: Path) -> None:
    """Tokenizer, generation settings, licence; the cache's links are followed."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, aside / path.name)


def _index(source: Path, aside: Path) -> None:
    """The index of the shards, with the new number of bytes."""
    index = read_data(source / INDEX)
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0]
                for path in shards(source) for entry in header(aside / path.name)[0].values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    write_text(aside / INDEX, json.dumps(index, indent=2) + "\n")


def _rewrite_file(source: Path, target: Path, shrink: int, make: Make) -> None:
    """One safetensors file: 8 bytes of header length, a JSON header, the tensors one after another."""
    entries, metadata, start = header(source)
    placed: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    text = json.dumps({**placed, **_placed(entries, shrink)}).encode()
    text += b" " * (-len(text) % 8)
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            old.seek(start + begin)
            if PROJECTION.search(name):
                stored = torch.frombuffer(bytearray(old.read(end - begin)), dtype=STORED[entry["dtype"]])
                made = make(name, stored.reshape(entry["shape"])).contiguous().reshape(-1)
                new.write(made.view(torch.uint8).numpy().tobytes())
            else:
                _pass(old, new, end - begin)


def _placed(entries: Entries, shrink: int) -> Entries:
    """The same tensors with shorter key and value projections, and their new places."""
    placed: Entries = {}
    at = 0
    for name, entry in entries.items():
        by = shrink if PROJECTION.search(name) else 1
        size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // by
        shape = [entry["shape"][0] // by, *entry["shape"][1:]] if by > 1 else entry["shape"]
        placed[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return placed


def _pass(old: IO[bytes], new: IO[bytes], size: int) -> None:
    while size:
        part = old.read(min(size, COPY_BYTES))
        if not part:
            raise OSError("a weight file ends early")
        new.write(part)
        size -= len(part)


def publish(aside: Path, folder: Path) -> None:
    """Sync every file, then rename; an older result gives way at the last moment."""
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
            _sync(path)
    _sync(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
