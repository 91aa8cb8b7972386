"""A made-up token array with line ends and syntax nodes, and documents that lie in it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from training.dataset.composer import Library
from training.dataset.documents import Document

EOS = 0


@dataclass
class Array:
    """What `infill.Source` asks for."""

    ids: np.ndarray
    ends: np.ndarray
    nodes: np.ndarray

    def tokens(self, start, length):
        return self.ids[start:start + length]

    def line_ends(self, start, length):
        return self.ends[start:start + length]

    def spans(self, start, end):
        return self.nodes[(self.nodes[:, 0] >= start) & (self.nodes[:, 1] <= end)]


def library(seed: int, count: int, longest: int) -> tuple[Library, list[Document], Array]:
    """Documents of random sizes with random line ends, nodes, ends, kinds and imports."""
    rng = random.Random(seed)
    documents, place, nodes = [], 0, []
    for index in range(count):
        body, header, ended = rng.randint(1, longest), rng.randint(1, 3), rng.random() < 0.8
        first = place + header
        documents.append(Document(path=f"{rng.choice('ab')}/f{index}.txt", language="text",
                                  kind=rng.choice(["code", "code", "docs"]), start=place, header=header,
                                  body=body, ended=ended))
        nodes += [tuple(sorted(rng.sample(range(first, first + body + 1), 2))) for _ in range(body // 8)]
        place = first + body
    ids = np.random.default_rng(seed).integers(5, 99, place)
    for document in documents:
        if document.ended:
            ids[document.body_start + document.body - 1] = EOS
    array = Array(ids, np.random.default_rng(seed + 1).random(place) < 0.2,
                  np.array(sorted(nodes), dtype=np.int64).reshape(-1, 2))
    paths = [document.path for document in documents]
    edges = {path: tuple(set(rng.sample(paths, min(2, count))) - {path}) for path in paths}
    pairs = {path: tuple(set(rng.sample(paths, min(1, count))) - {path}) for path in paths}
    words = np.random.default_rng(seed).integers(0, 50, (count, 32)).astype(np.uint32)
    return Library(documents=documents, edges=edges, pairs=pairs, words=words,
                   line_ends=array.line_ends), documents, array
