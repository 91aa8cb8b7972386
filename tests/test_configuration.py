"""The plan as files: what was planned is exactly what the trainer reads."""

import json

import pytest

from training.configuration import ConfigurationManager, deepspeed_config, load_config, to_yaml
from training.errors import CannotWrite
from training.records import Choice, HardwareProfile, Memory, Plan
from training.rundir import RunDirectory, read_record
from training.settings import KEYS, Config, read_yaml

PROFILE = HardwareProfile(name="box", source="measured", date="2026-01-01", system="Linux", cpu_name="x",
                          cpu_cores=2, cpu_flags=(), ram_total_bytes=1, ram_available_bytes=1, gpus=(),
                          disk_path="/", disk_free_bytes=1)


def plan(**values):
    choices = {key.name: Choice(values.get(key.name, key.default), "derived", "because") for key in KEYS}
    return Plan(tier=1, context_tokens=4096, target_tokens=512, base_model="embedded", choices=choices,
                memory=Memory(device_bytes=1, host_bytes=1, disk_bytes=1, terms={}), limits={}, steps=1,
                step_s=1.0, total_s=1.0)


def test_the_trainer_reads_exactly_what_was_planned(tmp_path):
    manager = ConfigurationManager(tmp_path / "run")
    name = 'a "quoted": name # é'
    written = manager.write(plan(**{"run.name": name, "optimizer.eps": 1e-9}), PROFILE, ["a b", "--auto"])
    assert dict(manager.load()) == dict(written) == dict(load_config(tmp_path / "run"))
    assert (tmp_path / "run" / "command.txt").read_text() == "'a b' --auto\n"
    run = RunDirectory(tmp_path / "run")
    assert read_record(Plan, run.plan).choices["run.name"].value == name
    assert read_record(HardwareProfile, run.hardware) == PROFILE


def test_each_key_stands_in_the_yaml_with_its_reason(tmp_path):
    text = to_yaml(Config({}), {"training.epochs": "small repository"})
    assert "  # small repository\n  epochs: 3" in text
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert set(read_yaml(path)) == {key.name for key in KEYS}


@pytest.mark.parametrize(("values", "zero"), [
    ({"deepspeed.stage": 2, "deepspeed.offload_optimizer": True}, {"stage": 2, "offload_optimizer": "cpu"}),
    ({"deepspeed.stage": 3, "deepspeed.offload_parameters": True}, {"stage": 3, "offload_param": "cpu"}),
])
def test_deepspeed_gets_the_stage_and_the_offload_asked_for(values, zero):
    found = deepspeed_config(Config(values))["zero_optimization"]
    assert found["stage"] == zero.pop("stage")
    assert {name: found[name]["device"] for name in zero} == zero


def test_deepspeed_batch_is_the_configured_one():
    found = deepspeed_config(Config({"training.micro_batch": 3, "training.accumulation": 5}))
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (3, 5)
    assert json.loads(json.dumps(found)) == found


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="file"):
        ConfigurationManager(tmp_path / "file").write(plan(), PROFILE, [])
