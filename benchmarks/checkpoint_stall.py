"""How long the training waits for a checkpoint.

    python3 benchmarks/checkpoint_stall.py [--tries 5] [--folder DIR] [PARAMETERS...]

Saves random fp32 weights with AdamW's two moments through the trainer's own `checkpoints.save`, in a folder
of the given file system. Writes benchmarks/results/checkpoint-stall-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.planning.choices import SAVE_EVERY_S
from training.trainer import checkpoints
from training.trainer.engine import Captured

ROOT = Path(__file__).resolve().parents[1]
# The embedded model, a LoRA of rank 16 on 1.5 and on 7 billion parameters, and all of a model of 0.2 billion.
SIZES = (5_500_000, 18_000_000, 40_000_000, 200_000_000)
WIDTH = 1024


def captured(parameters: int) -> Captured:
    """Weights and moments of so many parameters in matrices of 4 M."""
    rows = [min(4096, left) for left in range(parameters // WIDTH, 0, -4096)]

    def matrices(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}{at}": torch.randn(many, WIDTH) for at, many in enumerate(rows)}

    moments = matrices("exp_avg/") | matrices("exp_avg_sq/")
    return Captured(weights=matrices(""), optimizer=moments, numbers={})


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("parameters", nargs="*", type=int, default=SIZES)
    arguments = parser.parse_args()
    if arguments.folder and not arguments.folder.is_dir():
        parser.error(f"there is no folder {arguments.folder}")
    sizes = []
    for parameters in arguments.parameters:
        made, times = captured(parameters), []
        with tempfile.TemporaryDirectory(prefix="elite-stall-", dir=arguments.folder) as name:
            for step in range(1, arguments.tries + 1):
                begin = time.perf_counter()
                checkpoints.save(Path(name), made, {"step": step}, {})
                times.append(time.perf_counter() - begin)
                checkpoints.retain(Path(name), 1)
        sizes.append({"parameters": parameters, "bytes": checkpoints.size_bytes(made),
                      "save_s": statistics.median(times), "least_s": min(times), "most_s": max(times)})
        print(sizes[-1], flush=True)
    found = {"date": str(date.today()), "cores": os.cpu_count(), "every_s": SAVE_EVERY_S,
             "tries": arguments.tries, "sizes": sizes}
    path = ROOT / "benchmarks" / "results" / f"checkpoint-stall-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
