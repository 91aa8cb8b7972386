"""Every configuration key: its type, limits and meaning. `config.yaml`, `--set` and the docs use these names.

A configuration is a flat mapping of dotted names (`training.epochs`) in memory and nested by section in YAML.
All checks report every problem at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from training.errors import EliteError, MissingInput, UsageError, raise_all
from training.keys import BY_NAME as BY_NAME
from training.keys import KEYS as KEYS
from training.keys import SECTIONS as SECTIONS
from training.keys import Key as Key
from training.texts import in_one_line

MAX_CONFIG_BYTES = 1 << 18
MAX_DEPTH, MAX_NODES, MAX_CHARACTERS = 16, 5_000, 8_192     # of a YAML text; characters of one value
LEAST_STAGE_TOKENS = 64          # the shortest windows of a curriculum
# Shares of the targets that lie in windows where every token is one.
DENSE = ("dataset.fim_share", "dataset.whole_share", "dataset.commit_share")


class Config(Mapping[str, Any]):
    """A complete, checked configuration: every key of `KEYS` by its dotted name, read-only."""

    def __init__(self, values: Mapping[str, Any]):
        """Defaults filled in. Raises UsageError or Problems for unknown keys and values out of range."""
        raise_all(problems_in(values))
        self._values = {key.name: _coerce(key, values.get(key.name, key.default)) for key in KEYS}
        raise_all(contradictions(self._values))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def nearest(word: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """` Nearest: X.` for the known word most like this one, or nothing.

    >>> nearest("training.epoch", BY_NAME)
    ' Nearest: training.epochs.'
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Nearest: {close[0]}." if close else ""


def problems_in(values: Mapping[str, Any], where: str = "") -> list[EliteError]:
    """Every unknown key and every value of the wrong type or out of range. `where` names the source."""
    source = f"{in_one_line(where)}: " if where else ""
    found: list[EliteError] = []
    for name, value in values.items():
        key = BY_NAME.get(name)
        if key is None:
            near = nearest(str(name), BY_NAME)
            found.append(UsageError(f"{source}Unknown configuration key {in_one_line(name)}.{near}"))
        elif complaint := _complaint(key, value):
            found.append(UsageError(f"{source}{name} is {value!r}; {complaint}."))
    return found


def _complaint(key: Key, value: Any) -> str:
    if isinstance(value, bool) != (key.kind is bool) or not isinstance(value, _accepted(key.kind)):
        return f"it must be {_KIND_WORDS[key.kind]}"
    if key.kind is list and not all(isinstance(item, str) for item in value):
        return "it must be a list of words"
    if key.choices and value not in key.choices:
        return f"it must be one of {', '.join(key.choices)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if key.low is not None and value < key.low:
        return f"the least is {key.low:g}"
    if key.high is not None and value > key.high:
        return f"the most is {key.high:g}"
    return ""


_KIND_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
               list: "a list of words"}


def _accepted(kind: type[Any]) -> tuple[type[Any], ...]:
    return (int, float) if kind is float else (list, tuple) if kind is list else (kind,)


def _coerce(key: Key, value: Any) -> Any:
    return float(value) if key.kind is float else list(value) if key.kind is list else value


def contradictions(values: Mapping[str, Any]) -> list[EliteError]:
    """Values that cannot be honoured together, each with the key to change."""
    return [UsageError(message.format(**{name.replace(".", "_"): value for name, value in values.items()}))
            for broken, message in RULES if broken(values)]


