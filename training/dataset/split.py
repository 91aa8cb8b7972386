"""Which text is kept for evaluation, and how much of it the training text already shows.

The split is by file, in clusters: files with the same stem in one folder (header and source, copies named
`x_old`, `x (1)`) and near duplicates stay on one side. Nothing here reads a text but `sketch`.

E entries, P = SKETCH_ROWS minima.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from rensa import RMinHash

SKETCH_ROWS = 128            # half for the text's words, half for its lines; 4 bytes each
SKETCH_SEED = 1
HALF = SKETCH_ROWS // 2
SAME_WORDS, SAME_LINES = 0.65, 0.5   # Jaccard similarity from which two files are near duplicates
BAND_ROWS = 3                # of 21 bands a pair at the limit shares one with probability 0.999 and 0.94
NEIGHBOURS = 3               # entries next to each other in a band's order that are compared
MIN_FEATURES = 8             # a text with fewer words or lines is near only to its own copy
MIN_HELD_OUT_BYTES = 400     # smaller files say little about a model
MIN_TIMES, MIN_SPAN_SECONDS, MAX_SAME_TIME = 4, 86_400, 0.9
NGRAM_TOKENS, CHUNK_TOKENS = 13, 1 << 20
_COPY_MARK = re.compile(r"([ _.-]*(\(\d+\)|copy|old|orig|backup|bak))+$", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d]\w{2,}")
_HEAD_COMMENT = re.compile(r"/\*.{0,8000}?\*/", re.DOTALL)
_COMMENT = re.compile(r"(?:#|(?<!:)//)[^\n]*")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Entry(Protocol):
    """What the split knows of a file. `created`: commit time in seconds; None where no history tells it."""

    @property
    def path(self) -> str: ...          # noqa: D102
    @property
    def kind(self) -> str: ...          # noqa: D102
    @property
    def bytes(self) -> int: ...         # noqa: D102
    @property
    def sketch(self) -> np.ndarray: ...         # noqa: D102
    @property
    def created(self) -> int | None: ...        # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Split:
    """The held-out paths; how they were chosen (`time` or `cluster`) and why.

    near_duplicates: files that have a near duplicate, all of them kept on its side.
    """

    paths: frozenset[str]
    by: str
    near_duplicates: int
    why: str


def sketch(text: str) -> np.ndarray:
    """Minima of hashes of the text's words and of its lines (MinHash; rensa's algorithm 2), uint32 (P,).

    Words are those of code and strings: renaming some leaves most. Comments and licences are left out.
    """
    body = text.lstrip()
    head = _HEAD_COMMENT.match(body)
    body = _COMMENT.sub("", body[head.end():] if head else body)
    words = set(_WORD.findall(body))
    lines = {line.strip() for line in body.split("\n") if len(line) >= MIN_FEATURES}
    return np.concatenate([_minima(features, body) for features in (words, lines)])


def _minima(features: set[str], text: str) -> np.ndarray:
    if len(features) < MIN_FEATURES:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        features = {f"{digest}{index}" for index in range(MIN_FEATURES)}
    hashed = RMinHash.from_token_sets([list(features)], HALF, SKETCH_SEED)[0]
    return np.array(hashed.digest(), np.uint32)


def held_out(entries: Sequence[Entry], share: float, seed: int, by: str) -> Split:
    """The part kept for evaluation, about `share` of the files and at most twice that of the bytes.

    `by`: "time" takes the newest files first, "cluster" draws by `seed`, "auto" decides. A cluster is as old
    as its oldest file. With one entry nothing is held out.
    """
    mode, why = _mode(entries, by)
    if len(entries) < 2:
        return Split(paths=frozenset(), by=mode, near_duplicates=0, why=why)
    pairs = near_duplicates(entries)
    clusters = [[entries[index] for index in group] for group in _groups(len(entries), (
        *_same_stems(entries), *map(tuple, pairs.tolist())))]
    if mode == "time":
        clusters.sort(key=lambda cluster: (-_age(cluster), _draw(seed, cluster)))
    else:
        clusters.sort(key=lambda cluster: _draw(seed, cluster))
    chosen = _choose(clusters, share, sum(entry.bytes for entry in entries), len(entries))
    return Split(paths=frozenset(chosen), by=mode, near_duplicates=len(np.unique(pairs)), why=why)


def _mode(entries: Sequence[Entry], by: str) -> tuple[str, str]:
    """("time" or "cluster", why)."""
    if by == "cluster":
        return "cluster", "asked for"
    code = [entry for entry in entries if entry.kind == "code"]
    times = Counter(entry.created for entry in code if entry.created is not None)
    known = sum(times.values())
    if not known:
        return "cluster", "no file has a time of creation (no commit history)"
    if by == "time":
        return "time", "asked for"
    if 2 * known < len(code):
        return "cluster", f"only {known:,} of {len(code):,} code files have a time of creation"
    most, span = max(times.values()), max(times) - min(times)
    if len(times) < MIN_TIMES or span < MIN_SPAN_SECONDS or most > MAX_SAME_TIME * known:
        return "cluster", (f"creation times differ too little ({len(times):,} over {span / 86_400:,.1f} "
                           f"days; {most:,} of {known:,} code files share one)")
    return "time", (f"{known:,} of {len(code):,} code files have a time of creation, "
                    f"over {span // 86_400:,} days")


def _age(cluster: Sequence[Entry]) -> int:
    """The oldest creation time; a file without one may be as old as any."""
    return min(entry.created if entry.created is not None else 0 for entry in cluster)


def _choose(clusters: Sequence[Sequence[Entry]], share: float, total_bytes: int, files: int) -> set[str]:
    """Clusters in order until the share of files is reached; none that would take too many bytes."""
    quota_files = max(1, round(share * files))
    limit_bytes = max(2 * share * total_bytes, total_bytes / files)
    chosen: set[str] = set()
    size = 0
    for cluster in clusters:
        cluster_bytes = sum(entry.bytes for entry in cluster)
        useful = any(entry.kind == "code" and entry.bytes >= MIN_HELD_OUT_BYTES for entry in cluster)
        if useful and size + cluster_bytes <= limit_bytes and len(chosen) + len(cluster) <= quota_files + 1:
            chosen |= {entry.path for entry in cluster}
            size += cluster_bytes
        if len(chosen) >= quota_files:
            break
    return chosen or _least_cluster(clusters, total_bytes)


def _least_cluster(clusters: Sequence[Sequence[Entry]], total_bytes: int) -> set[str]:
    """The smallest code cluster of some size; one file of it where it is over half of the text."""
    code = [cluster for cluster in clusters if any(entry.kind == "code" for entry in cluster)]
    if not code:
        return set()
    size = {id(cluster): sum(entry.bytes for entry in cluster) for cluster in code}
    useful = [cluster for cluster in code if size[id(cluster)] >= MIN_HELD_OUT_BYTES] or code
    least = min(useful, key=lambda cluster: size[id(cluster)])
    if size[id(least)] > total_bytes / 2:
        return {min(least, key=lambda entry: entry.bytes).path}
    return {entry.path for entry in least}


def _draw(seed: int, cluster: Sequence[Entry]) -> bytes:
    name = min(entry.path for entry in cluster)
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()


def _groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of the pairs, each ascending, in order of their first."""
    parent = list(range(count))

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for left, right in pairs:
        first, second = sorted((find(left), find(right)))
        parent[second] = first
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(count):
        groups[find(index)].append(index)
    return list(groups.values())


