"""Runs of the whole command that are killed all the time, against one that is not.

    python3 benchmarks/soak.py [--minutes 60] [--least 5] [--most 60] [--steps 300]

A small embedded model on a folder of code, `--steps` updates, a checkpoint every fifth. First one run without
a kill. Then the same run again and again, until the minutes are over: after `--least` to `--most` seconds,
drawn anew each time, SIGKILL goes to the command, to its trainer, or to both; a killed command is followed by
`resume`. A run is the same when its digest (sha256 over the final weights) and its losses by step are those
of the first, bit for bit, and no process of it is left 15 s after a kill. Writes
benchmarks/results/soak-<date>.json; exit code 1 when one was not the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "elite_train.py")]
SMALL = {"embedded.hidden": 64, "embedded.layers": 2, "embedded.heads": 2, "embedded.kv_heads": 2,
         "embedded.mlp": 128, "embedded.vocab_tokens": 1024, "training.micro_batch": 4,
         "training.accumulation": 2, "training.save_steps": 5, "training.eval_steps": 50,
         "training.epochs": 50, "training.budget_s": 0, "training.trial": "false",
         "training.averaging": "ema", "evaluation.windows": 4, "evaluation.completions": 2,
         "evaluation.completion_tokens": 8,
         "evaluation.context_targets": 0, "device.threads": 1}
MODULES = 60
GONE_S = 15.0
PATIENCE_S = 3600.0


def repository(folder: Path) -> Path:
    """Modules of the standard library, by name."""
    folder.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:MODULES]:
        shutil.copyfile(path, folder / path.name)
    return folder


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    with log.open("ab") as out:
        return subprocess.Popen([*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                start_new_session=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def first_arguments(repo: Path, run: Path, steps: int) -> list[str]:
    """Of the command that begins a run."""
    chosen = [word for name, value in {**SMALL, "training.max_steps": steps}.items()
              for word in ("--set", f"{name}={value}")]
    return ["--auto", "--repo", str(repo), "--output", str(run), "--base-model", "embedded",
            "--context", "128", *chosen]


def trainers(run: Path) -> list[psutil.Process]:
    """Living trainers of a run, by their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "--run-dir" in words and str(run) in words and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def outcome(run: Path) -> tuple[str, list[float]]:
    """Digest and losses by step; raises when a step is missing or stands there twice."""
    result = json.loads((run / "result.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, result["steps"] + 1)), "a gap or a duplicate"
    return str(result["digest"]), [row["loss"] for row in rows]


def killed_run(repo: Path, run: Path, arguments: argparse.Namespace, source: random.Random,
               kills: Counter[str], until: float) -> None:
    """One run to its end; while there is time it is killed again and again."""
    log = run.with_suffix(".log")
    process = start(first_arguments(repo, run, arguments.steps), log)
    while True:
        wait_s = source.uniform(arguments.least, arguments.most) if time.monotonic() < until else PATIENCE_S
        try:
            code = process.wait(wait_s)
        except subprocess.TimeoutExpired:
            code = None
        if code == 0:
            return
        if code is not None:
            raise SystemExit(f"the command ended with {code}: {log.read_text()[-2000:]}")
        who = source.choice(["command", "trainer", "both"])
        at = trainers(run)
        if who != "command" and not at:
            continue  # between two stages
        kills[who] += 1
        if who != "trainer":
            process.kill()
            process.wait()
        for trainer in at if who != "command" else []:
            with contextlib.suppress(psutil.Error):
                trainer.kill()
        if who != "trainer":
            _all_gone(run)
            begun = (run / "config.yaml").exists()
            process = start(["resume", str(run)] if begun else [
                *first_arguments(repo, run, arguments.steps), "--fresh"], log)


def _all_gone(run: Path) -> None:
    limit = time.monotonic() + GONE_S
    while trainers(run):
        if time.monotonic() > limit:
            raise SystemExit(f"a trainer of {run} is left {GONE_S:.0f} s after its command was killed")
        time.sleep(0.1)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--least", type=float, default=5.0)
    parser.add_argument("--most", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source, kills = random.Random(arguments.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="elite-soak-") as folder:
        work = Path(folder)
        repo = repository(work / "code")
        begin = time.monotonic()
        if start(first_arguments(repo, work / "whole", arguments.steps), work / "whole.log").wait(PATIENCE_S):
            raise SystemExit(f"the first run failed: {(work / 'whole.log').read_text()[-2000:]}")
        whole_s, expected = time.monotonic() - begin, outcome(work / "whole")
        print(f"whole: {arguments.steps} steps in {whole_s:.0f} s, digest {expected[0][:12]}", flush=True)
        began = time.monotonic()
        until, runs, same = began + 60 * arguments.minutes, 0, 0
        while time.monotonic() < until:
            run = work / f"run-{runs}"
            killed_run(repo, run, arguments, source, kills, until)
            runs, same = runs + 1, same + (outcome(run) == expected)
            print(f"{runs} runs, {same} the same, kills {dict(kills)}, "
                  f"{(time.monotonic() - began) / 60:.1f} min", flush=True)
            shutil.rmtree(run)
    found: dict[str, Any] = {
        "date": str(date.today()), "minutes": round((time.monotonic() - began) / 60, 1), "runs": runs,
        "same": same, "kills": dict(kills), "steps": arguments.steps, "whole_s": round(whole_s, 1),
        "least_s": arguments.least, "most_s": arguments.most, "cores": os.cpu_count()}
    path = ROOT / "benchmarks" / "results" / f"soak-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path.relative_to(ROOT)}")
    raise SystemExit(runs != same)


if __name__ == "__main__":
    main()
