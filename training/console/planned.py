"""The plan on one screen of 80 columns: memory against its limits, every tier's verdicts, choices, ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from training.console.parts import note, show
from training.console.theme import gib, plain, rows, span
from training.records import GIB, Choice, Limit, Plan, Range, TierRow

LIMITS = {"device_memory": "device", "host_memory": "host", "disk": "disk", "hours": "hours",
          "repository": "repository", "model": "model"}
# Shown whatever their source; the rest of the choices only when the user or a measurement set them.
MAIN_KEYS = ("model.quantization", "training.epochs", "training.learning_rate", "deepspeed.stage")
# In the opening line, the hardware, the headline or the row of the step.
SAID_BEFORE = ("run.name", "dataset.repo", "dataset.also", "dataset.context_tokens", "dataset.target_tokens",
               "model.base", "device.kind", "device.count", "device.gpus", "stream.chunk_tokens")
COLOURS = ("black on cyan", "black on green", "black on yellow", "black on magenta", "black on blue",
           "black on white", "black on red", "black on bright_cyan")
LEAST_SHARE = 0.02               # of the whole bar; smaller terms are drawn together as others
MATTERS = 0.25                   # of a room: from here on host memory or disk has a bar of its own
LABEL, FIGURES = 8, 21           # columns beside a bar
KEY_COLUMNS, FOLDED = 26, 7      # beside a reason, and what folding at words may waste of a line
NAMES = {"device_bytes": "device memory", "step_s": "a step", "total_s": "the whole run", "loss": "loss"}


def plan(console: Console, made: Plan) -> None:
    """Window and length, memory against its limits, each tier's verdicts, and the choices that count."""
    tier = f"Tier {made.tier}" if made.tier else "Below tier 1"
    note(console, f"{tier}: windows of {made.context_tokens:,} tokens, {_targets(made)} of "
                  f"them trained on; {made.steps:,} steps of {span(made.step_s)}, {span(made.total_s)} in "
                  "all.", "head")
    _reason(console, made)
    _memory(console, made)
    tiers(console, _with_chosen(made), made.context_tokens)
    _limits(console, made.limits, made.tier)
    _choices(console, made.choices)
    _estimates(console, made)
    for text in made.notes:
        note(console, text, "warn")


def _targets(made: Plan) -> str:
    """Trained tokens of a window: those of a cross-file one, and of one in which all are, where some are."""
    shares = [made.choices[f"dataset.{name}"].value for name in ("fim_share", "whole_share", "commit_share")
              if f"dataset.{name}" in made.choices]
    some = any(shares) and made.target_tokens < made.context_tokens
    return f"{made.target_tokens:,}" + (" or all" if some else "")


def _reason(console: Console, made: Plan) -> None:
    choice = made.choices.get("dataset.context_tokens")
    if choice is not None and (choice.source == "user" or not made.tier):
        why = f"Asked for: {choice.why}" if choice.source == "user" else choice.why
        note(console, f"{why[:1].upper()}{why[1:]}.")


# -- memory --------------------------------------------------------------------------------------------------


def _memory(console: Console, made: Plan) -> None:
    """Bars of device memory by term, and of host memory and disk where they matter."""
    memory, room = made.memory, made.room
    console.print()
    terms = _drawn(memory.terms, max(memory.device_bytes, room.get("device_total_bytes", 0)))
    on_cpu = "device.kind" in made.choices and made.choices["device.kind"].value == "cpu"
    _bar(console, "Memory" if on_cpu else "Device", terms, room.get("device_bytes", 0),
         room.get("device_total_bytes", 0))
    others = []
    places = (("Host", memory.host_bytes, "host_bytes"), ("Disk", memory.disk_bytes, "disk_bytes"))
    for label, need, name in places[on_cpu:]:      # a CPU's host memory is the device
        if name in room and need > MATTERS * room[name]:
            _bar(console, label, [("", need)], room[name], room[name])
        else:
            others.append(f"{gib(need)} on the {label.lower()}")
    if others and not made.tiers:
        note(console, f"Besides: {', '.join(others)}.", "quiet")


