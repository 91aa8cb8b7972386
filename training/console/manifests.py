"""The dataset on the screen: in the chain a few lines, for `dataset` alone its whole account and windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from training.console.parts import note, show
from training.console.theme import plain, rows

Data = Mapping[str, Any]
SHOWN_REASONS, SHOWN_LANGUAGES = 4, 6
EXAMPLES, PATH_COLUMNS = 2, 48   # of a reason, and columns of each
# Lines of a sample window: at the beginning and at the end of a stretch of context, and of a target.
CONTEXT_LINES, TARGET_LINES = (4, 8), (12, 4)
MOST_LINES = 36                  # of one window
TAB = 4


def dataset(console: Console, manifest: Data) -> None:
    """What went into the windows, what was left out, and why, in few lines."""
    files, tokens, windows = (_part(manifest, name) for name in ("files", "tokens", "windows"))
    note(console, f"{files.get('accepted', 0):,} of {files.get('seen', 0):,} files; "
                  f"{tokens.get('total', 0):,} tokens, {tokens.get('trained_per_epoch', 0):,} trained on in "
                  f"an epoch; {windows.get('train', 0):,} windows to train, "
                  f"{windows.get('held_out', 0):,} held out.")
    mixed = _mixed(_part(manifest, "kinds"))
    if mixed:
        note(console, f"Trained tokens: {mixed}.", "quiet")
    dropped = _ranked(_part(files, "dropped"))
    if dropped:
        told = ", ".join(f"{count:,} {reason}" for reason, count in dropped[:SHOWN_REASONS])
        rest = sum(count for _, count in dropped[SHOWN_REASONS:])
        note(console, f"Left out: {told}{f', {rest:,} for other reasons' if rest else ''}.", "quiet")
    if coverage := _coverage(manifest):
        note(console, f"Imports whose source is in the same window: {coverage}.", "quiet")
    if replaced := _replaced(manifest):
        note(console, f"Replaced before training: {replaced}.", "warn")
    for text in manifest.get("notes", ()):
        note(console, str(text), "warn")


def manifest(console: Console, found: Data, advice: Callable[[str], str]) -> None:
    """The manifest's whole account. `advice`: what can be done about files left out for a reason."""
    _repositories(console, found)
    _files(console, _part(found, "files"), advice)
    _tokens(console, found)
    _kinds(console, found)
    table = rows("", "", wide=1)
    for name, text in _facts(found):
        table.add_row(plain(name, "head"), plain(text))
    if table.row_count:
        console.print()
    show(console, table)
    for text in found.get("notes", ()):
        note(console, str(text), "warn")


def _part(data: Data, name: str) -> Data:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def _mixed(kinds: Data) -> str:
    """Kinds of windows by their share of what is trained on."""
    total = sum(kind.get("target_tokens", 0) for kind in kinds.values())
    ranked = sorted(kinds.items(), key=lambda item: -item[1].get("target_tokens", 0))
    return ", ".join(f"{_percent(kind.get('target_tokens', 0) / total)} {name}"
                     for name, kind in ranked if total and kind.get("target_tokens"))


def _percent(share: float) -> str:
    """A share as a percentage with what digits it has.

    >>> _percent(0.0003), _percent(0.037), _percent(0.95)
    ('0.03 %', '3.7 %', '95 %')
    """
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _coverage(found: Data) -> str:
    shares = {int(context): share for context, share in _part(found, "dependency_coverage").items()
              if isinstance(share, int | float)}
    return ", ".join(f"{100 * shares[context]:.0f} % within {context:,}" for context in sorted(shares))


def _replaced(found: Data) -> str:
    """How many secrets and personal data were replaced, with the rules where there is room."""
    secrets, personal = found.get("secrets_replaced", 0), found.get("personal_replaced", 0)
    parts = [f"{secrets:,} secret{'s' * (secrets != 1)}"] * bool(secrets)
    return ", ".join([*parts, *[f"{personal:,} personal data"] * bool(personal)])


def _ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Most first: JSON came back sorted by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _counted(counts: Data) -> str:
    """`12 this, 3 that`, most first."""
    return ", ".join(f"{count:,} {name}" for name, count in _ranked(counts))


# -- the whole account ---------------------------------------------------------------------------------------


