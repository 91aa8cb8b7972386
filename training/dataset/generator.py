"""Stage 4: `DatasetGenerator` turns a repository into a folder of windows.

read -> redact -> split -> tokenizer -> encode -> windows -> write aside, rename
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.dataset.sources import checkout, repository, secrets
from training.dataset import tokenizer as tokenizers_
from training.dataset.completions import completion_spans
from training.dataset.composer import Composer, Window, coverage
from training.dataset.documents import Document, TokenPool, add_marks, lay_out
from training.dataset.structure.edges import import_edges
from training.dataset.sources.repository import SourceFile, Survey
from training.dataset.split import leakage, split
from training.dataset.staging import aside_of, replace
from training.dataset.store import (
    FORMAT,
    SPLITS,
    WindowStore,
    content_digest,
    file_sizes,
    write_json,
    write_tokens,
    write_windows,
)
from training.dataset.structure.syntax import skeleton
from training.dataset.tokenizer import Coder
from training.dataset.windows import Layout, Text, composed_windows, packed_windows, slices
from training.errors import EliteError, UsageError
from training.records import BaseModel, RepositoryFacts
from training.rundir import RunDirectory
from training.settings import Config

Progress = Callable[[str, int, int, str], None]
MIN_CONTEXT_TOKENS = 2        # a header token, which nothing predicts, and one target
HEAD_LINES, HEAD_README_CHARACTERS = 400, 1_500
EXAMPLES = 3                  # paths shown per reason
_SETTINGS = ("dataset.context_tokens", "dataset.target_tokens", "dataset.held_out_share", "dataset.fim_share",
             "dataset.max_file_bytes", "embedded.vocab_tokens", "model.base", "model.revision", "run.seed")


def _silent(phase: str, done: int, total: int, detail: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """Redacted text of both sides. `continued`: the one file is on both, cut in two."""

    train: list[SourceFile]
    held_out: list[SourceFile]
    findings: tuple[secrets.Finding, ...]

    @property
    def continued(self) -> bool:
        """Whether the held-out text goes on where the training text ends."""
        return len(self.train) == len(self.held_out) == 1 and self.train[0].path == self.held_out[0].path


@dataclass(frozen=True, kw_only=True)
class _Built:
    """Everything that goes to disk, still in memory."""

    coder: Coder
    layout: Layout
    ids: np.ndarray
    windows: dict[str, list[Window]]
    documents: dict[str, list[Document]]


class DatasetGenerator:
    """Writes `<output>/dataset/` from the repository that the configuration names.

    `base` carries the FIM sentinels and the location of the base model; without it no target is infilled
    unless the model is the embedded one. `folder` overrides where the dataset itself is written.
    """

    def __init__(self, config: Config, output: str | Path, base: BaseModel | None = None,
                 folder: str | Path | None = None):
        self.config, self.base = config, base
        self.folder = Path(folder) if folder else RunDirectory(Path(output)).dataset

    @staticmethod
    def survey(repo: str, max_file_bytes: int = repository.DEFAULT_MAX_FILE_BYTES) -> RepositoryFacts:
        """What the repository holds, without tokenizing it. `languages`: bytes of accepted text by language.

        Raises UsageError, MissingInput, or DataError with the count of each reason when nothing can be
        trained on.
        """
        found = repository.survey(checkout.locate(repo), max_file_bytes)
        return RepositoryFacts(path=str(found.root), name=found.name,
                               files=len(found.sources) + len(found.dropped),
                               code_files=len(found.sources),
                               code_bytes=sum(item.bytes for item in found.sources),
                               languages=_languages(found.sources))

    def generate(self, progress: Progress = _silent) -> dict[str, Any]:
        """Make the dataset, or return the one that is there for this very text and these settings.

        Raises MissingInput, DataError, UsageError or CannotWrite; nothing half-written stays behind.
        """
        if self.config["dataset.context_tokens"] < MIN_CONTEXT_TOKENS:
            raise UsageError(f"dataset.context_tokens is {self.config['dataset.context_tokens']}; "
                             f"the least is {MIN_CONTEXT_TOKENS}.")
        root = checkout.locate(self.config["dataset.repo"], refresh=False)
        found = repository.survey(root, self.config["dataset.max_file_bytes"],
                                  lambda done, total: progress("read", done, total, "files"))
        fingerprint = self._fingerprint(found)
        if (existing := self._existing(fingerprint)) is not None:
            return existing
        corpus = self._corpus(found, progress)
        with aside_of(self.folder, sum(item.bytes for item in found.sources)) as aside:
            built = self._build(found, corpus, aside / "tokenizer", progress)
            progress("write", 0, 1, "tokens")
            manifest = _describe(found, corpus, built) | {
                "fingerprint": fingerprint, "settings": _settings_of(self.config),
                "repository": checkout.without_password(self.config["dataset.repo"])}
            _write(aside, built, completion_spans(corpus.held_out, self.config["run.seed"]), manifest)
            replace(aside, self.folder)
        progress("write", 1, 1, "tokens")
        return WindowStore.open(self.folder).manifest

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Evenly spread train windows of the finished dataset as text.

        Keys: split, index, tokens, target_tokens, context, target, pieces [{text, trained}] in window order.
        """
        store = WindowStore.open(self.folder)
        coder = tokenizers_.open_folder(self.folder / "tokenizer", {})
        total = store.count("train")
        chosen = sorted({round(place) for place in np.linspace(0, total - 1, min(count, total))})
        return [_sample(store, coder, index) for index in chosen]

    @property
    def _location(self) -> str:
        return self.base.location if self.base else self.config["model.base"]

    def _fingerprint(self, found: Survey) -> str:
        """sha256 over the accepted text, the settings and the base's tokenizer."""
        state = hashlib.sha256(f"format {FORMAT}\0{found.name}\0".encode())
        for source in found.sources:
            state.update(hashlib.sha256(f"{source.path}\0{source.text}".encode()).digest())
        dropped = sorted((item.path, item.reason) for item in found.dropped
                         if item.reason != "ignored by rule")
        embedded = self._location == "embedded"
        tokenizer = "" if embedded else tokenizers_.digest_of(self._location, self.config["model.revision"])
        fim = self.base.fim if self.base else {}
        state.update(json.dumps([dropped, tokenizer, fim, _settings_of(self.config)],
                                sort_keys=True).encode())
        return state.hexdigest()

    def _existing(self, fingerprint: str) -> dict[str, Any] | None:
        try:
            store = WindowStore.open(self.folder)
        except EliteError:
            return None
        return store.manifest if store.manifest.get("fingerprint") == fingerprint else None

    def _corpus(self, found: Survey, progress: Progress) -> _Corpus:
        clean: list[SourceFile] = []
        findings: list[secrets.Finding] = []
        for index, source in enumerate(found.sources):
            text, secret = secrets.redact(source.text, source.path)
            clean.append(SourceFile(path=source.path, language=source.language, kind=source.kind, text=text))
            findings += secret
            if index % 16 == 0:
                progress("redact", index, len(found.sources), f"{len(findings)} secrets")
        train, held_out = split(clean, self.config["dataset.held_out_share"], self.config["run.seed"])
        return _Corpus(train=train, held_out=held_out, findings=tuple(findings))

    def _coder(self, corpus: _Corpus, folder: Path) -> Coder:
        if self._location == "embedded":
            return tokenizers_.train_embedded([source.text for source in corpus.train],
                                              self.config["embedded.vocab_tokens"], self.config["run.seed"],
                                              folder)
        return tokenizers_.load_base(self._location, self.config["model.revision"],
                                     self.base.fim if self.base else {}, folder)

    def _build(self, found: Survey, corpus: _Corpus, tokenizer_folder: Path, progress: Progress) -> _Built:
        progress("tokenizer", 0, 1, self._location)
        coder = self._coder(corpus, tokenizer_folder)
        progress("encode", 0, 1, "")
        pool = TokenPool()
        context = self.config["dataset.context_tokens"]
        layout = Layout(context_tokens=context, target_tokens=self.config["dataset.target_tokens"],
                        fim_share=self.config["dataset.fim_share"], seed=self.config["run.seed"],
                        marks=add_marks(coder, pool))
        documents = {"train": lay_out(coder, pool, corpus.train, context, ended=not corpus.continued),
                     "held_out": lay_out(coder, pool, corpus.held_out, context)}
        head = (0, 0)
        if not layout.packed:
            documents["train"] = _add_skeletons(coder, pool, corpus.train, documents["train"])
            head = _add_head(coder, pool, found.name, corpus.train)
        ids = pool.array()
        edges = import_edges([*corpus.train, *corpus.held_out], found.name)
        composer = Composer(documents["train"], edges, layout.marks, context,
                            np.flatnonzero(coder.ends_line[ids]), head)
        windows = {}
        for done, (name, sources) in enumerate((("train", corpus.train), ("held_out", corpus.held_out))):
            progress("windows", done, len(SPLITS), name)
            texts = _texts(coder, ids, sources, documents[name])
            windows[name] = _windows(documents[name], texts, composer, layout)
        return _Built(coder=coder, layout=layout, ids=ids, windows=windows, documents=documents)


