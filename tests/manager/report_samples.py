"""A finished run's files with plausible figures, for the report's tests and for looking at the page."""

import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from run_factory import make_run

from training.records import Figure, HardwareProfile, Memory, Quality, Result
from training.rundir import write_record

SAMPLE = {"path": "click/termui.py",
          "prefix": "def confirm(text, default=False, abort=False):\n    while True:\n        try:\n",
          "before": "            return self.get_get(name)\n",
          "after": "            value = visible_input(prompt).lower().strip()\n",
          "expected": "            echo(prompt, nl=False, err=err)\n"}


def curve(base: float, composed: float, random: float = -0.08, hostile: str = "", kinds: int = 3) -> dict:
    """A context curve whose loss without context is `base`; the changes are those at the whole window."""
    rows = [{"kind": kind, "length": length, "context_tokens": 0.9 * length, "loss": base + part * change,
             "bits_per_byte": (base + part * change) / 2, "change": part * change,
             "low": part * change - 0.05 * bool(length), "high": part * change + 0.05 * bool(length)}
            for kind, change in [("composed", composed), ("random", random),
                                 (f"foreign{hostile}", 0.01)][:kinds]
            for length, part in ((0, 0.0), (512, 0.5), (4096, 1.0))]
    return {"items": 8, "files": 5, "target_tokens": 900, "foreign": f"a library{hostile}", "rows": rows}


def finished(path: Path, after: float = 2.41, hostile: str = "", steps: int = 240):
    """A done run; `hostile` is put into every text that can come from outside."""
    memory = Memory(device_bytes=1_250_000_000, host_bytes=1_250_000_000, disk_bytes=10_000,
                    terms={"weights": 180_000_000, "optimizer_state": 350_000_000, "gradients": 175_000_000,
                           "activations": 420_000_000, "logits": 125_000_000})
    run = make_run(path, {"run.name": f"click{hostile}", "dataset.repo": f"/src/click{hostile}"}, memory)
    draw = random.Random(1)
    rows, time = [], 1795224168.0
    for step in range(1, steps + 1):
        time += 0.7 + 0.1 * draw.random()
        loss = 2.2 + 6 * math.exp(-step / 30) + draw.gauss(0, 0.12)
        rows.append({"step": step, "epoch": step / 80, "loss": loss, "lr": 2e-4, "grad_norm": 1.0,
                     "tokens": 4096, "tokens_per_s": 5400.0, "device_bytes": 1_310_000_000,
                     "host_bytes": 1_310_000_000, "time": time})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.evaluations.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in
                                       ((0, 8.32), (80, 3.3), (160, 2.7), (steps, after))))
    sample = {name: text + hostile for name, text in SAMPLE.items()}
    (run.path / "model").mkdir()
    write_record(run.result, Result(
        state="done", steps=steps, epochs=3.0, tokens_trained=4096 * steps, seconds=181.0, tier=1,
        context_tokens=4096, memory={"predicted_bytes": 1_250_000_000, "measured_bytes": 1_310_000_000},
        time={"predicted_s": 200.0, "measured_s": 181.0},
        quality={"before": Quality(loss=8.32, bits_per_byte=4.01, exact_match=0.0, edit_similarity=0.05,
                                   context_curve=curve(8.4, -0.01, kinds=1)),
                 "after": Quality(loss=after, bits_per_byte=1.16, exact_match=0.125, edit_similarity=0.42,
                                  context_curve=curve(after + 0.1, -0.3, hostile=hostile))},
        model_dir="model", digest="5f" * 32, samples=(sample, sample | {"path": "click/core.py" + hostile})))
    write_record(run.hardware, HardwareProfile(
        name="here", source="measured", date="2026-11-21", system=f"Linux 6.1{hostile}", cpu_name="Some CPU",
        cpu_cores=2, cpu_flags=("avx2",), ram_total_bytes=8 << 30, ram_available_bytes=6 << 30, gpus=(),
        disk_path="/", disk_free_bytes=50 << 30,
        figures={"cpu.matmul_fp32": Figure(value=2e11, unit="FLOP/s", method="numpy")}))
    run.command.write_text(f"python3 elite_train.py --auto --repo /src/click{hostile}\n")
    (run.dataset / "manifest.json").write_text(json.dumps({
        "files": {"seen": 142, "accepted": 97,
                  "dropped": {"binary": 21, "too large": 2, f"generated{hostile}": 22}},
        "tokens": {"total": 412_331, "trained_per_epoch": 208_112}, "windows": {"train": 641, "held_out": 33},
        "dependency_coverage": {"4096": 0.62, "16384": 0.91}, "secrets_replaced": 1, "leakage": 0.0121,
        "selftest": {"files": 9, "bytes": 90_000,
                     "bits_per_byte": {"none": 1.664, f"composed{hostile}": 1.373},
                     "gain": {f"composed{hostile}": [0.291, 0.201, 0.4]}, "xz": 1.66, "gzip": 1.761}}))
    return run
