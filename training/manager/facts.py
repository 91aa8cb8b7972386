"""What a run directory tells about one run, gathered once for the console's last table and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import EliteError
from training.manager import contexts, forecast
from training.manager.monitor import clock, number, part, read_rows
from training.records import GIB
from training.rundir import RunDirectory, read_data
from training.texts import visible

QUALITY = (("loss", "held-out loss, nats a token", "lower"), ("bits_per_byte", "bits per byte", "lower"),
           ("exact_match", "completions that match exactly", "higher"),
           ("edit_similarity", "edit similarity of completions", "higher"),
           ("parse_rate", "completions that parse", "higher"))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The JSON files of one run as mappings; what is absent or torn is empty."""

    path: Path
    result: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    forecast: dict[str, Any] = field(default_factory=dict)
    command: str = ""


def gather(run_path: str | Path) -> Facts:
    """Read a run directory. Nothing is required to be there."""
    run = RunDirectory(Path(run_path))
    try:
        command = run.command.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        command = ""
    return Facts(path=run.path, result=_mapping(run.result), plan=_mapping(run.plan),
                 hardware=_mapping(run.hardware), manifest=_mapping(run.dataset / "manifest.json"),
                 metrics=read_rows(run.metrics), evaluations=by_step(read_rows(run.evaluations)),
                 forecast=_mapping(run.path / forecast.NAME), command=command)