def _repositories(console: Console, found: Data) -> None:
    several = found.get("repositories", ())
    for each in several:
        commit = f", commit {each['commit'][:12]}" if each.get("commit") else ", not in git"
        note(console, f"{each.get('named') or each.get('name')}{commit}", "head")


def _files(console: Console, files: Data, advice: Callable[[str], str]) -> None:
    """Accepted and left out; each reason with examples and what can be done."""
    note(console, f"{files.get('accepted', 0):,} of {files.get('seen', 0):,} files accepted: "
                  f"{files.get('train', 0):,} to train on, {files.get('held_out', 0):,} held out.")
    table = rows("Left out", "Files", "For example, and what to do", right=(1,), wide=2)
    for reason, count in _ranked(_part(files, "dropped")):
        about = plain(", ".join(map(_short, _part(files, "examples").get(reason, ())[:EXAMPLES])))
        if sentence := advice(reason):
            about.append("\n" * bool(about)).append_text(plain(sentence, "quiet"))
        table.add_row(plain(reason), f"{count:,}", about)
    show(console, table)


def _short(path: str) -> str:
    """The end of a long path."""
    return path if len(path) <= PATH_COLUMNS else f"...{path[3 - PATH_COLUMNS:]}"


def _tokens(console: Console, found: Data) -> None:
    languages, tokens = _part(found, "languages"), _part(found, "tokens")
    size = sum(languages.values())
    ranked = _ranked(languages)
    told = [f"{name} {_percent(bytes_ / size)}" for name, bytes_ in ranked[:SHOWN_LANGUAGES] if size]
    if len(ranked) > SHOWN_LANGUAGES:
        told.append(f"{len(ranked) - SHOWN_LANGUAGES} more")
    table = rows("", "", wide=1)
    if told:
        table.add_row(plain("Text", "head"), plain(f"{size / 1e6:,.1f} MB: {', '.join(told)}"))
    names = (("trained_per_epoch", "trained on in an epoch"), ("held_out", "held out"),
             ("rejected", "in windows of a single token, left out"), ("lost", "lost"))
    parts = [f"{tokens[name]:,} {word}" for name, word in names
             if tokens.get(name) or (name == "lost" and name in tokens)]
    if tokens:
        table.add_row(plain("Tokens", "head"), plain(f"{tokens.get('total', 0):,} = {' + '.join(parts)}"))
    show(console, table)


def _kinds(console: Console, found: Data) -> None:
    """Windows by kind: how many, what they train on, how long they are."""
    kinds = _part(found, "kinds")
    table = rows("Windows", "Number", "Trained tokens", "Share", "Mean length", right=(1, 2, 3, 4))
    total = sum(kind.get("target_tokens", 0) for kind in kinds.values())
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1].get("target_tokens", 0)):
        count, targets = kind.get("windows", 0), kind.get("target_tokens", 0)
        table.add_row(plain(name), f"{count:,}", f"{targets:,}", _percent(targets / total) if total else "",
                      f"{kind.get('tokens', 0) / count:,.0f}" if count else "")
    if table.row_count:
        console.print()
        show(console, table)
    held_out, waste = (_part(found, part).get(name) for part, name in (("windows", "held_out"),
                                                                       ("packing", "waste")))
    told = [] if held_out is None else [f"{held_out:,} windows held out"]
    if isinstance(waste, int | float) and len(kinds) > 1:
        told.append(f"packing leaves {_percent(waste)} of full windows empty")
    if told:
        note(console, f"Besides: {', '.join(told)}." if table.row_count else f"{', '.join(told)}.", "quiet")


def _facts(found: Data) -> list[tuple[str, str]]:
    """Everything else, a name and a sentence each; what is not known is left out."""
    facts = [("Imports in the window", _coverage(found)), ("Held out", _held_out(found)),
             ("Replaced", _rules(found)), ("Commits", _commits(_part(found, "commits"))),
             ("Replay", _replay(_part(found, "replay"))), ("Self-test", _selftest(_part(found, "selftest")))]
    return [(name, text) for name, text in facts if text]


def _held_out(found: Data) -> str:
    split, leakage = _part(found, "split"), found.get("leakage")
    parts = [f"by {split['by']}: {split.get('why', '')}".rstrip(": ")] if split.get("by") else []
    if "near_duplicates" in split:
        parts.append(f"{split['near_duplicates']:,} near duplicates kept on their side")
    if isinstance(leakage, int | float):
        parts.append(f"{_percent(leakage)} of its 13-token runs are in the training text too")
    return "; ".join(parts)


