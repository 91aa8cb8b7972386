"""Makes a run directory as the earlier stages leave it, small and without a model."""

import json
from pathlib import Path

from training.configuration import to_yaml
from training.records import Choice, Limit, Memory, Plan
from training.rundir import RunDirectory, write_record
from training.settings import KEYS, Config

FAKE = Path(__file__).with_name("fake_trainer.py")


def make_plan(settings: dict | None = None, memory: Memory | None = None) -> Plan:
    values = {key.name: key.default for key in KEYS} | (settings or {})
    return Plan(tier=1, context_tokens=256, target_tokens=64, base_model="embedded",
                choices={name: Choice(value, "derived", f"why {name}") for name, value in values.items()},
                memory=memory or Memory(device_bytes=1 << 28, host_bytes=1 << 28, disk_bytes=1 << 20,
                                        terms={"weights": 3 << 26, "optimizer_state": 1 << 26}),
                limits={"hours": Limit(tier=2, why="8 h granted")}, steps=8, step_s=0.1, total_s=1.0)


def make_run(path: Path, settings: dict | None = None, memory: Memory | None = None) -> RunDirectory:
    """config.yaml, plan.json and a finished dataset's manifest and tokens."""
    run = RunDirectory(path)
    run.dataset.mkdir(parents=True)
    plan = make_plan(settings, memory)
    write_record(run.plan, plan)
    config = Config({name: choice.value for name, choice in plan.choices.items()})
    run.config.write_text(to_yaml(config, {}))
    (run.dataset / "manifest.json").write_text(json.dumps({
        "files": {"seen": 12, "accepted": 9, "dropped": {"binary": 2, "too large": 1}},
        "tokens": {"total": 5000, "trained_per_epoch": 900}, "windows": {"train": 20, "held_out": 3}}))
    (run.dataset / "tokens.bin").write_bytes(b"\0" * 64)
    return run
