"""A run directory with a real dataset and the embedded model, small enough to train in seconds."""

import json
import shutil
import sysconfig
from pathlib import Path

from training.configuration import ConfigurationManager, deepspeed_config, to_yaml
from training.dataset.generator import DatasetGenerator
from training.records import Choice, Memory, Plan
from training.rundir import write_record, write_text
from training.settings import Config

SMALL = {"run.name": "small", "model.base": "embedded", "embedded.hidden": 64, "embedded.layers": 2,
         "embedded.heads": 2, "embedded.kv_heads": 2, "embedded.mlp": 128, "embedded.vocab_tokens": 512,
         "dataset.context_tokens": 128, "dataset.target_tokens": 64, "training.micro_batch": 4,
         "training.accumulation": 2, "training.max_steps": 12, "training.epochs": 5,
         "training.learning_rate": 3e-3, "training.save_steps": 4, "training.checkpointing": False,
         "evaluation.windows": 4, "evaluation.completions": 2, "evaluation.completion_tokens": 8,
         "device.threads": 1}


def repository_at(path: Path) -> Path:
    """A few modules of the standard library."""
    path.mkdir(parents=True)
    for name in ("argparse", "ast", "bisect", "copy", "csv", "glob", "heapq", "json/decoder", "json/encoder"):
        source = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        shutil.copy(source, path / source.name)
    return path


def dataset_at(path: Path, **settings) -> Path:
    """The run directory with its dataset, without configuration."""
    config = Config(SMALL | {"dataset.repo": str(repository_at(path / "repository"))} | settings)
    DatasetGenerator(config, path / "run").generate()
    return path / "run"


def configure(run: Path, **settings) -> Path:
    """Write config.yaml, ds_config.json and plan.json; the run directory."""
    values = SMALL | {name.replace("__", "."): value for name, value in settings.items()}
    config = Config(values)
    plan = Plan(tier=0, context_tokens=config["dataset.context_tokens"], target_tokens=64,
                base_model="embedded",
                choices={name: Choice(value, "user", "a test") for name, value in config.items()},
                memory=Memory(device_bytes=1 << 28, host_bytes=1 << 28, disk_bytes=1 << 20, terms={}),
                limits={}, steps=12, step_s=0.5, total_s=6.0)
    write_record(ConfigurationManager(run).run.plan, plan)
    write_text(run / "config.yaml", to_yaml(config, {}))
    write_text(run / "ds_config.json", json.dumps(deepspeed_config(config)))
    return run
