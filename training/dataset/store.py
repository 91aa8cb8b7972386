"""The dataset on disk: one token array, windows as rows of a fixed index over it, and a manifest.

    tokens.bin                   token ids, uint16 or uint32, little-endian
    <split>_windows.bin  (W+1,)  int64: window i has the segments [windows[i], windows[i+1])
    <split>_segments.bin (K, 4)  int64: start, length, flags, lead (see `documents.Segment`)
    <split>_kinds.bin    (W,)    uint8: place in `KINDS`
    spans.bin            (N, 2)  int64: token spans of whole syntax nodes, ascending by start
    documents.bin        (D, 4)  int64: start, header, body (tokens), and the text's first byte in its file
    documents.json               path, language, kind and split of each of them
    token_bytes.npy      (V,)    uint16: UTF-8 bytes of each token's text
    ends_line.npy        (V,)    bool: the token's text ends in a line break
    completions.json             spans of held-out files to complete
    left_out.tsv                 reason and path of every file that is left out
    tokenizer/                   loadable by transformers.AutoTokenizer
    manifest.json                counts, reasons, sizes and hashes; written last

What varies between epochs (middles, places of cuts) is drawn from sha256(seed, epoch, place), so a window
depends on nothing but its row, the seed and the epoch: not on workers, ranks, batch size or what came before.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.dataset import infill
from training.dataset.documents import TRAINED, Segment
from training.errors import DataError, MissingInput
from training.rundir import read_data

FORMAT = 2
SPLITS = ("train", "held_out", "curve")
KINDS = ("cross-file", "fim", "whole", "commit", "replay")
CURVE_KINDS = ("composed", "random", "foreign")
NO_LOSS = -100
TOKEN_TYPES = ("<u2", "<u4")     # of tokens.bin, as numpy writes them (writing.token_dtype)
SEGMENT_COLUMNS, DOCUMENT_COLUMNS = 4, 4


class Origin(NamedTuple):
    """Where a token comes from: file, and UTF-8 byte in its text as read (secrets replaced)."""

    path: str
    byte: int


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
        self._varying = infill.Varying(eos_id=self.eos_id, fim=about.get("fim", {}),
                                       fim_rate=about.get("fim_rate", 0.0),
                                       move_tokens=about.get("move_tokens", 0),
                                       order=about.get("fim_order", "psm"))
        self._tokens = _mapped(path / "tokens.bin", about["dtype"])
        self._stamps = {name: _stamp(path / name) for name in ("tokens.bin", *(
            f"{split}_{part}.bin" for split in SPLITS for part in ("windows", "segments")))}
        self._token_bytes = np.load(path / "token_bytes.npy")
        self._ends_line = np.load(path / "ends_line.npy")
        self._spans = _mapped(path / "spans.bin", np.int64, 2)
        self._windows = {split: _mapped(path / f"{split}_windows.bin", np.int64) for split in SPLITS}
        self._segments = {split: _mapped(path / f"{split}_segments.bin", np.int64, SEGMENT_COLUMNS)
                          for split in SPLITS}

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
        if manifest["store"].get("dtype") not in TOKEN_TYPES:  # another one could be read as pointers
            raise DataError(f"{folder / 'manifest.json'} names a type of tokens that is none; make it anew.")
        for name, size_bytes in manifest["store"]["files"].items():
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise DataError(f"The dataset in {folder} lacks {name}; make it anew.") from error
            if found != size_bytes:
                raise DataError(f"{folder / name} has {found:,} bytes, the manifest says {size_bytes:,}; "
                                "make the dataset anew.")
        try:
            return cls(folder, manifest)
        except ValueError as error:  # numpy's, for a header that is none or would be unpickled
            raise DataError(f"The dataset in {folder} cannot be read: {error}; make it anew.") from error

    def count(self, split: str) -> int:
        """Windows of a split (`train`, `held_out` or `curve`)."""
        return max(0, len(self._windows[split]) - 1)

    def kind(self, index: int) -> str:
        """Which of `KINDS` a train window is."""
        return KINDS[int(_mapped(self.path / "train_kinds.bin", np.uint8)[index])]

    def segments(self, split: str, index: int, seed: int = 0, epoch: int = 0,
                 context_limit: int | None = None) -> list[Segment]:
        """What a window is made of in an epoch, in order. A negative start stands for one token that is not
        of the array: -1 - id (a sentinel or an end mark).

        `context_limit`: only so many of the context's nearest tokens stay before the first target's own
        text; None: all. Raises IndexError.
        """
        bounds = self._windows[split]
        if not 0 <= index < len(bounds) - 1:
            raise IndexError(f"window {index} of {split}; there are {len(bounds) - 1}")
        rows = [Segment(*map(int, row)) for row in self._segments[split][bounds[index]:bounds[index + 1]]]
        if context_limit is not None:
            rows = infill.nearest(rows, context_limit)
        return infill.varied(rows, self._varying, self, f"{seed}\0{epoch}")

    def window(self, split: str, index: int, seed: int = 0, epoch: int = 0,
               context_limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), int64 (S,) each. Labels are unshifted; -100 where there is no loss."""
        parts = self.segments(split, index, seed, epoch, context_limit)
        ids = np.empty(sum(part.length for part in parts), dtype=np.int64)
        labels = np.full(len(ids), NO_LOSS, dtype=np.int64)
        place = 0
        for part in parts:
            here = slice(place, place + part.length)
            ids[here] = self.tokens(part.start, part.length) if part.start >= 0 else -1 - part.start
            if part.trained:
                labels[here] = ids[here]
            place += part.length
        return ids, labels

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Stored ids from a place on, (length,), as they lie on disk."""
        return self._tokens[start:start + length]

    def line_ends(self, start: int, length: int) -> np.ndarray:
        """Whether each of these tokens ends a line, bool (length,)."""
        return np.asarray(self._ends_line[self.tokens(start, length)])

    def spans(self, start: int, end: int) -> np.ndarray:
        """Whole syntax nodes within [start, end), int64 (N, 2)."""
        first, last = np.searchsorted(self._spans[:, 0], [start, end]) if len(self._spans) else (0, 0)
        found = np.asarray(self._spans[first:last])
        return found[found[:, 1] <= end]

    def target_bytes(self, split: str, index: int) -> int:
        """UTF-8 bytes of the label tokens' text; tokens without text (end marks) count 0."""
        _, labels = self.window(split, index)
        return int(self._token_bytes[labels[labels != NO_LOSS]].sum(dtype=np.int64))

    @functools.lru_cache(maxsize=4)  # noqa: B019  a store lives as long as its process
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the train windows in one epoch: a pure function of (seed, epoch)."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        return generator.permutation(self.count("train"))

    def state(self, seed: int, epoch: int, position: int) -> dict[str, int | str]:
        """All that continues a run at a window of an epoch: four values."""
        return {"seed": seed, "epoch": epoch, "position": position, "index": self.digest}

    def without_target(self, split: str) -> np.ndarray:
        """Windows of a split that hold no token to train on, (N,)."""
        bounds, rows = np.asarray(self._windows[split]), self._segments[split]
        if len(bounds) < 2:
            return np.empty(0, np.int64)
        trained = np.where(rows[:, 2] & TRAINED, rows[:, 1], 0)
        totals = np.concatenate([[0], np.cumsum(trained)])
        return np.flatnonzero(totals[bounds[1:]] == totals[bounds[:-1]])

    def origin(self, place: int) -> Origin | None:
        """The file and byte a stored token stands for; None for headers, skeletons and marks."""
        table = _mapped(self.path / "documents.bin", np.int64, DOCUMENT_COLUMNS)
        row = int(np.searchsorted(table[:, 0], place, side="right")) - 1
        if row < 0:
            return None
        start, header, body, first_byte = map(int, table[row])
        offset = place - start - header
        if not 0 <= offset < body:
            return None
        before = self.tokens(start + header, offset)
        size = int(self._token_bytes[before].sum(dtype=np.int64)) if len(before) else 0
        return Origin(self.documents()[row]["path"], first_byte + size)

    def documents(self) -> list[dict[str, Any]]:
        """Every file in the array, by place: path, language, kind, split."""
        return list(read_data(self.path / "documents.json"))

    def completions(self) -> list[dict[str, Any]]:
        """Spans to complete: path, language, prefix, middle, suffix, header, parses."""
        return list(read_data(self.path / "completions.json"))

    def curve(self) -> dict[str, Any]:
        """The context curve's items: kinds, items, paths and targets (tokens) per item, foreign (what that
        text is). Windows of split `curve` come in threes, in the order of `CURVE_KINDS`."""
        return dict(self.manifest.get("curve") or {"kinds": list(CURVE_KINDS), "items": 0, "paths": [],
                                                   "targets": [], "foreign": ""})

    def written_to(self) -> str:
        """The first of the mapped files that was written to since it was opened, or "". One that was replaced
        or removed was not: what is mapped is the old file."""
        for name, (inode, *facts) in self._stamps.items():
            found = _stamp(self.path / name)
            if found[0] == inode and list(found[1:]) != facts:
                return name
        return ""

    def verify(self) -> None:
        """Read everything once. Raises DataError when the content is not what the manifest's digest says."""
        found = content_digest(self.path, self.manifest["store"]["files"])
        if found != self.digest:
            raise DataError(f"The dataset in {self.path} was changed: its content hash is {found[:12]}, "
                            f"the manifest says {self.digest[:12]}. Make it anew.")


def _mapped(path: Path, dtype: Any, columns: int = 0) -> np.ndarray:
    """A binary file as a read-only array, (rows, columns) or flat; empty files cannot be mapped."""
    shape = (-1, columns) if columns else (-1,)
    if path.stat().st_size == 0:
        return np.empty((0, columns) if columns else 0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").reshape(shape)


def _stamp(path: Path) -> tuple[int, int, int]:
    """(inode, bytes, time of the last write in ns); zeros for a file that is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


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


def write_json(path: Path, data: Any) -> None:
    """JSON with sorted keys, so that equal data are equal bytes."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
                    encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file below a folder but the manifest, by relative name: bytes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"}
