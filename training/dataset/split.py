"""Which text is kept for evaluation, and how much of it the training text already shows.

The split is by file, in clusters: files with the same stem in one folder (header and source, copies named
`x_old`, `x (1)`) and near-identical files stay on one side.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from training.dataset.sources.repository import SourceFile

SKETCH_LINES = 32            # lowest line hashes that stand for a file
SAME_SHARE = 0.5             # of the smaller sketch: above it two files are near-identical
MIN_HELD_OUT_BYTES = 400     # smaller files say little about a model
NGRAM_TOKENS = 13
_COPY_MARK = re.compile(r"([ _.-]*(\(\d+\)|copy|old|orig|backup|bak|v\d+|\d+))+$", re.IGNORECASE)


def split(sources: Sequence[SourceFile], share: float, seed: int) -> tuple[list[SourceFile],
                                                                           list[SourceFile]]:
    """(train, held out). With one file its last part is held out, under the same path."""
    if len(sources) == 1:
        return _cut_in_two(sources[0], max(share, 0.1))
    total = sum(source.bytes for source in sources)
    quota_files = max(1, round(share * len(sources)))
    limit_bytes = max(2 * share * total, total / len(sources))
    chosen: set[str] = set()
    size = 0
    candidates = sorted(_clusters(sources), key=lambda cluster: _draw(seed, cluster))
    for cluster in candidates:
        cluster_bytes = sum(source.bytes for source in cluster)
        useful = any(source.kind == "code" and source.bytes >= MIN_HELD_OUT_BYTES for source in cluster)
        if useful and size + cluster_bytes <= limit_bytes and len(chosen) + len(cluster) <= quota_files + 1:
            chosen |= {source.path for source in cluster}
            size += cluster_bytes
        if len(chosen) >= quota_files:
            break
    chosen = chosen or _least_cluster(candidates, total)
    return ([source for source in sources if source.path not in chosen],
            [source for source in sources if source.path in chosen])


def _least_cluster(clusters: Sequence[Sequence[SourceFile]], total_bytes: int) -> set[str]:
    """The smallest code cluster of some size; one file of it where it is over half of the text."""
    code = [cluster for cluster in clusters if any(source.kind == "code" for source in cluster)]
    size = {id(cluster): sum(source.bytes for source in cluster) for cluster in code}
    useful = [cluster for cluster in code if size[id(cluster)] >= MIN_HELD_OUT_BYTES] or code
    least = min(useful, key=lambda cluster: size[id(cluster)])
    if size[id(least)] > total_bytes / 2:
        return {min(least, key=lambda source: source.bytes).path}
    return {source.path for source in least}


def _cut_in_two(source: SourceFile, share: float) -> tuple[list[SourceFile], list[SourceFile]]:
    """The first part to train on, the last `share` (at least one line, or some characters) held out."""
    place = int(len(source.text) * (1 - share))
    line_end = source.text.rfind("\n", 0, place) + 1
    place = line_end or max(1, place)
    parts = [SourceFile(path=source.path, language=source.language, kind=source.kind, text=text)
             for text in (source.text[:place], source.text[place:])]
    return parts[:1], parts[1:]


def _draw(seed: int, cluster: Sequence[SourceFile]) -> bytes:
    name = min(source.path for source in cluster)
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _clusters(sources: Sequence[SourceFile]) -> list[list[SourceFile]]:
    parent = list(range(len(sources)))

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for left, right in (*_same_stems(sources), *_near_identical(sources)):
        parent[find(right)] = find(left)
    groups: dict[int, list[SourceFile]] = defaultdict(list)
    for index, source in enumerate(sources):
        groups[find(index)].append(source)
    return list(groups.values())


def _same_stems(sources: Sequence[SourceFile]) -> Iterable[tuple[int, int]]:
    first: dict[tuple[str, str], int] = {}
    for index, source in enumerate(sources):
        folder, base = posixpath.split(source.path)
        stem = base.split(".", 1)[0] if not base.startswith(".") else base
        key = (folder, _COPY_MARK.sub("", stem).lower() or stem)
        if key in first:
            yield first[key], index
        first.setdefault(key, index)


def _near_identical(sources: Sequence[SourceFile]) -> Iterable[tuple[int, int]]:
    """Pairs that share half of the smaller sketch or more (lowest hashes of lines of 8 characters up)."""
    sketches: list[list[int]] = []
    holders: dict[int, list[int]] = defaultdict(list)
    for index, source in enumerate(sources):
        lines = {line.strip() for line in source.text.split("\n")}
        sketch = sorted({zlib.crc32(line.encode()) for line in lines if len(line) >= 8})[:SKETCH_LINES]
        sketches.append(sketch)
        shared: dict[int, int] = defaultdict(int)
        for value in sketch:
            for other in holders[value][:64]:
                shared[other] += 1
            holders[value].append(index)
        for other, count in shared.items():
            smaller = min(len(sketch), len(sketches[other]))
            if smaller >= 4 and count >= SAME_SHARE * smaller:
                yield other, index


def leakage(held_out: Sequence[np.ndarray], train: Sequence[np.ndarray]) -> float | None:
    """Share of held-out runs of 13 tokens that also stand in a training file; None when there is no such run.

    Arrays are token ids, one per file. Runs are compared by 64-bit polynomial hash.
    """
    ours = np.concatenate([_ngram_hashes(ids) for ids in held_out]) if held_out else np.empty(0, np.uint64)
    if not len(ours):
        return None
    distinct, inverse = np.unique(ours, return_inverse=True)
    seen = np.zeros(len(distinct), dtype=bool)
    for ids in train:
        hashes = _ngram_hashes(ids)
        places = np.searchsorted(distinct, hashes)
        places[places == len(distinct)] = 0
        seen[places[distinct[places] == hashes]] = True
    return round(float(seen[inverse].mean()), 6)


def _ngram_hashes(ids: np.ndarray) -> np.ndarray:
    count = len(ids) - NGRAM_TOKENS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    values = ids.astype(np.uint64) + np.uint64(1)
    total = np.zeros(count, np.uint64)
    for offset in range(NGRAM_TOKENS):      # wraps modulo 2^64 on purpose
        total = total * np.uint64(0x9E3779B97F4A7C15) + values[offset:offset + count]
    return total
