"""The questions of a command without `--auto`: every answer has a default that Enter takes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from training import models
from training.command import places
from training.command.choices import Choices
from training.console import questions
from training.console.theme import span
from training.dataset.sources import checkout
from training.errors import MissingInput, StoppedByUser, UsageError
from training.manager.preflight import check_output
from training.manager.runs import RESUMABLE, list_runs
from training.records import HardwareProfile, Request
from training.settings import problems_in


def need_terminal() -> None:
    """Raise UsageError when there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UsageError("Standard input is no terminal, so nothing can be asked; --auto takes the defaults.")


def unfinished(console: Console) -> Path | None:
    """An interrupted run that the user wants to continue, or None."""
    infos = [info for info in list_runs(places.RUNS) if info.state in RESUMABLE]
    if not infos:
        return None
    index = questions.resumable(console, [dataclasses.asdict(info) for info in infos])
    return None if index is None else Path(infos[index].path)


def fill(console: Console, given: Choices, fresh: bool) -> Choices:
    """Ask for what was not given: repository, name, run directory, base model, epochs."""
    answers: dict[str, Any] = {}

    def ask(name: str, question: str, default: str, check: questions.Check) -> str:
        if getattr(given, name) is None:
            answers[name] = questions.ask(console, question, default, check)
        return str(answers.get(name, getattr(given, name)))
    found = places.find_repository(Path.cwd(), Path.home())
    repo = given.repo[0] if given.repo else ask("repo", "Repository, folder or git URL",
                                                str(found[0]) if found else "", _repository)
    if given.output is None:
        name = ask("model_name", "Name of the model",
                   places.free_path(places.RUNS / places.name_of(repo)).name, _folder_name)
        ask("output", "Run directory", str(places.RUNS / name),
            lambda answer: check_output(Path(answer).expanduser(), False, fresh))
    ask("base_model", "Base model (name, folder, hub id, auto or embedded)", "auto", _base)
    ask("epochs", "Epochs (auto: by the size of the repository)", "auto", _epochs)
    if "epochs" in answers:
        answers["epochs"] = None if answers["epochs"] == "auto" else int(answers["epochs"])
    if "repo" in answers:
        answers["repo"] = [answers["repo"]]
    return dataclasses.replace(given, **answers)


def _repository(answer: str) -> None:
    if not checkout.is_url(answer):
        checkout.locate(answer)


def _folder_name(answer: str) -> None:
    if not answer or "/" in answer:
        raise UsageError(f"{answer!r} cannot name a folder.")


def _base(answer: str) -> None:
    if answer != "auto":
        models.resolve(answer)


def _epochs(answer: str) -> None:
    if answer == "auto":
        return
    if not answer.isdigit():
        raise UsageError(f"{answer!r} is no whole number.")
    for problem in problems_in({"training.epochs": int(answer)}):
        raise problem


def choose_base(request: Request, profile: HardwareProfile, console: Console | None) -> models.Chosen:
    """The base model for this machine; on a GPU the embedded one is offered only where somebody can answer.

    `console`: where to ask, None with `--auto`. Raises MissingInput when the base cannot be had.
    """
    try:
        return models.choose(request.base_model, profile, online=True)
    except MissingInput as error:
        question = "Train the small embedded model instead?"
        if console is None or not profile.gpus:
            raise
        questions.tell(console, str(error))
        if not questions.confirm(console, question, default=False):
            raise
        return models.choose(models.EMBEDDED, profile, online=True)


def agree(console: Console, total_s: float) -> None:
    """Raise StoppedByUser unless the plan is accepted."""
    if not questions.confirm(console, f"Train this, about {span(total_s)}?", default=True):
        raise StoppedByUser("Not started; nothing was written.")
