"""The streamed step's part of docs/optimizations.md: its explanation, and what the benchmarks measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

CPU = """### Measured on a CPU

{cores} CPU cores without bf16, {date}: one whole step of a Llama of hidden {hidden}, 6 layers, vocabulary
{vocabulary:,}, LoRA on all linear layers, fp32; median of {runs} runs, one where the row took minutes, all in
turn. Memory is the growth of the process's peak; "stored" is the part of it that the step's stores hold. The
last columns are shares of Hugging Face's memory and multiples of its speed
(`python3 benchmarks/longcontext_cpu.py`).

{table}
"""
GPU = """### On a GPU

One whole step of the real shapes with random NF4 weights and LoRA, under a hard cap on device memory.
`python3 benchmarks/longcontext_gpu.py --suite` measures these rows.

{table}
"""


def section() -> str:
    """Explanation, CPU table, GPU table."""
    text = (ROOT / "docs" / "explanations" / "streamed-step.md").read_text(encoding="utf-8")
    return f"{text}\n{_cpu()}\n{_gpu()}"


def _benchmark(name: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _newest(pattern: str) -> dict[str, Any] | None:
    found = sorted((BENCHMARKS / "results").glob(pattern))
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None


def _cpu() -> str:
    record = _newest("longcontext-cpu-*.json")
    if record is None:
        return "Not measured on a CPU; `python3 benchmarks/longcontext_cpu.py` measures.\n"
    rows = record["medians"]
    return CPU.format(cores=record["cores"], date=record["date"], hidden=record["shape"]["hidden_size"],
                      vocabulary=record["shape"]["vocab_size"], runs=max(row["runs"] for row in rows),
                      table=_benchmark("longcontext_cpu").table(rows))


def _gpu() -> str:
    benchmark, record = _benchmark("longcontext_gpu"), _newest("longcontext-gpu-*.json")
    measured = {_case(row): row for row in (record or {"rows": []})["rows"]}
    lines = ["| Shape | Tokens | Cap | Layers | Result |", "| --- | --- | --- | --- | --- |"]
    for case in benchmark.SUITE:
        whole = benchmark.SHAPES[case["shape"]]["num_hidden_layers"]
        row = measured.get(_case(case))
        result = benchmark.result(row) if row else "not measured"
        lines.append(f"| {case['shape']} | {case['context']:,} | {case['cap_gib']} GiB | "
                     f"{case['asked_layers'] or whole} of {whole} | {result} |")
    return GPU.format(table="\n".join(lines))


def _case(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in ("shape", "context", "cap_gib", "asked_layers", "policy")])