def _texts(coder: Coder, ids: np.ndarray, sources: Sequence[SourceFile],
           documents: Sequence[Document]) -> list[Text]:
    texts = []
    for source, document in zip(sources, documents, strict=True):
        body = ids[document.body_start:document.body_start + document.body]
        text_only = body[:-1] if document.ended else body
        texts.append(Text(text=source.text, ends_line=coder.ends_line[body],
                          token_bytes=coder.token_bytes[text_only]))
    return texts


def _windows(documents: Sequence[Document], texts: Sequence[Text], composer: Composer,
             layout: Layout) -> list[Window]:
    parts = slices(documents, texts, layout)
    if layout.packed:
        return packed_windows(documents, parts, composer.edges, layout)
    return composed_windows(documents, parts, composer, layout)


def _add_skeletons(coder: Coder, pool: TokenPool, sources: Sequence[SourceFile],
                   documents: Sequence[Document]) -> list[Document]:
    texts = [skeleton(source.text, source.language) if source.kind == "code" else "" for source in sources]
    out = []
    for document, ids in zip(documents, coder.encode(texts), strict=True):
        place = (pool.add(ids), len(ids)) if len(ids) else (0, 0)
        out.append(dataclasses.replace(document, skeleton=place))
    return out


def _add_head(coder: Coder, pool: TokenPool, name: str, sources: Sequence[SourceFile]) -> tuple[int, int]:
    """The repository's name, README and list of files as tokens: (start, length)."""
    readmes = sorted((source.path.count("/"), source.path, source.text) for source in sources
                     if posixpath.basename(source.path).lower().startswith("readme"))
    readme = readmes[0][2][:HEAD_README_CHARACTERS] + "\n" if readmes else ""
    paths = "\n".join(source.path for source in sources[:HEAD_LINES])
    ids = coder.encode([f"# repository: {name}\n{readme}{paths}\n"])[0]
    return pool.add(ids), len(ids)


