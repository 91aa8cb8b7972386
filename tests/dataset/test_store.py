import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from repositories import EMAIL_PACKAGE, make, small_project

from training.dataset import writing
from training.dataset.documents import INFILL_DRAWN, TRAINED, Segment
from training.dataset.sources.secrets import redact
from training.dataset.store import FORMAT, WindowStore, content_digest, file_sizes, write_json
from training.errors import DataError, MissingInput

MIXED = {"context_tokens": 512, "target_tokens": 96, "fim_share": 0.3, "whole_share": 0.2, "fim_rate": 0.6}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset of a real package with every kind of window."""
    return make(EMAIL_PACKAGE, tmp_path_factory.mktemp("mixed"), **MIXED)[1]


def epoch_windows(store, seed, epoch):
    return [store.window("train", int(index), seed, epoch) for index in store.order(seed, epoch)]


def test_every_trained_token_is_its_files_byte_at_the_place_it_names(mixed):
    root = Path(EMAIL_PACKAGE)
    texts = {path.relative_to(root).as_posix(): redact(path.read_text(encoding="utf-8"), "")[0].encode()
             for path in root.rglob("*.py")}
    sizes = np.load(mixed.path / "token_bytes.npy")
    checked = 0
    for index in random.Random(1).sample(range(mixed.count("train")), 40):
        for part in mixed.segments("train", index, seed=3, epoch=1):
            if not part.trained or part.start < 0:
                continue
            origin = mixed.origin(part.start)
            assert origin is not None
            if origin.path not in texts:
                continue
            text = texts[origin.path]
            stored = map(int, mixed.tokens(part.start, part.length))
            ids = [token for token in stored if token != mixed.eos_id]
            size = int(sizes[ids].sum())
            decoded = decoder(mixed).decode(ids, skip_special_tokens=False)
            assert decoded.encode() == text[origin.byte:origin.byte + size]
            checked += 1
    assert checked > 30


def decoder(store):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(store.path / "tokenizer" / "tokenizer.json"))


def test_headers_and_marks_come_from_no_file(mixed):
    first = mixed.segments("held_out", 0)[0]
    assert mixed.origin(first.start) is None
    assert mixed.origin(10**9) is None


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_body_token_is_a_target_once_an_epoch_and_the_manifest_counts_them(mixed, epoch):
    trained: Counter[int] = Counter()
    for index in range(mixed.count("train")):
        for part in mixed.segments("train", index, 11, epoch):
            if part.trained and part.start >= 0:
                trained.update(range(part.start, part.start + part.length))
    assert set(trained.values()) == {1}
    tokens = mixed.manifest["tokens"]
    assert len(trained) == tokens["trained_per_epoch"]
    assert tokens["lost"] == tokens["rejected"] == 0
    assert tokens["total"] == tokens["trained_per_epoch"] + tokens["held_out"]


def test_no_token_of_a_held_out_file_is_ever_in_a_training_window(mixed):
    held = [about["path"] for about in mixed.documents() if about["split"] == "held_out"]
    assert held
    rows = np.fromfile(mixed.path / "documents.bin", dtype=np.int64).reshape(-1, 4)
    places = set()
    for row, about in zip(rows, mixed.documents(), strict=True):
        if about["split"] == "held_out":
            places.update(range(int(row[0]), int(row[0] + row[1] + row[2])))
    for index in range(mixed.count("train")):
        for part in mixed.segments("train", index):
            assert part.start < 0 or not places & set(range(part.start, part.start + part.length))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_interruptions_change_no_window(mixed, ranks):
    from training.trainer.batches import Layout, read_update

    layout = Layout(windows=mixed.count("train"), micro=1, accumulation=4, ranks=ranks)
    reference = Counter(ids.tobytes() for epoch in (0, 1) for ids, _ in epoch_windows(mixed, 7, epoch))
    read: Counter[bytes] = Counter()
    store = mixed
    for step in range(2 * layout.updates_per_epoch):
        if step % 3 == 0:       # a new process knows only the step
            store = WindowStore.open(mixed.path)
        for rank in range(ranks):
            for batch in read_update(store, step, layout, rank, 7)[0]:
                ids = batch.ids[0].numpy()
                if (batch.labels[0] != -100).any():
                    read[ids.tobytes()] += 1
    assert read == reference


def test_epochs_differ_in_middles_and_cuts_and_seeds_too(mixed):
    every = range(mixed.count("train"))
    first, second = ([mixed.window("train", index, 1, epoch)[0].tobytes() for index in every]
                     for epoch in (0, 1))
    changed = sum(one != two for one, two in zip(first, second, strict=True)) / len(first)
    assert 0.4 < changed < 1.0
    assert first == [mixed.window("train", index, 1, 0)[0].tobytes() for index in every]
    assert first != [mixed.window("train", index, 2, 0)[0].tobytes() for index in every]


def test_the_state_is_four_values_and_names_the_index(mixed):
    assert mixed.state(3, 2, 40) == {"seed": 3, "epoch": 2, "position": 40, "index": mixed.digest}


def test_a_shorter_context_keeps_the_targets_and_the_nearest_text(mixed):
    shorter = 0
    for index in range(mixed.count("train")):
        ids, labels = mixed.window("train", index)
        near, near_labels = mixed.window("train", index, context_limit=64)
        assert np.array_equal(labels[labels >= 0], near_labels[near_labels >= 0])
        shorter += len(near) < len(ids)
    assert shorter > mixed.count("train") / 4


def test_the_curve_has_the_same_targets_after_three_contexts(mixed):
    curve = mixed.curve()
    assert curve["kinds"] == ["composed", "random", "foreign"]
    assert curve["foreign"] in ("Python's standard library", "NumPy's lib folder")
    assert mixed.count("curve") == 3 * curve["items"] > 0
    held = {about["path"] for about in mixed.documents() if about["split"] == "held_out"}
    for item in range(curve["items"]):
        windows = [mixed.window("curve", 3 * item + kind) for kind in range(3)]
        targets = [labels[labels >= 0] for _, labels in windows]
        assert all(np.array_equal(targets[0], other) for other in targets)
        assert len(targets[0]) == curve["targets"][item]
        assert curve["paths"][item] in held
        bare = [mixed.window("curve", 3 * item + kind, context_limit=0)[0] for kind in range(3)]
        assert all(np.array_equal(bare[0], other) for other in bare)
        assert len({ids.tobytes() for ids, _ in windows}) == 3


def test_the_order_is_a_pure_function_of_seed_and_epoch(mixed):
    first = mixed.order(1, 0)
    assert sorted(first) == list(range(mixed.count("train")))
    assert np.array_equal(first, WindowStore.open(mixed.path).order(1, 0))
    assert not np.array_equal(first, mixed.order(1, 1))
    assert not np.array_equal(first, mixed.order(2, 0))


def test_a_torn_or_missing_store_is_refused(tmp_path):
    with pytest.raises(MissingInput, match="There is no dataset"):
        WindowStore.open(tmp_path)
    _, store = make(small_project(tmp_path / "repo"), tmp_path / "run", context_tokens=128, target_tokens=128)
    store.verify()
    tokens = store.path / "tokens.bin"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-2])
    with pytest.raises(DataError, match="the manifest says"):
        WindowStore.open(store.path)
    tokens.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match="was changed"):
        WindowStore.open(store.path).verify()
    tokens.unlink()
    with pytest.raises(DataError, match=r"lacks tokens.bin"):
        WindowStore.open(store.path)


def test_a_dataset_of_another_format_is_refused(tmp_path):
    write_json(tmp_path / "manifest.json", {"format": FORMAT - 1})
    with pytest.raises(DataError, match=f"is no dataset manifest of format {FORMAT}; make it anew"):
        WindowStore.open(tmp_path)


READ_ONE = """
import sys
from training.dataset.store import WindowStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

