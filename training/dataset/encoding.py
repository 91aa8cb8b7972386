"""Texts become tokens on disk, a batch at a time: headers, bodies, skeletons, and spans of whole nodes."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.dataset.corpus import Corpus, Entry, in_batches
from training.dataset.documents import Document, header_text
from training.dataset.tokenizer import BATCH_BYTES, Coder
from training.dataset.writing import RowWriter, TokenWriter

HEAD_LINES, HEAD_README_CHARACTERS = 400, 1_500
MIN_SPAN_TOKENS = 2
MAX_HEADER_SHARE = 4          # a header longer than a quarter of the window gives way to the end mark


@dataclass(frozen=True, kw_only=True)
class Text:
    """What becomes a document: untrained header, then body. `spans`: byte spans of the body (N, 2)."""

    path: str
    language: str
    kind: str
    header: str
    body: str
    skeleton: str = ""
    spans: np.ndarray | None = None
    byte: int = 0


class Encoder:
    """Writes tokens.bin, spans.bin and documents.bin in `folder`."""

    def __init__(self, coder: Coder, folder: Path, context_tokens: int):
        self.coder, self.context_tokens = coder, context_tokens
        self.tokens = TokenWriter(folder / "tokens.bin", coder.vocab_tokens)
        self.about: list[dict[str, Any]] = []
        self._spans, self._rows = RowWriter(folder / "spans.bin"), RowWriter(folder / "documents.bin")

    def close(self) -> None:
        """All three files are whole."""
        self.tokens.close()
        self._spans.__exit__(None, None, None)
        self._rows.__exit__(None, None, None)

    def files(self, corpus: Corpus, entries: Sequence[Entry], split: str, *, skeletons: bool, spans: bool,
              ended: bool = True) -> Iterable[Document]:
        """Encode files of the corpus. `ended`: an end mark closes each body; false where a file goes on."""
        for batch in in_batches(corpus, entries, BATCH_BYTES):
            yield from self.add([_text(corpus, entry, skeletons, spans) for entry in batch], split, ended)

    def add(self, texts: Sequence[Text], split: str, ended: bool = True) -> list[Document]:
        """Encode texts, each as one document."""
        encode = self.coder.encode
        headers, bodies = encode([text.header for text in texts]), encode([text.body for text in texts])
        skeletons = encode([text.skeleton for text in texts])
        return [self._document(text, (header, body, skeleton), split, ended)
                for text, header, body, skeleton in zip(texts, headers, bodies, skeletons, strict=True)]

    def _document(self, text: Text, ids: tuple[np.ndarray, np.ndarray, np.ndarray], split: str,
                  ended: bool) -> Document:
        header, body, skeleton = ids
        mark = [self.coder.eos_id]
        if len(header) > max(1, self.context_tokens // MAX_HEADER_SHARE) and text.kind != "commit":
            header = np.array(mark)
        header = header if len(header) else np.array(mark)
        start = self.tokens.add(header)
        self.tokens.add(body)
        if ended:
            self.tokens.add(mark)
        self._keep_spans(text, body, start + len(header))
        self._rows.add([start, len(header), len(body) + ended, text.byte])
        self.about.append({"path": text.path, "language": text.language, "kind": text.kind, "split": split})
        place = self.tokens.add(skeleton) if len(skeleton) else 0
        return Document(path=text.path, language=text.language, kind=text.kind, start=start,
                        header=len(header), body=len(body) + ended, ended=ended, byte=text.byte,
                        skeleton=(place, len(skeleton)))

    def _keep_spans(self, text: Text, body: np.ndarray, start: int) -> None:
        if text.spans is None or not len(text.spans):
            return
        found = token_spans(text.spans, self.coder.token_bytes[body], len(text.body.encode("utf-8")))
        self._spans.add((found + start).ravel().tolist())

    def bare(self, text: str) -> tuple[int, int]:
        """(start, length) of a text that is no document: the repository's head, foreign context."""
        ids = self.coder.encode([text])[0]
        return self.tokens.add(ids), len(ids)


def _text(corpus: Corpus, entry: Entry, skeletons: bool, spans: bool) -> Text:
    code = entry.kind == "code"
    return Text(path=entry.path, language=entry.language, kind=entry.kind, header=header_text(entry.path),
                body=corpus.text(entry), skeleton=corpus.skeleton(entry) if skeletons and code else "",
                spans=corpus.spans(entry) if spans and code else None, byte=entry.byte)


def token_spans(spans: np.ndarray, token_bytes: np.ndarray, size: int) -> np.ndarray:
    """Byte spans (N, 2) as token spans, int64, ascending; none when the tokens do not add up to `size`.

    Blanks before a node and its line break often share a token with it: those tokens belong to it.

    >>> token_spans(np.array([[4, 7]]), np.array([3, 2, 2, 1]), 8).tolist()
    [[1, 3]]
    """
    edges = np.concatenate([[0], np.cumsum(token_bytes, dtype=np.int64)])
    if edges[-1] != size:
        return np.empty((0, 2), np.int64)
    found = np.stack([np.searchsorted(edges, spans[:, 0], side="right") - 1,
                      np.searchsorted(edges, spans[:, 1], side="left")], axis=1).astype(np.int64)
    return np.unique(found[found[:, 1] - found[:, 0] >= MIN_SPAN_TOKENS], axis=0)


def head_text(corpus: Corpus, name: str, entries: Sequence[Entry]) -> str:
    """The repository's name, the start of its README, and its files."""
    readmes = sorted((entry for entry in entries
                      if posixpath.basename(entry.path).lower().startswith("readme")),
                     key=lambda entry: (entry.path.count("/"), entry.path))
    readme = corpus.text(readmes[0])[:HEAD_README_CHARACTERS] + "\n" if readmes else ""
    paths = "\n".join(entry.path for entry in entries[:HEAD_LINES])
    return f"# repository: {name}\n{readme}{paths}\n"
