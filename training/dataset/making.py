"""From the facts of all files to everything a dataset folder holds but its manifest's last lines."""

from __future__ import annotations

import dataclasses
import itertools
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.dataset import building, commits, corpus, describing, split
from training.dataset.building import Builder, Counts, Sides
from training.dataset.completions import completion_spans
from training.dataset.composer import Library
from training.dataset.corpus import Corpus, Entry, Place, Texts
from training.dataset.documents import Document, header_text
from training.dataset.encoding import Encoder, Text, head_text
from training.dataset.notes import notes
from training.dataset.selftest import selftest
from training.dataset.sources import history
from training.dataset.sources.repository import Listing, SourceFile, read_all
from training.dataset.store import CURVE_KINDS, FORMAT, write_json
from training.dataset.structure import edges as edges_
from training.dataset.structure.syntax import Structure, analyse
from training.dataset.tokenizer import BATCH_BYTES, Coder
from training.dataset.windows import Layout
from training.records import BaseModel
from training.settings import Config

Progress = Callable[[str, int, int, str], None]
MIN_CUT_SHARE = 0.1           # of a single file, held out at the least
SELFTEST_FILES, SELFTEST_BYTES = 16, 64 << 10


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Both sides' files, and the windows made of them; `ids` are all tokens."""

    train: list[Entry]
    held_out: list[Entry]
    builder: Builder
    counts: dict[str, Counts]
    ids: np.ndarray