def _drawn(terms: Mapping[str, int], whole: int) -> list[tuple[str, int]]:
    """Terms large enough to be seen, largest first, and the sum of the others."""
    ranked = sorted(((size, name) for name, size in terms.items() if size), reverse=True)
    shown = [(name, size) for size, name in ranked[:len(COLOURS) - 1] if size >= LEAST_SHARE * whole]
    rest = sum(terms.values()) - sum(size for _, size in shown)
    return [*shown, ("others", rest)] if rest else shown


def _bar(console: Console, label: str, terms: Sequence[tuple[str, int]], usable: int, total: int) -> None:
    """One bar; letters tell the terms apart where there is no colour. `|` is the limit, `/` the headroom."""
    need = sum(size for _, size in terms)
    width = max(20, console.width - 2 - LABEL - FIGURES)
    scale = width / max(need, total, 1)
    line, drawn = Text(f"  {label:<{LABEL}}"), 0.0
    for index, (name, size) in enumerate(terms):
        cells = round((drawn + size) * scale) - round(drawn * scale)
        line.append(_letter(index, name) * cells, COLOURS[index % len(COLOURS)])
        drawn += size
    line.append(_empty(round(drawn * scale), round(usable * scale), width))
    style = "bad" if usable and need > usable else ""
    line.append(f"  {need / GIB:,.1f} of {usable / GIB:,.1f} GiB" if usable else f"  {gib(need)}", style)
    console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
    legend = [f"{_letter(index, name)} {name} {_figure(size / GIB)}"
              for index, (name, size) in enumerate(terms) if name]
    if legend:
        legend += [f". free {_figure((usable - need) / GIB)}"] * (usable > need)
        legend += [f"/ headroom {_figure((total - usable) / GIB)}"] * (total > usable > 0)
        for told in _listed(legend, console.width - LABEL - 2):
            note(console, told, "quiet", LABEL + 2)


def _listed(items: Sequence[str], columns: int) -> list[str]:
    """Items in lines of at most so many columns, none broken over two.

    >>> _listed(["A one 1", "B two 2", "C six 6"], 17)
    ['A one 1, B two 2,', 'C six 6']
    """
    lines = [""]
    for index, item in enumerate(items):
        told = item + ("," if index < len(items) - 1 else "")
        if lines[-1] and len(f"{lines[-1]} {told}") > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {told}".strip()
    return lines


def _letter(index: int, name: str) -> str:
    return chr(ord("A") + index) if name else "#"


def _empty(drawn: int, usable: int, width: int) -> str:
    """What follows the terms: free room, the limit, headroom."""
    if drawn >= width or not usable:
        return "." * max(0, width - drawn)
    free = "." * max(0, usable - drawn)
    return (free[:-1] + "|" if free else "|") + "/" * max(0, width - max(usable, drawn + 1))


# -- tiers ---------------------------------------------------------------------------------------------------


def _with_chosen(made: Plan) -> list[TierRow]:
    """The tiers, and the plan itself where its window is none of theirs. A limit that was not judged for it
    gets no mark."""
    if not made.tiers or any(row.context_tokens == made.context_tokens for row in made.tiers):
        return list(made.tiers)
    memory, room = made.memory, made.room
    need = {"device_memory": ("device_bytes", memory.device_bytes),
            "host_memory": ("host_bytes", memory.host_bytes), "disk": ("disk_bytes", memory.disk_bytes)}
    fits = {name: size <= room[key] for name, (key, size) in need.items() if key in room}
    own = TierRow(tier=made.tier, context_tokens=made.context_tokens, target_tokens=made.target_tokens,
                  step=_word(made.choices), device_bytes=memory.device_bytes,
                  host_bytes=memory.host_bytes, disk_bytes=memory.disk_bytes, step_s=made.step_s,
                  total_s=made.total_s, fits=fits)
    return sorted([*made.tiers, own], key=lambda row: row.context_tokens)


