"""What the dataset stage does on real packages: coverage, packing, speed, memory, exactness, secrets.

    python3 benchmarks/dataset.py                     the standard library, NumPy and PyTorch's Python files
    python3 benchmarks/dataset.py --repo DIR ...      other repositories
    python3 benchmarks/dataset.py --proof             trains the embedded model both ways (about 25 minutes)

Coverage: share of a file's direct dependencies that lie, whole or as a skeleton, within the last N tokens
before it; each file counts once. Orders of the whole repository against context composed for each file.
Times need an otherwise idle machine; each is of a process of its own. Peak memory is its resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from training.dataset import corpus as corpora  # noqa: E402
from training.dataset import tokenizer  # noqa: E402
from training.dataset.composer import Composer, Library  # noqa: E402
from training.dataset.corpus import Corpus, Spool, Texts  # noqa: E402
from training.dataset.documents import Document  # noqa: E402
from training.dataset.encoding import Encoder  # noqa: E402
from training.dataset.generator import DatasetGenerator  # noqa: E402
from training.dataset.packing import best_fit_decreasing  # noqa: E402
from training.dataset.sources import repository  # noqa: E402
from training.dataset.store import WindowStore  # noqa: E402
from training.dataset.structure import edges  # noqa: E402
from training.settings import Config  # noqa: E402

LENGTHS = (4_096, 16_384, 65_536, 262_144)
PACKED_LENGTHS = (4_096, 32_768, 131_072)
VOCAB, SEED = 8_192, 1
RESULTS = ROOT / "benchmarks" / "results"
DAY = date.today().isoformat()


def packages() -> list[Path]:
    """The standard library without installed packages, and two packages that the requirements install."""
    import importlib.util
    found = [Path(sysconfig.get_paths()["stdlib"])]
    for name in ("numpy", "torch"):
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            found.append(Path(spec.submodule_search_locations[0]))
    return found


def source_tree(package: Path, work: Path) -> Path:
    """The package's Python files copied to a folder of their own: no tests of size by binaries, no packages
    installed below it."""
    target = work / package.name
    for path in sorted(package.rglob("*.py")):
        if "site-packages" not in path.parts[len(package.parts):] and path.is_file():
            place = target / path.relative_to(package)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return target


def settings(repo: Path, context: int = 4_096, target: int = 512, **more: Any) -> Config:
    """The configuration of one dataset."""
    named = {f"dataset.{name}": value for name, value in more.items()}
    return Config({"dataset.repo": str(repo), "dataset.context_tokens": context,
                   "dataset.target_tokens": target, "embedded.vocab_tokens": VOCAB, "run.seed": SEED} | named)


def coverage(repo: Path, work: Path) -> dict[str, Any]:
    """Order -> context -> share of direct dependencies within it; and what was counted."""
    corpus = Corpus(spool=Spool(work / "spool"))
    place = corpora.Place(named=str(repo), listing=repository.list_repository(repo))
    corpora.read(corpus, place, 1 << 20, {}, lambda *told: None)
    coder = tokenizer.train_embedded(Texts(corpus, corpus.entries), VOCAB, SEED, work / "tokenizer")
    encoder = Encoder(coder, work, max(LENGTHS))
    documents = list(encoder.files(corpus, corpus.entries, "train", skeletons=True, spans=False))
    encoder.close()
    ids = encoder.tokens.view()
    found = edges.import_edges(corpus.entries, repo.name)
    library = Library(documents=documents, edges=found, pairs=edges.pairs(corpus.entries, found),
                      words=np.stack([entry.words for entry in corpus.entries]),
                      line_ends=lambda start, length: coder.ends_line[ids[start:start + length]])
    orders = {"random": np.random.default_rng(SEED).permutation(len(documents)).tolist(),
              "path order": list(range(len(documents))),
              "topological": topological(documents, found)}
    shares = {name: in_order([documents[index] for index in order], found) for name, order in orders.items()}
    shares["composed"] = {length: composed(library, length) for length in LENGTHS}
    return {"files": len(documents), "dependencies": sum(map(len, found.values())),
            "tokens": sum(document.body for document in documents), "coverage": shares}


def topological(documents: Sequence[Document], found: edges.Edges) -> list[int]:
    """Dependencies first, the file with fewest open ones next (DeepSeek-Coder, arXiv:2401.14196)."""
    place = {document.path: index for index, document in enumerate(documents)}
    waiting = {path: {target for target in targets if target in place and target != path}
               for path, targets in found.items() if path in place}
    needed: dict[str, list[str]] = {}
    for path, targets in waiting.items():
        for target in targets:
            needed.setdefault(target, []).append(path)
    order: list[int] = []
    import heapq
    heap = [(len(targets), path) for path, targets in waiting.items()]
    heapq.heapify(heap)
    done: set[str] = set()
    while heap:
        count, path = heapq.heappop(heap)
        if path in done or count != len(waiting[path]):
            continue
        done.add(path)
        order.append(place[path])
        for other in needed.get(path, ()):
            if other not in done:
                waiting[other].discard(path)
                heapq.heappush(heap, (len(waiting[other]), other))
    return order


def in_order(documents: Sequence[Document], found: edges.Edges) -> dict[int, float]:
    """Coverage when the files stand one after another."""
    starts, position = {}, 0
    for document in documents:
        starts[document.path] = position
        position += document.length
    hits, total = dict.fromkeys(LENGTHS, 0), 0
    for document in documents:
        for target in found.get(document.path, ()):
            if target in starts:
                total += 1
                before = starts[document.path] - starts[target]
                for length in LENGTHS:
                    hits[length] += 0 < before <= length
    return {length: round(hits[length] / max(1, total), 4) for length in LENGTHS}


def composed(library: Library, length: int) -> float:
    """Coverage when each file has `length` tokens of context made for it."""
    composer = Composer(library, length)
    hits = total = 0
    for document in composer.documents:
        targets = composer.dependencies(document.path)
        total += len(targets)
        if targets:
            _, starts = composer.related([document], length)
            hits += sum(target in starts for target in targets)
    return round(hits / max(1, total), 4)


def packing(repo: Path, work: Path) -> dict[str, Any]:
    """Share of the room that stays empty: best fit, and one file a window."""
    rows = {}
    for length in PACKED_LENGTHS:
        config = settings(repo, length, length, held_out_share=0.05)
        manifest = DatasetGenerator(config, work / f"packed-{length}").generate()
        store = WindowStore.open(work / f"packed-{length}" / "dataset")
        table = np.fromfile(store.path / "documents.bin", dtype=np.int64).reshape(-1, 4)
        sizes = [min(int(row[1] + row[2]), length) for row in table]
        alone = 1 - sum(sizes) / (len(sizes) * length)
        rows[str(length)] = {"best_fit": manifest["packing"]["waste"], "one_file_a_window": round(alone, 4),
                             "bins": len(best_fit_decreasing(sizes, length))}
        shutil.rmtree(work / f"packed-{length}")
    return rows


def one(repo: str, output: str) -> None:
    """Make one dataset in this process and print seconds, CPU seconds and peak memory as JSON."""
    import training.dataset.making  # noqa: F401  imports are not what is measured
    from training.dataset.structure import worker
    before = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    marks: dict[str, float] = {}

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        marks.setdefault(phase, round(time.perf_counter() - start, 2))
    manifest = DatasetGenerator(settings(Path(repo)), output).generate(progress)
    seconds = time.perf_counter() - start
    worker.close()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "seconds": round(seconds, 2), "cpu_s": round(time.process_time() - cpu, 2),
        "children_cpu_s": round(children.ru_utime + children.ru_stime, 2), "phases": marks,
        "peak_mib": peak_mib(), "before_mib": before, "worker_peak_mib": round(children.ru_maxrss / 1024),
        "digest": manifest["digest"], "tokens": manifest["tokens"],
        "files": {name: manifest["files"][name] for name in ("seen", "accepted", "dropped")},
        "bytes": sum(manifest["bytes"].values()), "windows": manifest["windows"], "kinds": manifest["kinds"],
        "packing": manifest["packing"], "selftest": manifest["selftest"], "leakage": manifest["leakage"],
        "dependency_coverage": manifest["dependency_coverage"],
        "replaced": manifest.get("replaced_by_rule", {})}))


def peak_mib() -> int:
    """Most resident memory of this process since it began; ru_maxrss would count its parent's too."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split("VmHWM:")[1].split()[0]) // 1024


