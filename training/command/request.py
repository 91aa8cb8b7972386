"""Choices become a Request and a run directory, with every problem found in one look and nothing written."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import models
from training.command import places
from training.command.choices import Choices, collect, settings_of
from training.configuration import load_config
from training.dataset.sources import checkout
from training.errors import EliteError, MissingInput, UsageError, raise_all
from training.hardware import nvidia
from training.manager.preflight import check_disk, check_output
from training.manager.runs import list_runs
from training.planning import situation, tiers
from training.records import BaseModel, Gpu, HardwareProfile, Plan, RepositoryFacts, Request
from training.rundir import RunDirectory, read_record
from training.settings import problems_in

# The embedded model with its optimizer, two checkpoints, the dataset of a small repository and the log.
LEAST_DISK_BYTES = 200 << 20
MAX_NAME_BYTES = 200
NO_REPOSITORY = RepositoryFacts(path="", name="", files=0, code_files=0, code_bytes=0, languages={})
IDENTITY = ("dataset.repo", "run.name", "model.base")
# Other repositories, as every later stage finds them from any folder.
PLACES = ("dataset.also", "dataset.replay")
# (repository or several, most bytes of a file) -> what they hold.
Survey = Callable[..., RepositoryFacts]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request that holds water, what its repository holds, and where its run goes."""

    request: Request
    facts: RepositoryFacts
    output: Path


def check(choices: Choices, survey: Survey, fresh: bool = False, claim: bool = True,
          instead: RepositoryFacts | None = None) -> Checked:
    """Everything that can be known before measuring and planning. `claim`: a run will be written. `instead`:
    what stands for the repository where none was named.

    Raises one EliteError, or Problems with all of them: usage first, then inputs, then the output.
    """
    settings, found = settings_of(choices)
    found += name_problems(choices, settings)
    inputs: list[EliteError] = []
    name = str(settings.get("model.base") or "auto")
    facts = instead if instead and not settings.get("dataset.repo") else None
    repo = "" if facts else collect(inputs, lambda: repository(settings))
    facts = surveyed(survey, repo, settings, inputs) if repo else facts
    settings |= other_places(settings, inputs)
    base = collect(inputs, lambda: _likely_base(name)) or _farthest()
    output = _output(choices, settings, repo or "")
    request = _request(choices, settings, facts or NO_REPOSITORY, name, output)
    found += _planners_problems(request, base, facts or NO_REPOSITORY) + inputs
    if claim:
        collect(found, lambda: _check_place(output, fresh))
    raise_all(found)
    assert facts is not None
    return Checked(request=request, facts=facts, output=output)


def surveyed(survey: Survey, repo: str, settings: Mapping[str, Any],
              found: list[EliteError]) -> RepositoryFacts | None:
    """What all repositories hold. Each that cannot be read is a problem of its own."""
    also = settings.get("dataset.also") or []
    if problems_in({"dataset.also": also}):
        also = []
    missing: list[EliteError] = []
    found_at = (collect(missing, functools.partial(_place, each)) for each in (repo, *also))
    twice = [place for place, count in Counter(filter(None, found_at)).items() if count > 1]
    missing += [UsageError(f"The repository {place} is given twice; leave one out.") for place in twice]
    if missing:
        found += missing
        return None
    limit = "dataset.max_file_bytes"
    sound = limit in settings and not problems_in({limit: settings[limit]})
    repos = [repo, *also] if also else repo
    return collect(found, lambda: survey(repos, settings[limit]) if sound else survey(repos))


def other_places(settings: Mapping[str, Any], found: list[EliteError]) -> dict[str, Any]:
    """The other repositories by key, as a run keeps them: folders by their whole path, since it may be
    resumed from elsewhere; URLs without a login, and cloned where one was needed."""
    replay = settings.get("dataset.replay")
    also = settings.get("dataset.also")
    kept: dict[str, Any] = {}
    if isinstance(replay, str) and replay:
        kept["dataset.replay"] = collect(found, lambda: _cloned(replay)) or replay
    if isinstance(also, list) and not problems_in({"dataset.also": also}):
        kept["dataset.also"] = [_whole(each) for each in also]
    return kept


def _whole(repo: str) -> str:
    """A folder's whole path; a URL without its login; what names nothing as it is."""
    if checkout.is_url(repo):
        return checkout.without_login(repo)
    return str(Path(repo).expanduser().resolve()) if repo else repo


def _place(repo: str) -> str:
    """A repository's URL without its login, or its folder, which must be there. Raises UsageError or
    MissingInput."""
    if checkout.is_url(repo):
        return checkout.without_login(checkout.check_url(repo))
    return str(checkout.locate(repo))


def _cloned(repo: str) -> str:
    """A repository's place; one that needs a login is cloned while that is known."""
    place = _place(repo)
    if checkout.is_url(repo) and place != checkout.check_url(repo):
        checkout.locate(repo)
    return place


def _request(choices: Choices, settings: Mapping[str, Any], facts: RepositoryFacts, base: str,
             output: Path) -> Request:
    """The request without the values that are refused already."""
    sound = {key: value for key, value in settings.items() if not problems_in({key: value})}
    return Request(repo=facts.path, output=str(output), base_model=base, tier=choices.tier,
                   model_name=str(settings.get("run.name") or "") or output.absolute().name,
                   context_tokens=sound.get("dataset.context_tokens"), epochs=sound.get("training.epochs"),
                   max_hours=choices.max_hours, seed=sound.get("run.seed"), anyway=bool(choices.anyway),
                   settings={key: value for key, value in sound.items() if key not in IDENTITY})


