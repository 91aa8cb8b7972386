"""The streamed step beside Hugging Face with gradient checkpointing, on a CPU: peak memory and tokens/s.

    python3 benchmarks/longcontext_cpu.py [--repeats 3] [--lengths 4096 16384 32768] [--longest 131072]

One model (Llama architecture, hidden 256, 6 layers, LoRA on all linear layers), fp32, one whole step (forward
and backward) per process, all variants in turn so that they see the same machine. Memory is the growth of the
process's peak resident size over what it held before the step; what the streamed step stores is counted in,
and given apart. The longest length is run by the streamed step alone, with fewer layers where the row says
so. Writes benchmarks/results/longcontext-cpu-<date>.json and prints the medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 8192
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 1 << 20}
PEER = "Hugging Face, checkpointing"
KEPT = {"page_tokens": 4096, "loss_tokens": 512, "attention": "keep", "keys": "keep"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    PEER: None,
    "streamed, nothing kept but inputs": {"chunk_tokens": 1024, "page_tokens": 4096, "loss_tokens": 512},
    "streamed, attention kept on disk": {"chunk_tokens": 2048, "inputs": "disk"} | KEPT,
    "streamed, attention kept in memory": {"chunk_tokens": 4096} | KEPT,
}
ON_DISK = "streamed, attention kept on disk"
LONG = 32768  # from here on one run each, of the peer and of what is kept on disk


def resident(field: str) -> int:
    """A size of this process in /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(policy: dict[str, Any] | None, length: int, layers: int) -> dict[str, Any]:
    """One step in this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.longcontext import StreamedStep, StreamPolicy

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    ids = torch.randint(VOCABULARY, (1, length))
    step: Any = None
    if policy is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        step = StreamedStep(model, StreamPolicy(**policy))

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return step(tokens, tokens) if step else model(input_ids=tokens, labels=tokens, use_cache=False).loss

    loss(ids[:, :512]).backward()  # imports, thread pools
    model.zero_grad()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    start, cpu = time.perf_counter(), time.process_time()
    value = loss(ids)
    value.backward()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens_per_s": length / seconds, "loss": float(value),
            "gradient_norm": float(norm), "peak_growth_bytes": resident("VmHWM") - before,
            "stored_bytes": stored(step) if step else None}


def stored(step: Any) -> int:
    """Bytes that the step's stores hold: layer inputs and what is kept with them, keys, values, their
    gradients.
    """
    pages = [value for value in vars(step._pages[1]).values() if hasattr(value, "nbytes")]
    return int(step._transfer.bytes_held + sum(tensor.nbytes for tensor in pages))


def run(name: str, length: int, layers: int) -> dict[str, Any]:
    """One variant in a process of its own."""
    task = json.dumps({"policy": VARIANTS[name], "length": length, "layers": layers})
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", task], env=environment, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} at {length:,} tokens failed:\n{done.stderr[-2000:]}")
    row = {"variant": name, "length": length, "layers": layers, **json.loads(done.stdout.splitlines()[-1])}
    print(f"  {name:36} {length:>8,} {row['seconds']:8.1f} s {row['peak_growth_bytes'] / 2**20:7.0f} MiB",
          file=sys.stderr, flush=True)
    return row


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row by variant and length, with the ratios to the peer at that length."""
    found = []
    for name, length, layers in dict.fromkeys((r["variant"], r["length"], r["layers"]) for r in rows):
        same = [r for r in rows if (r["variant"], r["length"], r["layers"]) == (name, length, layers)]
        middle = {key: statistics.median(r[key] for r in same)
                  for key in ("seconds", "cpu_seconds", "tokens_per_s", "peak_growth_bytes")}
        found.append({"variant": name, "length": length, "layers": layers, "runs": len(same), **middle,
                      "seconds_from_to": [min(r["seconds"] for r in same), max(r["seconds"] for r in same)],
                      "stored_bytes": same[0]["stored_bytes"]})
    peers = {(row["length"], row["layers"]): row for row in found if row["variant"] == PEER}
    for row in found:
        peer = peers.get((row["length"], row["layers"]))
        if peer and row is not peer:
            row["memory_share"] = row["peak_growth_bytes"] / peer["peak_growth_bytes"]
            row["speed_ratio"] = peer["seconds"] / row["seconds"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The medians as Markdown."""
    lines = ["| tokens | step | s | tokens/s | peak growth, MiB | of it stored | memory | speed |",
             "|---:|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        name = row["variant"] + (f" ({row['layers']} of 6 layers)" if row["layers"] != 6 else "")
        held = f"{row['stored_bytes'] / 2**20:,.0f}" if row["stored_bytes"] is not None else ""
        ratios = (f"{row['memory_share']:.2f} | {row['speed_ratio']:.2f}" if "memory_share" in row else " | ")
        lines.append(f"| {row['length']:,} | {name} | {row['seconds']:,.1f} | {row['tokens_per_s']:,.0f} | "
                     f"{row['peak_growth_bytes'] / 2**20:,.0f} | {held} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 32768])
    parser.add_argument("--longest", type=int, default=131072, help="by the streamed step alone; 0: not run")
    parser.add_argument("--longest-layers", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    rows = []
    for length in options.lengths:
        names = (PEER, ON_DISK) if length >= LONG else tuple(VARIANTS)
        for _ in range(1 if length >= LONG else options.repeats):
            rows += [run(name, length, 6) for name in names]
    if options.longest:
        rows += [run(ON_DISK, length, options.longest_layers) for length in (16384, options.longest)]
    record = {"date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "shape": SHAPE,
              "rows": rows, "variants": VARIANTS, "medians": medians(rows)}
    out = ROOT / "benchmarks" / "results" / f"longcontext-cpu-{record['date']}.json"
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(record["medians"]))


if __name__ == "__main__":
    main()
