"""Commits as training text: message and old text, then the patch that was made of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

import numpy as np

from training.dataset import split
from training.dataset.encoding import Text
from training.dataset.sources import secrets
from training.dataset.sources.history import Change, Commit
from training.dataset.sources.languages import of_name
from training.dataset.tokenizer import Coder

LINES_AROUND = 20             # of the old text, on either side of a hunk
MESSAGE_CHARACTERS = 2_000
MOST = 5_000                  # commits looked at, newest first
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@", re.MULTILINE)


@dataclass(kw_only=True)
class Accounts:
    """What became of the changes that history holds."""

    used: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    findings: list[secrets.Finding] = field(default_factory=list)


def excerpt(before: str, patch: str) -> str:
    """The old text's lines around the hunks of a patch, with `...` between far ones.

    >>> excerpt("\\n".join("abcdefgh"), "@@ -2,1 +2,1 @@\\n-b\\n+B\\n")
    'a\\nb\\nc\\nd\\ne\\nf\\ng\\nh'
    """
    lines = before.split("\n")
    wanted: set[int] = set()
    for found in _HUNK.finditer(patch):
        first, count = int(found[1]) - 1, int(found[2] or 1)
        wanted.update(range(max(0, first - LINES_AROUND), min(len(lines), first + count + LINES_AROUND)))
    out: list[str] = []
    previous = -1
    for number in sorted(wanted):
        if number > previous + 1:
            out.append("...")
        out.append(lines[number])
        previous = number
    return "\n".join(out)


def text_of(commit: Commit, change: Change, excerpted: bool = True) -> Text:
    """One file's change: the header is context, the patch the target."""
    said = commit.message[:MESSAGE_CHARACTERS].strip()
    message = "\n".join(f"# {line}".rstrip() for line in said.split("\n"))
    old = f"# path: {change.path}\n{excerpt(change.before, change.patch)}\n" if excerpted else ""
    language = of_name(change.path)
    return Text(path=f"commit:{commit.id[:12]}:{change.path}", language=language.name if language else "",
                kind="commit", header=f"# commit\n{message}\n{old}# patch: {change.path}\n",
                body=change.patch.rstrip("\n") + "\n")


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Which paths are trained on, which are held out, and the sketches of these (n, P)."""

    train: Set[str]
    held_out: Set[str]
    sketches: np.ndarray

    def allows(self, change: Change) -> bool:
        """Whether a change shows nothing of a held-out file, under its own name or an earlier one."""
        if change.path in self.held_out:
            return False
        return change.path in self.train or not split.is_near(split.sketch(change.before), self.sketches)


def chosen(commits: Iterable[Commit], sides: Sides, coder: Coder, limit_tokens: int,
           context_tokens: int, accounts: Accounts) -> Iterator[Text]:
    """Changes, newest first, until their patches have `limit_tokens`. A change of a held-out file is never
    used, nor one larger than a window."""
    for commit in commits:
        for change in commit.changes:
            if accounts.tokens >= limit_tokens:
                return
            if not sides.allows(change):
                accounts.skipped["held-out file"] += 1
                continue
            text = _fitting(commit, change, coder, context_tokens, accounts)
            if text is None:
                accounts.skipped["larger than a window"] += 1
                continue
            accounts.used += 1
            yield text


def _fitting(commit: Commit, change: Change, coder: Coder, context_tokens: int,
             accounts: Accounts) -> Text | None:
    for excerpted in (True, False):
        text, findings = _redacted(text_of(commit, change, excerpted))
        header, body = coder.encode([text.header, text.body])
        if len(header) + len(body) < context_tokens:
            accounts.tokens += len(body) + 1
            accounts.findings += findings
            return text
    return None


def _redacted(text: Text) -> tuple[Text, tuple[secrets.Finding, ...]]:
    header, in_header = secrets.redact(text.header, text.path)
    body, in_body = secrets.redact(text.body, text.path)
    return (Text(path=text.path, language=text.language, kind=text.kind, header=header, body=body),
            in_header + in_body)
