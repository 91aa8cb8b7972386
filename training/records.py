"""The frozen records that pass between stages, and their JSON.

Units stand in the names: bytes are bytes (GiB only when printing), `_s` is seconds, `_tokens` is tokens.
`None` means not measured, which is not 0.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

Record = TypeVar("Record")
GIB = 1 << 30


@dataclass(frozen=True)
class Choice:
    """A planned value, where it came from (user, measured, derived, preset), and why."""

    value: Any
    source: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number about a machine: its unit, how it was obtained, over how many repeats, with what spread.

    `spread` is (max - min) / median over the repeats. `value` None: not measured, `method` says why.
    """

    value: float | None
    unit: str
    method: str
    repeats: int = 1
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Support:
    """Whether one optimization works on this machine; if not, why and what to do about it."""

    works: bool
    why: str
    what_to_do: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as the driver reports it. `architecture`: Turing, Ampere, Ada, Hopper, Blackwell ..."""

    index: int
    name: str
    architecture: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """What a machine can do. `figures` and `supports` are keyed by dotted names (`cpu.matmul_fp32`).

    `versions`: of driver and packages. `rates_date`: when the rates were measured, if before `date`.
    """

    name: str
    source: str
    date: str
    system: str
    cpu_name: str
    cpu_cores: int
    cpu_flags: tuple[str, ...]
    ram_total_bytes: int
    ram_available_bytes: int
    gpus: tuple[Gpu, ...]
    disk_path: str
    disk_free_bytes: int
    figures: dict[str, Figure] = field(default_factory=dict)
    supports: dict[str, Support] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rates_date: str = ""

    @property
    def device(self) -> str:
        """`cuda` when there is a GPU to train on, else `cpu`."""
        return "cuda" if self.gpus else "cpu"

    def rate(self, name: str) -> float | None:
        """The value of one figure, or None when it was not measured."""
        figure = self.figures.get(name)
        return figure.value if figure else None


@dataclass(frozen=True, kw_only=True)
class RepositoryFacts:
    """What a survey found. `code_bytes`: accepted text; `commits`: those that git reaches, 0 without git."""

    path: str
    name: str
    files: int
    code_files: int
    code_bytes: int
    languages: dict[str, int]
    commits: int = 0


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One kind of linear layer: `count` modules called `name`, each of `inputs` x `outputs` weights."""

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder, read from its config without weights. `parameters`: count per component.

    `intermediate`: MLP width a token passes through (chosen experts together). `active_parameters`: those
    that compute for one token. `linears`: without head and experts. `rope_scaled`: its context is stretched
    already. `note`: what the config left open. `windows`: sliding window of each layer, 0 for full attention;
    () when no layer has one.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    native_context: int
    rope: bool
    tied: bool
    parameters: dict[str, int]
    active_parameters: int = 0
    linears: tuple[LinearShape, ...] = ()
    rope_scaled: bool = False
    note: str = ""
    windows: tuple[int, ...] = ()

    @property
    def total_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.parameters.values())


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A model to start from. `location`: a hub id, a local folder, or `embedded`.

    `fim`: the sentinels (prefix, suffix, middle) or nothing; `fim_order`: as configs/models.yaml has it.
    """

    name: str
    location: str
    licence: str
    shape: ModelShape
    lora_targets: tuple[str, ...]
    fim: dict[str, str] = field(default_factory=dict)
    fim_order: str = "psm"
    languages: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. `settings`: configuration keys set by flag, `--set` or `--config`.

    None or 0 leaves a choice to the planner. `anyway`: run even where the plan does not fit.
    """

    repo: str
    output: str = ""
    model_name: str = ""
    base_model: str = "auto"
    tier: int | None = None
    context_tokens: int | None = None
    epochs: int | None = None
    max_hours: float | None = None
    seed: int | None = None
    anyway: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Planned memory of one process: `terms` are the device's bytes by name and add up to `device_bytes`."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    terms: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The highest tier that one limit alone allows (0: not even the first), and why."""

    tier: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Range:
    """An estimate: lowest, expected and highest. `source`: derived (formulas) or measured (a trial)."""

    low: float
    expected: float
    high: float
    source: str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class TierRow:
    """One tier worked out for a request. `step`: plain, recomputed or streamed. `fits`: verdict by limit.

    `total_s`: of all epochs, before any cut to the hours granted; 0 when no rate is known. `places`: where
    layer inputs, pages and weights live, and the ZeRO stage.
    """

    tier: int
    context_tokens: int
    target_tokens: int
    step: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    step_s: float
    total_s: float
    fits: dict[str, bool]
    places: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialStep:
    """Updates of the real model at one length. `seconds`: each micro-batch's, the first (warm-up) left out;
    `update_s`: clipping and the optimizer's step.

    `peak_bytes`: the device's, while it ran (a CPU: peak resident memory); `live_bytes`: tensors alone, None
    when not measured. `error`: why there is no figure.
    """

    context_tokens: int
    target_tokens: int
    micro_batch: int
    seconds: tuple[float, ...]
    update_s: float
    peak_bytes: int
    live_bytes: int | None = None
    loss: float | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Real steps taken before a run: small ones that fit the constants, one at size that confirms.

    `load_s`: from the process's start to the loaded model. `resident_bytes`: of the process with the model
    loaded, before the first step; `other_bytes`: its peak outside the steps (loading, evaluating, saving).
    `evaluation_s`: one whole evaluation. `confirmed`: the last step had the planned size. `skipped`: why
    there was no trial, or no step at size.
    """

    steps: tuple[TrialStep, ...]
    load_s: float
    resident_bytes: int
    other_bytes: int = 0
    evaluation_s: float | None = None
    save_s: float | None = None
    confirmed: bool = False
    skipped: str = ""
    date: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. `choices` holds every configuration key by its dotted name; tier 0 is below the table.

    `tiers`: each row of the table worked out. `ranges`: low, expected and high of `device_bytes`, `step_s`,
    `total_s` and `loss`, by name; `trial`: what they were fitted to. `room`: usable `device_bytes`,
    `host_bytes` and `disk_bytes`, and `device_total_bytes` before headroom.
    """

    tier: int
    context_tokens: int
    target_tokens: int
    base_model: str
    choices: dict[str, Choice]
    memory: Memory
    limits: dict[str, Limit]
    steps: int
    step_s: float
    total_s: float
    notes: tuple[str, ...] = ()
    tiers: tuple[TierRow, ...] = ()
    ranges: dict[str, Range] = field(default_factory=dict)
    trial: Trial | None = None
    room: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a model does on held-out text: nats a target token, shares of 1, `context_curve.measure`'s."""

    loss: float
    bits_per_byte: float
    exact_match: float | None = None
    edit_similarity: float | None = None
    parse_rate: float | None = None
    context_curve: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What happened. Written as `result.json`; `state` is done, interrupted or failed."""

    state: str
    steps: int
    epochs: float
    tokens_trained: int
    seconds: float
    tier: int
    context_tokens: int
    memory: dict[str, int | None]
    time: dict[str, float | None]
    quality: dict[str, Quality | None]
    model_dir: str
    digest: str
    samples: tuple[dict[str, str], ...] = ()
    error: str = ""
    exit_code: int = 0


def to_data(record: Any) -> Any:
    """A record as plain JSON data: dicts, lists, strings, numbers, None."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_data(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_data(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_data(value) for value in record]
    return record


