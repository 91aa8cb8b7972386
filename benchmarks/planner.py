"""The planner's predictions beside real steps on this CPU, and beside what other tools answer.

    python benchmarks/planner.py                   memory, then time; writes results/planner-<date>.json
    python benchmarks/planner.py --memory [TEXT]   only memory; TEXT: only names with it, unwritten
    python benchmarks/planner.py --time [TEXT]     only time

Memory: most bytes of tensors alive in one update (see measured_steps), predicted by the planner's terms
without a trial. Time: a trial at two short lengths, as the command takes it, predicts the seconds of a step
at twice the longer one. Times need a quiet machine; memory does not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import statistics
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from benchmarks import planner_peers  # noqa: E402
from benchmarks.measured_steps import Combination, measured, predicted, timed  # noqa: E402
from training.hardware import host  # noqa: E402
from training.hardware.profiler import HardwareProfiler  # noqa: E402
from training.planning import fitting  # noqa: E402
from training.records import HardwareProfile  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 704, "vocab_size": 4096, "max_position_embeddings": 8192, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0}
ALL_HEADS = {"num_key_value_heads": 4}
# Dropout of the residual stream keeps a byte a number; the families' presets for code have none.
STILL = {**ALL_HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
         "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 64}, "mistral": {"sliding_window": None},
    "granite": {}, "smollm3": {}, "olmo2": ALL_HEADS, "cohere": ALL_HEADS, "phi": STILL,
    "phi3": ALL_HEADS, "starcoder2": {**STILL, "num_key_value_heads": 2, "sliding_window": None},
    "gpt_neox": STILL, "gpt2": {**STILL, "n_inner": 1024}, "gemma": {"head_dim": 64},
    "gemma3_text": {"head_dim": 64, "sliding_window": 8192}}
FULL, RECOMPUTED = {"lora.enabled": False}, {"training.checkpointing": True}
NF4 = {"model.quantization": "nf4"}
HALF = {"model.dtype": "bfloat16", "dataset.context_tokens": 256, "dataset.target_tokens": 64}
LENGTH = "dataset.context_tokens"
WAYS: dict[str, dict[str, Any]] = {
    "256 tokens": {LENGTH: 256}, "2,048 tokens": {LENGTH: 2048}, "4,096 tokens": {LENGTH: 4096},
    "batch 2": {"training.micro_batch": 2}, "batch 4": {"training.micro_batch": 4, LENGTH: 512},
    "rank 2": {"lora.rank": 2}, "rank 64": {"lora.rank": 64},
    "q and v only": {"lora.targets": ["q_proj", "v_proj"]},
    "accumulated": {"training.accumulation": 2}, "all logits at once": {"training.loss_chunk_tokens": 0},
    "8-bit optimizer": {"optimizer.name": "adamw_8bit"}, "all targets": {"dataset.target_tokens": 512},
    "recomputed": RECOMPUTED, "recomputed, 4,096 tokens": {**RECOMPUTED, LENGTH: 4096},
    "recomputed, batch 4": {**RECOMPUTED, "training.micro_batch": 4},
    "full": FULL, "full, 2,048 tokens": {**FULL, LENGTH: 2048}, "full, accumulated": {
        **FULL, "training.accumulation": 2}, "full, recomputed": {**FULL, **RECOMPUTED},
    "full, 8-bit optimizer": {**FULL, "optimizer.name": "adamw_8bit"},
    "NF4": NF4, "NF4, 2,048 tokens": {**NF4, LENGTH: 2048}, "NF4, recomputed": {**NF4, **RECOMPUTED},
    "NF4, 8-bit optimizer": {**NF4, "optimizer.name": "adamw_8bit"},
    "bf16": HALF, "bf16, 512 tokens": {**HALF, LENGTH: 512},
    "bf16, batch 2": {**HALF, "training.micro_batch": 2},
    "bf16, 512 tokens, recomputed": {**HALF, LENGTH: 512, **RECOMPUTED},
    "bf16, recomputed": {**HALF, **RECOMPUTED}, "bf16, full": {**HALF, **FULL},
    "bf16, NF4": {**HALF, **NF4},
}
# Sliding windows make masks, and families without fused attention hold scores: both grow with the square.
EAGER = {"model.attention": "eager"}
SQUARE: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("mistral", {"sliding_window": 256, "num_key_value_heads": 2}, {LENGTH: 2048}),
    ("mistral", {"sliding_window": 256, "num_key_value_heads": 2}, {LENGTH: 4096, **RECOMPUTED}),
    ("gemma3_text", {"sliding_window": 256, "head_dim": 64, "num_key_value_heads": 2}, {LENGTH: 2048}),
    ("gptj", {"rotary_dim": 32}, EAGER), ("gemma2", {"head_dim": 64, "num_key_value_heads": 2}, EAGER))
CHUNK = "stream.chunk_tokens"
STREAMED: dict[str, dict[str, Any]] = {
    "chunk 256": {CHUNK: 256}, "chunk 1,024": {CHUNK: 1024}, "8,192 tokens": {CHUNK: 512, LENGTH: 8192},
    "output kept": {CHUNK: 512, "stream.attention": "keep"},
    "keys kept": {CHUNK: 512, "stream.keys": "keep"}, "tiled MLP": {CHUNK: 512, "stream.mlp_tokens": 128},
    "half of the inputs": {CHUNK: 512, "stream.keep_every": 2},
    "batch 2": {CHUNK: 512, "training.micro_batch": 2},
    "int8 inputs": {CHUNK: 512, "stream.encoding": "int8"},
    "inputs on disk": {CHUNK: 512, "stream.inputs": "disk"},
    "full": {CHUNK: 512, **FULL}, "NF4": {CHUNK: 512, **NF4},
}


def combinations() -> Iterator[tuple[str, Combination]]:
    """Every request by name: each family once, a Llama in all ways, and some of them streamed."""
    for family, sizes in FAMILIES.items():
        yield family, Combination(family=family, sizes={**SIZES, **sizes}, values={LENGTH: 1024})
    for name, values in WAYS.items():
        yield f"llama, {name}", Combination(family="llama", sizes=SIZES, values={LENGTH: 1024, **values})
    for family, sizes, values in SQUARE:
        yield f"{family}, {', '.join(map(str, values.values()))}", Combination(
            family=family, sizes={**SIZES, **STILL, **sizes}, values={LENGTH: 1024, **values})
    yield "llama, 32,000 words", Combination(family="llama", sizes={**SIZES, "vocab_size": 32_000},
                                             values={LENGTH: 1024})
    for name, values in STREAMED.items():
        yield f"llama streamed, {name}", Combination(family="llama", sizes=SIZES,
                                                     values={LENGTH: 2048, **values})
    yield "llama streamed, bf16", Combination(family="llama", sizes=SIZES,
                                             values={**HALF, LENGTH: 512, CHUNK: 128})
    for family in ("phi", "qwen3", "gemma3_text"):
        yield f"{family} streamed", Combination(family=family, sizes={**SIZES, **FAMILIES[family]},
                                                values={LENGTH: 2048, CHUNK: 512})


# Ways whose step is timed, at a quarter, a half and the whole of the window, as a trial takes them.
TIMED: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {LENGTH: 2048}) for family in ("llama", "phi", "qwen3", "gpt2", "starcoder2")},
    **{f"llama, {name}": ("llama", {LENGTH: 2048, **values}) for name, values in {
        "recomputed": RECOMPUTED, "full": FULL, "full, recomputed": {**FULL, **RECOMPUTED}, "NF4": NF4,
        "batch 2": {"training.micro_batch": 2}, "rank 64": {"lora.rank": 64}}.items()},
    **{f"llama streamed, {name}": ("llama", {LENGTH: 4096, CHUNK: 256, **values}) for name, values in {
        "recomputed": {}, "output kept": {"stream.attention": "keep"}, "full": FULL,
        "tiled MLP": {"stream.mlp_tokens": 64}}.items()},
    "phi streamed": ("phi", {LENGTH: 4096, CHUNK: 512}),
}
REPEATS = 5


def time_row(name: str, profile: HardwareProfile) -> dict[str, Any]:
    """Seconds of an update at the whole window, predicted from the two short lengths and measured."""
    family, values = TIMED[name]
    combination = Combination(family=family, sizes={**SIZES, **FAMILIES[family]}, values=values)
    config, whole = combination.config, values[LENGTH]
    lengths = (whole // 4, whole // 2, whole)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        shape, seconds = timed(combination, lengths, REPEATS)
    medians = [statistics.median(each) for each in seconds]
    parts = [fitting.parts_s(shape, fitting.at_length(
        config, length, config["dataset.target_tokens"] * length // whole), profile) for length in lengths]
    pace = fitting.pace(medians[:2], parts[:2])
    predicted_s, untried_s = pace.at(parts[2]), sum(parts[2])
    return {"name": name, "tokens": whole, "measured_s": medians[2], "predicted_s": predicted_s,
            "off": predicted_s / medians[2] - 1, "untried_off": untried_s / medians[2] - 1,
            "spread": fitting.spread(seconds[2]), "pace": pace.why, "short_s": medians[:2], "parts_s": parts}


def memory_row(name: str, combination: Combination) -> dict[str, Any]:
    """Predicted, measured, and the peers' answers without their fixed parts, in bytes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        step = measured(combination)
    terms = predicted(combination, step.shape)
    total = sum(terms.values())
    return {"name": name, "measured_bytes": step.peak_bytes, "predicted_bytes": total, "terms": terms,
            "off": total / step.peak_bytes - 1, "peers": _peers(combination, step.peak_bytes)}


