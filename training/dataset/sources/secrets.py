"""Credentials and personal data in source text, replaced by typed placeholders; the value is never kept.

`scan` names the places where anything can stand; the rules of `secret_rules` and `personal` look there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from training.dataset.sources import personal
from training.dataset.sources.scan import Places, opening_table, places
from training.dataset.sources.secret_rules import (
    BARE,
    CONTEXTS,
    GENERIC,
    INSIDE,
    NOT_A_SECRET,
    SHAPES,
    TOKENS,
    URL_PASSWORD,
    Context,
    Token,
)

BEFORE = 96                   # characters before a value that may announce it
MIN_BARE = 16                 # characters of a value that stands without quotes
MIN_GENERIC_ENTROPY, MIN_URL_ENTROPY = 3.0, 2.5
MIN_PIECE = 10                # characters of a guessed value without a separator
NAME_CHARACTERS = 24          # of a name before the word that makes it a credential's
MIN_CHANGES = 0.45            # share of places where the class of character changes
_QUOTES, _OPERATORS = ("\"", "'", "`"), (":", "=", ">")
_LINE_ENDS = ("", "\n", " ", "\t", ";")
_WORD = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
KINDS = tuple(dict.fromkeys(["private-key", *(rule.name for rule in TOKENS),
                             *(name.replace("_", "-") for name in SHAPES.groupindex),
                             *(rule.name for rule in CONTEXTS), "url-password", "generic-secret",
                             "environment-secret"]))
_GATE = ("key", "secret", "token", "pass", "pwd", "cred", "auth", "sig=", "-u", "salt")
_EXAMPLES = re.compile(r"(?i)example|placeholder|change[_-]?me|dummy|your[_-]|my[_-]|xxxx|test|sample"
                       r"|redacted|passw|secret|abcdef|qwerty|12345678|\*\*\*|\.\.\.|[{}]|%(?:[sd(]|\d*\.\d*f)|^[$%]")
_WORDLIKE = re.compile(r"[A-Za-z]*\d{0,4}|\d+[A-Za-z]{0,3}")
_SEPARATORS = re.compile(r"[._/:\\,&=?-]+")
_TWO_DIGITS, _LETTER = re.compile(r"\d.*\d", re.DOTALL), re.compile(r"[A-Za-z]")
_CHANGES = re.compile(r"[A-Z](?=[^A-Z])|[a-z](?=[^a-z])|[0-9](?=[^0-9])|[^A-Za-z0-9](?=[A-Za-z0-9])")
_TO_QUOTE = re.compile(r"[^\s\"'`<>\\]{0,200}")
_FROM_QUOTE = re.compile(r"[^\s\"'`<>\\]{0,60}$")
_CODE = re.compile(r"\.(?:pyi?|[mc]?[jt]sx?|go|java|kt|rs|[ch]|cc|[ch]pp|cs|rb|php|swift|scala|lua|pl)$")
_BEGIN_KEY = re.compile(r"-----BEGIN[ A-Z0-9]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_BODY = re.compile(r"(?:[\sA-Za-z0-9+/=\\\"',.:;#*()]|-(?!-)){64,16000}")
_KEY_LINES = re.compile(r"(?:[\s\\nr\"'+,]{0,24}[A-Za-z0-9+/=]{40,100}){1,400}")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where a secret stood: path, 1-based line and rule. Never its value."""

    path: str
    line: int
    rule: str


Span = tuple[int, int, str]       # start, end, rule


def entropy(text: str) -> float:
    """Shannon entropy of the characters, bits each.

    >>> entropy("aabb")
    1.0
    """
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts) if text else 0.0


def looks_random(value: str) -> bool:
    """Whether a guessed credential is more than words, a path, an identifier or a documented example.

    Between separators stands one piece of 10 characters or more that is no word with a number after it, and
    it has two digits, or one and a mixture of cases.

    >>> looks_random("8fkQ0z7LmX2w"), looks_random("module.version-2024.tar")
    (True, False)
    """
    if _EXAMPLES.search(value) or not _LETTER.search(value):
        return False
    return any(len(piece) >= MIN_PIECE and not _WORDLIKE.fullmatch(piece)
               and (_TWO_DIGITS.search(value) is not None or is_mixed(piece))
               for piece in _SEPARATORS.split(value))


def is_mixed(value: str) -> bool:
    """Whether the class of character (capital, small, digit, other) changes at 45 % of the places or more.

    At random 62 % do; in names written in CamelCase about 30 %.

    >>> is_mixed("HcWZl8SAjKBLMQ"), is_mixed("HiggsAudioV2TokenizerModel")
    (True, False)
    """
    return len(_CHANGES.findall(value)) >= MIN_CHANGES * (len(value) - 1)


def placeholder(rule: str) -> str:
    """What stands in the text instead of the value.

    >>> placeholder("github-token"), placeholder("email")
    ('<secret:github-token>', '<personal:email>')
    """
    return f"<personal:{rule}>" if rule in personal.KINDS else f"<secret:{rule}>"


def redact(text: str, path: str) -> tuple[str, tuple[Finding, ...]]:
    """The text with each credential and personal datum replaced by its placeholder, and what was found.

    >>> redact("key = 'AKIA" "2E0A8F3B244C9986'", "a.py")[0]
    "key = '<secret:aws-access-key>'"
    """
    found = places(text, _OPENING_TABLE)
    spans = _without_overlaps([*_private_keys(text), *_tokens(text, found.openings),
                               *_url_passwords(text, found.ats), *_values(text, path, found),
                               *personal.find(text, found)])
    parts, findings, position, line = [], [], 0, 1
    for start, end, rule in spans:
        line += text.count("\n", position, start)
        findings.append(Finding(path=path, line=line, rule=rule))
        parts += [text[position:start], placeholder(rule)]
        line += text.count("\n", start, end)
        position = end
    return ("".join([*parts, text[position:]]) if spans else text), tuple(findings)


