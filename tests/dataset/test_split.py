import keyword
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from training.dataset import split
from training.dataset.split import held_out, leakage, near_duplicates, sketch

FUNCTION = "def {name}(value: int) -> int:\n    '''Add one to the value.'''\n    return value + 1\n\n\n"
LIBRARY = Path(os.__file__).parent
KEYWORDS = {*keyword.kwlist, "self", "cls", "super", "len", "str", "int"}
DAY = 86_400


@dataclass
class Item:
    path: str
    text: str = field(repr=False)
    created: int | None = None
    kind: str = "code"

    def __post_init__(self):
        self.sketch, self.bytes = sketch(self.text), len(self.text.encode())


def program(seed: int, lines: int = 30) -> str:
    """Code of its own words."""
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(lines)]
    return "".join(f"{name} = {rng.choice(names)}({rng.randrange(1000)})  # {rng.choice(names)}\n"
                   for name in names)


def name_of(index: int) -> str:
    """Numbered names would count as copies of each other."""
    return f"{chr(97 + index // 26)}{chr(97 + index % 26)}_part.py"


def varied(text: str, seed: int) -> str:
    """The same program after work on it: names changed throughout, comments rewritten, lines added."""
    rng = random.Random(seed)
    counts = Counter(name for name in re.findall(r"\b[a-z_]{3,}\b", text) if name not in KEYWORDS)
    for name in rng.sample([name for name, _ in counts.most_common(12)], 4):
        text = re.sub(rf"\b{name}\b", f"{name}_renamed", text)
    words = ["said", "in", "other", "terms"]
    text = re.sub(r"# .*", lambda match: "# " + " ".join(rng.sample(words, 3)), text)
    out = []
    for line in text.split("\n"):
        out += [line, f"# added {len(out)}"] if rng.random() < 0.03 else [line]
    return "\n".join(out)


def library_files(count: int, seed: int) -> list[Path]:
    files = [path for path in sorted(LIBRARY.glob("*.py")) if 4_000 < path.stat().st_size < 60_000]
    return random.Random(seed).sample(files, count)


def test_a_sketch_is_small_and_the_same_in_every_process():
    text = program(3)
    ours = sketch(text)
    assert ours.dtype == np.uint32
    assert ours.shape == (split.SKETCH_ROWS,)
    assert ours.nbytes <= 512
    code = "import sys; from training.dataset.split import sketch; print(sketch(sys.stdin.read()).tolist())"
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True,
                              check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed},
                              cwd=Path(split.__file__).parents[2])
        assert done.stdout.strip() == str(ours.tolist())


def test_the_sketch_is_that_of_rensa_0_5_algorithm_2():
    """Datasets are reused by their digests: another algorithm must be noticed."""
    words = " ".join(f"name{index}" for index in range(40))
    assert sketch(words)[[0, 1, 63]].tolist() == [1027864678, 1399365717, 723439313]
    assert split.RMinHash.ALGORITHM_VERSION == 2


def test_the_sketch_estimates_the_share_of_common_words_and_leaves_out_the_licence():
    words = [f"name{index}" for index in range(900)]
    first, second = (" ".join(words[start:start + 600]) for start in (0, 300))
    estimate = (sketch(first)[:split.HALF] == sketch(second)[:split.HALF]).mean()
    assert abs(estimate - 300 / 900) < 0.2
    licence = "".join(f"# Licensed in the manner of paragraph {index}\n" for index in range(30))
    body = program(1)
    assert np.array_equal(sketch(licence + body), sketch(body))
    assert np.array_equal(sketch("/*\n * Licence\n */\n" + body), sketch(body))


def test_planted_copies_of_held_out_files_are_recognised():
    files = library_files(40, 5)
    originals = [Item(f"lib/{path.name}", path.read_text(encoding="utf-8")) for path in files]
    copies = [Item(f"other/copy{index}.py", item.text) for index, item in enumerate(originals[:20])]
    near = [Item(f"third/work{index}.py", varied(item.text, index))
            for index, item in enumerate(originals[20:])]
    entries = [*originals, *copies, *near]
    pairs = {tuple(pair) for pair in near_duplicates(entries).tolist()}
    assert sum((index, 40 + index) in pairs for index in range(20)) == 20
    assert sum((20 + index, 60 + index) in pairs for index in range(20)) >= 18
    assert len(pairs) <= 42, "files of their own are no duplicates"
    for seed in range(5):
        found = held_out(entries, 0.2, seed, "cluster")
        assert found.near_duplicates >= 76
        sides = [(item.path in found.paths, twin.path in found.paths)
                 for item, twin in zip(originals, [*copies, *near], strict=True)]
        assert any(ours for ours, _ in sides)
        assert sum(ours != twin for ours, twin in sides[:20]) == 0
        assert sum(ours != twin for ours, twin in sides[20:]) <= 2


def test_copies_and_same_stems_stay_on_one_side():
    body = "".join(FUNCTION.format(name=f"f{index}") + f"UNIQUE_{index} = {index}\n" for index in range(20))
    entries = [Item("a/x.py", body), Item("b/y.py", body + "EXTRA = 1\n"), Item("c/x_old.py", program(1)),
               Item("c/x.py", program(2)),
               *(Item(f"lib/m{name}.py", program(ord(name))) for name in "abcdefghijklmnop")]
    for seed in range(60):
        paths = held_out(entries, 0.2, seed, "cluster").paths
        assert paths
        assert len(paths & {"a/x.py", "b/y.py"}) != 1
        assert len(paths & {"c/x_old.py", "c/x.py"}) != 1


