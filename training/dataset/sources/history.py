"""Commits as edits: message, old text and patch of each file; and when each file was added.

git's CLI reads: `git log --raw` names what changed, `git diff-tree --stdin` prints the patches of the commits
that were chosen, `git cat-file --batch` gives the old texts. One commit is in memory.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.dataset.sources import gitlog, reasons
from training.dataset.sources.checkout import LIST_TIMEOUT_S, git_place, run_git
from training.dataset.sources.checkout import is_repository as is_repository
from training.dataset.sources.filters import MAX_LINE_CHARACTERS, verdict_on_name, verdict_on_text
from training.dataset.sources.gitlog import Entry, Git, Head
from training.dataset.sources.languages import Language, of_name, of_shebang
from training.dataset.sources.reasons import printable
from training.dataset.sources.texts import decode

_REGULAR = (b"100644", b"100755")
_SUBMODULE = b"160000"
_TRAILER = re.compile(r"^(?:[A-Z][\w-]*-by|Change-Id|Reviewed-on|Cc|CC|git-svn-id): .*(?:\n|\Z)",
                      re.MULTILINE)
# A line of a patch that ends in a line feed alone, and not because the file ends there.
_LINE_FEED = re.compile(r"^[ +-](?:.*[^\r\n])?\n(?!\\)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One file's edit. `before`: its old text, "" for a new file; `patch`: unified hunks, 3 lines of context.

    Line ends are `\\n`; the hunks' line numbers count `before`'s lines.
    """

    path: str
    before: str
    patch: str


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One commit's message (without trailers) and edits. `time`: of the commit, seconds since 1970."""

    id: str
    time: int
    message: str
    changes: tuple[Change, ...]


def count(root: Path) -> int:
    """Commits that can be read here: no merges, nor a shallow clone's oldest; 0 without git.

    Below a repository's root these are the commits of the whole repository.
    """
    place = git_place(root)
    if place is None:
        return 0
    answer = run_git(["rev-list", "--count", "--no-merges", "HEAD"], root, LIST_TIMEOUT_S)
    found = answer.stdout.strip()
    return max(0, int(found) - len(_boundary(root))) if found.isdigit() else 0


def _boundary(root: Path) -> frozenset[str]:
    """The oldest commits of a shallow clone: git shows them as if they had added every file."""
    answer = run_git(["rev-parse", "--git-path", "shallow"], root, LIST_TIMEOUT_S)
    try:
        return frozenset(Path(root, os.fsdecode(answer.stdout.rstrip(b"\n"))).read_text("ascii").split())
    except (OSError, ValueError):
        return frozenset()


def created(root: Path) -> dict[str, int]:
    """Path (as `SourceFile.path`) -> time of the commit that added it, seconds; renames are followed.

    In a shallow clone, files older than its oldest commit carry that commit's time. Holds files that are gone
    as well. Empty without git.
    """
    times: dict[str, int] = {}
    newest: dict[bytes, bytes] = {}     # an older name of a file -> its newest
    try:
        with Git(root) as git:
            log = git.start(gitlog.LOG, "--diff-filter=AR", "--format=tformat:@%H %ct", "HEAD", "--")
            for head in gitlog.heads(log, None):
                git.alive()
                for entry in head.entries or ():
                    _date(entry, head.time, newest, times)
    except EOFError:
        return times
    return times


def _date(entry: Entry, time_s: int, newest: dict[bytes, bytes], times: dict[str, int]) -> None:
    name = newest.pop(entry.path, entry.path)
    path = printable(os.fsdecode(name))
    if path not in times and entry.status == b"R":
        newest[entry.source] = name
    elif path not in times:
        times[path] = time_s


def commits(root: Path, limit: int, skipped: Counter[str] | None = None) -> Iterator[Commit]:
    """At most `limit` commits that hold an edit to train on, newest first, merges left out.

    `skipped` counts what was left out by reason, files and whole commits alike. Close the iterator, or read
    it to its end: three git processes live with it.
    """
    skipped = Counter() if skipped is None else skipped
    if limit <= 0 or not count(root):
        return
    boundary = _boundary(root)
    try:
        with Git(root) as git:
            log = git.start(gitlog.LOG, "--format=tformat:@%H %ct%n%B", "HEAD", "--")
            streams = git.start(gitlog.PATCHES), git.start(gitlog.BLOBS)
            for head in gitlog.heads(log, gitlog.MAX_CHANGED_FILES):
                git.alive()
                commit = _commit(head, boundary, streams, skipped)
                if isinstance(commit, str):
                    skipped[commit] += 1
                    continue
                git.paused()
                yield commit
                git.alive()
                limit -= 1
                if not limit:
                    return
    except EOFError:
        skipped[reasons.UNFINISHED] += 1


