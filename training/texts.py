"""What may be shown of a text from outside: nothing that acts on a terminal or a page, and no login."""

from __future__ import annotations

import re
from typing import Any

# C0 and C1 controls but tabulators and line ends, the marks that reorder text (Trojan Source,
# CVE-2021-42574), and halves of surrogate pairs, which no stream can encode.
ACTING = ("[\x00-\x08\x0b-\x1f\x7f-\x9f]"
          "|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_ACTING = re.compile(ACTING)
_LOGIN = re.compile(r"(?<=://)[^/\s]*@")


def visible(text: Any) -> str:
    """A text with control and direction marks shown by number; line ends stay.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a<U+001B>[31mb<U+202E>c'
    """
    return _ACTING.sub(_number, str(text))


def in_one_line(text: Any) -> str:
    """The same, with line ends shown by number too: for names.

    >>> in_one_line("a\\nb")
    'a<U+000A>b'
    """
    return visible(text).replace("\n", "<U+000A>")


def _number(found: re.Match[str]) -> str:
    return f"<U+{ord(found[0]):04X}>"


def without_password(text: str) -> str:
    """A text whose URLs have no user and password.

    >>> without_password("https://me:token@example.org/a.git")
    'https://example.org/a.git'
    """
    return _LOGIN.sub("", text)
