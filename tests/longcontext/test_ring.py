"""Ranks that share a window have one process's loss and gradients, send as much as they should, and refuse
what they cannot share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.longcontext.ring import positions_of, shared, visit

HERE = Path(__file__).resolve().parent
RINGS = (2, 3)
PATIENCE_S = 120


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What ring_worker.py found, by size of the ring."""
    folder = tmp_path_factory.mktemp("ring")
    worker = subprocess.run([sys.executable, str(HERE / "ring_worker.py"), str(folder), *map(str, RINGS)],
                            text=True, capture_output=True, timeout=PATIENCE_S)
    assert worker.returncode == 0, worker.stderr[-4000:]
    return {ranks: json.loads((folder / f"found-{ranks}.json").read_text()) for ranks in RINGS}


def test_every_token_has_one_rank_and_each_its_global_position():
    for ranks in (1, 2, 3, 4):
        places = torch.cat([positions_of(24, rank, ranks) for rank in range(ranks)])
        assert sorted(places.tolist()) == list(range(24))


def test_labels_are_shifted_before_they_are_shared_out_and_padding_has_none():
    ids = torch.arange(10)[None]
    parts = [shared(ids, ids, rank, 2) for rank in range(2)]
    assert parts[0].ids.tolist() == [[0, 1, 2, 9, 0, 0]]
    assert parts[0].targets.tolist() == [[1, 2, 3, -100, -100, -100]]
    assert parts[1].targets.tolist() == [[4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_visits_cover_each_causal_pair_once_and_take_equal_work(ranks):
    tokens = 4 * ranks
    seen = torch.zeros(tokens, tokens)
    own = tokens // ranks
    for rank in range(ranks):
        work = 0
        for owner in range(ranks):
            part = visit(rank, owner, own)
            queries = positions_of(tokens, rank, ranks)[part.queries]
            keys = positions_of(tokens, owner, ranks)[part.keys]
            block = torch.ones(len(queries), len(keys))
            block = block.tril() if part.kind == "causal" else block
            seen[queries[:, None], keys] += block
            work += block.sum()
        assert work == own * (own + 1) / 2 + (ranks - 1) * own * own / 2
    assert torch.equal(seen, torch.ones(tokens, tokens).tril())


@pytest.mark.parametrize("ranks", RINGS)
@pytest.mark.parametrize("case", ["llama 48", "llama 41", "qwen2 48", "qwen2 41", "mistral 48", "mistral 41",
                                  "gpt2 48", "gpt2 41", "short"])
def test_loss_and_gradients_are_those_of_one_process(found, ranks, case):
    plain, ring, worst, _ = found[ranks][case]
    assert ring == pytest.approx(plain, rel=1e-6)
    assert worst < 1e-5


@pytest.mark.parametrize("ranks", RINGS)
def test_recomputed_activations_go_around_the_ring_again(found, ranks):
    assert found[ranks]["llama 48"][3] == 3
    assert found[ranks]["llama 41"][3] == 6


@pytest.mark.parametrize("ranks", RINGS)
def test_each_hop_sends_keys_and_values_of_one_rank(found, ranks):
    forward, backward, pair = found[ranks]["sent"]
    assert forward == (ranks - 1) * pair
    assert backward == (ranks - 1) * pair + ranks * pair


def test_the_check_at_the_start_compares_with_the_model_itself(found):
    plain, ring = found[2]["verified"]
    assert ring == pytest.approx(plain, rel=1e-6)
    assert "its loss is" in found[2]["lied"]
    assert "on the ring" in found[2]["lied"]


def test_what_cannot_be_shared_is_refused(found):
    assert found[2]["window"] == "attention over windows of 16 tokens, shorter than the sequences of 60"
    assert found[2]["rope"] == "rotary embeddings of type dynamic"


def test_soft_caps_and_windows_longer_than_the_sequences_are_no_obstacle(found):
    plain, ring = found[2]["softcap"]
    assert ring == pytest.approx(plain, rel=1e-5)


def test_outside_of_a_shared_step_the_rings_attention_raises_and_does_not_wait_for_others(found):
    assert found[2]["alone"] == "ring attention was called outside of a shared step"