RULES: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (lambda v: v["dataset.target_tokens"] > v["dataset.context_tokens"],
     "dataset.target_tokens is {dataset_target_tokens:,} and a window holds dataset.context_tokens = "
     "{dataset_context_tokens:,}; lower the target."),
    (lambda v: v["dataset.fim_share"] + v["dataset.whole_share"] > 1,
     "dataset.fim_share {dataset_fim_share:g} and dataset.whole_share {dataset_whole_share:g} add up to more "
     "than 1; lower one."),
    (lambda v: bool(v["dataset.replay"]) and v["dataset.commit_share"] + v["dataset.replay_share"] > 0.9,
     "dataset.commit_share {dataset_commit_share:g} and dataset.replay_share {dataset_replay_share:g} leave "
     "the files less than a tenth; lower one."),
    (lambda v: v["dataset.curriculum_stages"] > 1 and
     v["dataset.context_tokens"] >> (v["dataset.curriculum_stages"] - 1) < LEAST_STAGE_TOKENS,
     "dataset.curriculum_stages {dataset_curriculum_stages} halves windows of {dataset_context_tokens:,} "
     "tokens to fewer than 64; lower it."),
    (lambda v: v["model.quantization"] == "nf4" and not v["lora.enabled"],
     "model.quantization nf4 freezes the weights, so nothing would be trained; set lora.enabled=true."),
    (lambda v: v["deepspeed.offload_parameters"] and v["deepspeed.stage"] != 3,
     "deepspeed.offload_parameters needs deepspeed.stage=3; it is {deepspeed_stage}."),
    (lambda v: v["deepspeed.offload_optimizer"] and v["deepspeed.stage"] == 0,
     "deepspeed.offload_optimizer needs deepspeed.stage=1, 2 or 3; it is 0."),
    (lambda v: bool(v["device.gpus"]) and not re.fullmatch(r"\d+(,\d+)*", v["device.gpus"]),
     "device.gpus is {device_gpus!r}; give indices such as 0,2."),
    (lambda v: bool(re.fullmatch(r"[\d,]+", v["device.gpus"])) and
     v["device.gpus"].count(",") + 1 != v["device.count"],
     "device.gpus names {device_gpus} and device.count is {device_count}; give as many indices as devices."),
    (lambda v: v["device.kind"] == "cpu" and v["device.allocator"] in ("expandable", "split"),
     "device.allocator {device_allocator} is made for GPUs; on a CPU set it to default or mapped."),
    (lambda v: v["device.kind"] == "cuda" and v["device.allocator"] == "mapped",
     "device.allocator mapped is made for CPUs; on a GPU set it to default, expandable or split."),
    (lambda v: v["embedded.hidden"] % v["embedded.heads"] != 0,
     "embedded.hidden {embedded_hidden} is no multiple of embedded.heads {embedded_heads}."),
    (lambda v: v["embedded.heads"] % v["embedded.kv_heads"] != 0,
     "embedded.heads {embedded_heads} is no multiple of embedded.kv_heads {embedded_kv_heads}."),
    (lambda v: v["stream.weights"] == "streamed" and not v["lora.enabled"],
     "stream.weights is streamed and every weight is trained; only frozen ones can be. Set "
     "lora.enabled=true."),
    (lambda v: v["stream.weights"] == "streamed" and v["deepspeed.stage"] == 3,
     "stream.weights is streamed and deepspeed.stage is 3; both move the weights. Set "
     "stream.weights=resident."),
    *((lambda v, name=name, off=off: v[name] != off and not v["lora.enabled"],
       f"{name} is for adapters and lora.enabled is false; leave it out.")
      for name, off in (("lora.plus_ratio", 1.0), ("lora.rank_stabilized", False), ("lora.dora", False))),
    *((lambda v, name=name, off=off: v[name] != off and v["deepspeed.stage"] > 0,
       f"{name} needs whole gradients and ZeRO partitions them; set deepspeed.stage=0 or leave it out.")
      for name, off in (("training.adaptive_clip", 0.0), ("training.gradient_noise", 0.0),
                        ("optimizer.lookahead_steps", 0), ("parallel.compression", "none"))),
    (lambda v: v["optimizer.name"] != "adamw" and v["deepspeed.stage"] > 0,
     "optimizer.name is {optimizer_name} and deepspeed.stage is {deepspeed_stage}; ZeRO shards or offloads "
     "the optimizer's state itself. Set optimizer.name=adamw."),
    (lambda v: v["training.averaging"] != "none" and v["deepspeed.stage"] == 3,
     "training.averaging needs whole weights and deepspeed.stage 3 partitions them; set deepspeed.stage=2."),
    (lambda v: v["dataset.curriculum_pace"] == "dynamic" and v["dataset.curriculum_stages"] < 2,
     "dataset.curriculum_pace is dynamic and there is one stage; set dataset.curriculum_stages=2 or more."),
    *((lambda v, name=name: v[name] > 0 and not v["training.checkpointing"],
       f"{name} chooses among recomputed activations and training.checkpointing is false; set it to true.")
      for name in ("training.kept_layers", "training.kept_inputs")),
    (lambda v: v["training.kept_layers"] > 0 and v["training.kept_inputs"] > 0,
     "training.kept_layers and training.kept_inputs are two ways to spend memory; set one of them."),
    *((lambda v, name=name, off=off: v[name] != off and v["stream.chunk_tokens"] > 0,
       f"{name} is for the plain step and stream.chunk_tokens chooses the streamed one; leave it out.")
      for name, off in (("training.kept_layers", 0), ("training.kept_inputs", 0), ("training.compile", False),
                        ("parallel.ring", 1))),
    (lambda v: v["model.kv_heads"] > 0 and v["model.base"] == "embedded",
     "model.kv_heads pools a base's heads; the embedded model is made with embedded.kv_heads."),
    (lambda v: v["model.heal_steps"] > 0 and not v["model.kv_heads"],
     "model.heal_steps is {model_heal_steps} and no heads are pooled; set model.kv_heads."),
    (lambda v: v["parallel.compression"] != "none" and v["device.count"] < 2,
     "parallel.compression is {parallel_compression} and one device exchanges no gradients; leave it out."),
    (lambda v: v["device.count"] % v["parallel.ring"] != 0,
     "device.count {device_count} is no multiple of parallel.ring {parallel_ring}."),
    (lambda v: v["parallel.ring"] > 1 and v["training.compile"],
     "training.compile and parallel.ring cannot go together; set training.compile=false."),
    (lambda v: v["parallel.ring"] > 1 and v["deepspeed.stage"] == 3,
     "parallel.ring shares out tokens and deepspeed.stage 3 weights; set deepspeed.stage=2."),
    *((lambda v, name=name: v["device.kind"] == "cpu" and bool(v[name]),
       f"{name} is for GPUs and device.kind is cpu; leave it out.")
      for name in ("device.gpus", "device.memory_share", "device.pool_share", "device.defragment_steps",
                   "device.cudnn_autotune", "model.fused_kernels")),
)