def measured(repo: Path, output: Path) -> dict[str, Any]:
    """`one` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", str(repo), str(output)], capture_output=True,
                          text=True, check=True, cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(repos: Sequence[Path]) -> dict[str, Any]:
    """All figures of all repositories."""
    from training.dataset.sources import secrets
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="elite-dataset-") as name:
        for package in repos:
            work = Path(name) / "of" / package.name
            work.mkdir(parents=True)
            repo = source_tree(package, Path(name)) if package.suffix != ".git" else package
            first, second = (measured(repo, work / which) for which in ("one", "two"))
            row = first | {"mb_per_s": round(first["bytes"] / 1e6 / first["seconds"], 2),
                           "again_s": second["seconds"], "same_bytes": first["digest"] == second["digest"]}
            row |= coverage(repo, work)
            row["secrets_mb_per_cpu_s"] = secrets_speed(repo, secrets)
            if package == repos[0]:
                row["packing_by_length"] = packing(repo, work)
            rows[package.name] = row
            print(json.dumps({package.name: row}, indent=1), file=sys.stderr)
            shutil.rmtree(work)
    return rows


def secrets_speed(repo: Path, secrets: Any) -> float:
    """Megabytes of text a CPU second."""
    texts = [found.text for found in repository.read_all(repository.list_repository(repo))
             if isinstance(found, repository.SourceFile)][:400]
    start = time.process_time()
    for text in texts:
        secrets.redact(text, "")
    return round(sum(map(len, texts)) / 1e6 / (time.process_time() - start), 1)


def main() -> None:
    """Parse the arguments and write the results."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", action="append", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / f"dataset-{DAY}.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(*args.one)
    rows = run(args.repo or packages())
    result = {"date": DAY, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
              "python": platform.python_version(), "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
