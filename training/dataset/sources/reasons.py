"""Why a file or a change is left out, in the words a manifest shows, and what a user can do about each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

IGNORED = "ignored by rule"
IGNORE_RULES = "ignore rules too large"
TOO_DEEP = "over 64 folders deep"
LINK = "symbolic link"
MISSING = "missing from the working tree"
NESTED = "nested repository"
SUBMODULE = "submodule"
IRREGULAR = "no regular file"
OUTSIDE = "outside the repository"
UNREADABLE = "unreadable"
CHANGED = "changed while it was read"
UNKNOWN = "unknown type"
BINARY = "binary"
NOT_UTF8 = "not UTF-8"
DUPLICATE = "duplicate"
BOUNDARY = "oldest commit of a shallow clone"
UNFINISHED = "history not read to its end"
DELETED = "deleted file"
NO_TEXT_CHANGED = "no text changed"
NOTHING_LEFT = "commit with no change left"
LINE_ENDS = "line ends of several kinds"


def over(limit_bytes: int) -> str:
    """The reason for a file over the size limit.

    >>> over(1 << 20)
    'over 1,048,576 bytes'
    """
    return f"over {limit_bytes:,} bytes"


_NUMBER = re.compile(r"\d[\d,]*")
_ADVICE = {
    IGNORED: "A .gitignore rule or a tool's own folder; `git add -f PATH` makes a file count.",
    IGNORE_RULES: "Shorten the folder's .gitignore: at most 256 KiB and 4,096 lines are read.",
    TOO_DEEP: "Give the inner folder as a repository of its own: `--set dataset.also='[DIR]'`.",
    LINK: "Links are never followed; give the folder it points to: `--set dataset.also='[DIR]'`.",
    MISSING: "git tracks it and the folder lacks it: `git checkout -- PATH`, or commit the deletion.",
    NESTED: "Give it as a repository of its own: `--set dataset.also='[DIR]'`.",
    SUBMODULE: "Give its folder or URL as a repository of its own: `--set dataset.also='[DIR]'`.",
    IRREGULAR: "A pipe, socket or device holds no source text; nothing to do.",
    OUTSIDE: "Its name leads out of the repository; `git fsck` shows what is wrong with the index.",
    UNREADABLE: "Give the user who runs this the right to read it: `chmod -R u+rX DIR`.",
    CHANGED: "Stop what writes it (a build, an editor) and run again.",
    UNKNOWN: "Its name and first line tell no known language; rename it if it is source text.",
    BINARY: "No text; nothing to do.",
    NOT_UTF8: "Convert it, `iconv -f LATIN1 -t UTF-8`, or declare its encoding in its first two lines.",
    DUPLICATE: "The same text is there under another path; nothing to do.",
    over(0): "Raise the limit: `--set dataset.max_file_bytes=BYTES`.",
    "empty": "It holds no text, or is a notebook without cells; nothing to do.",
    "generated": "A program wrote it; if not, take the mark out of its name or its first ten lines.",
    "vendored": "If this is your code, give its folder as a repository of its own: "
                "`--set dataset.also='[DIR]'`.",
    "minified": "Put the original beside it; minified text is not trained on.",
    "lock file": "A package manager wrote it; nothing to do.",
    "licence text": "The same in every repository; nothing to do.",
    "data over 64 KiB": "Data rather than settings; nothing to do.",
    "long lines": "Wrap them: no line over 1,000 characters, and 100 at most in the mean.",
    "under 25 % letters": "A table of numbers or symbols; nothing to do.",
    BOUNDARY: "Fetch the rest of the history: `git fetch --unshallow`.",
    UNFINISHED: "git stopped, or gave nothing for 60 s: `git fsck` tells why; what came before is used.",
    DELETED: "The change only takes text away; nothing to do.",
    NO_TEXT_CHANGED: "Renamed, or other mode bits; nothing to do.",
    NOTHING_LEFT: "Each of its changes was left out for a reason of its own; nothing to do.",
    LINE_ENDS: "The change mixes or rewrites line ends; nothing to do.",
    "commit over 64 files": "An import or a reformat rather than an edit; nothing to do.",
    "patch over 64 KiB": "An import or a reformat rather than an edit; nothing to do.",
    "file over 256 KiB": "The old text would not fit beside its patch; nothing to do.",
}
_BY_SHAPE = {_NUMBER.sub("N", reason): sentence for reason, sentence in _ADVICE.items()}


def advice(reason: str) -> str:
    """One sentence: what a user can do about files left out for this reason; "" for an unknown reason.

    >>> advice("over 2,097,152 bytes")
    'Raise the limit: `--set dataset.max_file_bytes=BYTES`.'
    """
    return _BY_SHAPE.get(_NUMBER.sub("N", reason), "")


def all_reasons() -> tuple[str, ...]:
    """Every reason that has an advice, with the default limits in it."""
    return tuple(_ADVICE)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """One file that is left out, and why. `path` as in `SourceFile`."""

    path: str
    reason: str


def printable(name: str) -> str:
    """A file name as one printable line: control characters and undecodable bytes are escaped.

    >>> printable("a\\nb/\\udcff.py")
    'a\\\\x0ab/\\\\xff.py'
    """
    name = name.replace(os.sep, "/") if os.sep != "/" else name
    if name.isascii() and name.isprintable():
        return name
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() if ord(char) > 0xff
                   else f"\\x{ord(char):02x}" for char in shown)
