"""Configuration keys: what is refused, in which words, and that nothing is lost on the way through YAML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import MissingInput, Problems, UsageError
from training.settings import BY_NAME, KEYS, Config, parse_assignment, problems_in, read_yaml


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_an_empty_configuration_is_all_defaults():
    config = Config({})
    assert len(config) == len(KEYS)
    assert all(config[key.name] == key.default for key in KEYS)


def test_every_default_is_within_its_own_limits():
    assert problems_in({key.name: key.default for key in KEYS}) == []


def test_all_problems_are_reported_at_once_with_the_nearest_key():
    with pytest.raises(Problems) as caught:
        Config({"training.epoch": 2, "lora.rank": 0, "training.schedule": "step",
                "training.clip_norm": "much"})
    assert str(caught.value).splitlines() == [
        "Unknown configuration key training.epoch. Nearest: training.epochs.",
        "lora.rank is 0; the least is 1.",
        "training.schedule is 'step'; it must be one of cosine, linear, constant, one_cycle.",
        "training.clip_norm is 'much'; it must be a number.",
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("values", "words"), [
    ({"model.quantization": "nf4"}, "set lora.enabled=true"),
    ({"dataset.context_tokens": 256, "dataset.target_tokens": 512}, "a window holds dataset.context_tokens"),
    ({"deepspeed.offload_parameters": True, "deepspeed.stage": 2}, "needs deepspeed.stage=3; it is 2"),
    ({"lora.plus_ratio": 16.0}, "lora.plus_ratio is for adapters and lora.enabled is false"),
    ({"training.adaptive_clip": 0.01, "deepspeed.stage": 2}, "training.adaptive_clip needs whole gradients"),
    ({"optimizer.name": "muon", "deepspeed.stage": 2}, "Set optimizer.name=adamw"),
    ({"training.averaging": "ema", "deepspeed.stage": 3}, "set deepspeed.stage=2"),
    ({"dataset.curriculum_pace": "dynamic"}, "set dataset.curriculum_stages=2 or more"),
    ({"training.kept_layers": 2, "training.checkpointing": False}, "training.checkpointing is false"),
    ({"training.kept_layers": 2, "training.kept_inputs": 2}, "two ways to spend memory"),
    ({"training.compile": True, "stream.chunk_tokens": 64}, "training.compile is for the plain step"),
    ({"model.kv_heads": 2}, "the embedded model is made with embedded.kv_heads"),
    ({"model.heal_steps": 2}, "no heads are pooled; set model.kv_heads"),
    ({"parallel.compression": "powersgd"}, "one device exchanges no gradients"),
    ({"parallel.ring": 2}, "device.count 1 is no multiple of parallel.ring 2"),
    ({"parallel.ring": 2, "device.count": 2, "deepspeed.stage": 3}, "shares out tokens"),
    ({"model.fused_kernels": True}, "model.fused_kernels is for GPUs and device.kind is cpu"),
    ({"stream.weights": "streamed"}, "only frozen ones can be. Set lora.enabled=true"),
    ({"stream.chunk_tokens": -1}, "stream.chunk_tokens is -1; the least is 0"),
    ({"stream.inputs": "ram"}, "it must be one of device, pinned, pageable, disk"),
    ({"device.kind": "cuda", "device.gpus": "0,1"}, "device.gpus names 0,1 and device.count is 1"),
    ({"device.kind": "cuda", "device.gpus": "a,b"}, "device.gpus is 'a,b'; give indices such as 0,2"),
    ({"device.allocator": "split"}, "device.allocator split is made for GPUs; on a CPU set it to default"),
    ({"device.pool_share": 0.5}, "device.pool_share is for GPUs and device.kind is cpu; leave it out"),
    ({"training.learning_rate": float("nan")}, "it must be a finite number"),
])
def test_values_that_cannot_be_honoured_are_refused(values, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        Config(values)


@pytest.mark.parametrize(("text", "words"), [
    ("- a\n- b\n", "holds a list"),
    ("training: {epochs: 2\n", "is not valid YAML"),
    ("a: &x [1]\nb: *x\n", "aliases"),
    ("training: {epochs: 1, epochs: 2}\n", "epochs is given twice"),
    ("training:\n  epochs: 1\ntraining.epochs: 2\n", "training.epochs is given twice"),
    ("x: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ("[" * 5000, "nested too deep|not valid YAML"),
    (b"\xff\xfe\x00", "not UTF-8"),
    ("1: 2\n", "is not text"),
    ("a: 0b_\n", "a value is not what it says it is"),
    ("a: " + "1" * 5_000 + "\n", "a value is not what it says it is"),
    ("a: !!bool x\n", "a value is not what it says it is"),
    ("a: [" + "1," * 6_000 + "]\n", "holds over 5,000 keys and values"),
    ("a: " + "x" * 9_000 + "\n", "line 1 holds a text of 9,000 characters; the most is 8,192"),
])
def test_a_file_that_is_no_configuration_gets_one_line(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_yaml(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_of_two_lines_is_told_in_one(tmp_path):
    with pytest.raises(MissingInput) as caught:
        read_yaml(tmp_path / "none\nTraining is done.yaml")
    assert "none<U+000A>Training is done.yaml" in str(caught.value)
    assert [str(each) for each in problems_in({"x\ny": 1}, "a\nb.yaml")] == [
        "a<U+000A>b.yaml: Unknown configuration key x<U+000A>y."]


def test_a_missing_file_is_missing_input(tmp_path):
    with pytest.raises(MissingInput, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_sections_and_dotted_names_mean_the_same(tmp_path):
    nested = read_yaml(write(tmp_path, "training:\n  epochs: 2\n  learning_rate: 1e-4\n"))
    dotted = read_yaml(write(tmp_path, "training.epochs: 2\ntraining.learning_rate: 1e-4\n"))
    assert nested == dotted == {"training.epochs": 2, "training.learning_rate": 1e-4}


@pytest.mark.parametrize(("text", "value"), [
    ("training.epochs=2", 2), ("training.learning_rate=3e-5", 3e-5), ("model.revision=12", "12"),
    ("lora.enabled=true", True), ("lora.targets=[q_proj]", ["q_proj"]), ("training.epochs=two", "two"),
    ("training.epochs=0b_", "0b_"), ("training.epochs=2001-13-01", "2001-13-01"),
])
def test_set_reads_typed_values(text, value):
    assert parse_assignment(text)[1] == value


def test_set_without_a_value_shows_an_example():
    with pytest.raises(UsageError, match=r"--set training\.epochs=2"):
        parse_assignment("training.epochs")


@given(st.dictionaries(st.sampled_from(sorted(BY_NAME)), st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))))
def test_any_values_are_either_a_complete_configuration_or_a_usage_error(values):
    try:
        known = set(Config(values))
    except (UsageError, Problems) as error:
        known = set(BY_NAME) if error.exit_code == 2 else set()
    assert known == set(BY_NAME)
