"""Does composed context teach more than path order? The embedded model, trained both ways on equal targets.

    python3 benchmarks/context_proof.py                       PEFT's source, three seeds
    python3 benchmarks/context_proof.py --repo DIR --seeds 1 2 --windows 1200

Both arms start from the same weights and see the same targets in the same order, in windows of the same
length; only what stands before a target differs: context made for it, or the files before it in path order.
Each trained model is then scored on the same held-out targets with the context it was trained with, with the
other one, and with none: bits per byte, and the difference with a 95 % bootstrap interval over held-out files
and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from training.dataset import making  # noqa: E402
from training.dataset.building import Builder  # noqa: E402
from training.dataset.composer import Composer, Window, block  # noqa: E402
from training.dataset.documents import Document, Segment, merged  # noqa: E402
from training.dataset.generator import DatasetGenerator  # noqa: E402
from training.dataset.store import WindowStore  # noqa: E402
from training.settings import Config  # noqa: E402
from training.trainer import embedded  # noqa: E402
from training.trainer.batches import collate  # noqa: E402
from training.trainer.evaluation import evenly_spaced  # noqa: E402
from training.trainer.loss import causal_loss  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CONTEXT, TARGET, BATCH, RATE = 256, 128, 8, 2e-3
EVALUATED = 160              # held-out windows, evenly spaced
RESAMPLES = 2_000


class PathOrder(Composer):
    """Before each target: its own file's text, then the files before it in path order, and nothing else."""

    def compose(self, documents: Any, parts: Any) -> Window:
        """One window of at most `context_tokens`."""
        budget = self.budget(documents, parts)
        taken = min(parts[0].first, budget)
        tail = block(documents[parts[0].document], parts[0], taken)
        for part in parts[1:]:
            tail += block(documents[part.document], part)
        before = self._before(documents[parts[0].document], budget - taken)
        return Window(segments=tuple(merged([*before, *tail])))

    def _before(self, target: Document, room: int) -> list[Segment]:
        found: list[Segment] = []
        place = int(np.searchsorted(np.array(self.paths), target.path))
        for document in reversed(self.documents[:place]):
            taken = min(room, document.length)
            if not taken:
                break
            found.append(Segment(document.start + document.length - taken, taken))
            room -= taken
        return found[::-1]

    def related(self, targets: Any, budget: int) -> tuple[list[Segment], dict[str, int]]:
        """The files before the last target."""
        return self._before(targets[-1], budget), {}


