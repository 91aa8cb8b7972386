"""Text to token ids: a byte-level BPE trained on the repository, or the base model's own tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DataError, MissingInput

EOS, PAD = "<|endoftext|>", "<|pad|>"
EMBEDDED_FIM = {"prefix": "<|fim_prefix|>", "suffix": "<|fim_suffix|>", "middle": "<|fim_middle|>"}
SAMPLE_BYTES = 3 << 20        # a 3 MB sample trains in 1-2 s and costs 1-3 % more tokens than all of 29 MB
BATCH_BYTES = 1 << 20
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
           "vocab.json",
           "merges.txt", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class Coder:
    """A loaded tokenizer with what the windows need to know of it.

    `token_bytes` (V,): UTF-8 bytes of each token's text, 0 for special tokens. `ends_line` (V,): the text
    ends in a line break. `fim`: ids of the prefix, suffix and middle sentinels, or empty.
    """

    backend: Any
    eos_id: int
    pad_id: int
    fim: Mapping[str, int]
    token_bytes: np.ndarray
    ends_line: np.ndarray

    @property
    def vocab_tokens(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) per text. Text that spells a special token is read as plain text."""
        found: list[np.ndarray] = []
        batch: list[str] = []
        size = 0
        for text in (*texts, None):
            if text is None or size > BATCH_BYTES:
                found += [np.array(item.ids, dtype=np.int32)
                          for item in self.backend.encode_batch_fast(batch, add_special_tokens=False)]
                batch, size = [], 0
            if text is not None:
                batch.append(text)
                size += len(text)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))


def train_embedded(texts: Sequence[str], vocab_tokens: int, seed: int, folder: Path) -> Coder:
    """Train a byte-level BPE on a sample of `texts` and write it to `folder` in Hugging Face's layout.

    Every byte is a token, so any text round-trips. Few texts give fewer tokens than asked for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_tokens, special_tokens=[EOS, PAD, *EMBEDDED_FIM.values()],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  min_frequency=2,
                                  show_progress=False)
    backend.train_from_iterator(_sample(texts, seed), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": EOS,
                "pad_token": PAD,
                "unk_token": None, "model_max_length": 1 << 30, "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return open_folder(folder, EMBEDDED_FIM)


def _sample(texts: Sequence[str], seed: int) -> list[str]:
    """Texts in a seeded order until `SAMPLE_BYTES` characters; the last one is cut."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(texts))
    taken, size = [], 0
    for index in order:
        text = texts[index][:SAMPLE_BYTES - size]
        taken.append(text)
        size += len(text)
        if size >= SAMPLE_BYTES:
            break
    return taken


def load_base(location: str, revision: str, fim: Mapping[str, str], folder: Path) -> Coder:
    """Copy the tokenizer of a local folder or cached hub id to `folder`, and load it.

    Raises MissingInput when there is none on this machine, DataError when it cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in base_files(location, revision).items():
        shutil.copyfile(path, folder / name)
    if not (folder / "tokenizer.json").exists():
        _convert(location, revision, folder)
    return open_folder(folder, fim)


def base_files(location: str, revision: str) -> dict[str, Path]:
    """Tokenizer files of a base model on this machine, by name. Raises MissingInput when there is none."""
    if Path(location).is_dir():
        found = {name: Path(location) / name for name in _COPIED if (Path(location) / name).is_file()}
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = {name: try_to_load_from_cache(location, name, revision=revision or None) for name in _COPIED}
        found = {name: Path(path) for name, path in cached.items() if isinstance(path, str)}
    if not {"tokenizer.json", "vocab.json", "tokenizer.model"} & found.keys():
        raise MissingInput(f"The base model {location} has no tokenizer on this machine; "
                           "download it first or choose `--base-model embedded`.")
    return found


def digest_of(location: str, revision: str) -> str:
    """sha256 over the base's tokenizer files, to notice when they change."""
    state = hashlib.sha256()
    for name, path in sorted(base_files(location, revision).items()):
        state.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def _convert(location: str, revision: str, folder: Path) -> None:
    """Write tokenizer.json from an older layout, through Transformers."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(location, revision=revision or None, local_files_only=True,
                                               trust_remote_code=False)
        loaded.save_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"The tokenizer of {location} cannot be loaded: {reason}.") from error
    if not (folder / "tokenizer.json").exists():
        raise DataError(f"The tokenizer of {location} has no fast form (tokenizer.json); "
                        "choose another base model.")


def open_folder(folder: Path, fim: Mapping[str, str]) -> Coder:
    """Load a tokenizer folder; sentinels that are not single known tokens leave `fim` empty.

    Raises DataError when tokenizer.json is broken or no end-of-text token is known.
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:      # tokenizers raises bare Exception
        raise DataError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    eos = _special(folder, "eos_token")
    eos_id = backend.token_to_id(eos) if eos else None
    if eos_id is None:
        raise DataError(f"The tokenizer in {folder} names no end-of-text token "
                        "(eos_token in tokenizer_config.json).")
    pad = _special(folder, "pad_token")
    pad_id = backend.token_to_id(pad) if pad else None
    ids = {part: backend.token_to_id(fim[part]) if part in fim else None
           for part in ("prefix", "suffix", "middle")}
    known = {part: token for part, token in ids.items() if token is not None}
    token_bytes, ends_line = vocabulary_tables(backend.get_vocab(with_added_tokens=True), description)
    return Coder(backend=backend, eos_id=eos_id, pad_id=eos_id if pad_id is None else pad_id,
                 fim=known if len(set(known.values())) == 3 else {}, token_bytes=token_bytes,
                 ends_line=ends_line)


def _special(folder: Path, name: str) -> str:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = json.loads((folder / file).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    return ""


def vocabulary_tables(vocabulary: Mapping[str, int], description: Mapping[str, Any]) -> tuple[np.ndarray,
                                                                                              np.ndarray]:
    """(bytes of text per token id (V,), whether its text ends in a line break (V,)).

    In a byte-level vocabulary each character stands for one byte; in SentencePiece's, U+2581 is a space and
    `<0x0A>` one byte. Special tokens have no text.
    """
    size = max(vocabulary.values()) + 1
    token_bytes, ends_line = np.zeros(size, np.uint16), np.zeros(size, np.bool_)
    special = {item["id"]: item["special"] for item in description.get("added_tokens", ())}
    parts = json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
    byte_level = '"ByteLevel"' in parts
    for token, index in vocabulary.items():
        if special.get(index):
            continue
        if byte_level and index not in special:
            token_bytes[index], ends_line[index] = min(len(token), 65_535), token.endswith("Ċ")
        elif len(token) == 6 and token.startswith("<0x"):
            token_bytes[index], ends_line[index] = 1, token == "<0x0A>"
        else:
            text = token.replace("\u2581", " ")
            token_bytes[index] = min(len(text.encode("utf-8", "replace")), 65_535)
            ends_line[index] = text.endswith("\n")
    return token_bytes, ends_line
