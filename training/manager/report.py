"""report.html: one file that shows what a run did, for people. No scripts, nothing loaded from elsewhere.

Whatever comes from a run is text here: escaped, with control and direction marks shown by number, behind a
policy (CSP) that allows this page's own style and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from training.manager import charts, contexts, facts
from training.manager.facts import Facts, figure, number, part, seconds, size
from training.manager.facts import summary as summary  # the same rows, for the console
from training.rundir import RunDirectory, write_text
from training.texts import visible, without_password

STYLE = Path(__file__).with_name("style.css")
MAX_SAMPLES = 8
MAX_SAMPLE_CHARACTERS = 2000


def write_report(run_path: str | Path) -> Path:
    """Write the report of a run, whatever its state, and return its path. Raises CannotWrite."""
    target = RunDirectory(Path(run_path)).report
    write_text(target, page(facts.gather(run_path), STYLE.read_text(encoding="utf-8")))
    return target


def page(run: Facts, style: str) -> str:
    """The whole page of one run."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    makers = (_head, _error, _tiles, _curve, _quality, _contexts, _compared, _samples, _use, _limits,
              _choices, _dataset, _environment)
    body = "\n".join(block for make in makers if (block := make(run)))
    return ("<!doctype html>\n"
            '<html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            f"style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="referrer" content="no-referrer">'
            f"<title>{text(_name(run))} · training report</title><style>{style}</style></head>\n"
            f"<body><main>\n{body}\n</main></body></html>\n")


