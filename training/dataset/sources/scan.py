"""Where in a text a credential or a personal datum can stand at all: one pass over its characters in numpy.

The rules of `secrets` and `personal` look at these places only, each at a bounded stretch of text, so that
redaction is linear in the text whatever the text holds. Offsets are of characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

BLOCK = 1 << 20                       # characters looked at together: bounds the memory of one file
LEFT, RIGHT = 48, 320                 # characters of a block's neighbours that it also sees
MIN_NAME, MIN_VALUE, MAX_VALUE = 10, 10, 256
NUMBER_DIGITS, NUMBER_WIDTH = 8, 12   # eight digits within twelve characters
QUAD_WIDTH = 8                        # most characters between the outer dots of an IPv4 address

_VALUE, _NAME, _DIGIT, _UPPER, _ALNUM, _HEX = 1, 2, 4, 8, 16, 32


def _flags() -> np.ndarray:
    """What each character is, as bits; a value is ended by white space, quotes, brackets and `,;=:$\\`."""
    flags = np.zeros(256, np.uint8)
    for code in range(33, 127):
        character = chr(code)
        flags[code] = (_VALUE * (character not in "\"'`<>(){}[],;=:$\\") | _NAME * (character in "_-.")
                       | (_NAME | _ALNUM) * character.isalnum() | _DIGIT * character.isdigit()
                       | _UPPER * character.isupper() | _HEX * (character in "0123456789abcdefABCDEF"))
    return flags


_FLAGS = _flags()
_TABLE = _FLAGS.tobytes()                            # tables of bytes.translate, which numpy's take is 10x
_ENDS_NAME = ((_FLAGS & _NAME) == 0).tobytes()       # slower than; truth values, one byte each
_IS_DIGIT = ((_FLAGS & _DIGIT) != 0).tobytes()


def opening_table(openings: Iterable[str]) -> np.ndarray:
    """Which hashes of four characters open a token; (2^18,) bool. Hashes may collide: rules check again."""
    table = np.zeros(1 << 18, bool)
    words = np.frombuffer("".join(openings).encode("latin-1"), np.uint8).reshape(-1, 4)
    table[_hash_of_four(*words.T)] = True
    return table


def _hash_of_four(*columns: np.ndarray) -> np.ndarray:
    first, second, third, fourth = (column.astype(np.uint32) for column in columns)
    word = first | second << np.uint32(8) | third << np.uint32(16) | fourth << np.uint32(24)
    return (word * np.uint32(0x9E3779B1)) >> np.uint32(14)      # Fibonacci hashing to 18 bits


@dataclass(frozen=True)
class Places:
    """Offsets to look at, each list ascending.

    openings: starts of words of 10 characters up that begin as a known token does · values: words of 10 to
    256 characters with a digit, and their ends · numbers: first of eight close digits · ibans: two capitals
    before two digits · ats: `@` between a word and a letter or digit · pluses: `+` before a digit · quads:
    first of three dots close to each other, between digits · groups: first colon of an address of the global
    IPv6 block (2000::/3).
    """

    openings: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    value_ends: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    ibans: list[int] = field(default_factory=list)
    ats: list[int] = field(default_factory=list)
    pluses: list[int] = field(default_factory=list)
    quads: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


def places(text: str, openings: np.ndarray) -> Places:
    """All places of the text; `openings` as from `opening_table`."""
    found = Places()
    for start in range(0, len(text), BLOCK):
        for name, offsets in _Block(text, start).places(openings):
            if len(offsets):
                getattr(found, name).extend((offsets + (start - LEFT)).tolist())
    return found


class _Block:
    """One block of the text, one byte a character; the character at `start` has index LEFT."""

    def __init__(self, text: str, start: int):
        left = max(start - LEFT, 0)
        piece = text[left:start + BLOCK + RIGHT].encode("latin-1", "replace")
        data = b" " * (LEFT - (start - left)) + piece + b" " * LEFT
        self.size = min(BLOCK, len(text) - start)
        self.data = np.frombuffer(data, np.uint8)
        self.flags = np.frombuffer(data.translate(_TABLE), np.uint8)
        self.name_ends = np.frombuffer(data.translate(_ENDS_NAME), bool).nonzero()[0]
        self.digits = np.frombuffer(data.translate(_IS_DIGIT), bool).nonzero()[0]

    def places(self, openings: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name in Places, offsets within this block)."""
        yield "openings", self._own(self._openings(openings))
        if len(self.digits):
            values, value_ends = self._values()
            yield "values", values
            yield "value_ends", value_ends
            yield "numbers", self._own(self._numbers())
            yield "ibans", self._own(self._ibans())
            yield "pluses", self._pluses()
            yield "quads", self._quads()
            yield "groups", self._groups()
        yield "ats", self._ats()

    def _own(self, offsets: np.ndarray) -> np.ndarray:
        return offsets[(offsets >= LEFT) & (offsets < LEFT + self.size)] if len(offsets) else offsets

    def _all(self, character: str, beyond: int = 0) -> np.ndarray:
        return LEFT + (self.data[LEFT:LEFT + self.size + beyond] == ord(character)).nonzero()[0]

    def _is(self, offsets: np.ndarray, flag: int) -> np.ndarray:
        return (self.flags[offsets] & flag) != 0

    def _ats(self) -> np.ndarray:
        offsets = self._all("@")
        return offsets[self._is(offsets - 1, _VALUE) & self._is(offsets + 1, _ALNUM)]

    def _openings(self, openings: np.ndarray) -> np.ndarray:
        ends = self.name_ends
        starts = ends[:-1][ends[1:] - ends[:-1] > MIN_NAME] + 1
        return starts[openings[_hash_of_four(*(self.data[starts + index] for index in range(4)))]]

    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        ends = self.name_ends[~self._is(self.name_ends, _VALUE)]
        lengths = ends[1:] - ends[:-1] - 1
        keep = ((lengths >= MIN_VALUE) & (lengths <= MAX_VALUE)).nonzero()[0]
        first, last = ends[keep] + 1, ends[keep + 1]
        keep = self.digits.searchsorted(last) > self.digits.searchsorted(first)
        keep &= (first >= LEFT) & (first < LEFT + self.size)
        return first[keep], last[keep]

    def _numbers(self) -> np.ndarray:
        digits = self.digits
        close = digits[NUMBER_DIGITS - 1:] - digits[:1 - NUMBER_DIGITS] < NUMBER_WIDTH
        starts = digits[:len(close)][close]
        return starts[~self._is(starts - 1, _NAME)]

    def _ibans(self) -> np.ndarray:
        starts = self.digits[:-1][self.digits[1:] - self.digits[:-1] == 1] - 2
        starts = starts[self._is(starts, _UPPER) & self._is(starts + 1, _UPPER)]
        return starts[~self._is(starts - 1, _ALNUM)]

    def _pluses(self) -> np.ndarray:
        offsets = self._all("+")
        return offsets[self._is(offsets + 1, _DIGIT) & ~self._is(offsets - 1, _NAME)]

    def _quads(self) -> np.ndarray:
        dots = self._all(".", QUAD_WIDTH)
        dots = dots[self._is(dots - 1, _DIGIT) & self._is(dots + 1, _DIGIT)]
        return self._own(dots[:-2][dots[2:] - dots[:-2] <= QUAD_WIDTH])

    def _groups(self) -> np.ndarray:
        offsets = self._all(":")
        first = self.data[offsets - 4]
        offsets = offsets[((first == ord("2")) | (first == ord("3"))) & ~self._is(offsets - 5, _NAME)]
        return offsets[self._is(offsets - 3, _HEX) & self._is(offsets - 2, _HEX)
                       & self._is(offsets - 1, _HEX)]
