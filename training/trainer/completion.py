"""Greedy completion of held-out spans, and how close a completion comes to what stood there."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from training.errors import MissingInput
from training.trainer.loss import causal_lm, parts, verify_chunked

# A completion reads its own file only, so a longer prefix costs time and shows little more.
PREFIX_TOKENS = 2048
# Tokens of source code average 3 to 4 characters; this many characters hold PREFIX_TOKENS of them.
PREFIX_CHARACTERS = 8 * PREFIX_TOKENS
CONTEXT_OF_DECODING = 8


class Completer:
    """A model on `device` with its tokenizer. `room_tokens` bounds prefix and completion together."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, device: torch.device, room_tokens: int,
                 completion_tokens: int):
        self._model = model
        self._device = device
        self._tokenizer = tokenizer
        self._limit = max(1, min(completion_tokens, room_tokens - 1))
        self._prefix = min(PREFIX_TOKENS, room_tokens - self._limit)
        self._ends = end_tokens(causal_lm(model))

    def complete(self, prefix: str, lines: int) -> str:
        """At most `lines` lines, or tokens up to the limit, that the model puts after `prefix`."""
        text = prefix[-PREFIX_CHARACTERS:]
        before = self._tokenizer.encode(text, add_special_tokens=False).ids[-self._prefix:]
        if not before:
            return ""
        # Decoded together with the last tokens of the prefix: some decoders drop a leading space.
        shared = before[-CONTEXT_OF_DECODING:]
        skipped = len(self._tokenizer.decode(shared, skip_special_tokens=True))

        def text_of(ids: list[int]) -> str:
            return self._tokenizer.decode(shared + ids, skip_special_tokens=True)[skipped:]

        ids = greedy(self._model, torch.tensor([before], device=self._device), self._limit,
                     lambda ids: ids[-1] in self._ends or text_of(ids).count("\n") >= lines)
        return first_lines(text_of([token for token in ids if token not in self._ends]), lines)


def open_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a folder. Raises MissingInput when it is not there."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise MissingInput(f"The dataset has no tokenizer ({path}); make the dataset again.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # code that spells a special token is text, as in the windows
    tokenizer.no_truncation()
    return tokenizer


def end_tokens(model: Any) -> frozenset[int]:
    """The ids that end a text, of the generation settings or else of the configuration."""
    held = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    held = model.config.eos_token_id if held is None else held
    return frozenset(held if isinstance(held, list | tuple) else [] if held is None else [held])


@torch.no_grad()
def greedy(model: nn.Module, before: torch.Tensor, limit: int,
           stop: Callable[[list[int]], bool]) -> list[int]:
    """The most probable token after `before` (1, S), `limit` times or until `stop(tokens so far)`.

    Keys and values are cached; the head is computed for the last position only.
    """
    decoder, head = parts(model) if verify_chunked(model) else (causal_lm(model), None)
    fed, cache, made = before, None, list[int]()
    while len(made) < limit:
        output = decoder(input_ids=fed, past_key_values=cache, use_cache=True)
        logits = head(output.last_hidden_state[:, -1]) if head else output.logits[:, -1]
        cache, fed = output.past_key_values, logits.argmax(-1, keepdim=True)
        made.append(int(fed))
        if stop(made):
            break
    return made


def first_lines(text: str, lines: int) -> str:
    """The first `lines` lines, without the newline that ends the last.

    >>> first_lines("a = 1\\nb = 2\\nc", 2)
    'a = 1\\nb = 2'
    """
    return "\n".join(text.split("\n")[:lines])


def lines_of(middle: str) -> int:
    """Lines of an expected span, at least one."""
    return max(1, len(middle.splitlines()))


def score(expected: str, completion: str) -> tuple[bool, float]:
    """Whether both are the same but for white space at the end, and their edit similarity (0 to 1).

    The similarity is 1 - Levenshtein distance / longer length, as in CrossCodeEval (arXiv:2310.11248).

    >>> score("return x\\n", "return y")
    (False, 0.875)
    """
    expected, completion = expected.rstrip(), completion.rstrip()
    longer = max(len(expected), len(completion))
    return expected == completion, 1 - levenshtein(expected, completion) / longer if longer else 1.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b`, in len(a) x len(b) steps.

    >>> levenshtein("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def parses(span: Mapping[str, Any], completion: str) -> bool | None:
    """Whether Python text parses with the completion in the span's place.

    None for other languages, and where the text does not parse as it stands (`span["parses"]`).
    """
    if not span["parses"]:
        return None
    middle = span["middle"]
    text = span["prefix"] + completion.rstrip() + middle[len(middle.rstrip()):] + span["suffix"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