store = WindowStore.open(sys.argv[1])
store.window("train", 0)
before = resident()
ids, labels = store.window("train", 1)
print(len(ids), resident() - before, int(ids[0]), int((labels >= 0).sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_window_of_four_million_tokens_touches_only_its_own_pages(tmp_path):
    total, length = 1 << 31, 1 << 22             # 4 GiB of uint16, a hole but for what is written
    with open(tmp_path / "tokens.bin", "wb") as file:
        os.truncate(file.fileno(), 2 * total)
        file.seek(2 * (total - length))
        file.write((7).to_bytes(2, "little"))
    for name in ("spans.bin", "documents.bin"):
        (tmp_path / name).write_bytes(b"")
    write_json(tmp_path / "documents.json", [])
    np.save(tmp_path / "token_bytes.npy", np.ones(300, np.uint16))
    np.save(tmp_path / "ends_line.npy", np.zeros(300, bool))
    rows = [Segment(total - length, length - 1_000), Segment(total - 1_000, 1_000, TRAINED | INFILL_DRAWN)]
    writing.write_windows(tmp_path, "train", [[Segment(0, 9), Segment(9, 9, TRAINED)], rows])
    for name in ("held_out", "curve"):
        writing.write_windows(tmp_path, name, [])
    files = file_sizes(tmp_path)
    about = {"pad_id": 0, "eos_id": 1, "vocab_tokens": 300, "dtype": "<u2", "context_tokens": length,
             "files": files}
    names = [name for name in files if name != "tokens.bin"]
    write_json(tmp_path / "manifest.json", {"format": FORMAT, "store": about,
                                            "digest": content_digest(tmp_path, names)})
    done = subprocess.run([sys.executable, "-c", READ_ONE, str(tmp_path)], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])
    tokens, grown, first, targets = map(int, done.stdout.split())
    assert (tokens, first, targets) == (length, 7, 1_000)
    assert grown < 2.5 * 8 * length + 2 * length, "ids and labels (8 bytes each) and the window's own pages"


def test_the_curriculum_grows_the_context_in_the_first_epoch_only(mixed):
    from training.trainer.batches import Curriculum, Layout, read_update

    layout = Layout(windows=mixed.count("train"), micro=2, accumulation=1, ranks=1)
    course = Curriculum(stages=3, share=0.6, context_tokens=512, target_tokens=96)
    longest = [max(batch.ids.shape[1] for batch in read_update(mixed, step, layout, 0, 7, course)[0])
               for step in range(layout.updates_per_epoch)]
    plain = [max(batch.ids.shape[1] for batch in read_update(mixed, step, layout, 0, 7)[0])
             for step in range(layout.updates_per_epoch)]
    first, second = int(0.3 * len(longest)), int(0.6 * len(longest))
    stages = longest[:first - 1], longest[first + 1:second - 1], longest[second + 1:]
    assert np.mean(stages[0]) < np.mean(stages[1]) < np.mean(stages[2])
    assert longest[second + 1:] == plain[second + 1:]
    targets = [read_update(mixed, step, layout, 0, 7, course)[1] for step in range(3)]
    assert targets == [read_update(mixed, step, layout, 0, 7)[1] for step in range(3)]
