"""The dataset on disk: one token array, windows as lists of segments of it, and a manifest.

    tokens.bin                   token ids, uint16 or uint32, little-endian
    <split>_windows.npy  (W+1,)  int64: window i has segments [windows[i], windows[i+1])
    <split>_segments.npy (K, 3)  int64: start, length, trained (0 or 1)
    token_bytes.npy      (V,)    uint16: UTF-8 bytes of each token's text
    completions.json             spans of held-out files to complete
    tokenizer/                   loadable by transformers.AutoTokenizer
    manifest.json                counts, reasons, sizes and hashes; written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.dataset.documents import Segment
from training.errors import DataError, MissingInput
from training.rundir import read_data

FORMAT = 1
SPLITS = ("train", "held_out")
NO_LOSS = -100


class WindowStore:
    """Read access to a finished dataset folder. Windows are gathered from a memory map, nothing is held."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        about = manifest["store"]
        self.pad_id: int = about["pad_id"]
        self.eos_id: int = about["eos_id"]
        self.vocab_tokens: int = about["vocab_tokens"]
        self.context_tokens: int = about["context_tokens"]
        self.digest: str = manifest["digest"]
        self._tokens = np.memmap(path / "tokens.bin", dtype=about["dtype"], mode="r")
        self._token_bytes = np.load(path / "token_bytes.npy")
        self._windows = {split: np.load(path / f"{split}_windows.npy", mmap_mode="r") for split in SPLITS}
        self._segments = {split: np.load(path / f"{split}_segments.npy", mmap_mode="r") for split in SPLITS}

    @classmethod
    def open(cls, path: str | Path) -> WindowStore:
        """Open a dataset folder. Raises MissingInput when there is none, DataError when a file is torn."""
        folder = Path(path)
        if not (folder / "manifest.json").is_file():
            raise MissingInput(f"There is no dataset in {folder}: manifest.json is missing.")
        manifest = read_data(folder / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{folder / 'manifest.json'} is no dataset manifest of format {FORMAT}; "
                            "make it anew.")
        for name, size_bytes in manifest["store"]["files"].items():
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise DataError(f"The dataset in {folder} lacks {name}; make it anew.") from error
            if found != size_bytes:
                raise DataError(f"{folder / name} has {found:,} bytes, the manifest says {size_bytes:,}; "
                                "make the dataset anew.")
        return cls(folder, manifest)

    def count(self, split: str) -> int:
        """Windows of a split (`train` or `held_out`)."""
        return len(self._windows[split]) - 1

    def segments(self, split: str, index: int) -> np.ndarray:
        """Segments of a window, int64 (K, 3): start, length, trained."""
        bounds = self._windows[split]
        if not 0 <= index < len(bounds) - 1:
            raise IndexError(f"window {index} of {split}; there are {len(bounds) - 1}")
        return np.asarray(self._segments[split][bounds[index]:bounds[index + 1]])

    def window(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), int64 (S,) each. Labels are unshifted; -100 where there is no loss."""
        pieces, targets = [], []
        for start, length, trained in self.segments(split, index):
            ids = self._tokens[start:start + length].astype(np.int64)
            pieces.append(ids)
            targets.append(ids if trained else np.full(length, NO_LOSS, dtype=np.int64))
        return np.concatenate(pieces), np.concatenate(targets)

    def target_bytes(self, split: str, index: int) -> int:
        """UTF-8 bytes of the label tokens' text; tokens without text (end marks) count 0."""
        _, labels = self.window(split, index)
        return int(self._token_bytes[labels[labels != NO_LOSS]].sum(dtype=np.int64))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the train windows in one epoch: a pure function of (seed, epoch)."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        return generator.permutation(self.count("train"))

    def completions(self) -> list[dict[str, Any]]:
        """Spans to complete: path, language, prefix, middle, suffix, header, parses."""
        return list(read_data(self.path / "completions.json"))

    def verify(self) -> None:
        """Read everything once. Raises DataError when the content is not what the manifest's digest says."""
        found = content_digest(self.path, self.manifest["store"]["files"])
        if found != self.digest:
            raise DataError(f"The dataset in {self.path} was changed: its content hash is {found[:12]}, "
                            f"the manifest says {self.digest[:12]}. Make it anew.")


def content_digest(folder: Path, names: Mapping[str, int] | Sequence[str]) -> str:
    """sha256 over the named files, with their names, in sorted order."""
    state = hashlib.sha256()
    for name in sorted(names):
        with open(folder / name, "rb") as file:
            inner = hashlib.sha256()
            while block := file.read(1 << 20):
                inner.update(block)
        state.update(name.encode() + b"\0" + inner.digest())
    return state.hexdigest()


def write_tokens(folder: Path, ids: np.ndarray, vocab_tokens: int) -> str:
    """Write tokens.bin with the smallest type that holds the vocabulary; that type's name."""
    dtype = "<u2" if vocab_tokens <= 1 << 16 else "<u4"
    ids.astype(dtype).tofile(folder / "tokens.bin")
    return dtype


def write_windows(folder: Path, split: str, windows: Sequence[Sequence[Segment]]) -> None:
    """Write the index of one split."""
    bounds = np.zeros(len(windows) + 1, dtype=np.int64)
    np.cumsum([len(window) for window in windows], out=bounds[1:])
    flat = [segment for window in windows for segment in window]
    np.save(folder / f"{split}_windows.npy", bounds)
    np.save(folder / f"{split}_segments.npy", np.array(flat, dtype=np.int64).reshape(-1, 3))


def write_json(path: Path, data: Any) -> None:
    """JSON with sorted keys, so that equal data are equal bytes."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
                    encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file below a folder but the manifest, by relative name: bytes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"}
