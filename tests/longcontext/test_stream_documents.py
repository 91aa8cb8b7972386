"""Packed documents do not see each other: gradients equal those of each document on its own."""

import pytest
import torch
from families import assert_equal, gradients, make, plain, streamed, tokens

from training.longcontext import StreamError, StreamPolicy

POLICY = StreamPolicy(chunk_tokens=8, page_tokens=5, loss_tokens=5)
LENGTH = 31


def packed(rows, offset=0):
    """Ids, labels without a target across documents, and positions (B, S) of each row's documents."""
    ids, labels = tokens(len(rows), LENGTH)
    positions = torch.empty_like(ids)
    for row, starts in enumerate(rows):
        for begin, end in spans(starts):
            positions[row, begin:end] = torch.arange(end - begin) + offset
            labels[row, begin] = -100
    return ids, labels, positions


def spans(starts):
    return list(zip(starts, [*starts[1:], LENGTH], strict=True))


def one_by_one(model, ids, labels, positions, rows):
    """Loss and gradients of the plain model on each document alone, averaged over all label tokens."""
    def loss():
        total, count = 0.0, 0
        for row, starts in enumerate(rows):
            for begin, end in spans(starts):
                part = (slice(row, row + 1), slice(begin, end))
                targets = int((labels[part][:, 1:] != -100).sum())
                if targets:
                    total = total + targets * model(input_ids=ids[part], labels=labels[part], use_cache=False,
                                                    position_ids=positions[part]).loss
                    count += targets
        return total / count
    return gradients(model, loss)


ROWS = {
    "one row": [[0, 3, 4, 17]],
    "same in both rows": [[0, 8, 16]] * 2,
    "different in each row": [[0, 5, 6, 21], [0, 16]],
    "one whole, one cut": [[0], [0, 1, 2, 30]],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("family", "window"), [("Llama", None), ("Mistral", 3), ("Gemma3", 6),
                                                ("Gemma2", 10), ("GPT2", None), ("Qwen3Moe", None)])
def test_documents_do_not_see_each_other(family, window, rows):
    model = make(family, **({"sliding_window": window} if window else {}))
    ids, labels, positions = packed(rows)
    expected = one_by_one(model, ids, labels, positions, rows)
    assert_equal(streamed(model, POLICY, ids, labels, position_ids=positions), expected)


def test_they_equal_eager_attention_with_a_block_diagonal_mask():
    rows = [[0, 5, 6, 21], [0, 16]]
    model = make("Llama")
    ids, labels, positions = packed(rows)
    number = torch.stack([torch.bucketize(torch.arange(LENGTH), torch.tensor(starts), right=True)
                          for starts in rows])
    seen = (number[:, :, None] == number[:, None]) & torch.ones(LENGTH, LENGTH).tril().bool()
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    expected = plain(model, ids, labels, attention_mask=mask[:, None], position_ids=positions)
    assert_equal(streamed(model, POLICY, ids, labels, position_ids=positions), expected)


def test_documents_change_the_loss_so_that_the_tests_above_can_fail():
    model = make("Llama")
    ids, labels, positions = packed([[0, 8, 16]])
    apart = streamed(model, POLICY, ids, labels, position_ids=positions).loss
    assert abs(float(apart - streamed(model, POLICY, ids, labels).loss)) > 1e-4


def test_one_row_of_positions_serves_the_whole_batch():
    model = make("Llama")
    ids, labels, positions = packed([[0, 7, 20]] * 2)
    expected = one_by_one(model, ids, labels, positions, [[0, 7, 20]] * 2)
    assert_equal(streamed(model, POLICY, ids, labels, position_ids=positions[:1]), expected)


def test_documents_may_begin_at_any_position():
    model = make("Llama")
    ids, labels, positions = packed([[0, 7, 20]], offset=40)
    expected = one_by_one(model, ids, labels, positions, [[0, 7, 20]])
    assert_equal(streamed(model, POLICY, ids, labels, position_ids=positions), expected)


def test_every_token_a_document_of_its_own():
    model = make("Llama")
    ids, labels = tokens(2, LENGTH)
    positions = torch.zeros_like(ids)
    expected = gradients(model, lambda: _each_alone(model, ids, labels))
    assert_equal(streamed(model, POLICY, ids, labels, position_ids=positions), expected)


def _each_alone(model, ids, labels):
    logits = model(input_ids=ids.reshape(-1, 1), use_cache=False).logits.reshape(*ids.shape, -1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_positions_of_another_shape_are_refused():
    model = make("Llama")
    ids, labels, positions = packed([[0, 7]])
    with pytest.raises(StreamError, match=r"^position_ids is \(1, 30\) and input_ids \(1, 31\)\.$"):
        streamed(model, POLICY, ids, labels, position_ids=positions[:, 1:])
