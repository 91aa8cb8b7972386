"""One pass over the files of all repositories: read, redact, analyse; texts go to a file, facts stay.

At any moment one batch of files is in memory; what stays of a file is an `Entry` of about a kilobyte.
"""

from __future__ import annotations

import builtins
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from training.dataset import split
from training.dataset.sources import personal, secrets
from training.dataset.sources.repository import Counts, Dropped, Listing, SourceFile, read_all
from training.dataset.structure.syntax import Import, Structure, analyse

WORDS = 32                    # identifiers that stand for a file
EXAMPLES = 3                  # paths shown per reason
FINDINGS_KEPT = 1_000         # listed in the manifest; all are counted
_WORD = re.compile(r"[A-Za-z_]\w{3,}")
Told = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One repository: what the user named, its listing, what stands before its paths, and its commit."""

    named: str
    listing: Listing
    prefix: str = ""
    commit: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of one text. `words` (32,) uint32: the lowest hashes of its identifiers, 0 fills up."""

    text: bytes
    sketch: np.ndarray
    words: np.ndarray
    structure: Structure
    findings: Sequence[secrets.Finding]


@dataclass(kw_only=True, slots=True)
class Entry:
    """One accepted file: where its text, spans and skeleton lie in the spool, and what it says of itself.

    `created`: commit time in seconds, None where history does not know it. `byte`: where in the file the
    text begins.
    """

    path: str
    language: str
    kind: str
    bytes: int
    digest: builtins.bytes
    place: int
    spans: tuple[int, int]
    skeleton: tuple[int, int]
    sketch: np.ndarray
    words: np.ndarray
    structure_imports: tuple[Import, ...] = ()
    defines: tuple[str, ...] = ()
    package: str = ""
    created: int | None = None
    byte: int = 0


class Spool:
    """Bytes appended to a file and read back by place."""

    def __init__(self, path: Path):
        self._file = open(path, "w+b")   # noqa: SIM115  closed by `close`
        self._size = 0

    def add(self, data: bytes) -> int:
        """Append; the place."""
        place = self._size
        self._file.seek(place)
        self._file.write(data)
        self._size += len(data)
        return place

    def read(self, place: int, size: int) -> bytes:
        """Bytes from a place on."""
        self._file.seek(place)
        return self._file.read(size)

    def close(self) -> None:
        """Nothing more is read."""
        self._file.close()


@dataclass(kw_only=True)
class Corpus:
    """All accepted files of all repositories, in the order of their paths, and what became of the others.

    `left_out`: where each of these is listed with its reason.
    """

    spool: Spool
    entries: list[Entry] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    findings: list[secrets.Finding] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    state: Any = field(default_factory=hashlib.sha256)
    left_out: IO[str] | None = None

    def counts(self) -> Counts:
        """How many files were accepted and dropped."""
        return Counts(accepted=len(self.entries), code=sum(entry.kind == "code" for entry in self.entries),
                      text_bytes=sum(entry.bytes for entry in self.entries), dropped=Counter(self.dropped))

    def drop(self, path: str, reason: str) -> None:
        """Count a file that is left out, and list it."""
        self.dropped[reason] += 1
        if self.left_out is not None:
            self.left_out.write(f"{reason}\t{path}\n")
        if len(paths := self.examples.setdefault(reason, [])) < EXAMPLES:
            paths.append(path)

    def note(self, findings: Sequence[secrets.Finding]) -> None:
        """Count what was replaced; the places of secrets are kept, those of personal data are many."""
        self.rules.update(finding.rule for finding in findings)
        secret = [finding for finding in findings if finding.rule not in personal.KINDS]
        self.findings += secret[:max(0, FINDINGS_KEPT - len(self.findings))]

    def text(self, entry: Entry) -> str:
        """A file's text, secrets replaced."""
        return self.spool.read(entry.place, entry.bytes).decode("utf-8")

    def spans(self, entry: Entry) -> np.ndarray:
        """Byte spans of whole syntax nodes in the text, int32 (N, 2)."""
        place, count = entry.spans
        return np.frombuffer(self.spool.read(place, 8 * count), dtype="<i4").reshape(-1, 2)

    def skeleton(self, entry: Entry) -> str:
        """Signatures and heads, or nothing."""
        return self.spool.read(*entry.skeleton).decode("utf-8")

    def source(self, entry: Entry) -> SourceFile:
        """The file with its text."""
        return SourceFile(path=entry.path, language=entry.language, kind=entry.kind, text=self.text(entry))


