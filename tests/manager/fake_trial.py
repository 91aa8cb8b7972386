"""Stands in for the trainer with --trial: takes no step, writes what FAKE says."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

ACT = os.environ.get("FAKE", "done")
PEAK = int(os.environ.get("FAKE_PEAK", "20"))  # a MiB a token
SPEED = float(os.environ.get("FAKE_SPEED", "1"))  # a micro-batch takes its size to this power
RUN = Path(sys.argv[-1])  # --trial --run-dir DIR


def step(context: int, **changes) -> dict:
    micro = int(re.search(r"micro_batch: (\d+)", (RUN / "config.yaml").read_text())[1])
    each_s = 0.5 * micro ** SPEED
    return {"context_tokens": context, "target_tokens": context, "micro_batch": micro,
            "seconds": [each_s, each_s], "update_s": 0.1, "peak_bytes": micro * context << PEAK,
            "live_bytes": None, "loss": 6.0, "error": "", **changes}


def found(steps: list, **changes) -> None:
    data = {"steps": steps, "load_s": 3.0, "resident_bytes": 1 << 28, "date": "now", **changes}
    (RUN / "trial.json").write_text(json.dumps(data))


def told(code: int, text: str) -> None:
    (RUN / "result.json").write_text(json.dumps({
        "state": "failed", "steps": 0, "epochs": 0.0, "tokens_trained": 0, "seconds": 1.0, "tier": 0,
        "context_tokens": 0, "memory": {}, "time": {}, "quality": {}, "model_dir": "", "digest": "",
        "error": text, "exit_code": code}))
    sys.exit(code)


def main() -> None:
    assert "--trial" in sys.argv
    order = json.loads((RUN / "trial-order.json").read_text())
    lengths = [item["context_tokens"] for item in order["lengths"]]
    small = [step(length) for length in lengths[:-1]]
    if ACT == "hang":
        (RUN / "heartbeat.json").write_text(json.dumps({"phase": "trial", "time": time.time()}))
        time.sleep(60)
    found(small)
    if ACT == "done":
        found([*small, step(lengths[-1])], confirmed=True, evaluation_s=1.0, save_s=0.2)
    elif ACT == "out" or (ACT == "out_once" and not Path(os.environ["FAKE_MARK"]).exists()):
        Path(os.environ.get("FAKE_MARK", os.devnull)).touch()
        found([*small, step(lengths[-1], seconds=[], error="out of memory: tried 9 GiB")])
    elif ACT == "out_once":
        found([*small, step(lengths[-1])], confirmed=True)
    elif ACT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ACT == "raise":
        raise RuntimeError(os.environ["FAKE_FAIL"])
    elif ACT.startswith("told_"):
        told(int(ACT.split("_")[1]), "the base is torn.")


if __name__ == "__main__":
    main()