def most_targets(values: Mapping[str, Any]) -> int:
    """The most tokens of one window that are trained on: all of a window of a dense kind, if any is made. A
    share that is left out counts as 0.

    >>> most_targets({"dataset.context_tokens": 4096, "dataset.target_tokens": 512})
    512
    >>> most_targets({"dataset.context_tokens": 4096, "dataset.target_tokens": 512, "dataset.fim_share": 0.2})
    4096
    """
    replayed = bool(values.get("dataset.replay")) and values.get("dataset.replay_share", 0.0) > 0
    dense = replayed or any(values.get(name, 0.0) > 0 for name in DENSE)
    return int(values["dataset.context_tokens" if dense else "dataset.target_tokens"])


def parse_assignment(text: str) -> tuple[str, Any]:
    """`training.epochs=2` as a name and a typed value. Raises UsageError when there is no `=`.

    >>> parse_assignment("training.learning_rate=1e-4")
    ('training.learning_rate', 0.0001)
    >>> parse_assignment("lora.targets=[q_proj, v_proj]")
    ('lora.targets', ['q_proj', 'v_proj'])
    """
    name, separator, raw = text.partition("=")
    if not separator or not name.strip():
        raise UsageError(f"--set takes KEY=VALUE; got {text!r}. Example: --set training.epochs=2")
    key = BY_NAME.get(name.strip())
    if key is not None and key.kind is str:
        return name.strip(), raw
    try:
        return name.strip(), _plain_data(raw)
    except yaml.YAMLError:
        return name.strip(), raw


class _Loader(yaml.SafeLoader):
    """Plain data only; a key given twice is an error, and so are aliases (they can grow without bound).

    Depth, nodes and texts are bounded as they are read: PyYAML takes a second for 20,000 nodes, and as long
    for `1:1:1 ...` of 100,000 characters, which YAML 1.1 reads as a number of base 60.
    """

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        self.nodes += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deep; a configuration has two levels")
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(f"it holds over {MAX_NODES:,} keys and values")
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_CHARACTERS:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} holds a text of {len(node.value):,} "
                                 f"characters; the most is {MAX_CHARACTERS:,}")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} on line {key_node.start_mark.line + 1} is not text")
            if key in mapping:
                raise yaml.YAMLError(f"{key} is given twice, again on line {key_node.start_mark.line + 1}")
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


# YAML 1.1 reads 1e-4 as text; YAML 1.2 and people read it as a number.
_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of nested sections or dotted names as a flat mapping; the keys are not checked here.

    Raises MissingInput when it cannot be read, UsageError when it is no YAML mapping.
    """
    name = in_one_line(path)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_CONFIG_BYTES:
            raise UsageError(f"{name} is {size_bytes:,} bytes; a configuration has at most "
                             f"{MAX_CONFIG_BYTES:,}.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingInput(f"Cannot read the configuration {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start}).") from error
    return flatten(_parse(text, name), name)


def _parse(text: str, name: str) -> Any:
    try:
        return _plain_data(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} is not valid YAML: {reason}.") from error


def _plain_data(text: str) -> Any:
    """What a YAML text holds. Raises YAMLError, also where PyYAML's constructors raise something else: for
    `0b_`, `2001-13-01`, 5,000 digits (ValueError), `!!bool x` (KeyError), `!!timestamp x` (AttributeError).
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(f"a value is not what it says it is ({str(error)[:100]})") from error


def flatten(data: Any, source: str) -> dict[str, Any]:
    """Nested sections as dotted names. UsageError when the top is no mapping or a name stands twice."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{source} holds a {type(data).__name__}; a configuration is a mapping such as "
                         "`training: {epochs: 2}`.")
    flat: dict[str, Any] = {}
    for name, value in data.items():
        inner = value.items() if name in SECTIONS and isinstance(value, dict) else [(None, value)]
        for key, item in inner:
            dotted = f"{name}.{key}" if key is not None else name
            if dotted in flat:
                raise UsageError(f"{source}: {dotted} is given twice.")
            flat[dotted] = item
    return flat