def _languages(sources: Sequence[SourceFile]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for source in sources:
        sizes[source.language] += source.bytes
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _examples(found: Survey) -> dict[str, list[str]]:
    """A few paths per reason."""
    examples: dict[str, list[str]] = {}
    for item in found.dropped:
        if len(paths := examples.setdefault(item.reason, [])) < EXAMPLES:
            paths.append(item.path)
    return examples


def _describe(found: Survey, corpus: _Corpus, built: _Built) -> dict[str, Any]:
    """The manifest's account of what became of each file and token."""
    bodies = {name: sum(item.body for item in documents) for name, documents in built.documents.items()}
    trained = {name: sum(segment.length for window in windows for segment in window.segments
                         if segment.trained)
               for name, windows in built.windows.items()}
    marks = {name: sum(segment.trained and segment.start == built.layout.marks.eos
                       for window in windows for segment in window.segments)
             for name, windows in built.windows.items()}
    parts = {name: [built.ids[item.body_start:item.body_start + item.body] for item in documents]
             for name, documents in built.documents.items()}
    return {
        "format": FORMAT, "name": found.name,
        "regime": "packed" if built.layout.packed else "composed",
        "files": {"seen": len(found.sources) + len(found.dropped), "accepted": len(found.sources),
                  "dropped": found.reasons, "examples": _examples(found), "train": len(corpus.train),
                  "held_out": len(corpus.held_out)},
        "languages": _languages(found.sources),
        "bytes": {name: sum(item.bytes for item in side)
                  for name, side in (("train", corpus.train), ("held_out", corpus.held_out))},
        "tokens": {"total": sum(bodies.values()), **bodies, "trained_per_epoch": trained["train"],
                   "infill_ends": marks["train"],
                   "lost": bodies["train"] - trained["train"] + marks["train"]},
        "windows": {name: len(windows) for name, windows in built.windows.items()},
        "window_tokens": {name: sum(window.length for window in windows) for name,
                          windows in built.windows.items()},
        "dependency_coverage": coverage(built.windows["train"], built.layout.context_tokens),
        "dependencies": sum(len(window.dependencies) for window in built.windows["train"]),
        "infilled": bool(built.coder.fim) and built.layout.infills,
        "secrets_replaced": len(corpus.findings),
        "secrets": [dataclasses.asdict(finding) for finding in corpus.findings],
        "leakage": leakage(parts["held_out"], parts["train"]),
    }


def _settings_of(config: Config) -> dict[str, Any]:
    return {name: config[name] for name in _SETTINGS}


def _write(folder: Path, built: _Built, spans: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    dtype = write_tokens(folder, built.ids, built.coder.vocab_tokens)
    for name, windows in built.windows.items():
        write_windows(folder, name, [window.segments for window in windows])
    np.save(folder / "token_bytes.npy", built.coder.token_bytes)
    write_json(folder / "completions.json", spans)
    sizes = file_sizes(folder)
    manifest["store"] = {"files": sizes, "dtype": dtype, "vocab_tokens": built.coder.vocab_tokens,
                         "pad_id": built.coder.pad_id, "eos_id": built.coder.eos_id,
                         "context_tokens": built.layout.context_tokens}
    manifest["completions"] = len(spans)
    manifest["digest"] = content_digest(folder, sizes)
    write_json(folder / "manifest.json", manifest)


def _sample(store: WindowStore, coder: Coder, index: int) -> dict[str, Any]:
    ids, labels = store.window("train", index)
    pieces: list[dict[str, Any]] = []
    position = 0
    for _, length, trained in store.segments("train", index):
        pieces.append({"text": coder.decode(ids[position:position + length]), "trained": bool(trained)})
        position += int(length)
    return {"split": "train", "index": index, "tokens": len(ids), "target_tokens": int((labels >= 0).sum()),
            "context": "".join(piece["text"] for piece in pieces if not piece["trained"]),
            "target": "".join(piece["text"] for piece in pieces if piece["trained"]), "pieces": pieces}
