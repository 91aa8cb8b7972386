"""A small dataset on disk, written with the store's own writers, for tests of the trainer."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from training.dataset import store as writers
from training.dataset import writing
from training.dataset.store import WindowStore

SPANS = [
    {"path": "a.py", "language": "python", "header": "# a.py\n", "parses": True,
     "prefix": "def add(a, b):\n", "middle": "    return a + b", "suffix": "\n\n"},
    {"path": "b.c", "language": "c", "header": "// b.c\n", "parses": None,
     "prefix": "int main(void)\n{\n", "middle": "    int x = 1;\n    return x;", "suffix": "\n}\n"},
    {"path": "c.py", "language": "python", "header": "# c.py\n", "parses": True,
     "prefix": "for i in range(3):\n", "middle": "    print(i)", "suffix": "\n"},
]


def make_store(folder: Path, tokenizer_from: Path, context_tokens: int = 96, windows: int = 12,
               target_tokens: int = 32, vocab_tokens: int | None = None) -> WindowStore:
    """A dataset of stdlib text: windows of `context_tokens` with the loss on their last `target_tokens`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tokenizer_from, folder / "tokenizer", dirs_exist_ok=True,
                    ignore=lambda _, names: [n for n in names if not n.startswith("tokenizer")])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text[:400_000]).ids[:2 * windows * context_tokens], dtype=np.int64)
    vocab_tokens = vocab_tokens or tokenizer.get_vocab_size()
    tokens = writing.TokenWriter(folder / "tokens.bin", vocab_tokens)
    tokens.add(ids)
    tokens.close()
    texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    np.save(folder / "token_bytes.npy", np.array([len(text.encode()) for text in texts], dtype=np.uint16))
    np.save(folder / "ends_line.npy", np.array([text.endswith("\n") for text in texts]))
    for name in ("spans.bin", "documents.bin"):
        (folder / name).write_bytes(b"")
    writers.write_json(folder / "documents.json", [])
    head = context_tokens - target_tokens
    writing.write_windows(folder, "curve", [])
    for part, split in enumerate(("train", "held_out")):
        starts = [(part * windows + i) * context_tokens for i in range(windows)]
        writing.write_windows(folder, split, [[(s, head, 0), (s + head, target_tokens, 1)] for s in starts])
    writers.write_json(folder / "completions.json", SPANS)
    about: dict[str, Any] = {"pad_id": 0, "eos_id": 0, "vocab_tokens": vocab_tokens, "dtype": tokens.dtype,
                             "context_tokens": context_tokens, "files": writers.file_sizes(folder)}
    digest = writers.content_digest(folder, about["files"])
    writers.write_json(folder / "manifest.json", {"format": writers.FORMAT, "store": about, "digest": digest,
                                                  "windows": {"train": windows, "held_out": windows}})
    return WindowStore.open(folder)
