"""The micro-batch by binary search: against a made-up machine, and with real steps of a small model."""

import time

import pytest
import torch
from test_calculator import profile
from torch import nn

from training.planning.tuning import AdvancedOptimizer, search
from training.records import GIB, TrialStep

PLANNED = {"training.micro_batch": 1, "training.accumulation": 64}


def machine(fixed=1.0, each=1.0, seconds=lambda size: 1.0, fails_from=10**6):
    """A try_step whose memory is `fixed` + `each` GiB a window, and the sizes it was asked for."""
    asked = []

    def try_step(size):
        asked.append(size)
        error = "CUDA out of memory" if size >= fails_from else ""
        return TrialStep(context_tokens=100, target_tokens=100, micro_batch=size, update_s=0.0, error=error,
                         seconds=() if error else (seconds(size),) * 3,
                         peak_bytes=0 if error else int((fixed + each * size) * GIB))
    return try_step, asked


def found(try_step, room_gib, **planned):
    values = {**PLANNED, **{f"training.{name}": value for name, value in planned.items()}}
    return search.search(try_step, values, int(room_gib * GIB))


def sizes(fit):
    return fit.choices["training.micro_batch"].value, fit.choices["training.accumulation"].value


@pytest.mark.parametrize("room", [2, 3, 4.9, 5, 8, 9, 17, 33, 64.9, 65, 1000])
def test_the_largest_power_of_two_that_fits_is_found(room):
    fits = max(size for size in (1, 2, 4, 8, 16, 32, 64) if 1 + size <= room)
    assert sizes(found(machine()[0], room)) == (fits, 64 // fits)


@pytest.mark.parametrize("fails_from", [2, 4, 8, 16, 32, 64])
def test_a_step_that_fails_does_not_fit_whatever_room_there_is(fails_from):
    fit = found(machine(fails_from=fails_from)[0], 1000)
    assert sizes(fit) == (fails_from // 2, 128 // fails_from)
    assert f"; {fails_from} does not fit" in fit.why


@pytest.mark.parametrize("full", [1, 2, 4, 8, 16, 32, 64])
def test_a_larger_size_that_is_not_faster_is_not_taken(full):
    """A device that is filled by `full` windows: up to there a step takes no longer."""
    fit = found(machine(each=0.01, seconds=lambda size: max(1.0, size / full))[0], 100)
    assert sizes(fit)[0] == full


def test_a_gain_of_three_per_cent_is_no_reason_and_one_of_ten_is():
    def gaining(share):
        return machine(each=0.01, seconds=lambda size: size / (1 + share) ** (size.bit_length() - 1))[0]
    assert sizes(found(gaining(0.03), 100)) == (1, 64)
    assert sizes(found(gaining(0.10), 100)) == (64, 1)


def test_few_steps_are_taken_each_size_once_and_none_that_is_hopeless():
    try_step, asked = machine()
    found(try_step, 6)
    assert len(asked) == len(set(asked)) <= 6
    assert max(asked) <= 4           # 8 windows would take 9 GiB, which the line through 1 and 2 tells
    try_step, asked = machine()
    found(try_step, 1000)
    assert len(asked) == len(set(asked)) <= 6


def test_the_windows_of_an_update_stay_what_was_planned():
    for micro, accumulation in ((1, 8), (2, 4), (1, 12), (3, 1), (8, 1)):
        size, rest = sizes(found(machine(each=0.01)[0], 100, micro_batch=micro, accumulation=accumulation))
        assert size * rest == micro * accumulation


def test_the_reason_shows_what_was_measured():
    fit = found(machine()[0], 5.2)
    assert fit.choices["training.micro_batch"].source == "measured"
    assert fit.choices["training.micro_batch"].why == (
        "a step of 4 took 5.00 of 5.20 GiB and made 2.00 times the tokens/s of 2; 8 would take 9.00")
    assert fit.choices["training.accumulation"].why == (
        "64 windows of a device in an update, as planned, 4 at a time")


def test_one_window_that_does_not_fit_changes_nothing_and_says_so():
    fit = found(machine(fixed=5)[0], 4)
    assert fit.choices == {}
    assert fit.why == "one window at a time does not fit: it took 6.00 of 4.00 GiB"
    assert found(machine(fails_from=1)[0], 4).why == "one window at a time does not fit: CUDA out of memory"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(64, 32), nn.Linear(32, 128), nn.Linear(128, 64)

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.embed(ids))))


def test_real_steps_of_a_small_model_find_the_size_at_which_its_saved_tensors_exceed_the_limit():
    """The limit lies between what autograd saves for 8 windows and for 16."""
    model, tokens = Small(), 256

    def saved_bytes(size, limit=None):
        kept = [0]

        def pack(tensor):
            kept[0] += tensor.numel() * tensor.element_size()
            if limit is not None and kept[0] > limit:
                raise MemoryError(f"{kept[0]:,} bytes kept, {limit:,} allowed")
            return tensor
        ids = torch.randint(64, (size, tokens))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return kept[0]

    limit = (saved_bytes(8) + saved_bytes(16)) // 2

    def try_step(size):
        start, error, peak = time.perf_counter(), "", 0
        try:
            peak = saved_bytes(size, limit)
        except MemoryError as failed:
            error = str(failed)
        # Of the clock only that it ran: on shared cores it does not tell a size's worth.
        assert time.perf_counter() > start
        return TrialStep(context_tokens=tokens, target_tokens=tokens, micro_batch=size, update_s=0.0,
                         seconds=(1.0,), peak_bytes=peak, error=error)

    for room in (limit, 10 * limit):  # over the room as told by the record, and as told by the error alone
        fit = AdvancedOptimizer(profile()).search(try_step, {**PLANNED, "training.accumulation": 32}, room)
        assert sizes(fit) == (8, 4)
        assert fit.steps[0].micro_batch == 1
