"""What the user chose: one flag a field, checked all at once, turned into a Request.

The command line beats `--config`; both beat what the planner derives. A flag and `--set` are both command
line, so the same key in both is an error, not a question of order.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from training.errors import EliteError, Problems, UsageError

Text = Optional[str]  # noqa: UP045  Typer evaluates these, also on Python 3.10
Whole = Optional[int]  # noqa: UP045
Switch = Optional[bool]  # noqa: UP045
Number = Optional[float]  # noqa: UP045
Words = Optional[list[str]]  # noqa: UP045
# The flags that name a configuration key; `--set` and `--config` name the same ones.
FLAG_KEYS = {"model_name": "run.name", "base_model": "model.base", "context": "dataset.context_tokens",
             "epochs": "training.epochs", "seed": "run.seed"}


def value(text: str, metavar: str) -> Any:
    """An option that takes a value."""
    return typer.Option(help=text, metavar=metavar)


def flag(name: str, text: str) -> Any:
    """A switch that is off unless given."""
    return typer.Option(name, help=text)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The flags of a run as they were given. None: not given."""

    repo: Annotated[Words, value("What to train on; repeatable.", "DIR|GIT-URL")] = None
    output: Annotated[Text, value("The run directory; runs/<model-name> if not given.", "DIR")] = None
    model_name: Annotated[Text, value("Name of the model; the repository's if not given.", "NAME")] = None
    epochs: Annotated[Whole, value("Passes over the training windows.", "N")] = None
    base_model: Annotated[Text, value("What to tune: a name of docs/models.md, a hub id, a folder, auto, or "
                                      "embedded (small, from scratch).", "NAME|DIR|auto|embedded")] = None
    tier: Annotated[Whole, value("Row of the tier table (docs/tiers.md).", "N")] = None
    context: Annotated[Whole, value("Length of a window, tokens.", "TOKENS")] = None
    max_hours: Annotated[Number, value("Hours granted to training; 48 if not given.", "H")] = None
    anyway: Annotated[Switch, flag("--anyway", "Run though the plan does not fit.")] = None
    seed: Annotated[Whole, value("Seed of every random choice.", "N")] = None
    config: Annotated[Text, value("YAML with configuration keys (docs/configuration.md).", "FILE")] = None
    set: Annotated[Words, value("One configuration key; repeatable.", "KEY=VALUE")] = None


def with_choices(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a Typer command one option for each field of Choices (or only those named); it gets them as its
    argument `choices`."""
    def dressed(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)
        named = inspect.Parameter.KEYWORD_ONLY
        fields = [inspect.Parameter(field.name, named, default=None, annotation=field.type)
                  for field in dataclasses.fields(Choices) if not names or field.name in names]
        rest = [each.replace(kind=named) for each in own.parameters.values() if each.name != "choices"]

        def called(**given: Any) -> Any:
            own_values = {field.name: given.pop(field.name) for field in fields}
            for repeated in ("repo", "set"):
                own_values[repeated] = own_values[repeated] or None  # Typer gives an empty list
            return command(choices=Choices(**own_values), **given)
        called.__doc__, called.__name__ = command.__doc__, command.__name__
        called.__signature__ = own.replace(parameters=[*rest, *fields])  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in [*rest, *fields]}
        return called
    return dressed


def refuse_early(context: typer.Context) -> None:
    """Raise UsageError for flags that stand before a subcommand, where they would do nothing."""
    early = ["--" + name.replace("_", "-") for name, given in context.params.items()
             if given is not None and given is not False and given not in ([], ())]
    command = context.invoked_subcommand
    if early:
        raise UsageError(f"{', '.join(early)} before {command} would do nothing; flags go after {command}.")


def settings_of(choices: Choices) -> tuple[dict[str, Any], list[EliteError]]:
    """The configuration keys that the user set, flags included, and every problem with them."""
    from training.settings import problems_in, read_yaml  # reads YAML: 30 ms that `--help` can do without
    values: dict[str, Any] = {}
    found: list[EliteError] = []
    if choices.config is not None:
        try:
            values = read_yaml(Path(choices.config))
            found += problems_in(values, choices.config)
        except EliteError as error:
            found.append(error)
    spoken, problems = _spoken(choices)
    found += problems
    return {**values, **spoken}, found


def _spoken(choices: Choices) -> tuple[dict[str, Any], list[EliteError]]:
    """What the command line itself sets, by key."""
    from training.settings import parse_assignment, problems_in
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    found: list[EliteError] = []
    for flag, key, given in _flags(choices):
        told = " ".join(f"{flag} {each}" for each in (given if isinstance(given, list) else [given]))
        values[key], origin[key] = given, told
        found += problems_in({key: given}, flag)
    for text in choices.set or ():
        try:
            key, value = parse_assignment(text)
        except UsageError as error:
            found.append(error)
            continue
        if key in origin:
            found.append(UsageError(f"{origin[key]} and --set {text} both set {key}; keep one of them."))
        values[key], origin[key] = value, f"--set {text}"
        found += problems_in({key: value}, "--set")
    return values, found


def _flags(choices: Choices) -> list[tuple[str, str, Any]]:
    """(flag, its key, its value) of those given. The first repository is `dataset.repo`."""
    found: list[tuple[str, str, Any]] = []
    if choices.repo:
        first, *others = choices.repo
        found.append(("--repo", "dataset.repo", first))
        found += [("--repo", "dataset.also", others)] if others else []
    return found + [("--" + name.replace("_", "-"), key, getattr(choices, name))
                    for name, key in FLAG_KEYS.items() if getattr(choices, name) is not None]


def collect(found: list[EliteError], act: Callable[[], Any]) -> Any:
    """The result of `act`, or None with its problems added to `found`."""
    try:
        return act()
    except Problems as error:
        found.extend(error.problems)
    except EliteError as error:
        found.append(error)
    return None