def _without_overlaps(spans: Iterable[Span]) -> list[Span]:
    """Sorted by place; of two that overlap the one named first stays."""
    ranked = list(spans)
    taken = bytearray(max((end for _, end, _ in ranked), default=0))
    kept = []
    for start, end, rule in ranked:
        if taken.find(1, start, end) < 0:
            taken[start:end] = b"\1" * (end - start)
            kept.append((start, end, rule))
    return sorted(kept)


def _private_keys(text: str) -> Iterator[Span]:
    """The body between the marks of a private key, or the base64 lines after a mark without an end."""
    if "PRIVATE KEY" not in text:
        return
    for begin in _BEGIN_KEY.finditer(text):
        body = _KEY_BODY.match(text, begin.end())
        if not (body and text.startswith("-----END", body.end())):
            body = _KEY_LINES.match(text, begin.end())
        if body and entropy(body[0]) >= 3.0:
            yield body.start(), body.end(), "private-key"


def _openings(rules: Iterable[Token]) -> dict[str, list[Token]]:
    """Rules by the first four characters of their tokens; an opening of three is followed by any."""
    by_opening: dict[str, list[Token]] = {}
    for rule in rules:
        for opening in rule.openings:
            for four in {(opening + other)[:4] for other in _WORD}:
                by_opening.setdefault(four, []).append(rule)
    return by_opening


_BY_OPENING = _openings(TOKENS)
_OPENING_TABLE = opening_table(_BY_OPENING)


def _tokens(text: str, starts: Iterable[int]) -> Iterator[Span]:
    for start in starts:
        for rule in _BY_OPENING.get(text[start:start + 4], ()):
            match = rule.pattern.match(text, start)
            if match:
                first, last = match.span("secret" if "secret" in rule.pattern.groupindex else 0)
                if entropy(text[first:last]) >= rule.min_entropy:
                    yield first, last, rule.name
                    break


def _url_passwords(text: str, ats: Iterable[int]) -> Iterator[Span]:
    for at in ats:
        match = URL_PASSWORD.search(text, max(at - 200, 0), at)
        if match and entropy(match["secret"]) >= MIN_URL_ENTROPY and _is_password(match["secret"]):
            yield *match.span("secret"), "url-password"


def _is_password(value: str) -> bool:
    """Of a URL: eight mixed characters do."""
    return looks_random(value) or (len(value) >= 8 and is_mixed(value) and not _EXAMPLES.search(value))


def _values(text: str, path: str, found: Places) -> Iterator[Span]:
    for start, end in zip(found.values, found.value_ends, strict=True):
        if not _LETTER.search(text, start, end) or text.startswith("//", start):
            continue
        shape = SHAPES.fullmatch(text, start, end)
        if shape:
            yield start, end, str(shape.lastgroup).replace("_", "-")
            continue
        before = text[max(start - BEFORE, 0):start]
        lowered = before.lower()
        if before[-1:] == ":" or any(word in lowered for word in _GATE):
            span = _announced(text, start, end, before, lowered) or _generic(text, path, start, end, before)
            if span:
                yield span


def _announced(text: str, start: int, end: int, before: str, lowered: str) -> Span | None:
    """The value of a header, an address, a connection string ... whose form is known."""
    end = _with_padding(text, end)
    for rule in CONTEXTS:
        if any(word in lowered for word in rule.keywords):
            match = rule.value.fullmatch(text, start, end)
            if match and rule.before.search(before):
                first, last = match.span("secret" if "secret" in rule.value.groupindex else 0)
                if _is_secret(rule, text[first:last]):
                    return first, last, rule.name
    return None


def _with_padding(text: str, end: int) -> int:
    """`=` ends a word, but up to two belong to base64."""
    return end + len(text[end:end + 2]) - len(text[end:end + 2].lstrip("="))


def _is_secret(rule: Context, value: str) -> bool:
    return entropy(value) >= rule.min_entropy and (not rule.guess or looks_random(value))


def _generic(text: str, path: str, start: int, end: int, before: str) -> Span | None:
    """A random value behind a name that says key, token, password ...: quoted, or alone on its line."""
    shift = len(_FROM_QUOTE.search(before)[0])  # type: ignore[index]
    right = _TO_QUOTE.match(text, end).end()  # type: ignore[union-attr]
    quoted = before[:len(before) - shift]
    if quoted[-1:] in _QUOTES and text[right:right + 1] == quoted[-1:] and _named(GENERIC, quoted):
        return _judged(text, start - shift, right, "generic-secret")
    end = _with_padding(text, end)
    if before.rstrip(" \t")[-1:] not in _OPERATORS and "-" not in before:
        return None
    if _named(INSIDE, before):
        return _judged(text, start, end, "generic-secret")
    if text[end:end + 1] not in _LINE_ENDS or end - start < MIN_BARE or not _named(BARE, before):
        return None
    is_name = not _CODE.search(path) or before[before.rfind("\n") + 1:].replace("export", "").isupper()
    return _judged(text, start, end, "environment-secret") if is_name else None


def _named(pattern: re.Pattern[str], before: str) -> bool:
    """Whether the text before a value ends with a name that announces a credential."""
    lowered = before.lower()
    match = pattern.search(lowered)
    return match is not None and not NOT_A_SECRET.search(lowered, max(match.start() - NAME_CHARACTERS, 0))


def _judged(text: str, start: int, end: int, rule: str) -> Span | None:
    value = text[start:end]
    return (start, end, rule) if entropy(value) >= MIN_GENERIC_ENTROPY and looks_random(value) else None
