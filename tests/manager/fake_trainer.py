"""Stands in for training/model_trainer_unified.py: same arguments and files, no model; FAKE: how it acts."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training.manager.watchdog import watch_parent

ACT = os.environ.get("FAKE", "done")
RUN = Path(sys.argv[-1])  # --run-dir DIR
RANK = int(os.environ.get("RANK", "0"))
STEPS = int(os.environ.get("FAKE_STEPS", "8"))


def beat(phase: str, step: int = 0) -> None:
    line = {"pid": os.getpid(), "phase": phase, "step": step, "steps": STEPS, "done": step, "total": STEPS,
            "detail": "", "time": time.time()}
    aside = RUN / ".beat"
    aside.write_text(json.dumps(line))
    os.replace(aside, RUN / "heartbeat.json")


def result(state: str, exit_code: int = 0, error: str = "", steps: int = STEPS) -> str:
    return json.dumps({
        "state": state, "steps": steps, "epochs": 1.0, "tokens_trained": 100, "seconds": 1.0, "tier": 1,
        "context_tokens": 256, "memory": {"predicted_bytes": 10, "measured_bytes": 11},
        "time": {"predicted_s": 1.0, "measured_s": 1.5},
        "quality": {"before": {"loss": 3.0, "bits_per_byte": 1.5},
                    "after": {"loss": 2.0, "bits_per_byte": 1.0}},
        "model_dir": "model" if state == "done" else "", "digest": "ab" * 32 if state == "done" else "",
        "samples": [], "error": error, "exit_code": exit_code})


def step(number: int) -> None:
    row = {"step": number, "epoch": 0.5, "loss": 4.0 / number, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100,
           "tokens_per_s": 1000.0, "device_bytes": 1 << 28, "host_bytes": 1 << 28, "time": time.time()}
    with (RUN / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    beat("train", number)


def rewind(first: int) -> None:
    rows = (RUN / "metrics.jsonl").read_text().splitlines() if (RUN / "metrics.jsonl").exists() else []
    kept = [row for row in rows if json.loads(row)["step"] < first]
    if RANK == 0 and len(kept) < len(rows):
        (RUN / "metrics.jsonl").write_text("".join(row + "\n" for row in kept))


def checkpoint(number: int) -> None:
    folder = RUN / f"checkpoint-{number}"
    folder.mkdir(exist_ok=True)
    (folder / "MANIFEST.json").write_text("{}")


def stop_if_asked(number: int) -> None:
    file = RUN / "stop"
    if not file.exists() or ACT == "stubborn":
        return
    name = file.read_text().strip()
    checkpoint(number)
    code = 130 if name == "SIGINT" else 75
    (RUN / "result.json").write_text(result("interrupted", code, f"Stopped by {name}.", number))
    sys.exit(code)


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    with (RUN / "starts").open("a") as file:
        file.write("x")
    if ACT != "unwatched":
        watch_parent(grace_s=1.0)
    if ACT == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ACT in ("slow_import", "hang_import"):
        beat("import")
        time.sleep(60)
    if ACT in ("orphan", "stubborn"):
        child = subprocess.Popen([sys.executable, "-c", "import signal, time;"
                                  "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
        (RUN / "orphan.pid").write_text(str(child.pid))
    first = max([int(path.name.split("-")[1]) for path in RUN.glob("checkpoint-*")], default=0) + 1
    rewind(first)
    for number in range(first, STEPS + 1):
        if RANK == 0:
            step(number)
        act_at(number + 1)
        if f"fail_at_{number}" == ACT:
            fail()
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0.02")))
        stop_if_asked(number)
    end()


def confess(kind: str, error: str, step: int) -> None:
    told = {"kind": kind, "phase": "train", "rank": RANK, "step": step, "peak_bytes": 3 << 30, "error": error}
    (RUN / "failure.json").write_text(json.dumps(told))


def act_at(number: int) -> None:
    """What needs the configuration or another state of this process."""
    text = (RUN / "config.yaml").read_text()
    if ACT == "oom" and number == 4 and "micro_batch: 1\n" not in text:
        confess("out_of_memory", "OutOfMemoryError: CUDA out of memory.", number - 1)
        sys.exit(71)
    if ACT == "always_oom" and number == 4:
        confess("out_of_memory", "OutOfMemoryError: CUDA out of memory.", number - 1)
        sys.exit(71)
    if ACT == "hang" and number == int(os.environ.get("FAKE_HANG_AT", "4")) and not (RUN / "hung").exists():
        (RUN / "hung").write_text("once")
        time.sleep(600)
    if ACT == "killed_once" and number == 4 and not (RUN / "killed").exists():
        (RUN / "killed").write_text("once")
        os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    kind = os.environ["FAKE_FAIL"]
    if kind == "fault":
        confess("fault", "RuntimeError: it broke", 2)
        sys.exit(70)
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
        time.sleep(5)
    if kind == "told":
        (RUN / "result.json").write_text(result("failed", 71, "A step needs 9 GiB; 8 GiB is free."))
        sys.exit(71)
    if kind.isdigit():
        sys.exit(int(kind))
    raise RuntimeError(kind)


def end() -> None:
    if RANK != 0 or ACT == "no_result":
        return
    (RUN / "model").mkdir(exist_ok=True)
    text = result("done")
    (RUN / "result.json").write_text(text[:60] if ACT == "torn_result" else text)
    if ACT == "bad_end":
        os._exit(3)


if __name__ == "__main__":
    main()
