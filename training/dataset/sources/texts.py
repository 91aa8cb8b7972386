"""From a file's bytes to text: UTF-8, or the encoding that the file itself declares; nothing is guessed.

A wrong guess would train on text nobody wrote: bytes that are not UTF-8 need a byte-order mark (UTF-16,
UTF-32) or a declaration in the first two lines (PEP 263, Emacs' and Vim's modelines, XML's `encoding=`).
"""

from __future__ import annotations

import codecs
import json
import re

from training.dataset.sources.reasons import BINARY, NOT_UTF8

MAX_CONTROL_SHARE = 0.01        # of the first 8 KiB; formfeed, tab, escape and line ends are not counted
_SNIFFED_BYTES = 8 << 10
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
          (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"^[^\n]*\n?[^\n]*?coding\s*[:=]\s*[\"']?([-\w.]+)")
# Text encodings only: Python's registry also holds transforms (zlib, rot13) and slow ones (idna, punycode).
_CODECS = re.compile(r"iso8859-\d+|cp\d+|koi8-\w|euc_\w+|shift_jis\w*|gb\w+|big5\w*|mac-\w+")
_CONTROL = bytes((*range(9), 11, *range(14, 27), *range(28, 32), 127))


def decode(data: bytes) -> tuple[str, str]:
    """(text, "") with `\\n` line ends and without byte-order mark, or ("", reason).

    >>> decode(b"\\xff\\xfea\\0\\r\\0\\n\\0"), decode(b"# coding: latin-1\\n\\xe9"), decode(b"\\xe9")
    (('a\\n', ''), ('# coding: latin-1\\né', ''), ('', 'not UTF-8'))
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not encoding and is_binary(data):
        return "", BINARY
    for name in (encoding,) if encoding else ("utf-8-sig", _declared(data)):
        try:
            text = with_line_ends(data.decode(name))
            return ("", BINARY) if "\0" in text else (text, "")
        except (UnicodeError, LookupError):
            continue
    return "", BINARY if encoding else NOT_UTF8


def with_line_ends(text: str) -> str:
    """The text with `\\n` for every `\\r\\n` and `\\r`."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def is_binary(data: bytes) -> bool:
    """Whether a NUL stands anywhere, or over 1 % of the first 8 KiB are control characters."""
    head = data[:_SNIFFED_BYTES]
    controls = len(head) - len(head.translate(None, _CONTROL))
    return controls > MAX_CONTROL_SHARE * len(head) or b"\0" in data


def _declared(data: bytes) -> str:
    """The name of the text encoding that the first two lines declare, or "" for none that is known."""
    found = _DECLARED.match(data[:400])
    try:
        name = codecs.lookup(found.group(1).decode("ascii", "replace")).name if found else ""
    except (LookupError, ValueError):
        return ""
    return name if _CODECS.fullmatch(name) else ""


def notebook_text(text: str) -> str:
    """A Jupyter notebook's cells as one script: prose as comments, no outputs; "" when it is none."""
    try:
        parts = [_cell(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    parts = [part for part in parts if part.strip()]
    # JSON can spell half a surrogate pair, which no UTF-8 can.
    script = with_line_ends("\n\n".join(parts)).encode("utf-8", "replace").decode("utf-8")
    return script + "\n" if parts else ""


def _cell(kind: str, source: str) -> str:
    if kind == "markdown":
        return "\n".join(f"# {line}".rstrip() for line in source.splitlines())
    return source.strip("\n") if kind == "code" else ""