def text(value: Any) -> str:
    """Any value as inert HTML text; URLs without user and password.

    >>> text('<img src=x onerror="a">')
    '&lt;img src=x onerror=&quot;a&quot;&gt;'
    """
    return escape(visible(without_password(str(value))), quote=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of ready HTML cells; a head that starts with `>` makes a column of numbers."""
    marks = [' class="num"' if head.startswith(">") else "" for head in heads]
    body = "".join("<tr>" + "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, row, strict=True))
                   + "</tr>" for row in rows)
    names = "".join(f"<th{mark}>{text(name.lstrip('>'))}</th>"
                    for mark, name in zip(marks, heads, strict=True))
    head = f"<thead><tr>{names}</tr></thead>" if any(heads) else ""
    top = f"<caption>{text(caption)}</caption>" if caption else ""
    short = ' class="short"' if len(heads) == 2 and any(heads) else ""
    return f'<div class="scroll"><table{short}>{top}{head}<tbody>{body}</tbody></table></div>'


def section(title: str, body: str) -> str:
    """A titled block, or nothing when there is nothing to show."""
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def _name(run: Facts) -> str:
    return str(_value(run, "run.name") or run.path.resolve().name)


def _value(run: Facts, key: str) -> Any:
    return part(part(run.plan, "choices"), key).get("value")


def _head(run: Facts) -> str:
    state = str(run.result.get("state") or "unfinished")
    mark = state if state in ("done", "failed", "interrupted") else "unfinished"
    ended = [value for row in run.metrics[-1:] if (value := number(row, "time")) is not None]
    date = f" · {datetime.fromtimestamp(ended[0]):%d %B %Y, %H:%M}" if ended else ""
    base = run.plan.get("base_model")
    about = f"base model {text(base)}" if base else "training run"
    return (f'<header><h1>{text(_name(run))} <span class="badge {mark}">{text(state)}</span></h1>'
            f'<p class="soft">{about}{text(date)}</p>'
            f'<p class="lead">{text(facts.verdict(run))}</p></header>')


def _error(run: Facts) -> str:
    message = str(run.result.get("error") or "")
    return section("Why it ended", f"<pre>{text(message)}</pre>") if message else ""


def _tiles(run: Facts) -> str:
    result = run.result
    tiles = [(f"{row['before']} → {row['after']}", row["name"]) for row in facts.quality(run)[:2]]
    measured_s = number(part(result, "time"), "measured_s")
    memory_bytes = number(part(result, "memory"), "measured_bytes")
    tiles += [(seconds(measured_s), "training time"), (size(memory_bytes), "memory at most"),
              (f"{number(result, 'steps') or len(run.metrics):,.0f}", "steps"),
              (f"{number(result, 'tokens_trained') or 0:,.0f}", "tokens trained on"),
              (f"{number(run.plan, 'context_tokens') or 0:,.0f}", f"context, tokens (tier {_tier(run)})")]
    body = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>'
                   for value, name in tiles)
    return f'<div class="tiles">{body}</div>'


def _tier(run: Facts) -> str:
    tier = number(run.plan, "tier")
    return f"{tier:.0f}" if tier is not None else "unknown"


def _points(rows: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    pairs = ((number(row, "step"), number(row, "loss")) for row in rows)
    return [(step, loss) for step, loss in pairs if step is not None and loss is not None]


def _curve(run: Facts) -> str:
    drawing = charts.loss_curve(_points(run.metrics), _points(run.evaluations))
    if not drawing:
        return ""
    legend = ('<p class="soft"><span class="key k-raw"></span>each step<span class="key k-mean"></span>'
              'running mean<span class="key k-held"></span>held-out files</p>')
    broken = len(run.metrics) - len(_points(run.metrics))
    note = f'<p class="failed">Steps with a loss that is not finite: {broken:,}.</p>' if broken else ""
    return section("Loss", drawing + legend + note)


def _quality(run: Facts) -> str:
    rows = [[text(row["name"]), text(row["before"]), text(row["after"]), text(row["change"]),
             f'<span class="{row["verdict"]}">{row["verdict"]}</span>'] for row in facts.quality(run)]
    if not rows:
        return ""
    body = table(("Figure", ">Before", ">After", ">Change", ""), rows,
                 "Measured on files that were not trained on, with the same windows both times.")
    return section("Before and after, on held-out files",
                   body + _paragraph(contexts.compressors(run.manifest)))


def _paragraph(words: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{text(words)}</p>" if words else ""


def _contexts(run: Facts) -> str:
    """What context is worth: the curve after training, and the four arms of training and context."""
    curve = contexts.curve_of(run.result, "after")
    kinds, rows = contexts.table(curve)
    if not rows:
        return ""
    items, files = (number(curve, name) or 0 for name in ("items", "files"))
    caption = (f"Loss on {items:,.0f} targets of {files:,.0f} held-out files after training, and its change "
               "against no context.")
    body = _paragraph(contexts.sentence(curve)) + table(
        (">Context, tokens at most", *(f">{kind}" for kind in kinds)), [list(map(text, row)) for row in rows],
        caption)
    if curve.get("foreign"):
        body += _paragraph(f"Foreign context: {curve['foreign']}", "soft")
    arms = contexts.arms(run.result)
    if arms:
        pairs = [[name, *(text(f"{arms[key]:.3f}") for key in keys)] for name, keys in
                 (("untrained", ("base", "base_context")), ("trained", ("tuned", "tuned_context")))]
        body += ("<h3>Training and context, apart and together</h3>"
                 + table(("Loss", ">Without context", ">With composed context"), pairs)
                 + _paragraph(contexts.judgement(arms)))
    return section("Loss by context", body)


def _compared(run: Facts) -> str:
    rows = [[text(row["name"]), text(row["predicted"]), text(row["measured"]), text(row["off"])]
            for row in facts.compared(run)]
    body = table(("", ">Predicted", ">Measured", ">Off by"), rows)
    return section("Predicted beside measured", body + _terms(part(part(run.plan, "memory"), "terms")))


def _terms(terms: Mapping[str, Any]) -> str:
    sizes = {name: value for name in terms if (value := number(terms, name))}
    total = sum(sizes.values())
    rows = [[text(name.replace("_", " ")), text(size(value)), charts.bar(value / total)]
            for name, value in sorted(sizes.items(), key=lambda item: -item[1])]
    caption = "Terms of the prediction; only their sum can be measured."
    return "<h3>Memory by term</h3>" + table(("Term", ">Predicted", ""), rows, caption) if rows else ""


def _samples(run: Facts) -> str:
    parts = []
    for sample in facts.samples(run)[:MAX_SAMPLES]:
        shown = {name: _cut(value, from_end=name == "prefix") for name, value in sample.items()}
        parts.append(f"<h3>{shown['path']}</h3><p class=\"soft\">The file up to here</p>"
                     f"<pre>{shown['prefix']}</pre>" + '<div class="pair">' + "".join(
                         f'<div><p class="soft">{label}</p><pre>{shown[name]}</pre></div>' for label, name in
                         (("Before training", "before"), ("After training", "after"),
                          ("What the file says", "expected"))) + "</div>")
    note = '<p class="soft">Spans of held-out files in the order in which they were drawn, not chosen.</p>'
    return section("Completions", note + "".join(parts) if parts else "")


def _cut(value: str, from_end: bool) -> str:
    if len(value) <= MAX_SAMPLE_CHARACTERS:
        return text(value)
    kept = value[-MAX_SAMPLE_CHARACTERS:] if from_end else value[:MAX_SAMPLE_CHARACTERS]
    return "… " + text(kept) if from_end else text(kept) + " …"


def _use(run: Facts) -> str:
    path = facts.model_path(run)
    if path is None or not path.is_dir():
        return ""
    lines = "\n".join(facts.loading_lines(path))
    return section("Load the model", f"<p><code>{text(path)}</code></p><pre>{text(lines)}</pre>")


def _limits(run: Facts) -> str:
    limits = part(run.plan, "limits")
    rows = [[text(name.replace("_", " ")), text(limit.get("tier", "")), text(limit.get("why", ""))]
            for name in limits if (limit := part(limits, name))]
    return section("What each limit allows", table(("Limit", ">Highest tier", "Why"), rows)) if rows else ""


def _choices(run: Facts) -> str:
    choices = part(run.plan, "choices")
    rows = [[f"<code>{text(name)}</code>", f"<code>{text(choice.get('value'))}</code>",
             text(choice.get("source", "")), text(choice.get("why", ""))]
            for name in choices if (choice := part(choices, name))]
    if not rows:
        return ""
    notes = "".join(f"<p>{text(note)}</p>" for note in run.plan.get("notes") or ())
    counted = Counter(row[2] for row in rows).most_common()
    sources = ", ".join(f"{amount} {source}" for source, amount in counted)
    return section("The plan", notes + f"<details><summary>{len(rows)} choices with their reasons ({sources})"
                   f"</summary>{table(('Key', 'Value', 'Source', 'Why'), rows)}</details>")


def _dataset(run: Facts) -> str:
    manifest = run.manifest
    if not manifest:
        return ""
    files, tokens, windows = (part(manifest, name) for name in ("files", "tokens", "windows"))
    rows = [("files seen", files.get("seen")), ("files accepted", files.get("accepted")),
            ("tokens", tokens.get("total")), ("tokens trained on per epoch", tokens.get("trained_per_epoch")),
            ("windows to train on", windows.get("train")), ("windows held out", windows.get("held_out")),
            ("secrets replaced", manifest.get("secrets_replaced"))]
    body = table(("", ">Count"), [[text(name), _count(value)] for name, value in rows if value is not None])
    coverage = part(manifest, "dependency_coverage")
    if coverage:
        shares = [[text(name), text(figure(number(coverage, name), True))] for name in coverage]
        body += "<h3>Dependency coverage by context</h3>" + table(("Context", ">Share"), shares)
    if selftest := contexts.selftest(manifest):
        body += ("<h3>What context is worth to a compressor</h3>"
                 + table(("Context", ">Bits per byte", ">Gain"), [list(map(text, row)) for row in selftest],
                         "Second halves of held-out files under LZMA, after context and the first half."))
    dropped = part(files, "dropped")
    if dropped:
        body += "<h3>Files left out</h3>" + table(("Reason", ">Files"), [
            [text(name), _count(value)] for name, value in dropped.items()])
    leakage = number(manifest, "leakage")
    if leakage is not None:
        body += ("<p>Held-out runs of 13 tokens that also stand in a training file: "
                 f"{figure(leakage, True)}</p>")
    return section("Dataset", body)


def _count(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{text(name)} {_count(item)}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else text(value)


def _environment(run: Facts) -> str:
    hardware, result = run.hardware, run.result
    gpus = [gpu for gpu in hardware.get("gpus") or () if isinstance(gpu, dict)]
    rows = [("system", hardware.get("system")), ("processor", hardware.get("cpu_name")),
            ("cores", hardware.get("cpu_cores")), ("RAM", size(number(hardware, "ram_total_bytes"))),
            *(("GPU", f"{gpu.get('name')}, {size(number(gpu, 'total_bytes'))}") for gpu in gpus),
            ("measured", hardware.get("date")), ("seed", _value(run, "run.seed")),
            ("repository", _value(run, "dataset.repo")), ("digest of the weights", result.get("digest")),
            ("command", run.command)]
    shown = [[text(name), f"<code>{text(value)}</code>"] for name, value in rows if value not in (None, "")]
    return section("Machine and command", table(("", ""), shown) if hardware or run.command else "")
