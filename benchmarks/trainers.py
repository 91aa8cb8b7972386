"""One tiny Qwen2 with LoRA trained on the same windows by ELITE, Hugging Face's Trainer with PEFT, and TRL.

    python3 benchmarks/trainers.py [--lengths 1024 4096 8192 16384] [--rounds 3] [--steps 8]

Hidden 256, 4 layers, 5.5 M parameters, LoRA of rank 8 on all linear layers, fp32, one window an update, in
which every token is a target, AdamW, constant rate. Each contender runs in a process of its own with the same
number of threads, all in turn, in several rounds. Tokens/s is the median of the steps after the second;
memory is the process's highest resident size (VmHWM) with all its imports, as a user would see it. Hugging
Face's two use gradient checkpointing, as their guides advise for long windows. ELITE runs its own loop,
engine and loss with what `elite_train.py plan` chooses for the length, and a second time with activations
recomputed wherever the plan keeps them. A peer that is not installed is left out by name. Writes
benchmarks/results/trainers-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 8192
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 864, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 65536,
         "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, RANK, WARM = 2e-4, 8, 2      # WARM: steps that are not counted
RECOMPUTED = "ELITE, recomputed"
PEERS = {"Trainer + PEFT": "peft", "TRL SFT": "trl"}
# What of the plan decides how a step is taken; the rest (data, length, rates) is the same for all.
PLANNED = ("training.checkpointing", "training.kept_layers", "training.kept_inputs",
           "training.loss_chunk_tokens", "device.allocator", "stream.")


def make_base(folder: Path) -> None:
    """A checkpoint with random weights, the same each time, and a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)


def planned(base: Path, length: int) -> dict[str, Any]:
    """The keys of PLANNED as `elite_train.py plan` chooses them for this base, length and machine."""
    fixed = {"dataset.context_tokens": length, "dataset.target_tokens": length, "lora.rank": RANK,
             "model.quantization": "none", "model.dtype": "float32", "training.accumulation": 1,
             "dataset.commit_share": 0.0}
    command = [sys.executable, str(ROOT / "elite_train.py"), "plan", "--repo", str(ROOT / "training"),
               "--base-model", str(base), "--json"]
    command += [word for name, value in fixed.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"no plan for {length:,} tokens: {done.stderr.strip()}")
    choices = json.loads(done.stdout)["choices"]
    return {name: choice["value"] for name, choice in choices.items() if name.startswith(PLANNED)}


# -- the contenders, each in its own process -----------------------------------------------------------------


class Windows:
    """Random windows of one length; what each of the three wants of a dataset."""

    pad_id, vocab_tokens, eos_id, digest = 0, VOCABULARY, 0, "random"

    def __init__(self, length: int, count: int):
        import numpy as np

        self.length = length
        self.rows = np.random.default_rng(7).integers(0, VOCABULARY, (count, length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        ids = torch.from_numpy(self.rows[index])
        return {"input_ids": ids, "labels": ids.clone()}

    def count(self, split: str) -> int:
        """Windows of a split."""
        return len(self.rows)

    def window(self, split: str, index: int, *_: Any) -> tuple[Any, Any]:
        """(ids, labels) of one window, each (S,)."""
        return self.rows[index], self.rows[index].copy()

    def order(self, seed: int, epoch: int) -> Any:
        """Windows in the order they lie in."""
        import numpy as np

        return np.arange(len(self.rows))


def run_elite(base: Path, length: int, steps: int, settings: dict[str, Any]) -> list[float]:
    """Seconds of each update of the trainer's own loop."""
    import torch

    from training.rundir import RunDirectory
    from training.settings import Config
    from training.trainer import loop
    from training.trainer.engine import PlainEngine
    from training.trainer.journal import Heartbeat, Journal
    from training.trainer.loading import load
    from training.trainer.loss import causal_loss
    from training.trainer.stopping import Watch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = Config({"model.base": str(base), "lora.enabled": True, "lora.rank": RANK,
                     "lora.targets": TARGETS, "lora.alpha": 2 * RANK, "dataset.context_tokens": length,
                     "dataset.target_tokens": length, "training.accumulation": 1,
                     "training.learning_rate": RATE, "training.schedule": "constant",
                     "training.warmup_share": 0.0, "training.weight_decay": 0.0, "training.save_steps": 0,
                     "training.max_steps": steps, **settings})
    store: Any = Windows(length, steps)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        loaded = load(config, store, device)
        function: Any = causal_loss
        if config["stream.chunk_tokens"]:
            from training.trainer.streaming import StreamedLoss

            (Path(folder) / "stream").mkdir()
            function = StreamedLoss(loaded.model, config, Path(folder), device)
        engine = PlainEngine(loaded.model, loaded.trainable, config, device)
        training = loop.Training(
            run=run, config=config, store=store, engine=engine, loss_function=function,
            heartbeat=Heartbeat(run, active=False), journal=Journal(run),
            watch=Watch(run.stop), identity={"config": {}, "data": ""}, session_start=time.monotonic())
        training.train()
        return list(training._durations)


def _clock() -> tuple[Any, list[float]]:
    """A callback of Hugging Face's trainers that writes down the seconds of each step."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Between the begin and the end of a step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Start."""
            self.start = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Stop."""
            seconds.append(time.monotonic() - self.start)

    return Clock(), seconds


def _arguments(kind: Any, folder: str, steps: int, **more: Any) -> Any:
    return kind(output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=1,
                max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
                gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
                seed=0, **more)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")


def run_trainer(base: Path, length: int, steps: int, _: dict[str, Any]) -> list[float]:
    """The same under Hugging Face's Trainer with PEFT."""
    from peft import get_peft_model
    from transformers import Qwen2ForCausalLM, Trainer, TrainingArguments

    clock, seconds = _clock()
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(base), _lora())
    model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model=model, args=_arguments(TrainingArguments, folder, steps), callbacks=[clock],
                train_dataset=Windows(length, steps)).train()  # type: ignore[arg-type]
    return seconds


