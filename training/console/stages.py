"""Each stage's decisions and their reasons, as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from training.console.theme import amount, gib, plain, rows, span
from training.records import Choice, HardwareProfile, Limit, Plan, RepositoryFacts, Request

LIMITS = {"device_memory": "device memory", "host_memory": "host memory", "disk": "disk",
          "hours": "hours granted", "repository": "repository"}
SHOWN_FLAGS = ("avx2", "avx512f", "amx_bf16", "asimd", "sve")
# Shown whatever their source; the rest of the choices only when the user or a measurement set them.
MAIN_KEYS = ("model.base", "model.quantization", "dataset.context_tokens", "lora.rank", "training.epochs",
             "training.learning_rate", "deepspeed.stage")
SAID_BEFORE = ("run.name", "dataset.repo")  # in the opening line
SHOWN_FIGURES = ("matmul", "attention", "memory_bandwidth", "disk.", "h2d_pinned", "train_step")


def heading(console: Console, number: int, name: str, seconds: float | None = None) -> None:
    """The line that opens a stage; `seconds`: how long its work took."""
    console.print()
    line = plain(f"{number} {name}", "stage")
    if seconds is not None:
        line.append(f"  {span(seconds)}", "quiet")
    console.print(line)


def _show(console: Console, table: Table) -> None:
    if table.row_count:
        console.print(Padding(table, (0, 0, 0, 2)))


def note(console: Console, text: str, style: str = "") -> None:
    """One indented sentence."""
    console.print(Padding(plain(text, style), (0, 0, 0, 2)))


def opening(console: Console, facts: RepositoryFacts, request: Request) -> None:
    """What goes in and where it goes."""
    console.print(plain(f"ELITE  {facts.name} -> {request.output}", "head"), soft_wrap=True)
    total = sum(facts.languages.values()) or 1
    top = sorted(facts.languages.items(), key=lambda item: -item[1])[:4]
    languages = ", ".join(f"{name} {100 * size / total:.0f} %" for name, size in top)
    note(console, f"{facts.path}: {facts.code_files:,} of {facts.files:,} files accepted, "
                  f"{facts.code_bytes / 1e6:,.2f} MB; {languages}.")


def hardware(console: Console, profile: HardwareProfile, every: bool = False) -> None:
    """What was measured. `every`: all figures with their methods, and what does not work with what to do."""
    table = rows("", "", wide=1)
    flags = " ".join(flag for flag in profile.cpu_flags if flag in SHOWN_FLAGS)
    table.add_row("CPU", plain(f"{profile.cpu_name}, {profile.cpu_cores} cores {flags}".strip()))
    for gpu in profile.gpus:
        table.add_row(f"GPU {gpu.index}", plain(f"{gpu.name}, {gpu.architecture} ({gpu.capability}), "
                                                f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"))
    if not profile.gpus:
        table.add_row("GPU", "none found: training runs on the CPU")
    table.add_row("Memory", f"{gib(profile.ram_available_bytes)} of {gib(profile.ram_total_bytes)} free")
    where = f" at {profile.disk_path}" if profile.disk_path else ""
    table.add_row("Disk", plain(f"{gib(profile.disk_free_bytes)} free{where}"))
    _show(console, table)
    _figures(console, profile, every)
    _supports(console, profile, every)


def _figures(console: Console, profile: HardwareProfile, every: bool) -> None:
    table = rows("Measured", "Value", "Spread", "How", right=(1, 2), wide=3)
    last = ""
    for name, figure in sorted(profile.figures.items()):
        if every or (figure.value is not None and any(part in name for part in SHOWN_FIGURES)):
            spread = f"{100 * figure.spread:.0f} %" if figure.spread is not None else ""
            value = amount(figure.value, figure.unit)
            how = figure.method if figure.method != last else ""  # a preset has one source for all
            table.add_row(plain(name), value, spread, plain(how, "quiet"))
            last = figure.method
    _show(console, table)


def _supports(console: Console, profile: HardwareProfile, every: bool) -> None:
    works = [name for name, support in profile.supports.items() if support.works]
    lacking = {name: support for name, support in profile.supports.items() if not support.works}
    if works:
        note(console, f"Works here: {', '.join(works)}.")
    if lacking and not every:
        note(console, f"Not here: {', '.join(lacking)}; `doctor` says why and what to do.", "quiet")
    if every:
        table = rows("Not here", "Why, and what to do", wide=1)
        for name, support in lacking.items():
            table.add_row(plain(name), plain("; ".join(filter(None, (support.why, support.what_to_do)))))
        _show(console, table)


def base(console: Console, name: str, why: str, fallback: str) -> None:
    """The base model and why; a fallback is said aloud."""
    if fallback:
        note(console, fallback, "warn")
    note(console, f"Base model: {name}. {why}")


def plan(console: Console, made: Plan) -> None:
    """Tier, limits, memory, time and the choices that were not presets, each with its reason."""
    tier = f"Tier {made.tier}" if made.tier else "Below tier 1"
    note(console, f"{tier}: windows of {made.context_tokens:,} tokens, {made.target_tokens:,} of "
                  f"them trained on; {made.steps:,} steps of {span(made.step_s)}, {span(made.total_s)} in "
                  "all.", "head")
    _limits(console, made.limits, made.tier)
    _memory(console, made)
    _choices(console, made.choices)
    for text in made.notes:
        note(console, text, "warn")


def _choices(console: Console, choices: Mapping[str, Choice]) -> None:
    """The main choices and those that the user or a measurement made: value, source, reason."""
    shown = {name: choice for name, choice in choices.items() if name not in SAID_BEFORE
             and (name in MAIN_KEYS or choice.source in ("user", "measured"))}
    table = rows("Choice", "Value and reason", wide=1)
    for name, choice in shown.items():
        reason = plain(_short(choice.value), "head")
        style = {"user": "head", "measured": "good"}.get(choice.source, "quiet")
        reason.append(f"  {choice.source}: ", style)
        table.add_row(plain(name), reason.append_text(plain(choice.why)))
    _show(console, table)
    if hidden := len(choices) - len(shown):
        note(console, f"{hidden} more choices, each with its reason, are in plan.json.", "quiet")


def _short(value: Any) -> str:
    text = ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else f"{value}"
    return text if len(text) <= 40 else "..." + text[-37:]


def _limits(console: Console, limits: Mapping[str, Limit], chosen: int) -> None:
    table = rows("Limit", "Allows", "Why", wide=2)
    for name, limit in limits.items():
        allows = f"tier {limit.tier}" if limit.tier else "no tier"
        style = "warn" if limit.tier <= chosen else ""
        table.add_row(LIMITS.get(name, plain(name)), plain(allows, style), plain(limit.why))
    _show(console, table)


def _memory(console: Console, made: Plan) -> None:
    terms = sorted(((size, name) for name, size in made.memory.terms.items() if size), reverse=True)
    largest = ", ".join(f"{name} {gib(size)}" for size, name in terms[:4])
    note(console, f"Memory: {gib(made.memory.device_bytes)} on the device ({largest}), "
                  f"{gib(made.memory.host_bytes)} on the host, {gib(made.memory.disk_bytes)} on disk.")


def configuration(console: Console, path: Path, old: Path | None) -> None:
    """Where the plan was written, and where `--fresh` put the old run."""
    if old is not None:
        note(console, f"The old run was moved to {old}.", "warn")
    note(console, f"config.yaml, ds_config.json, plan.json and hardware.json are in {path}.")


def dataset(console: Console, manifest: Mapping[str, Any]) -> None:
    """What went into the windows, what was left out, and why."""
    files, tokens, windows = (_part(manifest, name) for name in ("files", "tokens", "windows"))
    note(console, f"{files.get('accepted', 0):,} of {files.get('seen', 0):,} files; "
                  f"{tokens.get('total', 0):,} tokens, {tokens.get('trained_per_epoch', 0):,} trained on in "
                  f"an epoch; {windows.get('train', 0):,} windows to train, "
                  f"{windows.get('held_out', 0):,} held out.")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in _part(files, "dropped").items())
    if dropped:
        note(console, f"Left out: {dropped}.", "quiet")
    coverage = ", ".join(f"{100 * share:.0f} % at {context}"
                         for context, share in _part(manifest, "dependency_coverage").items()
                         if isinstance(share, int | float))
    if coverage:
        note(console, f"Imports whose source is in the same window: {coverage}.", "quiet")
    if manifest.get("secrets_replaced"):
        note(console, f"Secrets replaced before training: {_count(manifest['secrets_replaced'])}.", "warn")


def _part(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> str:
    return f"{sum(value.values()):,}" if isinstance(value, Mapping) else f"{value:,}"


def result(console: Console, summary: Mapping[str, Any]) -> None:
    """The last table: predicted beside measured, before beside after, a completion, how to load the model."""
    good = summary.get("state") == "done"
    note(console, str(summary.get("verdict", "")), "good" if good else "warn")
    console.print()
    table = rows("", "Predicted", "Measured", "Off", right=(1, 2, 3))
    for row in summary.get("compared", ()):
        table.add_row(plain(row["name"]), row["predicted"], row["measured"], row["off"])
    _show(console, table)
    table = rows("", "Before", "After", "Change", "", right=(1, 2, 3))
    for row in summary.get("quality", ()):
        style = {"better": "good", "worse": "bad"}.get(row["verdict"], "")
        table.add_row(plain(row["name"]), row["before"], row["after"], row["change"],
                      plain(row["verdict"], style))
    _show(console, table)
    if summary.get("sample"):
        _sample(console, summary["sample"])
    _loading(console, summary)


def _sample(console: Console, sample: Mapping[str, str]) -> None:
    console.print()
    note(console, f"A completion in {sample.get('path', '')}, which was held out:", "quiet")
    table = rows("", "", wide=1)
    for name in ("prefix", "before", "after", "expected"):
        lines = sample.get(name, "").rstrip("\n").split("\n")
        lines = lines[-3:] if name == "prefix" else lines[:3]
        table.add_row(plain("..." if name == "prefix" else name, "quiet"), plain("\n".join(lines)))
    _show(console, table)


def _loading(console: Console, summary: Mapping[str, Any]) -> None:
    if not summary.get("load"):
        return
    console.print()
    note(console, f"The model is in {summary['model_dir']}; load it with", "head")
    for line in summary["load"]:
        console.print(plain("    " + line), soft_wrap=True)
    note(console, f"Report for people: {summary['report']}", "quiet")


def runs(console: Console, infos: Sequence[Mapping[str, Any]], folder: str) -> None:
    """The runs of a folder, newest first."""
    if not infos:
        note(console, f"No runs in {folder}.")
    table = rows("Run", "State", "Step", "Loss", "Tier", "Base", "Last change", right=(2, 3, 4))
    for info in infos:
        style = {"done": "good", "failed": "bad", "interrupted": "warn"}.get(info["state"], "")
        loss = f"{info['loss']:.3f}" if info["loss"] is not None else ""
        steps = f"{info['step']:,}/{info['steps']:,}"
        table.add_row(plain(info["name"]), plain(info["state"], style), steps, loss, f"{info['tier']}",
                      plain(info["base_model"]), plain(info["date"][:16]))
    _show(console, table)


def doctor(console: Console, lines: Sequence[tuple[str, str, str, str]]) -> None:
    """What is installed and works: group, name, state, detail."""
    table = rows("", "", "", "", wide=3)
    for group, name, state, detail in lines:
        style = {"yes": "good", "MISSING": "bad"}.get(state, "warn")
        table.add_row(plain(group, "head"), plain(name), plain(state, style), plain(detail))
    _show(console, table)


def ledger(console: Console, entries: Sequence[Any]) -> None:
    """What each optimization did here: the median change of its on-runs against its off-runs."""
    table = rows("Optimization", "Verdict", "Memory", "Tokens/s", "Loss", "", right=(2, 3, 4), wide=5)
    for entry in entries:
        changes = [f"{100 * entry.change[name]:+.1f} %" if name in entry.change else ""
                   for name in ("memory_bytes", "tokens_per_s", "loss")]
        style = {"helped": "good", "hurt": "bad"}.get(entry.verdict, "quiet")
        table.add_row(plain(entry.id), plain(entry.verdict, style), *changes, plain(entry.why, "quiet"))
    _show(console, table)
