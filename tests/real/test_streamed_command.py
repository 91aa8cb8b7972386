"""The whole command through the streamed step, under DeepSpeed, on a tiny checkpoint."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from checkpoints import make_tiny_checkpoint
from measured import PROFILE

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path(typer.__file__).parent
ENVIRONMENT = {**os.environ, **PROFILE, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
pytestmark = pytest.mark.real


def test_a_streamed_run_under_deepspeed_ends_with_a_better_model(tmp_path):
    base = make_tiny_checkpoint(tmp_path / "base", "qwen2", attention_dropout=0.1)
    settings = {"stream.chunk_tokens": 384, "deepspeed.stage": 2, "training.max_steps": 4,
                "training.trial": "false",
                "training.accumulation": 2, "training.learning_rate": 0.01, "evaluation.windows": 2,
                "evaluation.completions": 1, "evaluation.completion_tokens": 4,
                "evaluation.context_targets": 1}
    chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "elite_train.py"), "--auto", "--context", "1024", "--repo", str(PACKAGE),
         "--base-model", str(base), "--output", "run", *chosen],
        cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert (result["state"], result["steps"]) == ("done", 4)
    assert result["quality"]["after"]["loss"] < result["quality"]["before"]["loss"]
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    log = (run / "train.log").read_text()
    assert "streamed step (stream.chunk_tokens=384" in log
    assert "Dropout on attention weights is off in the streamed step" in log
    assert not (run / "stream").exists()