def tiers(console: Console, found: Iterable[TierRow], chosen_tokens: int) -> None:
    """A row a tier: what it takes, and beside each figure whether that is within its limit. The one whose
    window has `chosen_tokens` is marked."""
    yes, no = _marks(console)
    table = rows("", "Tier", "Context", "Step", "Device", "Host", "Disk", "Hours", "Repo", "Model",
                 right=(1, 2, 4, 5, 6, 7, 8, 9))
    table.padding = (0, 1, 0, 0)
    for row in found:
        def cell(figure: str, name: str, fits: Mapping[str, bool] = row.fits) -> Text:
            mark = {True: yes, False: no}.get(fits.get(name))  # type: ignore[arg-type]
            return plain(f"{figure} {mark or ' ' * len(yes)}" if figure else mark or "",
                         "bad" if mark == no else "")
        chosen = row.context_tokens == chosen_tokens
        table.add_row(">" if chosen else "", plain(row.tier, "head" if chosen else ""),
                      f"{row.context_tokens:,}",
                      row.step, cell(_figure(row.device_bytes / GIB), "device_memory"),
                      cell(_figure(row.host_bytes / GIB), "host_memory"),
                      cell(_figure(row.disk_bytes / GIB), "disk"),
                      cell(_figure(row.total_s / 3600) if row.total_s else "?", "hours"),
                      cell("", "repository"), cell("", "model"))
    if table.row_count:
        console.print()
        show(console, table)
        note(console, f"Device, host and disk in GiB, hours of all epochs; {yes} within its limit, {no} "
                      "not.", "quiet")


def _marks(console: Console) -> tuple[str, str]:
    return ("✓", "✗") if (console.encoding or "").lower().startswith("utf") else ("ok", "NO")


def _figure(value: float) -> str:
    """A figure in a narrow column.

    >>> _figure(0.02), _figure(12.345), _figure(123.4), _figure(12345.6), _figure(3e6)
    ('<0.1', '12.3', '123', '12,346', '3e+06')
    """
    if 0 < value < 0.1:
        return "<0.1"
    if value >= 1e6:
        return f"{value:.0e}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _limits(console: Console, limits: Mapping[str, Limit], chosen: int) -> None:
    """The tier that each limit alone allows, and the reasons of the lowest."""
    if not limits:
        return
    allowed = ", ".join(f"{LIMITS.get(name, name)} {limit.tier or 'none'}" for name, limit in limits.items())
    note(console, f"By limit: {allowed}.")
    lowest = min(limit.tier for limit in limits.values())
    for name, limit in limits.items():
        if limit.tier == lowest or limit.tier < chosen:
            note(console, f"{LIMITS.get(name, name).capitalize()}: {limit.why}.", "warn")


# -- choices and ranges --------------------------------------------------------------------------------------


def _choices(console: Console, choices: Mapping[str, Choice]) -> None:
    """The step, the main choices, and those that the user or a measurement made: value, source, reason."""
    shown = {name: choice for name, choice in choices.items() if name not in SAID_BEFORE
             and (name in MAIN_KEYS or choice.source == "user" or _measured(name, choice))}
    table = rows("", "", wide=1)
    if "stream.chunk_tokens" in choices:
        table.add_row("step", _reasoned(console, _step(choices), choices["stream.chunk_tokens"], 3))
    for name, choice in shown.items():
        table.add_row(plain(name), _reasoned(console, _short(choice.value), choice))
    if table.row_count:
        console.print()
    show(console, table)
    if hidden := len(choices) - len(shown):
        note(console, f"{hidden} more choices, each with its reason, are in plan.json (`--json`).", "quiet")


def _measured(name: str, choice: Choice) -> bool:
    """What was found out by measuring, but for what switches something off."""
    return choice.source == "measured" and choice.value not in ("", False, 0, None)