def by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the steps' own weights (not of their average) in the order of their steps: the untrained ones
    (step 0) may have been evaluated last."""
    own = [row for row in rows if row.get("weights", "last") == "last"]
    return sorted(own, key=lambda row: number(row, "step") or 0)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = read_data(path)
    except EliteError:
        return {}
    return data if isinstance(data, dict) else {}


def size(value: float | None) -> str:
    """Bytes as GiB, or as MiB below a tenth of one.

    >>> size(3 * 2**30), size(5 * 2**20), size(None)
    ('3.00 GiB', '5.0 MiB', 'not measured')
    """
    if value is None:
        return "not measured"
    return f"{value / GIB:,.2f} GiB" if value >= GIB / 10 else f"{value / (1 << 20):,.1f} MiB"


def seconds(value: float | None) -> str:
    """Seconds as a clock, with a tenth below a minute."""
    if value is None:
        return "not measured"
    return f"{value:.1f} s" if value < 60 else clock(value)


def figure(value: float | None, share: bool = False) -> str:
    """A quality figure; a share of 1 as per cent."""
    if value is None:
        return "not measured"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"


def compared(facts: Facts) -> list[dict[str, str]]:
    """Predicted beside measured: name, predicted, measured, and how far the prediction was off."""
    memory, time = part(facts.result, "memory"), part(facts.result, "time")
    rows = []
    for name, values, suffix, show in (("memory", memory, "bytes", size), ("time", time, "s", seconds)):
        predicted, measured = number(values, f"predicted_{suffix}"), number(values, f"measured_{suffix}")
        off = f"{100 * (measured / predicted - 1):+.0f} %" if predicted and measured is not None else ""
        rows.append({"name": name, "predicted": show(predicted), "measured": show(measured), "off": off})
    return rows + _losses(facts)


def final_loss(metrics: list[dict[str, Any]]) -> float | None:
    """The mean training loss of the last tenth of the steps."""
    losses = [loss for row in metrics if (loss := number(row, "loss")) is not None]
    last = losses[-max(1, len(losses) // 10):]
    return sum(last) / len(last) if last else None


def _losses(facts: Facts) -> list[dict[str, str]]:
    """The training loss at the end of a finished run: expected before it began and at half, and measured."""
    measured = final_loss(facts.metrics) if facts.result.get("state") == "done" else None
    rows = []
    for name, found in (("loss, planned", part(part(facts.plan, "ranges"), "loss")),
                        ("loss, at half", facts.forecast)):
        expected, low, high = (number(found, key) for key in ("expected", "low", "high"))
        if measured is None or not expected or low is None or high is None:
            continue
        rows.append({"name": name, "predicted": f"{expected:.2f} ({low:.2f}-{high:.2f})",
                     "measured": f"{measured:.2f}", "off": f"{100 * (measured / expected - 1):+.0f} %"})
    return rows


def quality(facts: Facts) -> list[dict[str, str]]:
    """Before beside after for each figure that was measured, with the change and whether it is better."""
    before, after = (part(part(facts.result, "quality"), name) for name in ("before", "after"))
    rows = []
    for key, name, good in QUALITY:
        old, new = number(before, key), number(after, key)
        if old is None and new is None:
            continue
        share = key not in ("loss", "bits_per_byte")
        rows.append({"name": name, "before": figure(old, share), "after": figure(new, share),
                     **_change(old, new, good, share)})
    return rows


def _change(old: float | None, new: float | None, good: str, share: bool) -> dict[str, str]:
    if old is None or new is None:
        return {"change": "", "verdict": ""}
    text = f"{100 * (new - old):+.1f} points" if share else f"{new - old:+.3f}"
    better = new < old if good == "lower" else new > old
    return {"change": text, "verdict": "same" if new == old else "better" if better else "worse"}


def verdict(facts: Facts) -> str:
    """One sentence on whether training helped, as measured; nothing is said that was not measured."""
    state = facts.result.get("state")
    if state != "done":
        return {"interrupted": "The run was interrupted before its end; it can be resumed.",
                "failed": "The run failed."}.get(str(state), "The run has not ended.")
    values = part(facts.result, "quality")
    old, new = (number(part(values, name), "loss") for name in ("before", "after"))
    if old is None or new is None:
        return "The held-out loss was not measured, so whether training helped is not known."
    if new < old:
        return (f"The loss on held-out files fell from {old:.3f} to {new:.3f} "
                f"({100 * (1 - new / old):.1f} % less).")
    if new == old:
        return f"The loss on held-out files stayed at {old:.3f}: training did not help on held-out code."
    return (f"The loss on held-out files rose from {old:.3f} to {new:.3f}. "
            "Training did not help on held-out code; use the base model or train differently.")


def model_path(facts: Facts) -> Path | None:
    """Where the model lies, or None when there is none."""
    name = facts.result.get("model_dir")
    return facts.path / str(name) if name and isinstance(name, str) else None


def loading_lines(path: Path) -> list[str]:
    """The two lines of Python that load a finished model; an adapter brings its base along."""
    name = "AutoPeftModelForCausalLM" if (path / "adapter_config.json").exists() else "AutoModelForCausalLM"
    package = "peft" if name.startswith("AutoPeft") else "transformers"
    return [f"from {package} import {name}", f"model = {name}.from_pretrained({json.dumps(str(path))})"]


def samples(facts: Facts) -> list[dict[str, str]]:
    """The completions of held-out files in the order in which they were drawn, not the best ones first."""
    names = ("path", "prefix", "before", "after", "expected")
    return [{name: visible(item.get(name) or "") for name in names}
            for item in facts.result.get("samples") or () if isinstance(item, dict)]


def summary(run_path: str | Path) -> dict[str, Any]:
    """The rows of the console's last table, as text.

    Keys: state, verdict, compared [{name, predicted, measured, off}], quality [{name, before, after, change,
    verdict}], sample {path, prefix, before, after, expected} or None, model_dir, load (two lines of Python,
    or none), report, curve (what the loss curve said at half, and the epochs it recommends; "" without one),
    context (what composed context does to the loss; "" when not measured).
    """
    facts = gather(run_path)
    path, shown = model_path(facts), samples(facts)
    return {"state": str(facts.result.get("state") or "unfinished"), "verdict": verdict(facts),
            "compared": compared(facts), "quality": quality(facts), "sample": shown[0] if shown else None,
            "model_dir": str(path) if path else "", "load": loading_lines(path) if path else [],
            "report": str(RunDirectory(facts.path).report), "curve": str(facts.forecast.get("why") or ""),
            "context": visible(contexts.sentence(contexts.curve_of(facts.result, "after")))}
