"""Questions with an answer that Enter takes; a bad answer is told why and asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from training.console.theme import plain
from training.errors import EliteError, UsageError

Check = Callable[[str], None]


def ask(console: Console, question: str, default: str, check: Check = lambda answer: None) -> str:
    """The answer, checked. `check` raises an EliteError that is shown before the question comes again.

    Raises UsageError when standard input ends.
    """
    while True:
        line = plain(question, "head")
        if default:
            line.append(f" [{default}]", "quiet")
        console.print(line, end=": ", soft_wrap=True)
        try:
            answer = input().strip() or default
        except EOFError:
            console.print()
            raise UsageError("Standard input ended before the last question; --auto asks none.") from None
        try:
            check(answer)
        except EliteError as error:
            console.print(plain(f"  {error}", "warn"))
            continue
        return answer


def confirm(console: Console, question: str, default: bool) -> bool:
    """Yes or no."""
    def known(answer: str) -> None:
        if answer.lower() not in ("y", "yes", "n", "no"):
            raise UsageError(f"{answer!r} is neither yes nor no.")
    return ask(console, f"{question} (yes/no)", "yes" if default else "no", known).lower() in ("y", "yes")


def pick(console: Console, question: str, options: Sequence[str]) -> int | None:
    """The index of one of the numbered options, or None for none of them, which Enter takes."""
    for index, option in enumerate(options, 1):
        console.print(plain(f"  {index}  {option}"), soft_wrap=True)

    def known(answer: str) -> None:
        if answer != "none" and not (answer.isdigit() and 1 <= int(answer) <= len(options)):
            raise UsageError(f"{answer!r} is not in the list; give 1 to {len(options)}, or Enter for none.")
    answer = ask(console, question, "none", known)
    return None if answer == "none" else int(answer) - 1


def resumable(console: Console, infos: Sequence[Mapping[str, Any]]) -> int | None:
    """Which interrupted run to continue; None starts a new one."""
    console.print(plain("Interrupted runs:", "head"))
    return pick(console, "Continue one of them", [
        f"{info['name']}: {info['state']} at step {info['step']:,} of {info['steps']:,}, {info['date'][:16]}"
        for info in infos])


def tell(console: Console, text: str) -> None:
    """A warning before a question."""
    console.print(plain(text, "warn"))
