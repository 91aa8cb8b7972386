"""What a preflight looks at in other rooms: the base model's files and the dataset's windows."""

from __future__ import annotations

from pathlib import Path

from training import weights
from training.dataset.store import WindowStore
from training.errors import DataError, EliteError, MissingInput
from training.manager.preflight import Check
from training.rundir import RunDirectory
from training.settings import Config

SHOWN = 3


def base_is_whole(run: RunDirectory, config: Config) -> list[EliteError]:
    """Each weight file of the base is there, as long as its header says, and configuration and tokenizer."""
    base = str(config["model.base"])
    if base == "embedded":
        return []
    named = Path(base).expanduser()
    folder = named if named.is_dir() else weights.cached_folder(base, config["model.revision"])
    if folder is None:
        return [MissingInput(f"The base model {base} is not in the Hugging Face cache; fetch it again where "
                             "there is a network, or give its folder with --base-model.")]
    return [DataError(f"The base model in {folder} is not whole: {problem}; fetch or copy it again.")
            for problem in weights.folder_problems(folder)]


def dataset_is_as_made(run: RunDirectory, config: Config) -> list[EliteError]:
    """Its content is what its manifest says, and each train window has a token to train on."""
    try:
        store = WindowStore.open(run.dataset)
        store.verify()
    except (MissingInput, DataError) as error:
        return [error]
    empty = store.without_target("train")
    if not len(empty):
        return []
    named = ", ".join(map(str, empty[:SHOWN])) + (", ..." if len(empty) > SHOWN else "")
    return [DataError(f"{len(empty):,} of {store.count('train'):,} train windows have no token to train on "
                      f"({named}); make the dataset again with --fresh.")]


ALL: tuple[Check, ...] = (base_is_whole, dataset_is_as_made)