def from_data(cls: type[Record], data: Any) -> Record:
    """Rebuild a record from `to_data`'s output; unknown fields are ignored.

    Raises ValueError naming the first field that is missing or of the wrong shape.
    """
    return typing.cast(Record, _rebuild(cls, data, cls.__name__))


def _rebuild(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _rebuild_record(typing.cast(type, kind), data, where)
    if origin is typing.Union or origin is types.UnionType:
        options = [a for a in arguments if a is not type(None)]
        return None if data is None else _rebuild(options[0], data, where) if len(options) == 1 else data
    if origin is tuple:
        return tuple(_rebuild(arguments[0], value, where) for value in _expect(data, list, where))
    if origin is dict:
        return {key: _rebuild(arguments[1], value, f"{where}.{key}")
                for key, value in _expect(data, dict, where).items()}
    if kind is float and isinstance(data, int):
        return float(data)
    return data if kind is Any else _expect(data, kind, where)


def _rebuild_record(cls: type, data: Any, where: str) -> Any:
    _expect(data, dict, where)
    hints = typing.get_type_hints(cls)
    values = {}
    for item in dataclasses.fields(cls):
        if item.name in data:
            values[item.name] = _rebuild(hints[item.name], data[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{item.name} is missing")
    return cls(**values)


def _expect(data: Any, kind: type, where: str) -> Any:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is int):
        raise ValueError(f"{where} is {type(data).__name__}, expected {kind.__name__}")
    return data


def dumps(record: Any) -> str:
    """A record as indented JSON text ending in a newline; non-finite numbers are refused."""
    return json.dumps(to_data(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
