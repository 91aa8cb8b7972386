"""Commits as training text, from a real history."""

import json

import numpy as np
import pytest
from repositories import FUNCTION, git, make, write_tree

from training.dataset import commits, split
from training.dataset.sources import history
from training.dataset.sources.history import Change

MIXED = {"context_tokens": 512, "target_tokens": 64, "commit_share": 0.3, "split": "cluster"}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """Twelve files and fifteen commits; one file was called differently at first."""
    root = tmp_path_factory.mktemp("history") / "repo"
    files = {f"app/m{index}.py": "".join(
        FUNCTION.format(name=f"f{index}_{inner}") + f"V{index}_{inner} = {inner}\n" for inner in range(12))
        for index in range(12)}
    write_tree(root, files | {"README.md": "# App\n\nWords about it.\n"})
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "Everything there is")
    for number in range(14):
        path = root / f"app/m{number % 12}.py"
        path.write_text(path.read_text().replace("value + 1", f"value + {number + 2}", 2))
        asked = f"Because someone{number}" + "@corp.io asked."
        git(root, "commit", "-qam", f"Step {number} adds more\n\n{asked}")
    return root


def test_patches_are_targets_after_message_and_old_text(repo, tmp_path):
    manifest, store = make(repo, tmp_path / "run", **MIXED | {"context_tokens": 2048})
    assert manifest["commits"]["used"] > 5
    assert manifest["kinds"]["commit"]["target_tokens"] == manifest["tokens"]["commits"] > 0
    about = [(row, item) for row, item in enumerate(store.documents()) if item["split"] == "commits"]
    assert len(about) == manifest["commits"]["used"]
    table = np.fromfile(store.path / "documents.bin", dtype=np.int64).reshape(-1, 4)
    from tokenizers import Tokenizer
    coder = Tokenizer.from_file(str(store.path / "tokenizer/tokenizer.json"))
    start, header, body, _ = map(int, table[about[0][0]])
    context = coder.decode([int(token) for token in store.tokens(start, header)])
    patch = coder.decode([int(token) for token in store.tokens(start + header, body - 1)])
    assert context.startswith("# commit\n# Step ")
    assert "# Because <personal:email> asked.\n# path: app/m" in context
    assert "    return value + 1\n" in context
    assert patch.startswith("@@ -")
    assert "-    return value + 1\n+    return value + " in patch
    assert manifest["personal_replaced"] > 0


def test_the_share_of_target_tokens_is_the_configured_one_or_all_there_is(repo, tmp_path):
    manifest, _ = make(repo, tmp_path / "run", **MIXED | {"commit_share": 0.1})
    tokens = manifest["tokens"]
    assert 0.1 <= tokens["commits"] / tokens["trained_per_epoch"] < 0.16
    none, _ = make(repo, tmp_path / "none", **MIXED | {"commit_share": 0.0})
    assert none["tokens"]["commits"] == 0
    assert "commit" not in none["kinds"]


def test_no_change_of_a_held_out_file_is_used_not_even_under_an_earlier_name(repo, tmp_path):
    manifest, store = make(repo, tmp_path / "run", **MIXED | {"commit_share": 0.8})
    held = {item["path"] for item in store.documents() if item["split"] == "held_out"}
    used = {item["path"].split(":", 2)[2] for item in store.documents() if item["split"] == "commits"}
    assert held
    assert not held & used
    assert manifest["commits"]["skipped"]["held-out file"] >= len(held)
    text = (repo / next(iter(held))).read_text()
    sides = commits.Sides(train={"app/other.py"}, held_out=held, sketches=np.stack([split.sketch(text)]))
    assert not sides.allows(Change(path="app/old_name.py", before=text + "X = 1\n", patch=""))
    assert sides.allows(Change(path="app/old_name.py", before="import this\n" * 9, patch=""))
    assert sides.allows(Change(path="app/other.py", before=text, patch=""))


def test_a_change_larger_than_a_window_is_counted(repo, tmp_path):
    manifest, _ = make(repo, tmp_path / "run", **MIXED | {"context_tokens": 40, "target_tokens": 20})
    assert manifest["commits"]["used"] == 0
    assert manifest["commits"]["skipped"]["larger than a window"] > 5


def test_files_added_last_are_held_out_by_time(repo, tmp_path):
    newer = tmp_path / "newer"
    git(repo.parent, "clone", "-q", str(repo), str(newer))
    for number, day in enumerate(("2027-01-01", "2027-02-01", "2027-03-01", "2027-04-01")):
        text = "".join(f"def g{number}_{inner}(a):\n    return a * {inner}\n" for inner in range(30))
        write_tree(newer, {f"late/{'pqrs'[number]}.py": text})
        git(newer, "add", "-A")
        git(newer, "commit", "-qm", f"Late {number}", date=f"{day}T00:00:00Z")
    assert len(set(history.created(newer).values())) >= 4
    manifest, store = make(newer, tmp_path / "run", **MIXED | {"split": "time", "held_out_share": 0.12})
    held = {item["path"] for item in store.documents() if item["split"] == "held_out"}
    assert manifest["split"]["by"] == "time"
    assert held
    assert held <= {"late/r.py", "late/s.py"}, json.dumps(sorted(held))


def test_an_excerpt_marks_what_lies_between_far_hunks():
    before = "\n".join(str(number) for number in range(200))
    found = commits.excerpt(before, "@@ -30,2 +30,2 @@\n x\n@@ -150 +150 @@\n y\n").split("\n")
    assert found[0] == "..."
    assert found[1] == "9"
    assert found.count("...") == 2
    assert found[-1] == "169"