def _reasoned(console: Console, value: str, choice: Choice, lines: int = 2) -> Text:
    """Value, source, and as much of the reason as the lines hold."""
    reason = plain(value, "head")
    style = {"user": "head", "measured": "good"}.get(choice.source, "quiet")
    reason.append(f"  {choice.source}: ", style).append_text(plain(choice.why))
    room = lines * (console.width - KEY_COLUMNS - FOLDED)
    if len(reason) > room:
        kept = reason.plain[:room].rpartition(" ")[0]
        reason.truncate(len(kept))
        reason.append(" ...")
    return reason


def _step(choices: Mapping[str, Choice]) -> str:
    """The step, and where the streamed one keeps its parts."""
    value, word = {name: choice.value for name, choice in choices.items()}, _word(choices)
    if word != "streamed":
        return {"recomputed": "plain, activations recomputed"}.get(word, word)
    places = ", ".join(f"{name} {value[f'stream.{name}']}" for name in ("inputs", "pages", "weights")
                       if f"stream.{name}" in value)
    return f"streamed, chunks of {value['stream.chunk_tokens']:,}, {places}"


def _word(choices: Mapping[str, Choice]) -> str:
    """plain, recomputed or streamed."""
    def on(name: str) -> bool:
        return name in choices and bool(choices[name].value)
    if on("stream.chunk_tokens"):
        return "streamed"
    return "recomputed" if on("training.checkpointing") else "plain"


def _short(value: Any) -> str:
    text = ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else f"{value}"
    return text if len(text) <= 40 else "..." + text[-37:]


def _estimates(console: Console, made: Plan) -> None:
    """The estimates in one sentence; after a trial they are its table (`trial`)."""
    if made.trial is not None:
        return
    spans = [f"{NAMES.get(name, name)} {_told(name, each.low)} to {_told(name, each.high)}"
             for name, each in made.ranges.items()]
    for each in list(made.ranges.values())[:1]:
        note(console, f"Range: {', '.join(spans)} ({each.source}{each.why and ': '}{each.why}).")


def ranges(console: Console, found: Mapping[str, Range]) -> None:
    """Low, expected and high of what was estimated."""
    table = rows("Estimate", "Low", "Expected", "High", "From", right=(1, 2, 3), wide=4)
    for name, each in found.items():
        figures = [_told(name, value) for value in (each.low, each.expected, each.high)]
        table.add_row(plain(NAMES.get(name, name)), *figures,
                      plain(f"{each.source}: {each.why}" if each.why else each.source, "quiet"))
    if table.row_count:
        console.print()
    show(console, table)


def _told(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return gib(value)
    return span(value) if name.endswith("_s") else f"{value:.3f}"


def trial(console: Console, made: Plan) -> None:
    """The real steps that were taken before the run, and the estimates that were fitted to them."""
    if made.trial is None:
        return
    table = rows("Trial step", "Windows", "Peak", "Micro-batch", "Update", "Loss", right=(0, 1, 2, 3, 4, 5))
    for step in made.trial.steps:
        each = sum(step.seconds) / len(step.seconds) if step.seconds else None
        table.add_row(f"{step.context_tokens:,} tokens", f"{step.micro_batch}",
                      *(["-"] * 4 if step.error else [gib(step.peak_bytes), span(each), span(step.update_s),
                                                      "-" if step.loss is None else f"{step.loss:.3f}"]))
    show(console, table)
    for step in made.trial.steps:
        if step.error:
            note(console, f"{step.context_tokens:,} tokens: {step.error}", "warn")
    _beside(console, made)
    ranges(console, made.ranges)


def _beside(console: Console, made: Plan) -> None:
    """What else the trial measured, and what it left out."""
    assert made.trial is not None
    found = made.trial
    if found.skipped:
        note(console, f"Left out: {found.skipped}", "warn")
    if not found.steps:
        return
    parts = [f"loading took {span(found.load_s)} and left {gib(found.resident_bytes)} resident"]
    parts += [f"{name} {span(value)}" for name, value in (("an evaluation", found.evaluation_s),
                                                          ("a save", found.save_s)) if value is not None]
    size = "The last step had the planned size" if found.confirmed else "No step had the planned size"
    note(console, f"{size}; {', '.join(parts)}.", "" if found.confirmed else "warn")