_Streams = tuple["subprocess.Popen[bytes]", "subprocess.Popen[bytes]"]


def _commit(head: Head, boundary: frozenset[str], streams: _Streams, skipped: Counter[str]) -> Commit | str:
    """The commit with the changes that are left of it, or the reason to leave it out."""
    if head.id in boundary:
        return reasons.BOUNDARY
    if head.entries is None:
        return gitlog.TOO_MANY
    changes = tuple(_changes(head, streams, skipped))
    if not changes:
        return reasons.NOTHING_LEFT
    message = _TRAILER.sub("", head.message.decode("utf-8", "replace").replace("\r\n", "\n")).strip()
    return Commit(id=head.id, time=head.time, message=message, changes=changes)


def _changes(head: Head, streams: _Streams, skipped: Counter[str]) -> Iterator[Change]:
    wanted = []
    for entry in head.entries or ():
        if reason := _verdict_on_entry(entry):
            skipped[reason] += 1
        else:
            wanted.append(entry)
    hunks = gitlog.patches(streams[0], head.id) if wanted else {}
    for entry in wanted:
        found = _change(entry, hunks.get((entry.old, entry.new), reasons.NO_TEXT_CHANGED), streams[1])
        if isinstance(found, str):
            skipped[found] += 1
        else:
            yield found


def _verdict_on_entry(entry: Entry) -> str:
    """The reason to leave a change out by its modes and its path alone, or an empty string."""
    modes = entry.old_mode, entry.new_mode
    if entry.status == b"D":
        return reasons.DELETED
    if modes[1] not in _REGULAR or modes[0] not in (*_REGULAR, gitlog.NO_FILE):
        return reasons.SUBMODULE if _SUBMODULE in modes else reasons.LINK
    if entry.old == entry.new:
        return reasons.NO_TEXT_CHANGED
    path = printable(os.fsdecode(entry.path))
    if reason := verdict_on_name(path):
        return reason
    told = of_name(path) is not None or "." not in path.rpartition("/")[2].lstrip(".")
    return "" if told else reasons.UNKNOWN


def _change(entry: Entry, hunks: gitlog.Hunks | str, blobs: subprocess.Popen[bytes]) -> Change | str:
    """The edit of one file, or the reason to leave it out. `hunks` as of `gitlog.patches`."""
    before = b"" if entry.old_mode == gitlog.NO_FILE else gitlog.blob(blobs, entry.old)
    if isinstance(hunks, str) or isinstance(before, str):
        return hunks if isinstance(hunks, str) else str(before)
    try:
        old, patch = before.decode("utf-8-sig"), hunks.decode("utf-8").replace("\ufeff", "")
    except UnicodeDecodeError:
        return decode(before)[1] or reasons.NOT_UTF8
    mixed = "\r\n" in patch and _LINE_FEED.search(patch)
    old, patch = old.replace("\r\n", "\n"), patch.replace("\r\n", "\n")
    if mixed or "\r" in old or "\r" in patch:
        return reasons.LINE_ENDS
    path = printable(os.fsdecode(entry.path))
    new = "".join(line[1:] + "\n" for line in patch.split("\n") if line.startswith("+"))
    language = of_name(path) or of_shebang((old or new)[:200].split("\n", 1)[0])
    if language is None or language.name == "notebook":
        return reasons.UNKNOWN
    return _verdict_on_change(old or new, patch, language) or Change(path=path, before=old, patch=patch)


def _verdict_on_change(text: str, patch: str, language: Language) -> str:
    if max(map(len, patch.split("\n"))) > MAX_LINE_CHARACTERS:
        return "long lines"
    if "\0" in text:
        return reasons.BINARY
    return verdict_on_text(text, language.kind) if text.strip() else ""