def run_trl(base: Path, length: int, steps: int, _: dict[str, Any]) -> list[float]:
    """The same under TRL's SFTTrainer, with tokens given, so that it neither tokenizes nor packs."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    clock, seconds = _clock()
    rows = Dataset.from_dict({"input_ids": Windows(length, steps).rows.tolist()})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(SFTConfig, folder, steps, max_length=None, packing=False)
        SFTTrainer(model=Qwen2ForCausalLM.from_pretrained(base), args=arguments, train_dataset=rows,
                   processing_class=tokenizer, peft_config=_lora(), callbacks=[clock]).train()
    return seconds


RUNS: dict[str, Callable[[Path, int, int, dict[str, Any]], list[float]]] = {
    "ELITE": run_elite, RECOMPUTED: run_elite, "Trainer + PEFT": run_trainer, "TRL SFT": run_trl}


def peak_bytes() -> int:
    """The highest resident size of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def child(name: str, base: Path, length: int, steps: int, settings: dict[str, Any]) -> None:
    """One contender's run; a line of JSON on standard output."""
    seconds = RUNS[name](base, length, steps, settings)
    print("RESULT " + json.dumps({"tokens_per_s": length / statistics.median(seconds[WARM:]),
                                  "peak_bytes": peak_bytes()}))


# -- the comparison ------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every length, every round, every contender."""
    absent = [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]
    for name in absent:
        print(f"{name} is left out: it is not installed.")
    names = [name for name in RUNS if name not in absent and (not arguments.only or name in arguments.only)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_base(base)
        for length in arguments.lengths:
            settings = {name: {} for name in names}
            for name in {"ELITE", RECOMPUTED} & set(names):
                settings[name] = planned(base, length)
                if name == RECOMPUTED and not settings[name]["stream.chunk_tokens"]:
                    settings[name]["training.checkpointing"] = True
            found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name in names:
                    found[name].append(_run(name, base, length, arguments.steps, settings[name]))
            rows += [_row(name, length, runs, settings[name]) for name, runs in found.items()]
            _show(rows[-len(names):])
    return {"date": datetime.date.today().isoformat(), "cores": len(os.sched_getaffinity(0)),
            "steps": arguments.steps, "rounds": arguments.rounds, "versions": _versions(names),
            "left_out": absent, "rows": rows}


def _run(name: str, base: Path, length: int, steps: int, settings: dict[str, Any]) -> dict[str, float]:
    cores = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": cores, "OMP_WAIT_POLICY": "passive",
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--child", name, "--base", str(base), "--lengths", str(length),
               "--steps", str(steps), "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name} at {length:,} tokens failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def _row(name: str, length: int, runs: list[dict[str, float]], settings: dict[str, Any]) -> dict[str, Any]:
    speeds, peaks = [run["tokens_per_s"] for run in runs], [run["peak_bytes"] for run in runs]
    return {"name": name, "length": length, "tokens_per_s": round(statistics.median(speeds), 1),
            "tokens_per_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
            "peak_bytes": int(statistics.median(peaks)), "settings": settings}


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        low, high = row["tokens_per_s_range"]
        print(f"{row['length']:>7,} tokens  {row['name']:<17} {row['tokens_per_s']:>7,.0f} tokens/s "
              f"({low:,.0f}-{high:,.0f})  {row['peak_bytes'] / 1e6:>7,.0f} MB", flush=True)


def _versions(names: list[str]) -> dict[str, str]:
    from importlib.metadata import version

    wanted = ["torch", "transformers", "peft", *(["trl"] if "TRL SFT" in names else [])]
    return {name: version(name) for name in wanted}


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(RUNS))
    parser.add_argument("--child", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.base, arguments.lengths[0], arguments.steps, arguments.settings)
        return
    found = compare(arguments)
    path = ROOT / "benchmarks" / "results" / f"trainers-{found['date']}.json"
    if arguments.only is None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
