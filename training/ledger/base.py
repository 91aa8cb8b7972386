"""What both arms of every optimization share: the reduced model, its windows, and the base of adapters."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

# 1.1 M parameters, an update of 1,024 tokens takes 0.15 to 0.3 s on 2 cores. Where the loss is judged half
# the layers and half the width, so that a run of 40 updates takes 5 to 8 s (2026-11).
MODEL: dict[str, Any] = {
    "embedded.hidden": 128, "embedded.layers": 4, "embedded.heads": 4, "embedded.kv_heads": 4,
    "embedded.mlp": 352, "embedded.vocab_tokens": 2048}
# Neither history nor completions: they take seconds and are the same in both arms.
COMMON: dict[str, Any] = {
    "dataset.context_tokens": 256, "dataset.target_tokens": 256, "dataset.commit_share": 0.0,
    "training.micro_batch": 4, "training.accumulation": 1, "training.checkpointing": False,
    "training.save_steps": 0, "training.trial": False, "evaluation.completions": 0,
    "evaluation.context_targets": 0, "stream.chunk_tokens": 0}
TRAINED: dict[str, Any] = {"embedded.hidden": 64, "embedded.mlp": 176, "embedded.layers": 2,
                           "training.max_steps": 40, "training.eval_steps": 10, "evaluation.windows": 8}
TIMED: dict[str, Any] = {"training.max_steps": 6, "evaluation.windows": 2}
# An adapter learns a repository from a base that knows code of another kind, the interpreter's own library.
ADAPTER: dict[str, Any] = {"lora.enabled": True, "lora.rank": 8, "model.quantization": "none",
                           "model.dtype": "float32", "training.learning_rate": 1e-3}
BASE: dict[str, Any] = {**COMMON, **MODEL, "training.max_steps": 150, "evaluation.windows": 8}
BASE_BYTES = 3 << 20
DATASET_SEED = 1234
# Not measured: it takes memory from the system and fills caches. Entries with steps of seconds take three.
WARM_UP_STEPS = 1


def other_code(folder: Path, most_bytes: int = BASE_BYTES) -> Path:
    """A folder with modules of the standard library, by name, up to so many bytes."""
    folder.mkdir(parents=True)
    taken = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        taken += path.stat().st_size
        if taken > most_bytes:
            break
        shutil.copyfile(path, folder / path.name)
    return folder