class PathBuilder(Builder):
    """Windows in path order."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.composer = PathOrder(self.library, self.layout.context_tokens)


def settings(repo: Path, seed: int) -> Config:
    """Composed windows only, so that both arms have the same targets."""
    return Config({"dataset.repo": str(repo), "dataset.context_tokens": CONTEXT,
                   "dataset.target_tokens": TARGET, "dataset.fim_share": 0.0,
                   "dataset.fim_rate": 0.0, "dataset.whole_share": 0.0,
                   "dataset.commit_share": 0.0, "dataset.held_out_share": 0.08, "dataset.split": "cluster",
                   "run.seed": seed})


def stores(repo: Path, seed: int, work: Path) -> dict[str, WindowStore]:
    """The two datasets of a seed."""
    found = {}
    for arm, builder in (("composed", Builder), ("path order", PathBuilder)):
        making.Builder = builder    # type: ignore[misc]
        folder = work / f"{arm}-{seed}"
        DatasetGenerator(settings(repo, seed), folder, folder=folder).generate()
        found[arm] = WindowStore.open(folder)
    one, other = found.values()
    assert one.count("train") == other.count("train")
    for index in (0, one.count("train") // 2, one.count("train") - 1):
        pair = [store.window("train", index)[1] for store in (one, other)]
        assert np.array_equal(*(labels[labels >= 0] for labels in pair)), "both arms have the same targets"
    return found


def train(store: WindowStore, config: Config, seed: int, windows: int) -> Any:
    """A model from scratch on the first `windows` of the order of epochs."""
    torch.manual_seed(seed)
    model = embedded.build(config, store.vocab_tokens, store.pad_id, store.eos_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    steps = windows // BATCH
    order = np.concatenate([store.order(seed, epoch) for epoch in range(windows // store.count("train") + 1)])
    for step in range(steps):
        share = min(1.0, (step + 1) / (0.05 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * share
        chosen = order[step * BATCH:(step + 1) * BATCH]
        batch = collate([store.window("train", int(index), seed, 0) for index in chosen], store.pad_id)
        loss, count = causal_loss(model, batch.ids, batch.labels, None, 0)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def scores(model: Any, store: WindowStore, limit: int | None) -> dict[str, tuple[float, int]]:
    """Held-out file -> (bits, bytes) of its targets."""
    found: dict[str, tuple[float, int]] = {}
    for index in evenly_spaced(store.count("held_out"), EVALUATED):
        ids, labels = (torch.from_numpy(part)[None] for part in
                       store.window("held_out", index, context_limit=limit))
        nats, _ = causal_loss(model, ids, labels, None, 0)
        target = next(part.start for part in store.segments("held_out", index) if part.trained)
        origin = store.origin(target)
        path = origin.path if origin else ""
        bits, size = found.get(path, (0.0, 0))
        found[path] = bits + float(nats) / math.log(2), size + store.target_bytes("held_out", index)
    return found


def rate(found: dict[str, tuple[float, int]], paths: Any) -> float:
    """Bits per byte over some of the files."""
    return sum(found[path][0] for path in paths) / sum(found[path][1] for path in paths)


def interval(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    """95 % of bootstrap means of the difference in bits per byte, over seeds and files."""
    generator = np.random.default_rng(1)
    means = []
    for _ in range(RESAMPLES):
        differences = []
        for number in generator.integers(0, len(pairs), len(pairs)):
            one, other = pairs[number]
            paths = list(one)
            drawn = [paths[place] for place in generator.integers(0, len(paths), len(paths))]
            differences.append(rate(one, drawn) - rate(other, drawn))
        means.append(float(np.mean(differences)))
    return [round(float(edge), 4) for edge in np.percentile(means, [2.5, 97.5])]


def run(repo: Path, seeds: list[int], windows: int) -> dict[str, Any]:
    """Both arms for each seed."""
    rows: list[dict[str, Any]] = []
    pairs: dict[str, list[Any]] = {"own context": [], "no context": [], "composed context for both": []}
    with tempfile.TemporaryDirectory(prefix="elite-proof-") as name:
        for seed in seeds:
            found = stores(repo, seed, Path(name))
            models = {arm: train(store, settings(repo, seed), seed, windows) for arm, store in found.items()}
            own = {arm: scores(models[arm], found[arm], None) for arm in found}
            bare = {arm: scores(models[arm], found[arm], 0) for arm in found}
            swapped = scores(models["path order"], found["composed"], None)
            crossed = scores(models["composed"], found["path order"], None)
            pairs["own context"].append((own["composed"], own["path order"]))
            pairs["no context"].append((bare["composed"], bare["path order"]))
            pairs["composed context for both"].append((own["composed"], swapped))
            row = {"seed": seed, "files": len(own["composed"]),
                   "own": {arm: round(rate(each, each), 4) for arm, each in own.items()},
                   "none": {arm: round(rate(each, each), 4) for arm, each in bare.items()},
                   "trained in path order, composed context": round(rate(swapped, swapped), 4),
                   "trained composed, path-order context": round(rate(crossed, crossed), 4)}
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    return {"rows": rows, "difference": {
        kind: {"mean": round(float(np.mean([rate(a, a) - rate(b, b) for a, b in each])), 4),
               "interval": interval(each)} for kind, each in pairs.items()}}


def main() -> None:
    """Parse the arguments and write the results."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--windows", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=RESULTS / f"context-proof-{date.today()}.json")
    args = parser.parse_args()
    if args.repo is None:
        import peft
        args.repo = Path(peft.__file__).parent
    start = time.perf_counter()
    found = run(args.repo, args.seeds, args.windows)
    about = {"date": date.today().isoformat(), "repository": args.repo.name, "context_tokens": CONTEXT,
             "target_tokens": TARGET, "windows": args.windows, "trained_tokens": args.windows * TARGET,
             "seconds": round(time.perf_counter() - start)}
    args.output.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about | found, indent=1))


if __name__ == "__main__":
    main()