def _peers(combination: Combination, measured_bytes: int) -> dict[str, float | None]:
    """How far each peer's answer is off; None where it has none."""
    values = combination.config
    asked = {"family": combination.family, "config": {"model_type": combination.family, **combination.sizes},
             "context_tokens": values[LENGTH], "micro_batch": values["training.micro_batch"],
             "rank": values["lora.rank"] if values["lora.enabled"] else 0,
             "quantization": values["model.quantization"], "dtype": values["model.dtype"],
             "checkpointing": values["training.checkpointing"], "streamed": bool(values[CHUNK]),
             "optimizer": values["optimizer.name"], "targets": values["lora.targets"]}
    answers = planner_peers.peers_of(asked, fixed=False)
    return {name: None if found is None else found / measured_bytes - 1 for name, found in answers.items()}


def summary(offs: list[float]) -> dict[str, float | int]:
    """Median and worst error, as shares."""
    sizes = sorted(abs(off) for off in offs)
    return {"count": len(sizes), "median": statistics.median(sizes), "worst": sizes[-1]}


def _tell(row: Mapping[str, Any]) -> None:
    peers = "  ".join(f"{name} {100 * off:+.0f} %" for name, off in row["peers"].items() if off is not None)
    sys.stdout.write(f"{row['name']:36} {row['measured_bytes'] / 2**20:8.1f} MiB "
                     f"{row['predicted_bytes'] / 2**20:8.1f} {100 * row['off']:+6.2f} %   {peers}\n")
    sys.stdout.flush()


