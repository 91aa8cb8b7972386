"""Seconds from a process's start to the end of its first training step: ELITE beside Hugging Face's Trainer.

    python3 benchmarks/startup.py [--repeats 5]

Same model (embedded, Llama architecture, 4 M parameters), same window length, one CPU process each, started
in turn so that both see the same machine. Writes benchmarks/results/startup-<date>.json, prints the medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "training" / "model_trainer_unified.py"
sys.path.insert(0, str(ROOT))

PEER = """
import os, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
config = LlamaConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=4, intermediate_size=704, tie_word_embeddings=True)
draw = lambda: torch.randint(0, 4096, (512,))
rows = [{"input_ids": draw(), "labels": draw()} for _ in range(64)]
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        open(sys.argv[1], "w").close(); os._exit(0)
arguments = TrainingArguments(output_dir=sys.argv[1] + ".d", per_device_train_batch_size=8, max_steps=2,
                              report_to=[], use_cpu=True)
Trainer(model=LlamaForCausalLM(config), train_dataset=rows, callbacks=[Stop()], args=arguments).train()
"""


def seconds_until(path: Path, command: list[str], has_step) -> float:
    """Start a command, return the seconds until `has_step(path)`, and end it."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not has_step(path):
            if process.poll() is not None and not has_step(path):
                raise SystemExit(f"{command[1]} ended with {process.returncode} before its first step")
            time.sleep(0.02)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


def has_line(path: Path) -> bool:
    """Whether the metrics hold at least one step."""
    return path.is_file() and path.stat().st_size > 0


def prepare(folder: Path) -> None:
    """A run directory with a plan, a configuration and windows of this repository, ready for the trainer."""
    from training.configuration import ConfigurationManager
    from training.dataset.generator import DatasetGenerator
    from training.hardware.profiler import HardwareProfiler
    from training.models import resolve
    from training.planning.calculator import OptimalConfigCalculator
    from training.records import Request

    profile, base = HardwareProfiler(folder).profile(quick=True), resolve("embedded")
    settings = {"training.micro_batch": 8, "training.accumulation": 1, "training.max_steps": 2,
                "evaluation.windows": 1, "evaluation.completions": 0}
    request = Request(repo=str(ROOT), output=str(folder), model_name="startup", base_model="embedded",
                      settings=settings)
    plan = OptimalConfigCalculator(profile).calculate(request, base, DatasetGenerator.survey(str(ROOT)))
    config = ConfigurationManager(folder).write(plan, profile, [])
    DatasetGenerator(config, folder, base).generate()


def main() -> None:
    """Measure both in turn and record the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows: dict[str, list[float]] = {"elite": [], "transformers.Trainer": []}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "peer.py").write_text(PEER, encoding="utf-8")
        prepare(work / "run")
        for number in range(repeats + 1):  # the first pair warms the disk cache and is not counted
            run = work / f"run-{number}"
            subprocess.run(["cp", "-r", str(work / "run"), str(run)], check=True)
            trainer = [sys.executable, str(TRAINER), "--run-dir", str(run)]
            ours = seconds_until(run / "metrics.jsonl", trainer, has_line)
            flag = work / f"peer-{number}"
            theirs = seconds_until(flag, [sys.executable, str(work / "peer.py"), str(flag)], Path.is_file)
            if number:
                rows["elite"].append(ours)
                rows["transformers.Trainer"].append(theirs)
    record = {"date": datetime.date.today().isoformat(), "unit": "s", "cores": os.cpu_count(), "runs": rows,
              "median": {name: round(statistics.median(values), 2) for name, values in rows.items()}}
    out = ROOT / "benchmarks" / "results" / f"startup-{record['date']}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, values in rows.items():
        middle = statistics.median(values)
        print(f"{name:22} median {middle:5.2f} s   from {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
