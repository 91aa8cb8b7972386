"""dataset.packing: whether targets of several short files stand in one window."""

from collections import Counter

import numpy as np
import pytest
from repositories import make, small_project, write_tree

DENSE = {"context_tokens": 256, "target_tokens": 256, "commit_share": 0.0}
COMPOSED = {"context_tokens": 512, "target_tokens": 128, "commit_share": 0.0}
MIXED = COMPOSED | {"fim_share": 0.3, "fim_rate": 0.6, "whole_share": 0.2}


def project(root):
    """The small project, with as many files again that fill little of a window."""
    return write_tree(small_project(root), {f"app/tiny{index}.py": f"SIZE = {index}\n" for index in range(8)})


def targets(store, split="train"):
    """How often each stored token is a target, by place in the array."""
    counts: Counter[int] = Counter()
    for index in range(store.count(split)):
        for part in store.segments(split, index):
            if part.trained and part.start >= 0:
                counts.update(range(part.start, part.start + part.length))
    return counts


def files(store, index, trained_only):
    """The files that a train window's tokens are of."""
    parts = store.segments("train", index)
    origins = (store.origin(part.start + part.length - 1) for part in parts if part.start >= 0
               and (part.trained or not trained_only))
    return {origin.path for origin in origins if origin}


@pytest.mark.parametrize("regime", [DENSE, COMPOSED, MIXED], ids=["dense", "composed", "mixed"])
def test_without_packing_the_same_tokens_are_targets_in_more_windows(tmp_path, regime):
    repo = project(tmp_path / "repo")
    packed, together = make(repo, tmp_path / "packed", **regime)
    single, alone = make(repo, tmp_path / "single", packing=False, **regime)
    assert alone.count("train") > together.count("train")
    assert targets(alone) == targets(together)
    assert set(targets(alone).values()) == {1}
    for manifest, store in ((packed, together), (single, alone)):
        tokens, kinds = manifest["tokens"], manifest["kinds"].values()
        assert (tokens["lost"], tokens["rejected"], tokens["trained_per_epoch"]) == (0, 0, tokens["train"])
        assert sum(kind["target_tokens"] for kind in kinds) == tokens["train"]
        assert sum(kind["windows"] for kind in kinds) == manifest["windows"]["train"] == store.count("train")
    assert packed["tokens"] == single["tokens"]


def test_each_window_without_packing_holds_the_text_of_one_file_and_no_padding(tmp_path):
    repo = project(tmp_path / "repo")
    _, together = make(repo, tmp_path / "packed", **DENSE)
    _, alone = make(repo, tmp_path / "single", packing=False, **DENSE)
    assert max(len(files(together, index, False)) for index in range(together.count("train"))) > 1
    assert all(len(files(alone, index, False)) == 1 for index in range(alone.count("train")))
    for index in range(alone.count("train")):
        parts, (ids, labels) = alone.segments("train", index), alone.window("train", index)
        assert len(ids) == sum(part.length for part in parts) <= 256
        assert int((labels != -100).sum()) == sum(part.length for part in parts if part.trained)


def test_composed_windows_without_packing_have_targets_of_one_file_after_context_of_others(tmp_path):
    repo = project(tmp_path / "repo")
    _, together = make(repo, tmp_path / "packed", **COMPOSED)
    _, alone = make(repo, tmp_path / "single", packing=False, **COMPOSED)
    assert max(len(files(together, index, True)) for index in range(together.count("train"))) > 1
    assert all(len(files(alone, index, True)) == 1 for index in range(alone.count("train")))
    assert max(len(files(alone, index, False)) for index in range(alone.count("train"))) > 1


@pytest.mark.parametrize("regime", [DENSE, COMPOSED], ids=["dense", "composed"])
def test_held_out_windows_are_the_same_with_and_without_packing(tmp_path, regime):
    repo = project(tmp_path / "repo")
    _, together = make(repo, tmp_path / "packed", held_out_share=0.4, **regime)
    _, alone = make(repo, tmp_path / "single", packing=False, held_out_share=0.4, **regime)
    assert alone.count("held_out") == together.count("held_out") > 0
    for index in range(alone.count("held_out")):
        for one, other in zip(alone.window("held_out", index), together.window("held_out", index),
                              strict=True):
            assert np.array_equal(one, other)


def test_a_dataset_made_with_packing_is_not_reused_without_it(tmp_path):
    repo = project(tmp_path / "repo")
    packed, _ = make(repo, tmp_path / "run", **DENSE)
    single, _ = make(repo, tmp_path / "run", packing=False, **DENSE)
    again, _ = make(repo, tmp_path / "run", packing=True, **DENSE)
    assert (packed["settings"]["dataset.packing"], single["settings"]["dataset.packing"]) == (True, False)
    assert single["fingerprint"] != packed["fingerprint"]
    assert again["digest"] == packed["digest"] != single["digest"]