def _memory(text: str) -> dict[str, Any]:
    rows = []
    for name, combination in combinations():
        if text in name:
            rows.append(memory_row(name, combination))
            _tell(rows[-1])
    peers = {name: [row["peers"][name] for row in rows if row["peers"][name] is not None]
             for name in rows[0]["peers"]}
    return {"rows": rows, "ours": summary([row["off"] for row in rows]),
            "peers": {name: summary(offs) for name, offs in peers.items() if offs}}


def _time(text: str) -> dict[str, Any]:
    profile, rows = HardwareProfiler().profile(), []
    for name in TIMED:
        if text in name:
            rows.append(time_row(name, profile))
            row = rows[-1]
            offs = "  ".join(f"{kind} {100 * row[key]:+.1f} %" for kind, key in (
                ("off", "off"), ("untried", "untried_off"), ("spread", "spread")))
            sys.stdout.write(f"{name:32} {row['measured_s']:8.3f} s {row['predicted_s']:8.3f}  {offs}  "
                             f"{row['pace']}\n")
            sys.stdout.flush()
    return {"rows": rows, "ours": summary([row["off"] for row in rows]),
            "untried": summary([row["untried_off"] for row in rows])}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs="?", const="", metavar="TEXT")
    parser.add_argument("--time", nargs="?", const="", metavar="TEXT")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    machine, whole = host.fetch(None), chosen.memory is None and chosen.time is None
    torch.set_num_threads(machine.cpu_cores)
    date = datetime.date.today().isoformat()
    path = RESULTS / f"planner-{date}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= {"date": date, "machine": machine.cpu_name, "cores": machine.cpu_cores,
              "torch": torch.__version__}
    for name, asked, act in (("memory", chosen.memory, _memory), ("time", chosen.time, _time)):
        if whole or asked is not None:
            made = act(asked or "")
            summed = {key: value for key, value in made.items() if key != "rows"}
            sys.stdout.write(json.dumps(summed, indent=1) + "\n")
            found[name] = made if not asked else found.get(name)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
