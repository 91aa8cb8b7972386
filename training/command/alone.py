"""`dataset` alone: its configuration, where it goes, and the base whose tokenizer it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import models
from training.command import places
from training.command.choices import Choices, collect, settings_of
from training.command.request import (
    LEAST_DISK_BYTES,
    Survey,
    name_problems,
    other_places,
    repository,
    surveyed,
)
from training.errors import CannotWrite, EliteError, UsageError, raise_all
from training.manager.preflight import check_disk, check_output
from training.planning import mix, tiers
from training.records import BaseModel, RepositoryFacts
from training.settings import BY_NAME, Config, problems_in

DEFAULT_CONTEXT: int = BY_NAME["dataset.context_tokens"].default


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What is made and where. `base` None: a tokenizer made from the repository itself."""

    config: Config
    folder: Path
    base: BaseModel | None


def checked(choices: Choices, output: str, survey: Survey) -> Alone:
    """What `dataset` makes. Raises every problem at once; nothing is written."""
    settings, found = settings_of(choices)
    found += name_problems(choices, settings)
    inputs: list[EliteError] = []
    repo = collect(inputs, lambda: repository(settings))
    facts = surveyed(survey, repo, settings, inputs) if repo else None
    settings |= other_places(settings, inputs)
    base = _base(settings, found, inputs)
    name = places.name_of(facts.path) if facts else "dataset"
    folder = Path(output).expanduser() if output else places.free_path(places.RUNS / f"{name}-dataset")
    found += inputs
    collect(found, lambda: _check_folder(folder))
    collect(found, lambda: check_disk(folder, LEAST_DISK_BYTES // 2, "The dataset"))
    raise_all(found)
    assert facts is not None
    return Alone(config=Config(_values(settings, facts, base)), folder=folder, base=base)


def _base(settings: Mapping[str, Any], found: list[EliteError], inputs: list[EliteError]) -> BaseModel | None:
    """The base model that was named, if any."""
    name = settings.get("model.base")
    if name == "auto":
        found.append(UsageError("--base-model auto is decided by measuring the machine, which `dataset` does "
                                "not; name one of docs/models.md, or leave it out for a tokenizer made from "
                                "the repository."))
    if not isinstance(name, str) or name in ("", "auto"):
        return None
    base: BaseModel | None = collect(inputs, lambda: models.resolve(name))
    sound = {key: value for key, value in settings.items() if not problems_in({key: value})}
    if base is not None:
        found += [UsageError(text) for text in mix.problems(sound, base.name, bool(base.fim))]
    return base


def _values(settings: Mapping[str, Any], facts: RepositoryFacts, base: BaseModel | None) -> dict[str, Any]:
    """The configuration: what was set over what the plan of a run with this base would take."""
    context = int(settings.get("dataset.context_tokens", DEFAULT_CONTEXT))
    table = tiers.load()
    tier = tiers.tier_of(context, table)
    values = {"dataset.context_tokens": context, "run.name": facts.name,
              "dataset.target_tokens": table[tier - 1].target_tokens if tier else context,
              "dataset.held_out_share": mix.held_out(facts.code_files)[0]}
    if base is not None:
        embedded = base.location == models.EMBEDDED
        planned = mix.shares(sentinels=bool(base.fim), base=base.name, embedded=embedded,
                             is_packed=mix.packed({**values, **settings}), commits=facts.commits,
                             replay=str(settings.get("dataset.replay", "")))
        values |= {name: share for name, (share, _) in planned.items()} | {"model.base": base.location}
    kept = {key: value for key, value in settings.items() if key not in ("dataset.repo", "model.base")}
    return {**values, **kept, "dataset.repo": facts.path}


def _check_folder(folder: Path) -> None:
    """An earlier dataset may be replaced, anything else may not."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise CannotWrite(f"{folder} exists and holds no dataset; nothing in it is touched. Choose another "
                          "--output.")
    if not folder.is_dir():
        check_output(folder, resume=False, fresh=False)