@dataclass(kw_only=True)
class Maker:
    """Makes one dataset in `folder`. `coder_of`: sample texts -> tokenizer."""

    config: Config
    base: BaseModel | None
    places: Sequence[Place]
    corpus: Corpus
    replay: Corpus
    folder: Path
    coder_of: Callable[[Sequence[str]], Coder]
    progress: Progress

    def make(self) -> dict[str, Any]:
        """Write everything; the manifest."""
        self.progress("split", 0, 1, f"{len(self.corpus.entries):,} files")
        train, held_out, found = self._split()
        self.progress("tokenizer", 0, 1, "")
        coder = self.coder_of(Texts(self.corpus, train))
        layout = self._layout(coder)
        encoder = Encoder(coder, self.folder, layout.context_tokens)
        accounts = commits.Accounts()
        try:
            sides, head, foreign, about = self._encode(encoder, layout, train, held_out, accounts)
        finally:
            encoder.close()
        made = self._build(encoder, layout, sides, (train, held_out), head)
        curve = made.builder.curve(foreign) | {"kinds": list(CURVE_KINDS), "foreign": about}
        self.progress("write", 0, 1, "")
        structures = _Structures(self.corpus, held_out)
        spans = completion_spans(map(self.corpus.source, held_out), structures, self._seed)
        self._write(coder, encoder, spans)
        return {**self._of_files(made, found), **self._of_windows(made),
                "curve": curve | {"items": len(curve["paths"])}, "completions": len(spans),
                "commits": {"used": accounts.used, "skipped": dict(sorted(accounts.skipped.items()))},
                **describing.replaced([self.corpus, self.replay], accounts.findings),
                "store": {"dtype": encoder.tokens.dtype, "vocab_tokens": coder.vocab_tokens,
                          "pad_id": coder.pad_id, "eos_id": coder.eos_id, "fim": dict(coder.fim),
                          "fim_rate": layout.fim_rate, "fim_order": self._fim_order,
                          "move_tokens": layout.move_tokens, "context_tokens": layout.context_tokens}}

    def _build(self, encoder: Encoder, layout: Layout, sides: Sides,
               entries: tuple[list[Entry], list[Entry]], head: tuple[int, int]) -> _Made:
        """The windows of both sides, written."""
        ids, ends_line = encoder.tokens.view(), encoder.coder.ends_line
        library = self._library(*entries, sides, head, lambda start, length: np.asarray(
            ends_line[ids[start:start + length]]))
        builder = Builder(self.folder, sides, library, layout)
        self.progress("windows", 0, 2, "train")
        counts = {"train": builder.train()}
        self.progress("windows", 1, 2, "held out")
        counts["held_out"] = builder.held_out()
        return _Made(train=entries[0], held_out=entries[1], builder=builder, counts=counts, ids=ids)

    def _of_files(self, made: _Made, found: split.Split) -> dict[str, Any]:
        """The manifest's account of repositories and files."""
        return {"format": FORMAT, "name": self.places[0].listing.name,
                "repositories": [{"name": place.listing.name, "named": place.named, "commit": place.commit}
                                 for place in self.places],
                "files": describing.files(self.corpus, len(made.train), len(made.held_out)),
                "languages": describing.languages(self.corpus.entries),
                "bytes": {"train": sum(entry.bytes for entry in made.train),
                          "held_out": sum(entry.bytes for entry in made.held_out)},
                "split": {"by": found.by, "why": found.why, "near_duplicates": found.near_duplicates},
                "selftest": self._selftest(made.builder, made.train, made.held_out)}

    def _of_windows(self, made: _Made) -> dict[str, Any]:
        """The manifest's account of tokens and windows."""
        sides, layout, coverage = made.builder.sides, made.builder.layout, made.builder.coverage
        documents = {"train": sides.train, "held_out": sides.held_out, "commits": sides.commits,
                     "replay": sides.replay}
        read = sum(document.body for document in (*sides.train, *sides.held_out))
        return {"regime": "packed" if layout.packed else "composed", "infilled": layout.infills,
                "tokens": describing.tokens(documents, made.counts),
                "windows": {name: count.windows for name, count in made.counts.items()},
                **describing.windows(made.counts["train"], layout.context_tokens),
                "dependency_coverage": coverage.shares(), "dependencies": coverage.total,
                "leakage": split.leakage(_bodies(made.ids, sides.held_out), _bodies(
                    made.ids, [*sides.train, *sides.commits, *sides.replay])),
                "notes": notes(read, layout.context_tokens, len(self.corpus.entries), coverage.total, None)}

    @property
    def _seed(self) -> int:
        return int(self.config["run.seed"])

    @property
    def _fim_order(self) -> str:
        return self.base.fim_order if self.base else "psm+spm"

    def _split(self) -> tuple[list[Entry], list[Entry], split.Split]:
        """Train and held-out entries. Of a single file the last part is held out."""
        entries, share = self.corpus.entries, float(self.config["dataset.held_out_share"])
        found = split.held_out(entries, share, self._seed, self.config["dataset.split"])
        if len(entries) == 1:
            train, held_out = corpus.cut_in_two(self.corpus, max(share, MIN_CUT_SHARE))
            return train, held_out, split.Split(paths=frozenset(), by="cut", near_duplicates=0,
                                                why="one file: its last part is held out")
        return ([entry for entry in entries if entry.path not in found.paths],
                [entry for entry in entries if entry.path in found.paths], found)

    def _layout(self, coder: Coder) -> Layout:
        config = self.config
        return Layout(context_tokens=config["dataset.context_tokens"],
                      target_tokens=config["dataset.target_tokens"], seed=self._seed,
                      sentinels=bool(coder.fim), fim_share=config["dataset.fim_share"],
                      whole_share=config["dataset.whole_share"], fim_rate=config["dataset.fim_rate"],
                      shared=config["dataset.packing"])

    def _encode(self, encoder: Encoder, layout: Layout, train: list[Entry], held_out: list[Entry],
                accounts: commits.Accounts) -> tuple[Sides, tuple[int, int], list[tuple[int, int]], str]:
        """All texts to tokens: the sides, the repository's head, and foreign text with what it is."""
        continued = len(self.corpus.entries) == 1
        documents = self._documents(encoder, train, "train", skeletons=not layout.packed,
                                    spans=layout.infills, ended=not continued)
        kept = self._documents(encoder, held_out, "held_out", skeletons=False, spans=False)
        size = sum(document.body for document in documents)
        commit_share = float(self.config["dataset.commit_share"])
        replay_share = float(self.config["dataset.replay_share"]) if self.replay.entries else 0.0
        whole = size / max(1 - commit_share - replay_share, 0.1)
        patches = self._commits(encoder, train, held_out, int(whole * commit_share), accounts)
        more = self._replay(encoder, whole * replay_share)
        name = self.places[0].listing.name
        head = encoder.bare(head_text(self.corpus, name, train)) if not layout.packed else (0, 0)
        foreign, about = self._foreign(encoder, min(layout.context_tokens, building.CURVE_TOKENS))
        return (Sides(train=documents, held_out=kept, commits=patches, replay=more), head, foreign, about)

    def _documents(self, encoder: Encoder, entries: list[Entry], side: str, *, skeletons: bool, spans: bool,
                   ended: bool = True) -> list[Document]:
        found: list[Document] = []
        for document in encoder.files(self.corpus, entries, side, skeletons=skeletons, spans=spans,
                                      ended=ended):
            found.append(document)
            if len(found) % 16 == 0:
                self.progress("encode", len(found), len(entries), f"{encoder.tokens.size:,} tokens")
        return found

    def _commits(self, encoder: Encoder, train: list[Entry], held_out: list[Entry], limit_tokens: int,
                 accounts: commits.Accounts) -> list[Document]:
        """Patches of every repository's history, newest first, up to a number of tokens."""
        if limit_tokens < 1:
            return []
        found: list[Document] = []
        for place in self.places:
            trained, kept = ({entry.path.removeprefix(place.prefix) for entry in side
                              if entry.path.startswith(place.prefix)} for side in (train, held_out))
            sides = commits.Sides(train=trained, held_out=kept,
                                  sketches=np.stack([entry.sketch for entry in held_out]))
            texts = commits.chosen(history.commits(place.listing.root, commits.MOST, accounts.skipped), sides,
                                   encoder.coder, limit_tokens, encoder.context_tokens, accounts)
            for batch in _batches(texts, BATCH_BYTES):
                found += encoder.add(batch, "commits")
        return found

    def _replay(self, encoder: Encoder, limit_tokens: float) -> list[Document]:
        """Files of the second corpus, drawn until `limit_tokens` (about: by bytes of text)."""
        entries = self.replay.entries
        sizes, paths = [entry.bytes // 4 for entry in entries], [entry.path for entry in entries]
        taken = building.replay_share(sizes, paths, limit_tokens, self._seed)
        chosen = [entries[index] for index in taken]
        return list(encoder.files(self.replay, chosen, "replay", skeletons=False, spans=False))

    def _foreign(self, encoder: Encoder, wanted: int) -> tuple[list[tuple[int, int]], str]:
        """Text that has nothing to do with the repository, `wanted` tokens of it, and what it is."""
        roots = [place.listing.root for place in self.places]
        about, sources = foreign_sources(roots)
        pieces: list[tuple[int, int]] = []
        for source in sources:
            pieces.append(encoder.bare(header_text(source.path) + source.text))
            if sum(length for _, length in pieces) >= wanted:
                break
        return pieces, about

    def _library(self, train: list[Entry], held_out: list[Entry], sides: Sides, head: tuple[int, int],
                 line_ends: Callable[[int, int], np.ndarray]) -> Library:
        facts = [*train, *held_out]
        found = self._edges(facts)
        words = np.stack([entry.words for entry in train])
        return Library(documents=sides.train, edges=found, pairs=edges_.pairs(facts, found), words=words,
                       line_ends=line_ends, head=head)

    def _edges(self, facts: Sequence[Entry]) -> edges_.Edges:
        """Who imports whom; of several repositories first within each, then across all."""
        found = edges_.import_edges(facts, package_name(self.places[0].listing.root))
        for place in self.places if len(self.places) > 1 else ():
            size = len(place.prefix)
            own = [dataclasses.replace(entry, path=entry.path[size:]) for entry in facts
                   if entry.path.startswith(place.prefix)]
            for path, targets in edges_.import_edges(own, package_name(place.listing.root)).items():
                inner = [place.prefix + target for target in targets]
                found[place.prefix + path] = tuple(dict.fromkeys([*inner, *found[place.prefix + path]]))
        return found

    def _write(self, coder: Coder, encoder: Encoder, spans: list[dict[str, Any]]) -> None:
        np.save(self.folder / "token_bytes.npy", coder.token_bytes)
        np.save(self.folder / "ends_line.npy", coder.ends_line)
        write_json(self.folder / "completions.json", spans)
        write_json(self.folder / "documents.json", encoder.about)

    def _selftest(self, builder: Builder, train: list[Entry], held_out: list[Entry]) -> dict[str, Any]:
        """Bits per byte of held-out files' second halves under LZMA, by what stands before them."""
        by_path = {entry.path: entry for entry in train}
        code = [entry for entry in held_out if entry.kind == "code"][:SELFTEST_FILES]
        paths = [entry.path for entry in train]
        return selftest([self._selftest_item(builder, entry, by_path, paths) for entry in code], self._seed)

    def _selftest_item(self, builder: Builder, entry: Entry, by_path: dict[str, Entry],
                       paths: list[str]) -> tuple[bytes, bytes, dict[str, bytes]]:
        text = self.corpus.text(entry).encode("utf-8")
        half = text.find(b"\n", len(text) // 2) + 1 or len(text) // 2
        near = [document.path for document, _ in builder.composer.ranking(entry.path)]
        order = np.random.Generator(np.random.PCG64(self._seed)).permutation(len(paths))
        before = [path for path in paths if path < entry.path][::-1]
        orders = {"random": [paths[int(index)] for index in order], "path order": before, "composed": near}
        contexts = {kind: self._context(by_path, names) for kind, names in orders.items()}
        return text[:half], text[half:], contexts

    def _context(self, by_path: dict[str, Entry], names: Sequence[str]) -> bytes:
        """The first of these files, nearest last, up to `SELFTEST_BYTES`."""
        parts: list[bytes] = []
        room = SELFTEST_BYTES
        for name in names:
            if room <= 0:
                break
            data = self.corpus.text(by_path[name]).encode("utf-8")[:room]
            parts.append(data)
            room -= len(data)
        return b"".join(reversed(parts))


class _Structures(Mapping[str, Structure]):
    """Path -> what the file says of itself, analysed when it is asked for."""

    def __init__(self, corpus: Corpus, entries: Sequence[Entry]):
        self._corpus, self._entries = corpus, {entry.path: entry for entry in entries}

    def __getitem__(self, path: str) -> Structure:
        entry = self._entries[path]
        return analyse(self._corpus.text(entry), entry.language)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def package_name(root: Path) -> str:
    """The name by which the repository's own files import it: its folder's, behind those of the packages
    around it where it is a package itself."""
    parts = [root.name]
    while all((folder / "__init__.py").is_file() for folder in (root, root.parent)):
        root = root.parent
        parts.insert(0, root.name)
    return ".".join(parts)


def foreign_sources(roots: Sequence[Path]) -> tuple[str, Iterator[SourceFile]]:
    """Python's own library, or NumPy's where the repository is that library; and which it is."""
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    inside = any(root == library or library in root.parents or root in library.parents for root in roots)
    folder, about = (Path(np.__file__).resolve().parent / "lib", "NumPy's lib folder") if inside else (
        library, "Python's standard library")
    names = tuple(sorted(path.name for path in folder.glob("*.py")))
    listing = Listing(root=folder, name=folder.name, names=names, dropped=(), is_git=False)
    return about, (found for found in read_all(listing, 1 << 20) if isinstance(found, SourceFile))


def _bodies(ids: np.ndarray, documents: Sequence[Document]) -> Iterator[np.ndarray]:
    return (ids[document.body_start:document.body_start + document.body] for document in documents)


def _batches(texts: Iterator[Text], batch_bytes: int) -> Iterator[list[Text]]:
    """Texts so many at once that they have about `batch_bytes` characters."""
    batch: list[Text] = []
    size = 0
    for text in itertools.chain(texts, [None]):
        if text is not None:
            batch.append(text)
            size += len(text.header) + len(text.body)
        if batch and (text is None or size >= batch_bytes):
            yield batch
            batch, size = [], 0
