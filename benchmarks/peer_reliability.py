"""How other trainers stand what docs/reliability.md asks of this one.

    python3 benchmarks/peer_reliability.py [--kills 100] [--launches 10]

Hugging Face's Trainer trains a Qwen2 of two layers for 30 steps on one thread, with a checkpoint at each step
and the newest two kept, and is resumed from what `get_last_checkpoint` names:

- killed (SIGKILL) at a random moment of the run, `--kills` times;
- one file of its newest checkpoint with a flipped bit, cut in half, or gone, each file in turn;
- a loss that is not a number at step 5, once.

DeepSpeed's launcher starts two ranks that only sleep; then its own processes get SIGKILL or SIGTERM,
`--launches` times each.

"Same" is the sha256 over the final weights of an uninterrupted run. Writes
benchmarks/results/peer-reliability-<date>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS, HALF, NAN_AT = 30, 10, 5
SLEEPER = "import time\ntime.sleep(120)\n"
PATIENCE_S = 60.0
# How DeepSpeed's launcher is ended: its child, which starts the ranks, or the runner, which was typed.
WAYS = (("SIGKILL of launch.py", True, signal.SIGKILL),
        ("SIGTERM of the runner alone", False, signal.SIGTERM),
        ("SIGKILL of the runner alone", False, signal.SIGKILL))


def train(folder: Path, stop_at: int = 0, nan_at: int = 0) -> None:
    """One training with Hugging Face's Trainer, or the rest of one; result.json has its digest."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Plain(Trainer):
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            return loss * float("nan") if nan_at and self.state.global_step == nan_at else loss

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == stop_at

    torch.manual_seed(0)
    source = random.Random(0)
    rows = [[source.randrange(300) for _ in range(32)] for _ in range(4 * STEPS)]
    model = Qwen2ForCausalLM(Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, attention_dropout=0.1))
    told = TrainingArguments(
        str(folder / "out"), max_steps=STEPS, save_steps=1, save_total_limit=2, logging_steps=1, seed=0,
        per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3)
    trainer = Plain(model=model, args=told, callbacks=[Stop()] if stop_at else [],
                    train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    last = get_last_checkpoint(str(folder / "out")) if (folder / "out").exists() else None
    trainer.train(resume_from_checkpoint=last)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
    (folder / "result.json").write_text(json.dumps({"digest": digest.hexdigest(), "finite": finite,
                                                    "steps": trainer.state.global_step}))


def forked(act: Callable[[], None], log: Path, kill_after_s: float | None = None) -> int:
    """The exit status of a child that has everything imported, which may be killed on its way."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            act()
            code = 0
        finally:
            if code:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder: Path) -> dict[str, Any]:
    """What a training left."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def ended(folder: Path, expected: str) -> str:
    """Resumes and says how that went: same, other weights, or could not resume."""
    (folder / "result.json").unlink(missing_ok=True)
    code = forked(lambda: train(folder), folder / "again.log")
    if code or not (folder / "result.json").exists():
        return "could not resume"
    return "same" if result(folder)["digest"] == expected else "other weights, not told"


def kills(work: Path, count: int, whole_s: float, expected: str) -> dict[str, int]:
    """Outcomes of kills at random moments of a run."""
    source, found = random.Random(0), Counter[str]()
    for index in range(count):
        folder = work / f"killed-{index}"
        folder.mkdir()
        code = forked(lambda folder=folder: train(folder), folder / "log", source.uniform(0, whole_s))  # type: ignore[misc]
        saved = list((folder / "out").glob("checkpoint-*")) if (folder / "out").exists() else []
        if code == 0:
            found["ended before the kill"] += 1
        else:
            found[ended(folder, expected) if saved else "no checkpoint yet"] += 1
        shutil.rmtree(folder)
        print(f"kill {index + 1} of {count}: {dict(found)}", flush=True)
    return dict(found)


def damages(work: Path, expected: str) -> dict[str, dict[str, str]]:
    """What came of each damage to each file of the newest checkpoint."""
    half = work / "half"
    half.mkdir()
    assert forked(lambda: train(half, stop_at=HALF), half / "log") == 0
    names = sorted(path.name for path in (half / "out" / f"checkpoint-{HALF}").iterdir())
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for kind in ("flipped bit", "cut in half", "gone"):
            folder = work / "damaged"
            shutil.copytree(half, folder)
            path = folder / "out" / f"checkpoint-{HALF}" / name
            data = bytearray(path.read_bytes())
            if kind == "flipped bit":
                data[len(data) // 2] ^= 1
            path.write_bytes(data if kind == "flipped bit" else data[:len(data) // 2])
            if kind == "gone":
                path.unlink()
            found.setdefault(kind, {})[name] = ended(folder, expected)
            shutil.rmtree(folder)
            print(f"{name}, {kind}: {found[kind][name]}", flush=True)
    return found


def not_a_number(work: Path) -> dict[str, Any]:
    """How a run with one loss that is not a number ends."""
    folder = work / "nan"
    folder.mkdir()
    code = forked(lambda: train(folder, nan_at=NAN_AT), folder / "log")
    return {"exit_code": code, **(result(folder) if code == 0 else {})}


def ranks_of(script: Path) -> list[psutil.Process]:
    """Living processes that run a script themselves, the launcher's not among them."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        launched = any("deepspeed" in word for word in words[:4])
        if str(script) in words and not launched and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def launches(work: Path, count: int) -> dict[str, dict[str, Any]]:
    """Of each way to end DeepSpeed's launcher: the runner's exit codes, and whether ranks were left after."""
    found: dict[str, dict[str, Any]] = {}
    script = work / "sleeper.py"
    script.write_text(SLEEPER)
    for name, child, number in WAYS:
        codes, left = Counter[str](), 0
        for _ in range(count):
            runner = subprocess.Popen(
                [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", str(script)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            until = time.monotonic() + PATIENCE_S
            while len(ranks_of(script)) < 2 and time.monotonic() < until:
                time.sleep(0.2)
            target = psutil.Process(runner.pid)
            if child:
                target = next(each for each in target.children(recursive=True)
                              if any("launch" in word for word in each.cmdline()[:4]))
            target.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                runner.wait(15)
            codes[str(runner.returncode)] += 1
            time.sleep(1)
            left += bool(ranks_of(script))
            for process in [*psutil.Process().children(recursive=True), *ranks_of(script)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            runner.wait()
        found[name] = {"launches": count, "with ranks left": left, "exit codes of the runner": dict(codes)}
        print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--launches", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import transformers.models.qwen2.modeling_qwen2
    import transformers.trainer  # noqa: F401  imported once, before the forks

    with tempfile.TemporaryDirectory(prefix="elite-peers-") as name:
        work = Path(name)
        for whole in ("whole", "twice"):
            (work / whole).mkdir()
            begin = time.monotonic()
            assert forked(lambda whole=whole: train(work / whole), work / "log") == 0  # type: ignore[misc]
            whole_s = time.monotonic() - begin
        expected = result(work / "whole")["digest"]
        assert result(work / "twice")["digest"] == expected, "two uninterrupted runs differ"
        print(f"uninterrupted: {whole_s:.1f} s", flush=True)
        found = {"date": str(date.today()), "cores": os.cpu_count(),
                 "versions": {name: version(name) for name in ("transformers", "deepspeed", "torch")},
                 "kills": kills(work, arguments.kills, whole_s, expected),
                 "damages": damages(work, expected), "not_a_number": not_a_number(work),
                 "launcher": launches(work, arguments.launches)}
    path = ROOT / "benchmarks" / "results" / f"peer-reliability-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