def _rules(found: Data) -> str:
    told = _replaced(found)
    rules = _counted(_part(found, "replaced_by_rule"))
    return f"{told} ({rules}), each by a placeholder" if told and rules else told or "no secrets found"


def _commits(commits: Data) -> str:
    if not commits.get("used") and not commits.get("skipped"):
        return ""
    skipped = _counted(_part(commits, "skipped"))
    return f"{commits.get('used', 0):,} changes to files used" + (f"; left out: {skipped}" if skipped else "")


def _replay(replay: Data) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{value}"
                     for name, value in replay.items() if isinstance(value, int | str) and value)


def _selftest(found: Data) -> str:
    """Bits per byte of held-out files under LZMA, by the context before them; the least first."""
    measured = _part(found, "bits_per_byte") or {name: value for name, value in found.items()
                                                 if isinstance(value, float)}
    told = ", ".join(f"{name} {value:.3f}" for name, value in sorted(measured.items(), key=lambda x: x[1]))
    return f"bits per byte under LZMA behind context of each kind: {told}" if told else ""


# -- sample windows ------------------------------------------------------------------------------------------


def windows(console: Console, samples: Sequence[Data]) -> None:
    """Sample windows as text: context and target in colours, or with marks where there is none."""
    coloured = console.is_terminal and not console.no_color
    marks = ("", "") if coloured else (". ", "> ")
    legend = Text.assemble("  Sample windows: ", (f"{marks[0]}context", "quiet" if coloured else ""), ", ",
                           (f"{marks[1]}target", "good" if coloured else ""), " (what is trained on).")
    console.print()
    console.print(legend)
    for sample in samples:
        _window(console, sample, coloured)


def _window(console: Console, sample: Data, coloured: bool) -> None:
    about = [str(sample[key]) for key in ("kind", "path") if sample.get(key)]
    about.append(f"{sample.get('tokens', 0):,} tokens, {sample.get('target_tokens', 0):,} of them trained on")
    console.print()
    note(console, ": ".join([f"Window {sample.get('index', 0):,}", ", ".join(about)]), "head")
    pieces, shown = list(sample.get("pieces", ())), 0
    for number, piece in enumerate(pieces):
        if shown >= MOST_LINES:
            note(console, f"... and {len(pieces) - number} more stretches of context and target.", "quiet")
            break
        lines = _shortened(piece["text"], *_rate(sample, bool(piece["trained"])))
        shown += len(lines)
        for line in lines:
            _line(console, line, bool(piece["trained"]), coloured)


def _rate(sample: Data, trained: bool) -> tuple[float, tuple[int, int]]:
    """Tokens a character of one side of a window, and the lines shown of it."""
    targets = int(sample.get("target_tokens", 0))
    tokens = targets if trained else int(sample.get("tokens", 0)) - targets
    characters = sum(len(piece["text"]) for piece in sample["pieces"] if bool(piece["trained"]) == trained)
    return tokens / max(1, characters), TARGET_LINES if trained else CONTEXT_LINES


def _shortened(text: str, rate: float, shown: tuple[int, int]) -> list[str]:
    """The first and last lines; between them one for those left out, by their tokens (`rate` a character).

    >>> _shortened("a\\nb\\nc\\nd\\ne\\n", 0.5, (1, 1))
    ['a', '... about 3 tokens ...', 'e']
    """
    lines = text.removesuffix("\n").split("\n")
    first, last = shown
    if len(lines) <= first + last + 1:
        return lines
    left_out = sum(len(line) + 1 for line in lines[first:-last])
    return [*lines[:first], f"... about {round(left_out * rate):,} tokens ...", *lines[-last:]]


def _line(console: Console, text: str, trained: bool, coloured: bool) -> None:
    """One line of a window, cut at the width of the console."""
    style = ("good" if trained else "quiet") if coloured else ""
    margin = "  " if coloured else "  > " if trained else "  . "
    line = Text(margin)
    line.append_text(plain(text.expandtabs(TAB), style))
    line.truncate(console.width, overflow="ellipsis")
    console.print(line, no_wrap=True, crop=True)
