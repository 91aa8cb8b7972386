"""What a repository holds: every file is seen once and ends accepted or dropped with a reason.

list -> read one file -> accept or drop. Nothing is executed, no symbolic link is followed, only regular files
are opened, and one file's text at a time is in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training.dataset.sources.filters import verdict_on_name, verdict_on_text
from training.dataset.sources.languages import of_name, of_shebang
from training.dataset.sources.listing import Listing as Listing
from training.dataset.sources.listing import list_repository as list_repository
from training.dataset.sources.opening import Root
from training.dataset.sources.reasons import DUPLICATE, IGNORED, UNKNOWN, UNREADABLE
from training.dataset.sources.reasons import Dropped as Dropped
from training.dataset.sources.reasons import advice as advice
from training.dataset.sources.reasons import printable as printable
from training.dataset.sources.texts import decode
from training.dataset.sources.texts import notebook_text as notebook_text
from training.errors import DataError
from training.settings import BY_NAME

DEFAULT_MAX_FILE_BYTES: int = BY_NAME["dataset.max_file_bytes"].default
MIN_REPOSITORY_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One accepted file. `path` is relative, with `/`, printable; line ends are `\\n`, no byte-order mark."""

    path: str
    language: str
    kind: str
    text: str

    @property
    def bytes(self) -> int:
        """Size of the text as UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8"))


@dataclass(kw_only=True)
class Counts:
    """Files accepted and dropped by number, without their text. `languages`: bytes of text by language."""

    accepted: int = 0
    code: int = 0
    text_bytes: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, found: SourceFile | Dropped) -> None:
        """Count one more file."""
        if isinstance(found, Dropped):
            self.dropped[found.reason] += 1
            return
        size = found.bytes
        self.accepted += 1
        self.code += found.kind == "code"
        self.text_bytes += size
        self.languages[found.language] += size

    @property
    def files(self) -> int:
        """Everything that was seen: accepted and dropped."""
        return self.accepted + self.dropped.total()

    @property
    def reasons(self) -> dict[str, int]:
        """How many files each reason dropped, most frequent first."""
        return dict(sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])))


def read_all(listing: Listing,
             max_file_bytes: int = DEFAULT_MAX_FILE_BYTES) -> Iterator[SourceFile | Dropped]:
    """Each of the listing's names as text or dropped, in order, one in memory at a time."""
    try:
        root = Root(listing.root)
    except OSError:
        yield from (Dropped(path=printable(name), reason=UNREADABLE) for name in listing.names)
        return
    with root:
        for name in listing.names:
            yield examine(root, name, max_file_bytes)


def examine(root: Root, name: str, max_file_bytes: int) -> SourceFile | Dropped:
    """One file as text, or why it is left out. `name` is relative to `root`, as the system spells it."""
    path = printable(name)
    found = _accepted(root, name, path, max_file_bytes)
    return Dropped(path=path, reason=found) if isinstance(found, str) else found


def _accepted(root: Root, name: str, path: str, max_file_bytes: int) -> SourceFile | str:
    """The file, or the reason to drop it."""
    if reason := verdict_on_name(path):
        return reason
    language = of_name(path)
    if language is None and "." in path.rpartition("/")[2].lstrip("."):
        return root.irregular(name) or UNKNOWN
    data = root.read(name, max_file_bytes)
    if isinstance(data, str):
        return data
    text, reason = decode(data)
    if reason:
        return reason
    language = language or of_shebang(text[:200].split("\n", 1)[0])
    if language is None:
        return UNKNOWN
    if language.name == "notebook":
        text = notebook_text(text)
    if reason := verdict_on_text(text, language.kind):
        return reason
    return SourceFile(path=path, language=language.name, kind=language.kind, text=text)


def unless_seen(found: SourceFile | Dropped, seen: set[bytes]) -> SourceFile | Dropped:
    """The file, or dropped where its very text was seen before; `seen` takes its hash."""
    if isinstance(found, SourceFile):
        digest = hashlib.sha256(found.text.encode("utf-8")).digest()
        if digest in seen:
            return Dropped(path=found.path, reason=DUPLICATE)
        seen.add(digest)
    return found


def check(root: Path | str, counts: Counts) -> None:
    """Raise DataError, with the reasons by count, when nothing or no code is left to train on."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.reasons.items())
    most = next((f" Most often left out as {reason}: {sentence}" for reason in counts.reasons
                 if (sentence := advice(reason)) and reason != IGNORED), "")
    if not counts.accepted and set(counts.dropped) <= {IGNORED}:
        raise DataError(f"The repository {root} is empty: no file to read"
                        + (f" ({reasons})." if reasons else "."))
    if not counts.code:
        docs = f"{counts.accepted:,} documents or settings and no code"
        raise DataError(f"The repository {root} holds no code to train on: {docs}"
                        + (f"; left out: {reasons}.{most}" if reasons else "."))
    if counts.text_bytes < MIN_REPOSITORY_BYTES:
        raise DataError(f"The repository {root} holds {counts.text_bytes} bytes of text; the least is "
                        f"{MIN_REPOSITORY_BYTES}" + (f" (left out: {reasons})." if reasons else "."))
