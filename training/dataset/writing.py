"""Writing the arrays of a dataset piece by piece, so that nothing of their size is held in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from training.dataset.documents import Segment
from training.dataset.store import KINDS

FLUSH_VALUES = 1 << 17


def token_dtype(vocab_tokens: int) -> str:
    """The smallest type that holds the vocabulary.

    >>> token_dtype(65_536), token_dtype(151_936)
    ('<u2', '<u4')
    """
    return "<u2" if vocab_tokens <= 1 << 16 else "<u4"


class TokenWriter:
    """Appends token ids to tokens.bin and says where each piece lies; `view` reads back what is written."""

    def __init__(self, path: Path, vocab_tokens: int):
        self.dtype = token_dtype(vocab_tokens)
        self.size = 0
        self._path = path
        self._file = open(path, "wb")   # noqa: SIM115  closed by `close`

    def add(self, ids: Sequence[int] | np.ndarray) -> int:
        """Append ids; their place."""
        start = self.size
        self._file.write(np.asarray(ids).astype(self.dtype).tobytes())
        self.size += len(ids)
        return start

    def view(self) -> np.ndarray:
        """Everything added so far, mapped read-only."""
        if not self._file.closed:
            self._file.flush()
        return np.memmap(self._path, dtype=self.dtype, mode="r") if self.size else np.empty(0, self.dtype)

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()


class RowWriter:
    """Appends rows of int64 to a binary file. A context manager."""

    def __init__(self, path: Path):
        self.values = 0
        self._file = open(path, "wb")   # noqa: SIM115  closed by `__exit__`
        self._kept = array("q")

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._flush()
        self._file.close()

    def add(self, values: Iterable[int]) -> None:
        """Append the values of one row or more."""
        before = len(self._kept)
        self._kept.extend(values)
        self.values += len(self._kept) - before
        if len(self._kept) >= FLUSH_VALUES:
            self._flush()

    def _flush(self) -> None:
        self._kept.tofile(self._file)
        self._kept = array("q")


class IndexWriter:
    """Appends windows of one split. A context manager."""

    def __init__(self, folder: Path, split: str):
        self._segments = RowWriter(folder / f"{split}_segments.bin")
        self._bounds = RowWriter(folder / f"{split}_windows.bin")
        self._kinds = open(folder / f"{split}_kinds.bin", "wb")   # noqa: SIM115  closed by `__exit__`
        self._rows = 0
        self._bounds.add([0])

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._segments.__exit__(kind, error, trace)
        self._bounds.__exit__(kind, error, trace)
        self._kinds.close()

    def add(self, segments: Sequence[Segment], kind: str = KINDS[0]) -> None:
        """Append one window."""
        for segment in segments:
            self._segments.add(segment)
        self._rows += len(segments)
        self._bounds.add([self._rows])
        self._kinds.write(bytes([KINDS.index(kind)]))


def write_windows(folder: Path, split: str, windows: Iterable[Sequence[Sequence[int]]]) -> None:
    """Write the index of one split at once. Segments are (start, length, flags) or have a lead too."""
    with IndexWriter(folder, split) as index:
        for window in windows:
            index.add([Segment(*segment) for segment in window])
