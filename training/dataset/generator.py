"""Stage 4: `DatasetGenerator` turns repositories into a folder of windows.

list -> read, redact, analyse -> split -> tokenizer -> encode -> windows -> write aside, rename
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.dataset import corpus as corpora
from training.dataset import describing, making
from training.dataset import tokenizer as tokenizers_
from training.dataset.corpus import Corpus, Place, Spool
from training.dataset.sources import checkout, history, repository
from training.dataset.staging import aside_of, replace
from training.dataset.store import FORMAT, WindowStore
from training.dataset.tokenizer import Coder
from training.errors import EliteError, UsageError
from training.records import BaseModel, RepositoryFacts
from training.rundir import RunDirectory
from training.settings import Config
from training.texts import without_password

Progress = Callable[[str, int, int, str], None]
MIN_CONTEXT_TOKENS = 2        # a header token, which nothing predicts, and one target
TOLD_EVERY_S = 0.1
LEFT_OUT = "left_out.tsv"    # every file that is left out: reason, tab, path
_SETTINGS = ("dataset.context_tokens", "dataset.target_tokens", "dataset.held_out_share", "dataset.split",
             "dataset.fim_share", "dataset.whole_share", "dataset.fim_rate", "dataset.commit_share",
             "dataset.replay_share", "dataset.packing", "dataset.max_file_bytes", "embedded.vocab_tokens",
             "model.base", "model.revision", "run.seed")


def _silent(phase: str, done: int, total: int, detail: str) -> None:
    """Progress that nobody watches."""


class DatasetGenerator:
    """Writes `<output>/dataset/` from the repositories that the configuration names.

    `base` carries the FIM sentinels and the location of the base model; without it no target is infilled
    unless the model is the embedded one. `folder` overrides where the dataset itself is written.
    """

    def __init__(self, config: Config, output: str | Path, base: BaseModel | None = None,
                 folder: str | Path | None = None):
        self.config, self.base = config, base
        self.folder = Path(folder) if folder else RunDirectory(Path(output)).dataset

    @staticmethod
    def survey(repos: Sequence[str] | str,
               max_file_bytes: int = repository.DEFAULT_MAX_FILE_BYTES) -> RepositoryFacts:
        """What the repositories hold, before any token. `languages`: bytes of accepted text by language.

        Raises UsageError, MissingInput, or DataError with the count of each reason when nothing can be
        trained on.
        """
        named = [repos] if isinstance(repos, str) else list(repos)
        places = [_place(repo, refresh=True, several=len(named) > 1) for repo in named]
        counts, seen = repository.Counts(), set[bytes]()
        for place in places:
            counts.dropped.update(item.reason for item in place.listing.dropped)
            for found in repository.read_all(place.listing, max_file_bytes):
                counts.add(repository.unless_seen(found, seen))
        root = places[0].listing.root
        repository.check(_names(places), counts)
        languages = dict(sorted(counts.languages.items(), key=lambda item: (-item[1], item[0])))
        return RepositoryFacts(path=str(root), name=places[0].listing.name, files=counts.files,
                               code_files=counts.accepted, code_bytes=counts.text_bytes, languages=languages,
                               commits=sum(history.count(place.listing.root) for place in places))

    def generate(self, progress: Progress = _silent) -> dict[str, Any]:
        """Make the dataset, or return the one that is there for this very text and these settings.

        Raises MissingInput, DataError, UsageError or CannotWrite; nothing half-written stays behind.
        """
        if self.config["dataset.context_tokens"] < MIN_CONTEXT_TOKENS:
            raise UsageError(f"dataset.context_tokens is {self.config['dataset.context_tokens']}; "
                             f"the least is {MIN_CONTEXT_TOKENS}.")
        progress("list", 0, 1, "")
        named = [self.config["dataset.repo"], *self.config["dataset.also"]]
        places = [_place(repo, refresh=False, several=len(named) > 1) for repo in named]
        replay = [_place(self.config["dataset.replay"], refresh=False, several=True)
                  ] if self.config["dataset.replay"] else []
        if (existing := self._existing([*places, *replay])) is not None:
            return existing
        with aside_of(self.folder, _size_bytes([*places, *replay], self._most_bytes)) as aside:
            spool_path = aside / "texts.spool"
            spool = Spool(spool_path)
            try:
                manifest = self._make(places, replay, spool, aside, progress)
            finally:
                spool.close()
                spool_path.unlink(missing_ok=True)
            describing.seal(aside, manifest)
            replace(aside, self.folder)
        progress("write", 1, 1, "tokens")
        return WindowStore.open(self.folder).manifest

    def _make(self, places: Sequence[Place], replay: Sequence[Place], spool: Spool, aside: Path,
              progress: Progress) -> dict[str, Any]:
        state = hashlib.sha256()
        corpus, second = Corpus(spool=spool, state=state), Corpus(spool=spool, state=state)
        with open(aside / LEFT_OUT, "w", encoding="utf-8") as corpus.left_out:
            for place in places:
                self._read(corpus, place, progress)
        repository.check(_names(places), corpus.counts())
        for place in replay:
            self._read(second, place, progress)
        coder_of = self._coder_of(aside / "tokenizer")
        made = making.Maker(config=self.config, base=self.base, places=places, corpus=corpus, replay=second,
                            folder=aside, coder_of=coder_of, progress=progress).make()
        return made | {"fingerprint": self._fingerprint(places, state), "settings": self._settings(),
                       "repository": without_password(self.config["dataset.repo"])}

    def _read(self, corpus: Corpus, place: Place, progress: Progress) -> None:
        total, last = len(place.listing.names), [0.0]

        def told(files: int, size_bytes: int, path: str) -> None:
            now = time.monotonic()
            if now - last[0] >= TOLD_EVERY_S or files == total:
                last[0] = now
                progress("read", files, total, f"{files:,} files, {size_bytes / 1e6:.1f} MB")

        created = history.created(place.listing.root) if self.config["dataset.split"] != "cluster" else {}
        corpora.read(corpus, place, self._most_bytes, created, told)

    @property
    def _most_bytes(self) -> int:
        return int(self.config["dataset.max_file_bytes"])

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Train windows of the finished dataset as text, spread over kinds and places.

        Keys: split, index, kind, path, tokens, target_tokens, context, target, pieces [{text, trained}].
        """
        store = WindowStore.open(self.folder)
        coder = tokenizers_.open_folder(self.folder / "tokenizer", {})
        return [describing.sample(store, coder, index, self.config["run.seed"])
                for index in describing.spread(store, count)]

    @property
    def _location(self) -> str:
        return self.base.location if self.base else str(self.config["model.base"])

    def _settings(self) -> dict[str, Any]:
        return {name: self.config[name] for name in _SETTINGS}

    def _fingerprint(self, places: Sequence[Place], state: Any) -> str:
        """sha256 over what was read (`state`), the commits it stands at, the settings and the tokenizer."""
        embedded = self._location == "embedded"
        tokenizer = "" if embedded else tokenizers_.digest_of(self._location, self.config["model.revision"])
        fim = [self.base.fim, self.base.fim_order] if self.base else []
        stand = [[place.prefix, place.listing.name, place.commit] for place in places]
        about = [FORMAT, stand, tokenizer, fim, self._settings()]
        total = state.copy()
        total.update(json.dumps(about, sort_keys=True).encode())
        return str(total.hexdigest())

    def _existing(self, places: Sequence[Place]) -> dict[str, Any] | None:
        """The manifest that is there, when the files read the same now."""
        try:
            store = WindowStore.open(self.folder)
        except EliteError:
            return None
        state = hashlib.sha256()
        for place in places:
            for found in repository.read_all(place.listing, self._most_bytes):
                corpora.stamp(state, place.prefix, found)
        replay = bool(self.config["dataset.replay"])
        fingerprint = self._fingerprint(places[:-1] if replay else places, state)
        return store.manifest if store.manifest.get("fingerprint") == fingerprint else None

    def _coder_of(self, folder: Path) -> Callable[[Sequence[str]], Coder]:
        """Sample texts -> the tokenizer, written to `folder`."""
        def embedded(texts: Sequence[str]) -> Coder:
            return tokenizers_.train_embedded(texts, self.config["embedded.vocab_tokens"],
                                              self.config["run.seed"], folder)

        def loaded(texts: Sequence[str]) -> Coder:
            return tokenizers_.load_base(self._location, self.config["model.revision"],
                                         self.base.fim if self.base else {}, folder)
        return embedded if self._location == "embedded" else loaded


def _place(repo: str, refresh: bool, several: bool) -> Place:
    root = checkout.locate(repo, refresh=refresh)
    listing = repository.list_repository(root)
    head = checkout.run_git(["rev-parse", "HEAD"], root, checkout.LIST_TIMEOUT_S) if listing.is_git else None
    commit = head.stdout.decode("ascii", "replace").strip() if head and not head.returncode else ""
    return Place(named=without_password(repo), listing=listing,
                 prefix=f"{listing.name}/" if several else "", commit=commit)


def _names(places: Sequence[Place]) -> str:
    """All repositories, for messages about them together."""
    return " and ".join(str(place.listing.root) for place in places)


def _size_bytes(places: Sequence[Place], most_bytes: int) -> int:
    """Bytes on disk of all listed files that are not too large to be read."""
    total = 0
    for place in places:
        for name in place.listing.names:
            try:
                size = os.lstat(os.path.join(place.listing.root, name)).st_size
            except (OSError, ValueError):
                continue
            total += size if size <= most_bytes else 0
    return total