def test_the_larger_part_is_never_held_out_and_one_file_is_left_alone():
    entries = [Item("big.py", program(1, 900)), Item("small.py", program(2))]
    for seed in range(8):
        assert held_out(entries, 0.05, seed, "auto").paths == {"small.py"}
    assert held_out(entries[:1], 0.05, 1, "auto").paths == frozenset()
    assert held_out([], 0.05, 1, "auto").paths == frozenset()


def test_the_newest_files_are_held_out_but_not_new_copies_of_old_ones():
    entries = [Item(name_of(index), program(index), created=index * DAY) for index in range(40)]
    entries.append(Item("copy.py", program(3) + "extra = 1\n", created=99 * DAY))
    entries.append(Item("docs/guide.md", program(77), created=98 * DAY, kind="docs"))
    found = held_out(entries, 0.1, 1, "auto")
    assert found.by == "time"
    assert found.paths == {name_of(index) for index in range(36, 40)}
    assert found.near_duplicates == 2
    assert found.why == "41 of 41 code files have a time of creation, over 99 days"
    assert held_out(entries, 0.1, 2, "time").paths == found.paths
    drawn = {held_out(entries, 0.1, seed, "cluster").paths for seed in range(5)}
    assert len(drawn) > 1


@pytest.mark.parametrize(("times", "why"), [
    ([None] * 12, "no file has a time of creation (no commit history)"),
    ([*range(0, 5 * DAY, DAY), *[None] * 7], "only 5 of 12 code files have a time of creation"),
    ([7] * 12, "creation times differ too little (1 over 0.0 days; 12 of 12 code files share one)"),
    ([DAY * 9 * (index % 3) for index in range(12)],
     "creation times differ too little (3 over 18.0 days; 4 of 12 code files share one)")])
def test_auto_falls_back_to_clusters_and_says_why(times, why):
    entries = [Item(name_of(index), program(index), created=created) for index, created in enumerate(times)]
    found = held_out(entries, 0.1, 1, "auto")
    assert (found.by, found.why) == ("cluster", why)
    assert found.paths
    if why.startswith("no file"):
        assert held_out(entries, 0.1, 1, "time").by == "cluster"
    else:
        assert held_out(entries, 0.1, 1, "time").by == "time"


@dataclass
class Made:
    path: str
    sketch: np.ndarray
    created: int | None = None
    kind: str = "code"
    bytes: int = 1_000


def test_twenty_thousand_files_with_five_thousand_alike_take_seconds():
    rng = np.random.default_rng(1)
    sketches = rng.integers(0, 2 ** 32, (20_000, split.SKETCH_ROWS), dtype=np.uint32)
    sketches[5_000:10_000] = sketches[5_000]
    for index in range(10_000, 10_100):
        sketches[index + 5_000] = sketches[index]
        sketches[index + 5_000, rng.choice(split.HALF, 12, replace=False)] += 1
        sketches[index + 5_000, split.HALF:] += 1
    entries = [Made(f"d{index}/f{index}.py", row) for index, row in enumerate(sketches)]
    started = time.process_time()
    found = held_out(entries, 0.05, 1, "auto")
    assert time.process_time() - started < 8
    assert found.near_duplicates == 5_000 + 200
    assert 900 <= len(found.paths) <= 1_001
    assert not found.paths & {f"d{index}/f{index}.py" for index in range(5_000, 10_000)}


@pytest.mark.parametrize("piece", [" ", "\n", "a", "a1 ", "/*", "# \n", "key = "])
def test_a_sketch_of_hostile_text_takes_linear_time(piece):
    text = piece * (4_000_000 // len(piece))
    started = time.process_time()
    sketch(text)
    assert time.process_time() - started < 8


def test_leakage_is_the_share_of_runs_of_thirteen_tokens_seen_in_training():
    ours = np.arange(100, dtype=np.int32)
    assert leakage([ours], [np.arange(200, 400, dtype=np.int32)]) == 0.0
    assert leakage([ours], [np.arange(0, 400, dtype=np.int32)]) == 1.0
    assert leakage([ours], [np.arange(50, 400, dtype=np.int32)]) == round((100 - 50 - 12) / 88, 6)
    assert leakage([np.arange(5, dtype=np.int32)], [ours]) is None
    assert leakage([], [ours]) is None


def test_leakage_reads_training_files_one_by_one_and_long_ones_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    ours, theirs = (rng.integers(0, 9_000, size).astype(np.uint16) for size in (500, 5_000))
    theirs[990:1_050] = ours[100:160]
    whole = leakage([ours], [theirs])
    assert whole == round((60 - 12) / 488, 6)
    monkeypatch.setattr(split, "CHUNK_TOKENS", 1_000)
    alive: list[int] = []

    def stream():
        for part in np.split(theirs, [2_000, 2_500]):
            alive.append(len(part))
            yield part

    assert leakage(iter([ours]), stream()) == whole
    assert alive == [2_000, 500, 2_500]