def name_problems(choices: Choices, settings: Mapping[str, Any]) -> list[EliteError]:
    """A model name that cannot name a folder, and flags given empty."""
    found: list[EliteError] = []
    name = str(settings.get("run.name") or "")
    if set(name) & set("/\\\0") or name in (".", "..") or len(name.encode()) > MAX_NAME_BYTES:
        found.append(UsageError(f"The model name {name[:60]!r} cannot name a folder; use at most "
                                f"{MAX_NAME_BYTES} bytes and no slash."))
    for flag in ("repo", "output", "model_name", "base_model"):
        if "" in (getattr(choices, flag), *(choices.repo or ()) * (flag == "repo")):
            found.append(UsageError(f"--{flag.replace('_', '-')} is empty; give a value or leave it out."))
    return found


def _likely_base(name: str) -> BaseModel:
    """The base to hold the request against before the machine is known.

    Raises MissingInput or DataError for a base that cannot exist.
    """
    with contextlib.suppress(models.NotLoadable):
        if name != "auto":
            return models.resolve(name)
        if not nvidia.fetch().gpus:
            return models.resolve(models.EMBEDDED)
    return _farthest()


def _farthest() -> BaseModel:
    """The base with the longest context: what is beyond that one is beyond them all."""
    return max(models.registry().values(), key=lambda base: base.shape.native_context * base.shape.rope)


def _check_place(output: Path, fresh: bool) -> None:
    check_output(output, resume=False, fresh=fresh)
    check_disk(output, LEAST_DISK_BYTES)


def _planners_problems(request: Request, base: BaseModel, facts: RepositoryFacts) -> list[EliteError]:
    """What the planner will refuse on any machine. The devices asked for are taken to be there."""
    asked = request.settings
    count = int(asked.get("device.count", 1)) if asked.get("device.kind") == "cuda" else 0
    indices: Sequence[int] = range(count)
    if re.fullmatch(r"\d+(,\d+)*", str(asked.get("device.gpus", ""))):
        indices = [int(index) for index in asked["device.gpus"].split(",")]
    gpus = tuple(Gpu(index=index, name="", architecture="", capability="8.0", total_bytes=0, free_bytes=0)
                 for index in indices)
    machine = HardwareProfile(name="not measured", source="", date="", system="", cpu_name="", cpu_cores=1,
                              cpu_flags=(), ram_total_bytes=0, ram_available_bytes=0, gpus=gpus,
                              disk_path="", disk_free_bytes=0)
    return situation.build(request, machine, base, facts, tiers.load())[1]


def repository(settings: Mapping[str, Any]) -> str:
    """The repository as it was named, else the one that is found. Raises MissingInput."""
    if settings.get("dataset.repo"):
        return str(settings["dataset.repo"])
    return str(places.default_repository(Path.cwd(), Path.home())[0])


def _output(choices: Choices, settings: Mapping[str, Any], repo: str) -> Path:
    if choices.output:
        return Path(choices.output).expanduser()
    if choices.model_name:
        return places.RUNS / choices.model_name
    return places.free_path(places.RUNS / (str(settings.get("run.name") or "") or places.name_of(repo)))


def run_to_resume(choices: Choices, fresh: bool) -> Path:
    """The run that `--resume` means; refuses choices that differ from those it was made with.

    Raises MissingInput when there is none, UsageError or Problems for choices that cannot be changed.
    """
    if fresh:
        raise UsageError("--resume continues the run and --fresh moves it aside; give one of them.")
    settings, found = settings_of(choices)
    raise_all(found)
    path = _named_run(choices, settings)
    check_output(path, resume=True, fresh=False)
    raise_all(_differences(choices, settings, path))
    return path


def _named_run(choices: Choices, settings: Mapping[str, Any]) -> Path:
    if choices.output or choices.model_name:
        return _output(choices, settings, "")
    name = str(settings.get("run.name") or "") or places.name_of(repository(settings))
    for info in list_runs(places.RUNS):
        if info.name == name or (info.name.startswith(name + "-") and info.name[len(name) + 1:].isdigit()):
            return Path(info.path)
    raise MissingInput(f"No run of {name} in {places.RUNS.absolute()} to resume. Leave --resume out to start "
                       "one, or name it with --output.")


def _differences(choices: Choices, settings: Mapping[str, Any], path: Path) -> list[EliteError]:
    config, plan = load_config(path), RunDirectory(path).plan
    pairs = [(key, config[key], _comparable(key, value)) for key, value in settings.items()
             if key != "run.name" and not (key == "model.base" and value == "auto")]
    if choices.tier is not None:
        pairs.append(("tier", read_record(Plan, plan).tier, choices.tier))
    return [UsageError(f"{path} was made with {key} = {have!r}, not {want!r}; a run is resumed as planned. "
                       "Leave it out, or start anew with --fresh or another --output.")
            for key, have, want in pairs if have != want]


def _comparable(key: str, value: Any) -> Any:
    if key == "dataset.repo":
        return str(checkout.locate(value, refresh=False)) if checkout.is_url(value) else _whole(value)
    if key in PLACES:
        return [_whole(each) for each in value] if isinstance(value, list) else _whole(value)
    if key == "model.base":
        try:
            return models.resolve(str(value)).location
        except EliteError:
            return value
    return value
