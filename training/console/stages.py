"""Each stage's decisions and their reasons, as tables that fit 80 columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from training.console.manifests import dataset as dataset
from training.console.manifests import manifest as manifest
from training.console.manifests import windows as windows
from training.console.outlooks import outlook as outlook
from training.console.parts import heading as heading
from training.console.parts import note as note
from training.console.parts import show
from training.console.planned import plan as plan
from training.console.planned import trial as trial
from training.console.theme import amount, gib, plain, rows
from training.records import Gpu, HardwareProfile, RepositoryFacts, Request

SHOWN_FLAGS = ("avx2", "avx512f", "amx_bf16", "asimd", "sve")
SHOWN_FIGURES = {"gpu0": {"matmul_bf16": "bf16", "matmul_fp16": "fp16", "memory_bandwidth": "memory",
                          "h2d_pinned": "from the host"},
                 "cpu": {"matmul_fp32": "fp32", "matmul_bf16": "bf16"},
                 "disk": {"read": "read", "write": "write"}}
LEDGER_FIGURES = ("memory_bytes", "tokens_per_s", "loss", "loss_at_time")


def opening(console: Console, facts: RepositoryFacts, request: Request) -> None:
    """What goes in and where it goes."""
    console.print(plain(f"ELITE  {facts.name} -> {request.output}", "head"), soft_wrap=True)
    total = sum(facts.languages.values()) or 1
    top = sorted(facts.languages.items(), key=lambda item: -item[1])[:4]
    languages = ", ".join(f"{name} {100 * size / total:.0f} %" for name, size in top)
    also = len(request.settings.get("dataset.also", ()))
    more = f" and {also} more {'repositories' if also > 1 else 'repository'}" if also else ""
    note(console, f"{facts.path}{more}: {facts.code_files:,} of {facts.files:,} files accepted, "
                  f"{facts.code_bytes / 1e6:,.2f} MB; {languages}.")


def hardware(console: Console, profile: HardwareProfile, every: bool = False) -> None:
    """What the machine can do. `every`: all figures with their methods, and what does not work with what to
    do."""
    table = rows("", "", wide=1)
    flags = " ".join(flag for flag in profile.cpu_flags if flag in SHOWN_FLAGS)
    speed = "" if every else _speed(profile, "cpu")
    table.add_row("CPU", plain(f"{profile.cpu_name}, {profile.cpu_cores} cores {flags}".strip() + speed))
    for name, gpu in _gpus(profile.gpus):
        table.add_row(plain(name), plain(f"{gpu.name}, {gpu.architecture} ({gpu.capability}), "
                                         f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"))
    if not profile.gpus:
        table.add_row("GPU", "none found: training runs on the CPU")
    if not every and (speed := _speed(profile, "gpu0")):
        table.add_row("", plain(speed.removeprefix(", ")))
    table.add_row("Memory", f"{gib(profile.ram_available_bytes)} of {gib(profile.ram_total_bytes)} free")
    where = f" at {profile.disk_path}" if profile.disk_path else ""
    speed = "" if every else _speed(profile, "disk")
    table.add_row("Disk", plain(f"{gib(profile.disk_free_bytes)} free{where}{speed}"))
    show(console, table)
    _described(console, profile)
    if every:
        _figures(console, profile)
    _supports(console, profile, every)


def _gpus(gpus: Sequence[Gpu]) -> list[tuple[str, Gpu]]:
    """GPUs with their numbers; alike ones that follow each other in one row."""
    found: list[list[Gpu]] = []
    for gpu in gpus:
        if found and dataclasses.replace(gpu, index=found[-1][0].index) == found[-1][0]:
            found[-1].append(gpu)
        else:
            found.append([gpu])
    return [(f"GPU {same[0].index}" + (f"-{same[-1].index}" if len(same) > 1 else ""), same[0])
            for same in found]


def _speed(profile: HardwareProfile, part: str) -> str:
    """The figures of one part that plans rest on, each after a comma."""
    found = {told: profile.figures.get(f"{part}.{name}") for name, told in SHOWN_FIGURES[part].items()}
    return "".join(f", {name} {amount(figure.value, figure.unit)}"
                   for name, figure in found.items() if figure is not None and figure.value is not None)


def _described(console: Console, profile: HardwareProfile) -> None:
    """Where the figures of a described machine are from."""
    if profile.source == "preset":
        note(console, f"Described, not measured: {profile.name}.", "warn")
    for method in {figure.method for name, figure in profile.figures.items()
                   if name.startswith("gpu0.matmul") and figure.method.startswith("not measured")}:
        note(console, f"The GPU's speed is {method}.", "warn")


def _figures(console: Console, profile: HardwareProfile) -> None:
    table = rows("Measured", "Value", "Spread", "How", right=(1, 2), wide=3)
    last = ""
    for name, figure in sorted(profile.figures.items()):
        spread = f"{100 * figure.spread:.0f} %" if figure.spread is not None else ""
        how = figure.method if figure.method != last else ""  # a preset has one source for all
        table.add_row(plain(name), amount(figure.value, figure.unit), spread, plain(how, "quiet"))
        last = figure.method
    show(console, table)


def _supports(console: Console, profile: HardwareProfile, every: bool) -> None:
    works = [name for name, support in profile.supports.items() if support.works]
    lacking = {name: support for name, support in profile.supports.items() if not support.works}
    if works and every:
        note(console, f"Works here: {', '.join(works)}.")
    elif profile.supports:
        names = f"; not {', '.join(lacking)}: `doctor` says why" if lacking else ""
        note(console, f"{len(works)} of {len(profile.supports)} optimizations work here{names}.", "quiet")
    if every:
        table = rows("Not here", "Why, and what to do", wide=1)
        for name, support in lacking.items():
            table.add_row(plain(name), plain("; ".join(filter(None, (support.why, support.what_to_do)))))
        show(console, table)


def base(console: Console, name: str, why: str, fallback: str) -> None:
    """The base model and why; a fallback is said aloud."""
    if fallback:
        note(console, fallback, "warn")
    note(console, f"Base model: {name}. {why}")


def configuration(console: Console, path: Path, old: Path | None) -> None:
    """Where the plan was written, and where `--fresh` put the old run."""
    if old is not None:
        note(console, f"The old run was moved to {old}.", "warn")
    note(console, f"config.yaml, ds_config.json, plan.json and hardware.json are in {path}.")


def result(console: Console, summary: Mapping[str, Any]) -> None:
    """The last table: predicted beside measured, before beside after, a completion, how to load the model."""
    good = summary.get("state") == "done"
    note(console, str(summary.get("verdict", "")), "good" if good else "warn")
    console.print()
    table = rows("", "Predicted", "Measured", "Off", right=(1, 2, 3))
    for row in summary.get("compared", ()):
        table.add_row(plain(row["name"]), row["predicted"], row["measured"], row["off"])
    show(console, table)
    if summary.get("curve"):
        note(console, f"The loss curve at half: {summary['curve']}.", "quiet")
    table = rows("", "Before", "After", "Change", "", right=(1, 2, 3))
    for row in summary.get("quality", ()):
        style = {"better": "good", "worse": "bad"}.get(row["verdict"], "")
        table.add_row(plain(row["name"]), row["before"], row["after"], row["change"],
                      plain(row["verdict"], style))
    show(console, table)
    if summary.get("context"):
        note(console, str(summary["context"]), "quiet")
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
    show(console, table)


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
    show(console, table)


def doctor(console: Console, lines: Sequence[tuple[str, str, str, str]]) -> None:
    """What is installed and works: group, name, state, detail."""
    table = rows("", "", "", "", wide=3)
    for group, name, state, detail in lines:
        style = {"yes": "good", "MISSING": "bad"}.get(state, "warn")
        table.add_row(plain(group, "head"), plain(name), plain(state, style), plain(detail))
    show(console, table)


def ledger(console: Console, entries: Sequence[Any]) -> None:
    """What each optimization did here: the mean change of its on-runs against its off-runs. Figures that do
    not count are quiet, by the interval that the record holds."""
    table = rows("Optimization", "Verdict", "Memory", "Tokens/s", "Loss", "Timed", right=(2, 3, 4, 5),
                 wide=1)
    for entry in entries:
        style = {"helped": "good", "hurt": "bad", "failed": "bad"}.get(entry.verdict, "quiet")
        table.add_row(plain(entry.id), plain(entry.verdict, style), *(
            _ledger_cell(entry.changes.get(name)) for name in LEDGER_FIGURES))
    show(console, table)
    note(console, "Loss: held out, at equal tokens; timed: at equal time.", "quiet")
    for entry in entries:
        if entry.why:
            note(console, f"{entry.id}: {entry.why}", "warn" if entry.verdict == "failed" else "quiet")


def _ledger_cell(change: Any) -> Any:
    if change is None:
        return ""
    style = {"better": "good", "worse": "bad"}.get(change.verdict, "quiet")
    return plain(f"{100 * change.mean:+.1f} %", style)
