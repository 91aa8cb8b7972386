"""The manifest's account of what became of each file and token, and windows shown as text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.dataset.building import Counts, packing_waste
from training.dataset.corpus import Corpus, Entry
from training.dataset.documents import Document
from training.dataset.sources import personal
from training.dataset.store import KINDS, WindowStore, content_digest, file_sizes, write_json
from training.dataset.tokenizer import Coder


def files(corpus: Corpus, train: int, held_out: int) -> dict[str, Any]:
    """The manifest's `files`: seen = accepted + dropped."""
    dropped = dict(sorted(corpus.dropped.items(), key=lambda item: (-item[1], item[0])))
    return {"seen": len(corpus.entries) + corpus.dropped.total(), "accepted": len(corpus.entries),
            "dropped": dropped, "examples": corpus.examples, "train": train, "held_out": held_out}


def languages(entries: Sequence[Entry]) -> dict[str, int]:
    """Bytes of accepted text by language, most first."""
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.language] += entry.bytes
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def tokens(documents: Mapping[str, Sequence[Document]], counts: Mapping[str, Counts]) -> dict[str, int]:
    """The manifest's `tokens`: total = trained_per_epoch + held_out + rejected + lost; none is lost."""
    bodies = {name: sum(document.body for document in found) for name, found in documents.items()}
    trained, rejected = counts["train"].targets, counts["train"].rejected_tokens
    train = sum(size for name, size in bodies.items() if name != "held_out")
    return {"total": sum(bodies.values()), **bodies, "trained_per_epoch": trained, "rejected": rejected,
            "lost": train - trained - rejected}


def windows(counts: Counts, context_tokens: int) -> dict[str, Any]:
    """The manifest's `kinds` and `packing`."""
    return {"kinds": {name: dataclasses.asdict(kind) for name, kind in sorted(counts.kinds.items())},
            "packing": {"waste": packing_waste(counts.kinds, context_tokens)}}


def replaced(corpora: Sequence[Corpus], findings: Sequence[Any]) -> dict[str, Any]:
    """What was replaced, by rule; the places of the first thousand findings, never a value."""
    rules: Counter[str] = Counter(finding.rule for finding in findings)
    listed = [finding for finding in findings if finding.rule not in personal.KINDS]
    for corpus in corpora:
        rules.update(corpus.rules)
        listed += corpus.findings
    about_people = sum(rules[kind] for kind in personal.KINDS)
    return {"secrets_replaced": rules.total() - about_people, "personal_replaced": about_people,
            "replaced_by_rule": dict(sorted(rules.items())),
            "secrets": [dataclasses.asdict(finding) for finding in listed[:1_000]]}


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with the sizes and the hash of all other files."""
    sizes = file_sizes(folder)
    manifest["store"]["files"] = sizes
    manifest["digest"] = content_digest(folder, sizes)
    write_json(folder / "manifest.json", manifest)


def spread(store: WindowStore, count: int) -> list[int]:
    """Train windows to show: one of each kind in turn, evenly placed."""
    total = store.count("train")
    kinds = np.fromfile(store.path / "train_kinds.bin", dtype=np.uint8)
    places = {kind: np.flatnonzero(kinds == kind) for kind in range(len(KINDS)) if (kinds == kind).any()}
    chosen: dict[int, None] = {}
    for step in range(count):
        for found in places.values():
            if len(chosen) < min(count, total):
                chosen.setdefault(int(found[(2 * step + 1) * len(found) // (2 * count)]))
    missing = (index for index in range(total) if index not in chosen)
    while len(chosen) < min(count, total):
        chosen.setdefault(next(missing))
    return sorted(chosen)


def sample(store: WindowStore, coder: Coder, index: int, seed: int) -> dict[str, Any]:
    """One train window as text, as the first epoch has it."""
    ids, labels = store.window("train", index, seed)
    pieces: list[dict[str, Any]] = []
    position, path = 0, ""
    for part in store.segments("train", index, seed):
        text = coder.decode(ids[position:position + part.length])
        if pieces and pieces[-1]["trained"] == part.trained:
            pieces[-1]["text"] += text
        else:
            pieces.append({"text": text, "trained": part.trained})
        if part.trained and part.start >= 0 and (origin := store.origin(part.start)):
            path = origin.path
        position += part.length
    return {"split": "train", "index": index, "kind": store.kind(index), "path": path, "tokens": len(ids),
            "target_tokens": int((labels >= 0).sum()),
            "context": "".join(piece["text"] for piece in pieces if not piece["trained"]),
            "target": "".join(piece["text"] for piece in pieces if piece["trained"]), "pieces": pieces}
