"""Copies of the streamed step beside the computation, and one after the other when they must not be."""

from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import ClassVar

import pytest
import torch
from families import assert_equal, gradients, make, plain, tokens

from training.longcontext import StreamedStep, StreamError, StreamPolicy
from training.longcontext.blocks import Block
from training.longcontext.inputs import DiskStore, HostStore
from training.longcontext.pages import Ring
from training.longcontext.transfer import Transfer
from training.longcontext.weights import StreamedWeights

CPU = torch.device("cpu")


class FakeStream:
    """A side stream that writes down what it is asked for."""

    made: ClassVar[list["FakeStream"]] = []

    def __init__(self, device):
        self.waited = []
        FakeStream.made.append(self)

    def wait_stream(self, stream):
        self.waited.append(stream)

    def wait_event(self, event):
        self.waited.append(event)


class FakeEvent:
    """An event that is recorded at once."""

    def record(self, stream):
        self.stream = stream


class OnGpu(torch.Tensor):
    """A tensor that takes note of the streams it is used on, as those of a GPU do."""

    noted: ClassVar[list[FakeStream]] = []

    def record_stream(self, stream):
        OnGpu.noted.append(stream)


@pytest.fixture
def gpu(monkeypatch):
    """CUDA's streams and events as fakes; copies are done on the CPU."""
    FakeStream.made, OnGpu.noted = [], []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the computation")
    return torch.device("cuda", 0)


def copied(transfer):
    """Both directions once; the events."""
    source, target = torch.arange(4.0).as_subclass(OnGpu), torch.zeros(4).as_subclass(OnGpu)
    events = transfer.save(source, target), transfer.load(source, target)
    assert target.tolist() == [0.0, 1.0, 2.0, 3.0]
    return events


def test_overlapping_copies_run_on_streams_of_their_own(gpu):
    saved, loaded = copied(Transfer(gpu, pinned=False))
    down, up = FakeStream.made
    assert [saved.stream, loaded.stream] == [down, up]
    assert down.waited == up.waited == ["the computation"]
    assert OnGpu.noted == [down, up]


def test_without_overlap_there_is_no_stream_and_no_event_to_wait_for(gpu):
    transfer = Transfer(gpu, pinned=False, overlap=False)
    assert copied(transfer) == (None, None)
    assert FakeStream.made == OnGpu.noted == []
    transfer.wait(None)
    transfer.finish(None)


def test_pinned_memory_stays_pinned_without_overlap(gpu):
    assert Transfer(gpu, pinned=True, overlap=False).pinned
    assert not Transfer(CPU, pinned=True, overlap=False).pinned


@pytest.mark.parametrize(("overlap", "ahead"), [(True, [0, 1]), (False, [0])])
def test_the_next_layers_weights_travel_early_only_with_overlap(overlap, ahead, monkeypatch):
    layers = [torch.nn.Linear(2, 2).requires_grad_(False) for _ in range(3)]
    weights = StreamedWeights(layers, CPU, Transfer(CPU, pinned=False, overlap=overlap))
    brought = []
    load = weights._transfer.load
    monkeypatch.setattr(weights._transfer, "load", lambda host, target: brought.append(target) or
                        load(host, target))
    with weights.on_device(0, 1):
        assert len(brought) == 2 * len(ahead)
        assert sorted({0, *weights._coming}) == ahead


def test_a_store_on_the_host_fetches_ahead_only_with_overlap():
    for overlap in (True, False):
        store = HostStore(CPU, Transfer(CPU, pinned=False, overlap=overlap))
        store.put("x", torch.ones(3))
        store.fetch("x")
        assert ("x" in store._coming) == overlap
        assert torch.equal(store.get("x"), torch.ones(3))


def test_a_store_on_disk_waits_for_each_write_without_overlap(tmp_path):
    store = DiskStore(CPU, str(tmp_path), overlap=False)
    waited = []
    done = store._done
    store._done = lambda work: waited.append(work) or done(work)
    store.put("x", torch.ones(3))
    assert [type(work) for work in waited] == [Future]
    store.fetch("x")
    assert not store._coming
    assert torch.equal(store.get("x"), torch.ones(3))
    store.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_pages_are_loaded_one_block_ahead_only_with_overlap(overlap):
    ring = Ring(8, 4, CPU, Transfer(CPU, pinned=False, overlap=overlap))
    like = torch.zeros(1, 2, 4, 3)
    ring.begin(like, like)
    for start in (0, 4):
        ring.write(start, like + start, like)
    loads = []
    load = ring._load
    ring._load = lambda *given: loads.append(given[:2]) or load(*given)
    sweep = ring.sweep([Block("full", 0, 4, 4, 8), Block("full", 0, 4, 0, 4)], gradients=False)
    next(sweep)
    assert len(loads) == (2 if overlap else 1)
    assert len(list(sweep)) == 1
    assert len(loads) == 2


@pytest.mark.parametrize("others", [{"inputs": "pageable", "pages": "pageable"}, {"inputs": "disk"}], ids=str)
def test_gradients_are_the_same_with_and_without_overlap(others, tmp_path):
    model, (ids, labels) = make("Llama", torch.float32), tokens(2, 37)
    found = []
    for overlap in (True, False):
        policy = StreamPolicy(chunk_tokens=8, directory=str(tmp_path), overlap=overlap, **others)
        found.append(gradients(model, partial(StreamedStep(model, policy), ids, labels)))
    assert_equal(found[1], plain(model, ids, labels))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name])


def test_a_word_for_overlap_is_refused():
    with pytest.raises(StreamError, match=r"^overlap is 'no'; it must be true or false\.$"):
        StreamPolicy(overlap="no")
