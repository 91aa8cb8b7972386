"""Every file and every token of any repository is accounted for."""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repositories import make, write_tree

from training.dataset import DatasetGenerator
from training.dataset.store import WindowStore
from training.errors import DataError

# The long form of this test: ACCOUNTS_EXAMPLES=2000.
EXAMPLES = int(os.environ.get("ACCOUNTS_EXAMPLES", "30"))

lines = st.lists(st.one_of(
    st.sampled_from(["import a\n", "from . import b\n", "def f(x):\n    return x + 1\n",
                     "class C:\n    pass\n", "x = 'é 漢字'\r\n", "# words and more words\n", "\n",
                     "value = 'a" + "b" * 90 + "'\n"]),
    st.text(alphabet="abc (){}:=\"'\\\t\n#é", max_size=30)), max_size=40).map("".join)
contents = st.one_of(lines.map(str.encode), lines.map(str.encode), st.binary(max_size=60),
                     st.just(b""), st.just(b"\xef\xbb\xbf"), lines.map(lambda text: text.encode("utf-16")),
                     lines.map(lambda text: text.encode() + b"\0"))
names = st.builds(lambda *parts: "".join(parts), st.sampled_from(["", "p/", "p/q/", "tests/"]),
                  st.sampled_from(list("abcdefg")),
                  st.sampled_from([".py", ".py", ".js", ".md", ".png", ".min.js", ""]))
trees = st.dictionaries(names, contents, max_size=12)
shapes = st.fixed_dictionaries({
    "context_tokens": st.sampled_from([2, 17, 64, 300]), "share": st.sampled_from([1, 2, 8]),
    "fim_share": st.sampled_from([0.0, 0.4]), "whole_share": st.sampled_from([0.0, 0.4]),
    "fim_rate": st.sampled_from([0.0, 0.9]), "held_out_share": st.sampled_from([0.05, 0.4])})


@settings(deadline=None, max_examples=EXAMPLES)
@given(trees, shapes)
def test_files_and_tokens_add_up_whatever_the_repository_holds(tree, shape):
    work = Path(tempfile.mkdtemp())
    (work / "repo").mkdir()
    repo = write_tree(work / "repo", {name: content for name, content in tree.items()
                                      if not any(other.startswith(f"{name}/") for other in tree)})
    values = dict(shape, target_tokens=max(1, shape["context_tokens"] // shape["share"]))
    del values["share"]
    try:
        if usable(repo):
            manifest, store = make(repo, work / "run", **values)
            check(manifest, store, sum(path.is_file() for path in repo.rglob("*")))
        else:
            with pytest.raises(DataError, match=r"The repository .* (is empty|holds)"):
                make(repo, work / "run", **values)
            assert not (work / "run").exists()
    finally:
        shutil.rmtree(work)


def usable(repo: Path) -> bool:
    """Whether the survey, which the planner asks first, finds anything to train on."""
    try:
        return DatasetGenerator.survey(str(repo)).code_files > 0
    except DataError:
        return False


def check(manifest: dict, store: WindowStore, there: int) -> None:
    files, tokens = manifest["files"], manifest["tokens"]
    assert files["seen"] == files["accepted"] + sum(files["dropped"].values()) == there
    assert files["train"] + files["held_out"] in (files["accepted"], 2), "one file is cut in two"
    assert tokens["total"] == tokens["trained_per_epoch"] + tokens["held_out"] + tokens["rejected"]
    assert tokens["lost"] == tokens["rejected"] == 0
    for epoch in (0, 1):
        trained: Counter[int] = Counter()
        for index in range(store.count("train")):
            ids, labels = store.window("train", index, 5, epoch)
            assert 2 <= len(ids) <= manifest["store"]["context_tokens"]
            assert labels[0] == -100
            assert (labels >= 0).any(), "a window without a target"
            for part in store.segments("train", index, 5, epoch):
                if part.trained and part.start >= 0:
                    trained.update(range(part.start, part.start + part.length))
        assert len(trained) == tokens["trained_per_epoch"]
        assert set(trained.values()) == {1}
