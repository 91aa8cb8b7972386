"""Every configuration key: its type, limits and meaning. `config.yaml`, `--set` and the docs use these names.

A configuration is a flat mapping of dotted names (`training.epochs`) in memory and nested by section in YAML.
All checks report every problem at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.errors import EliteError, MissingInput, UsageError, raise_all

MAX_CONFIG_BYTES = 1 << 20
LEAST_STAGE_TOKENS = 64          # the shortest windows of a curriculum
# Shares of the targets that lie in windows where every token is one.
DENSE = ("dataset.fim_share", "dataset.whole_share", "dataset.commit_share")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One configuration key. `low` and `high` are inclusive; `choices` lists the only values allowed."""

    name: str
    kind: type[Any]
    default: Any
    about: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


def _key(name: str, default: Any, about: str, low: float | None = None, high: float | None = None,
         choices: tuple[str, ...] = ()) -> Key:
    return Key(name=name, kind=type(default), default=default, about=about, low=low, high=high,
               choices=choices)


KEYS: tuple[Key, ...] = (
    _key("run.name", "", "Name of the model and of its run directory."),
    _key("run.seed", 1234, "Seed of every random choice.", 0, 2**31 - 1),
    _key("model.base", "embedded", "Hub id, local folder, or `embedded`."),
    _key("model.revision", "", "Commit of the hub repository; empty takes the newest."),
    _key("model.context_native", 4096, "Context the base was trained for, tokens.", 1),
    _key("model.rope_factor", 1.0, "YaRN factor on the rotary embedding; 1 leaves it as it is.", 1.0),
    _key("model.quantization", "none", "Storage of the frozen weights.", choices=("none", "nf4")),
    _key("model.double_quant", True, "Quantize the NF4 block constants too (0.37 bits a parameter less)."),
    _key("model.dtype", "float32", "Type of the computation.", choices=("float32", "bfloat16", "float16")),
    _key("model.attention", "sdpa", "Attention kernel.", choices=("sdpa", "flash_attention_2", "eager")),
    _key("embedded.vocab_tokens", 4096, "Vocabulary of the embedded model's BPE, tokens.", 300, 65536),
    _key("embedded.hidden", 256, "Width of the embedded model.", 32, 4096),
    _key("embedded.layers", 4, "Layers of the embedded model.", 1, 64),
    _key("embedded.heads", 4, "Attention heads of the embedded model.", 1, 64),
    _key("embedded.kv_heads", 4, "Key/value heads of the embedded model.", 1, 64),
    _key("embedded.mlp", 704, "Width of the embedded model's MLP.", 32, 16384),
    _key("lora.enabled", False, "Train a LoRA adapter on a frozen base; false trains every weight."),
    _key("lora.rank", 16, "LoRA rank.", 1, 1024),
    _key("lora.alpha", 32, "LoRA scale; the update is multiplied by alpha / rank.", 1, 4096),
    _key("lora.dropout", 0.0, "Dropout on the adapter's input.", 0.0, 0.9),
    _key("lora.targets", [], "Names of the linear layers that get an adapter; empty takes the registry's."),
    _key("dataset.repo", "", "Folder or git URL the windows come from."),
    _key("dataset.also", [], "More repositories, folders or git URLs, as `--repo` given again; each "
         "one's paths start with its name."),
    _key("dataset.context_tokens", 4096, "Length of a window, context and target together, tokens.", 1),
    _key("dataset.target_tokens", 512, "Tokens at the end of a cross-file window that are trained on.", 1),
    _key("dataset.held_out_share", 0.05, "Share of the files kept for evaluation.", 0.001, 0.5),
    _key("dataset.split", "auto", "What is held out: the newest files by commit time, or clusters of like "
         "files drawn at random; auto: by time where git knows it.", choices=("auto", "time", "cluster")),
    _key("dataset.fim_share", 0.25, "Of the files' tokens, the share in code files that stand alone with a "
         "middle to fill in, if the base can.", 0.0, 1.0),
    _key("dataset.whole_share", 0.15, "Of the files' tokens, the share in full windows of whole files, "
         "dependencies first; the rest has its context composed per target.", 0.0, 1.0),
    _key("dataset.fim_rate", 0.5, "Of the code targets with composed context, the share that also has a "
         "middle to fill in.", 0.0, 1.0),
    _key("dataset.commit_share", 0.1, "Of all target tokens, the share from commits: message and old text, "
         "then the patch.", 0.0, 0.9),
    _key("dataset.replay", "", "A second corpus, folder or git URL, mixed in against forgetting."),
    _key("dataset.replay_share", 0.2, "Of all target tokens, the share from the second corpus, if there is "
         "one.", 0.0, 0.9),
    _key("dataset.curriculum_stages", 1, "Stages of growing context, each twice the one before; 1: full "
         "context from the start.", 1, 16),
    _key("dataset.curriculum_share", 0.3, "Share of the first epoch that the shorter stages take.", 0.0, 1.0),
    _key("dataset.max_file_bytes", 1 << 20, "Larger files are left out, bytes.", 1),
    _key("training.epochs", 3, "Passes over the training windows.", 1, 1000),
    _key("training.max_steps", 0, "Ends the run at this step; 0: by epochs.", 0),
    _key("training.budget_s", 0.0, "Seconds of training steps granted; the number of steps is fitted to the "
         "measured speed of the first ones. 0: no limit.", 0.0),
    _key("training.trial", True, "Take a few real steps before the run, to measure its memory and time."),
    _key("training.micro_batch", 1, "Windows a device computes at once.", 1, 4096),
    _key("training.accumulation", 8, "Micro-batches summed before an update.", 1, 4096),
    _key("training.learning_rate", 2e-4, "Highest learning rate.", 1e-8, 1.0),
    _key("training.schedule", "cosine", "Course of the learning rate.",
         choices=("cosine", "linear", "constant", "one_cycle")),
    _key("training.warmup_share", 0.03, "Share of the steps with a rising learning rate.", 0.0, 0.5),
    _key("training.min_lr_share", 0.1, "Last learning rate as a share of the highest.", 0.0, 1.0),
    _key("training.weight_decay", 0.01, "AdamW's weight decay on matrices.", 0.0, 1.0),
    _key("training.clip_norm", 1.0, "Gradients are scaled down to this norm; 0: never.", 0.0),
    _key("training.checkpointing", True, "Recompute activations in the backward pass."),
    _key("training.loss_chunk_tokens", 1024, "Tokens whose logits exist at once in the loss; 0: all.", 0),
    _key("training.eval_steps", 0, "Evaluate every so many steps; 0: before and after only.", 0),
    _key("training.save_steps", 100, "Checkpoint every so many steps; 0: at the end and when stopped.", 0),
    _key("training.keep_checkpoints", 2, "Newest checkpoints kept.", 1, 1000),
    _key("optimizer.name", "adamw", "Optimizer.", choices=("adamw", "adamw_8bit", "paged_adamw_8bit")),
    _key("optimizer.beta1", 0.9, "Decay of the first moment.", 0.0, 0.9999),
    _key("optimizer.beta2", 0.95, "Decay of the second moment.", 0.0, 0.99999),
    _key("optimizer.eps", 1e-8, "Added to the root of the second moment.", 0.0, 1.0),
    _key("deepspeed.stage", 0, "ZeRO stage; 0: plain Python without DeepSpeed.", 0, 3),
    _key("deepspeed.offload_optimizer", False, "Keep the optimizer's state in host memory."),
    _key("deepspeed.offload_parameters", False, "Keep parameters in host memory (stage 3)."),
    _key("device.kind", "cpu", "Where the model is trained.", choices=("cpu", "cuda")),
    _key("device.count", 1, "Devices, one process each.", 1, 1024),
    _key("device.threads", 0, "CPU threads of a process; 0: the machine's cores shared out.", 0, 4096),
    _key("device.gpus", "", "Which GPUs, by index (`0,2`); empty: the first ones."),
    _key("device.allocator", "default", "How memory is taken. On a GPU: segments that grow, or `split`, "
         "which keeps blocks above 512 MiB whole. On a CPU `mapped` gives blocks from 1 MiB on back at once.",
         choices=("default", "expandable", "split", "mapped")),
    _key("device.memory_share", 0.0, "Share of a GPU's memory that a process may take; 0: all.", 0.0, 1.0),
    _key("device.pool_share", 0.0, "Share of the planned device memory taken at the start; 0: none.", 0.0,
         1.0),
    _key("device.warmup_steps", 0, "Steps on made-up windows before the first real one; they change no "
         "weight.", 0, 100),
    _key("device.defragment_steps", 0, "Every so many updates idle device memory is given back when it is a "
         "fifth or more of what is reserved; 0: never.", 0),
    _key("device.cudnn_autotune", False, "cuDNN tries its convolution algorithms and keeps the fastest."),
    _key("device.matmul_precision", "highest", "Factors of float32 matrix products: float32, TF32, or bf16.",
         choices=("highest", "high", "medium")),
    _key("evaluation.windows", 32, "Held-out windows an evaluation reads.", 1),
    _key("evaluation.context_targets", 8, "Held-out targets whose loss is taken at growing length of "
         "composed, random and foreign context.", 0, 1000),
    _key("evaluation.completions", 8, "Held-out spans completed before and after training.", 0, 10000),
    _key("evaluation.completion_tokens", 48, "Longest completion, tokens.", 1, 4096),
    _key("stream.chunk_tokens", 0, "Queries of one call of a decoder layer in the streamed step; 0: the "
         "plain step.", 0),
    _key("stream.page_tokens", 0, "Keys of one attention kernel call; 0: as many as queries.", 0),
    _key("stream.mlp_tokens", 0, "Positions an MLP works on at once inside a chunk; 0: the whole chunk.", 0),
    _key("stream.inputs", "device", "Where layer inputs are kept for the backward pass.",
         choices=("device", "pinned", "pageable", "disk")),
    _key("stream.keep_every", 1, "Of so many layers one input is kept; the others are computed again.", 1),
    _key("stream.encoding", "exact", "How kept layer inputs are stored; int8 and int4 are lossy.",
         choices=("exact", "int8", "int4")),
    _key("stream.pages", "device", "Where the keys and values of the layer being worked on live.",
         choices=("device", "pinned", "pageable")),
    _key("stream.attention", "recompute", "Compute attention again in the backward pass, or keep its output.",
         choices=("recompute", "keep")),
    _key("stream.keys", "recompute", "Compute keys and values again in the backward pass, or keep them.",
         choices=("recompute", "keep")),
    _key("stream.weights", "resident", "Frozen weights stay on the device, or visit it layer by layer.",
         choices=("resident", "streamed")),
)
BY_NAME = {key.name: key for key in KEYS}
SECTIONS = tuple(dict.fromkeys(key.name.split(".")[0] for key in KEYS))


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
    source = f"{where}: " if where else ""
    found: list[EliteError] = []
    for name, value in values.items():
        key = BY_NAME.get(name)
        if key is None:
            near = nearest(str(name), BY_NAME)
            found.append(UsageError(f"{source}Unknown configuration key {name}.{near}"))
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
    (lambda v: v["device.count"] > 1 and v["deepspeed.stage"] == 0,
     "device.count is {device_count} and plain Python drives one device; set deepspeed.stage=2."),
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
    *((lambda v, name=name: v["device.kind"] == "cpu" and bool(v[name]),
       f"{name} is for GPUs and device.kind is cpu; leave it out.")
      for name in ("device.gpus", "device.memory_share", "device.pool_share", "device.defragment_steps",
                   "device.cudnn_autotune")),
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
        return name.strip(), yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError:
        return name.strip(), raw


class _Loader(yaml.SafeLoader):
    """Plain data only; a key given twice is an error, and so are aliases (they can grow without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)

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
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_CONFIG_BYTES:
            raise UsageError(f"{path} is {size_bytes:,} bytes; a configuration has at most "
                             f"{MAX_CONFIG_BYTES:,}.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingInput(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    return flatten(_parse(text, path), path)


def _parse(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deep; a configuration has two levels.") from error


def flatten(data: Any, path: Path) -> dict[str, Any]:
    """Nested sections as dotted names. UsageError when the top is no mapping or a name stands twice."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {type(data).__name__}; a configuration is a mapping such as "
                         "`training: {epochs: 2}`.")
    flat: dict[str, Any] = {}
    for name, value in data.items():
        inner = value.items() if name in SECTIONS and isinstance(value, dict) else [(None, value)]
        for key, item in inner:
            dotted = f"{name}.{key}" if key is not None else name
            if dotted in flat:
                raise UsageError(f"{path}: {dotted} is given twice.")
            flat[dotted] = item
    return flat