def _same_stems(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    first: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(entries):
        folder, base = posixpath.split(entry.path)
        stem = base.split(".", 1)[0] if not base.startswith(".") else base
        key = (folder, _COPY_MARK.sub("", stem).lower() or stem)
        if key in first:
            yield first[key], index
        first.setdefault(key, index)


def near_duplicates(entries: Sequence[Entry]) -> np.ndarray:
    """Pairs of entries (n, 2) whose sketches are near; enough of them to connect each cluster.

    Locality-sensitive hashing: in the order of each band of minima, neighbours that share the band are
    compared. That takes E log E, however many entries are alike.
    """
    if len(entries) < 2:
        return np.empty((0, 2), np.int64)
    sketches = np.stack([entry.sketch for entry in entries])
    candidates = np.concatenate([_candidates(sketches, first) for first in _bands()])
    candidates = np.unique(np.sort(candidates, axis=1), axis=0)
    same = np.zeros(len(candidates), bool)
    for start in range(0, len(candidates), 1 << 16):
        left, right = (sketches[column] for column in candidates[start:start + (1 << 16)].T)
        same[start:start + (1 << 16)] = _near(left == right)
    return candidates[same]


def _near(equal: np.ndarray) -> np.ndarray:
    """Whether pairs are near duplicates; `equal` (n, P): which of their minima are the same."""
    words, lines = equal[:, :HALF].mean(axis=1), equal[:, HALF:].mean(axis=1)
    found: np.ndarray = (words >= SAME_WORDS) | (lines >= SAME_LINES)
    return found


def is_near(one: np.ndarray, others: np.ndarray) -> bool:
    """Whether a sketch (P,) is a near duplicate of any of `others` (n, P)."""
    return bool(len(others)) and bool(_near(others == one).any())


def _bands() -> Iterator[int]:
    """The first row of each band."""
    for half in (0, HALF):
        yield from range(half, half + HALF - BAND_ROWS + 1, BAND_ROWS)


def _candidates(sketches: np.ndarray, first: int) -> np.ndarray:
    """Neighbours in the order of a band, ties in the order of the band behind it: (n, 2)."""
    half = first // HALF * HALF
    columns = [half + (first - half + step) % HALF for step in range(2 * BAND_ROWS)]
    order = np.lexsort(sketches[:, columns[::-1]].T)
    band = sketches[order][:, columns[:BAND_ROWS]]
    found = []
    for step in range(1, NEIGHBOURS + 1):
        together = (band[step:] == band[:-step]).all(axis=1)
        found.append(np.stack([order[:-step][together], order[step:][together]], axis=1))
    return np.concatenate(found)


def leakage(held_out: Iterable[np.ndarray], train: Iterable[np.ndarray]) -> float | None:
    """Share of held-out runs of 13 tokens that also stand in a training file; None when there is no such run.

    Arrays are token ids, one per file; one training array is looked at at a time. Runs are compared by 64-bit
    polynomial hash.
    """
    parts = [hashes for ids in held_out for hashes in _run_hashes(ids)]
    if not parts:
        return None
    distinct, counts = np.unique(np.concatenate(parts), return_counts=True)
    seen = np.zeros(len(distinct), dtype=bool)
    for ids in train:
        for hashes in _run_hashes(ids):
            places = np.searchsorted(distinct, hashes)
            places[places == len(distinct)] = 0
            seen[places[distinct[places] == hashes]] = True
    return round(float(counts[seen].sum() / counts.sum()), 6)


def _run_hashes(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Hashes of all runs of 13 tokens, a bounded number at a time."""
    for start in range(0, len(ids) - NGRAM_TOKENS + 1, CHUNK_TOKENS):
        values = ids[start:start + CHUNK_TOKENS + NGRAM_TOKENS - 1].astype(np.uint64) + np.uint64(1)
        count = len(values) - NGRAM_TOKENS + 1
        total = np.zeros(count, np.uint64)
        for offset in range(NGRAM_TOKENS):      # wraps modulo 2^64 on purpose
            total = total * _GOLDEN + values[offset:offset + count]
        yield total
