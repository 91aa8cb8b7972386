"""What context is worth to a model, before and after training: the curve's rows, the four arms, and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.manager.monitor import number, part

COMPOSED = "composed"
Row = Mapping[str, Any]


def curve_of(result: Mapping[str, Any], when: str) -> dict[str, Any]:
    """The context curve `before` or `after` training, or nothing."""
    return part(part(part(result, "quality"), when), "context_curve")


def rows_of(curve: Mapping[str, Any], kind: str) -> list[Row]:
    """A kind's rows that have a loss, in the order of their lengths."""
    return sorted((row for row in _rows(curve) if row["kind"] == kind), key=lambda row: row["length"])


def _rows(curve: Mapping[str, Any]) -> list[Row]:
    rows = curve.get("rows")
    return [row for row in (rows if isinstance(rows, list) else ()) if isinstance(row, dict)
            and isinstance(row.get("kind"), str)
            and number(row, "loss") is not None and number(row, "length") is not None]


def table(curve: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of kinds, and for each length its name and what each kind's loss is there."""
    kinds = list(dict.fromkeys(row["kind"] for row in _rows(curve)))
    by_kind = {kind: {row["length"]: row for row in rows_of(curve, kind)} for kind in kinds}
    lengths = sorted({length for rows in by_kind.values() for length in rows})
    return kinds, [[f"{length:,.0f}", *(_cell(by_kind[kind].get(length)) for kind in kinds)]
                   for length in lengths]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    change = number(row, "change")
    return f"{row['loss']:.3f}" + (f" ({change:+.3f})" if change and row["length"] else "")


def sentence(curve: Mapping[str, Any]) -> str:
    """What the longest context of each kind does to the loss; "" when it was not measured."""
    said = []
    for kind in table(curve)[0]:
        last = rows_of(curve, kind)[-1]
        if number(last, "change") is not None and last["length"]:
            tokens = number(last, "context_tokens") or 0.0
            said.append(f"{kind} context of {tokens:,.0f} tokens {_effect(last)}")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _effect(row: Row) -> str:
    """What it does to the loss, with the interval; where that holds 0 it is said."""
    change, low, high = (number(row, name) for name in ("change", "low", "high"))
    amount = change or 0.0
    if low is None or high is None:
        within = "one file: no interval"
    else:
        bounds = sorted((-low, -high) if amount < 0 else (low, high))
        within = f"{bounds[0]:.3f} to {bounds[1]:.3f}" + (", may be chance" if low <= 0 <= high else "")
    said = f"lowers the loss by {-amount:.3f}"
    if amount >= 0:
        said = f"did not help: the loss rises by {amount:.3f}"
    return f"{said} ({within})"


def arms(result: Mapping[str, Any]) -> dict[str, float]:
    """Loss of the four arms: base, base_context, tuned, tuned_context; empty when one was not measured."""
    found: dict[str, float] = {}
    for name, when in (("base", "before"), ("tuned", "after")):
        rows = rows_of(curve_of(result, when), COMPOSED)
        if len(rows) < 2:
            return {}
        found |= {name: rows[0]["loss"], f"{name}_context": rows[-1]["loss"]}
    return found


def judgement(found: Mapping[str, float]) -> str:
    """What training gained, what context gained, and which was more; "" without the four arms."""
    if not found:
        return ""
    base = found["base"]
    context, trained, both = (base - found[name] for name in ("base_context", "tuned", "tuned_context"))
    said = (f"Below the untrained model's loss without context: {trained:.3f} by training alone, "
            f"{context:.3f} by composed context alone, {both:.3f} by both.")
    if trained <= 0:
        said += " Training did not help without context."
    if both <= context:
        said += " With context given, training did not help."
    if context > trained:
        said += " Context alone helps more than training alone."
    return said


def compressors(manifest: Mapping[str, Any]) -> str:
    """What general compressors reach on held-out text, for comparison with the model's bits per byte."""
    found = part(manifest, "selftest")
    names = [f"{name} {value:.2f}" for name in ("xz", "gzip") if (value := number(found, name)) is not None]
    return f"Compressors on held-out text, bits per byte: {', '.join(names)}." if names else ""


def selftest(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Bits per byte under LZMA by kind of context: kind, figure, gain against none with its interval."""
    found = part(manifest, "selftest")
    shares, gains = part(found, "bits_per_byte"), part(found, "gain")
    rows = []
    for kind in shares:
        if number(shares, kind) is None:
            continue
        bounds = gains.get(kind)
        known = dict(zip(("mean", "low", "high"), bounds if isinstance(bounds, list) else (), strict=False))
        mean, low, high = (number(known, name) for name in ("mean", "low", "high"))
        gain = f"{mean:.3f}" if mean is not None else ""
        gain += f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
        rows.append((kind, f"{shares[kind]:.3f}", gain))
    return rows
