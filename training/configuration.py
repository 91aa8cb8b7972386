"""Stage 3: the plan as `config.yaml` and `ds_config.json`, which are all that the trainer reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.records import HardwareProfile, Plan
from training.rundir import RunDirectory, write_record, write_text
from training.settings import KEYS, SECTIONS, Config, read_yaml
from training.texts import without_password


class ConfigurationManager:
    """Writes and reads the configuration of one run directory."""

    def __init__(self, output: str | Path):
        self.run = RunDirectory(Path(output))

    def write(self, plan: Plan, profile: HardwareProfile, argv: list[str]) -> Config:
        """Write hardware.json, plan.json, config.yaml, ds_config.json and command.txt.

        Returns the configuration. Raises UsageError when the plan's choices contradict each other,
        CannotWrite when the disk refuses.
        """
        config = Config({name: choice.value for name, choice in plan.choices.items()})
        write_record(self.run.plan, plan)  # first: a folder with a plan is a run, and can be resumed
        write_record(self.run.hardware, profile)
        reasons = {name: choice.why for name, choice in plan.choices.items()}
        write_text(self.run.config, to_yaml(config, reasons))
        write_text(self.run.deepspeed, json.dumps(deepspeed_config(config), indent=2) + "\n")
        write_text(self.run.command, without_password(shlex.join(argv)) + "\n")
        return config

    def load(self) -> Config:
        """The configuration of an existing run. Raises MissingInput, UsageError or Problems."""
        return load_config(self.run.path)


def load_config(run_path: str | Path) -> Config:
    """Read and check `config.yaml` of a run directory."""
    return Config(read_yaml(RunDirectory(Path(run_path)).config))


def to_yaml(config: Config, reasons: Mapping[str, str]) -> str:
    """The configuration as YAML: a section a block, each key with its reason, or its meaning, as comment."""
    lines = ["# Written by elite_train.py. `elite_train.py --config FILE` makes a new run of an edited copy."]
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for key in KEYS:
            if key.name.startswith(section + "."):
                why = " ".join((reasons.get(key.name) or key.about).split())
                value = json.dumps(config[key.name], ensure_ascii=False)
                lines += [f"  # {why}", f"  {key.name.split('.')[1]}: {value}"]
    return "\n".join(lines) + "\n"


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON for this configuration; the trainer passes it to `deepspeed.initialize` unchanged.

    The optimizer is not in it: the trainer builds it, so that plain Python and DeepSpeed share one.
    """
    zero: dict[str, Any] = {"stage": config["deepspeed.stage"], "contiguous_gradients": True,
                            "overlap_comm": config["device.kind"] == "cuda", "reduce_bucket_size": 50_000_000,
                            "allgather_bucket_size": 50_000_000}
    if config["deepspeed.offload_optimizer"]:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config["device.kind"] == "cuda"}
    if config["deepspeed.offload_parameters"]:
        zero["offload_param"] = {"device": "cpu", "pin_memory": config["device.kind"] == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": config["training.micro_batch"],
        "gradient_accumulation_steps": config["training.accumulation"],
        "gradient_clipping": config["training.clip_norm"],
        "bf16": {"enabled": config["model.dtype"] == "bfloat16"},
        "fp16": {"enabled": config["model.dtype"] == "float16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def reference() -> str:
    """docs/configuration.md: every key with its type, default, limits and meaning."""
    lines = ["# Configuration", "",
             "Generated from `training/settings.py` by `make docs`. The same dotted names serve in",
             "`config.yaml`, in `--config FILE` and in `--set KEY=VALUE`. The command line beats `--config`,",
             "which beats what the planner derives.", ""]
    for section in SECTIONS:
        lines += [f"## {section}", "", "| Key | Type | Default | Limits | Meaning |", "|---|---|---|---|---|"]
        for key in KEYS:
            if key.name.startswith(section + "."):
                lines.append(f"| `{key.name}` | {key.kind.__name__} | `{json.dumps(key.default)}` | "
                             f"{_limits(key.low, key.high, key.choices)} | {key.about} |")
        lines.append("")
    return "\n".join(lines)


def _limits(low: float | None, high: float | None, choices: tuple[str, ...]) -> str:
    if choices:
        return ", ".join(choices)
    if low is None:
        return ""
    return f"{low:,g} or more" if high is None else f"{low:,g} to {high:,.15g}"