def read(corpus: Corpus, place: Place, max_file_bytes: int, created: Mapping[str, int], told: Told) -> None:
    """Add every file of a repository. `created`: path -> commit time; `told(files, bytes, path)`."""
    prefix = place.prefix
    for item in place.listing.dropped:
        corpus.drop(prefix + item.path, item.reason)
    size = 0
    for files, found in enumerate(read_all(place.listing, max_file_bytes), 1):
        digest = stamp(corpus.state, prefix, found)
        if isinstance(found, Dropped):
            corpus.drop(prefix + found.path, found.reason)
        else:
            size += len(found.text)
            if digest in corpus.seen:
                corpus.drop(prefix + found.path, "duplicate")
            else:
                corpus.seen.add(digest)
                add(corpus, found, digest, prefix, created.get(found.path))
        told(files, size, prefix + found.path)


def stamp(state: Any, prefix: str, found: SourceFile | Dropped) -> bytes:
    """Take one file into the hash of all that was read; the sha256 of its text, or of why it was dropped."""
    said = found.reason if isinstance(found, Dropped) else found.text
    digest = hashlib.sha256(said.encode("utf-8")).digest()
    state.update(f"{prefix}{found.path}\0".encode() + digest)
    return digest


class Texts(Sequence[str]):
    """The texts of entries, each read when it is asked for."""

    def __init__(self, corpus: Corpus, entries: Sequence[Entry]):
        self._corpus, self._entries = corpus, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return self._corpus.text(self._entries[index])


def add(corpus: Corpus, source: SourceFile, digest: bytes, prefix: str = "",
        created: int | None = None) -> Entry:
    """Put one file's text into the spool and its facts into the index."""
    facts = facts_of(source, prefix + source.path)
    corpus.note(facts.findings)
    spans = np.ascontiguousarray(facts.structure.spans, dtype="<i4")
    skeleton = facts.structure.skeleton.encode("utf-8")
    entry = Entry(path=prefix + source.path, language=source.language, kind=source.kind,
                  bytes=len(facts.text), digest=digest, place=corpus.spool.add(facts.text),
                  spans=(corpus.spool.add(spans.tobytes()), len(spans)),
                  skeleton=(corpus.spool.add(skeleton), len(skeleton)),
                  sketch=facts.sketch, words=facts.words,
                  structure_imports=facts.structure.imports, defines=facts.structure.defines,
                  package=facts.structure.package, created=created)
    corpus.entries.append(entry)
    return entry


def facts_of(source: SourceFile, path: str) -> Facts:
    """A file's text with secrets replaced, and what it says of itself."""
    text, findings = secrets.redact(source.text, path)
    return Facts(text=text.encode("utf-8"), sketch=split.sketch(text), words=words(text),
                 structure=analyse(text, source.language), findings=findings)


def words(text: str) -> np.ndarray:
    """The 32 lowest CRC-32 of the identifiers of a text, uint32 (32,), 0 fills up.

    >>> [int(count) for count in (words("alpha beta beta") > 0).sum(keepdims=True)]
    [2]
    """
    found = np.zeros(WORDS, dtype=np.uint32)
    hashes = sorted({zlib.crc32(word.encode()) for word in set(_WORD.findall(text))})[:WORDS]
    found[:len(hashes)] = hashes
    return found


def cut_in_two(corpus: Corpus, share: float) -> tuple[list[Entry], list[Entry]]:
    """The only file's first part to train on, and its last `share`: a line at least, or some characters."""
    source = corpus.source(corpus.entries[0])
    place = int(len(source.text) * (1 - share))
    place = source.text.rfind("\n", 0, place) + 1 or max(1, place)
    parts = [SourceFile(path=source.path, language=source.language, kind=source.kind, text=text)
             for text in (source.text[:place], source.text[place:])]
    first, second = (add(corpus, part, corpus.entries[0].digest) for part in parts)
    second.byte = first.bytes
    del corpus.entries[1:]
    return [first], [second]


def in_batches(corpus: Corpus, entries: Sequence[Entry], batch_bytes: int) -> Iterator[list[Entry]]:
    """Entries in order, so many at once that their text is about `batch_bytes`."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.bytes
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
