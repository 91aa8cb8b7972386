"""Stores of layer inputs: what goes in comes out, room is reused, and what ran out of room is told."""

import errno
import logging
import os
import resource

import pytest
import torch
from families import assert_equal, gradients, make, plain, tokens

from training.longcontext import StoreFull, StreamedStep, StreamError, StreamPolicy
from training.longcontext.inputs import build
from training.longcontext.transfer import Transfer

CPU = torch.device("cpu")
PLACES = ("device", "pinned", "pageable", "disk")


def store_at(place, tmp_path):
    return build(place, CPU, Transfer(CPU, pinned=place == "pinned"), str(tmp_path))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_what_goes_in_comes_out(place, dtype, tmp_path):
    store = store_at(place, tmp_path)
    tensors = {("x", i): (torch.randn(3, i + 1, 5) * 100).to(dtype) for i in range(12)}
    for key, tensor in tensors.items():
        store.put(key, tensor)
    store.fetch(("x", 3))
    store.fetch(("not", "there"))
    for _ in range(2):
        for key, tensor in tensors.items():
            assert torch.equal(store.get(key), tensor)
    store.put(("x", 3), tensors["x", 3] + 1)
    assert torch.equal(store.get(("x", 3)), tensors["x", 3] + 1)
    store.drop(("x", 3))
    assert ("x", 3) not in store
    assert ("x", 4) in store
    store.clear()
    assert not any(key in store for key in tensors)


@pytest.mark.parametrize("place", PLACES)
def test_a_transposed_tensor_is_stored_as_it_reads(place, tmp_path):
    store = store_at(place, tmp_path)
    tensor = torch.randn(4, 3, 2).permute(2, 0, 1)
    store.put("t", tensor)
    assert torch.equal(store.get("t"), tensor)


def trained(place, tmp_path, **others):
    """A model, a step with this store, and a batch."""
    model = make("Llama", torch.float32)
    policy = StreamPolicy(chunk_tokens=8, inputs=place, directory=str(tmp_path), **others)
    return model, StreamedStep(model, policy), *tokens(2, 37)


def test_the_file_has_no_name_while_it_is_in_use(tmp_path):
    _, step, ids, labels = trained("disk", tmp_path)
    loss = step(ids, labels)
    assert os.fstat(step._machine.store._file.fileno()).st_size > 0
    assert os.fstat(step._machine.store._file.fileno()).st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    loss.backward()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("others", [{}, {"attention": "keep", "keys": "keep"}, {"keep_every": 2},
                                    {"encoding": "int8"}], ids=str)
def test_the_file_does_not_grow_from_step_to_step(tmp_path, others):
    _, step, ids, labels = trained("disk", tmp_path, **others)
    sizes = []
    for _ in range(5):
        step(ids, labels).backward()
        sizes.append(os.fstat(step._machine.store._file.fileno()).st_size)
    assert sizes == sizes[:1] * 5


@pytest.mark.parametrize("place", ["device", "pinned", "pageable"])
def test_host_buffers_are_reused_from_step_to_step(place, tmp_path, monkeypatch):
    _, step, ids, labels = trained(place, tmp_path, pages="pageable", attention="keep", keys="keep",
                                   keep_every=2)
    asked = []
    empty = Transfer.empty
    monkeypatch.setattr(Transfer, "empty", lambda *given: asked.append(given[1:]) or empty(*given))
    counts = []
    for _ in range(5):
        step(ids, labels).backward()
        counts.append(len(asked))
    assert counts[0] > 0
    assert counts == counts[:1] * 5


FULL = (r"^No space is left in {} for layer inputs: [\d,]+ bytes were asked for so far\. Free some, name "
        r"another folder, or keep fewer layer inputs\.$")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_full_disk_is_told_and_its_file_is_gone(tmp_path, monkeypatch, code):
    model, step, ids, labels = trained("disk", tmp_path)
    asked = []

    def allocate(file, start, size):
        asked.append(size)
        if len(asked) > 3:
            raise OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", allocate)
        with pytest.raises(StoreFull, match=FULL.format(tmp_path)):
            step(ids, labels)
    assert step._machine.store._file.closed
    assert list(tmp_path.iterdir()) == []
    assert_equal(gradients(model, lambda: step(ids, labels)), plain(model, ids, labels))  # once there is room


def test_a_limit_on_file_sizes_is_told(tmp_path):
    _, step, ids, labels = trained("disk", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(StoreFull, match=FULL.format(tmp_path)):
            step(ids, labels).backward()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_another_failure_of_the_disk_is_told_as_what_it_is(tmp_path, monkeypatch):
    _, step, ids, labels = trained("disk", tmp_path)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StreamError, match=rf"^The input store in {tmp_path} failed: Input/output error\.$"):
        step(ids, labels).backward()


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(StreamError, match=r"^The input store cannot be opened in .*/nowhere: No such file"):
        StreamedStep(make("Llama"), StreamPolicy(inputs="disk", directory=str(tmp_path / "nowhere")))


def test_pinned_memory_that_ends_is_told_once_and_ordinary_memory_takes_over(monkeypatch, caplog):
    transfer = Transfer(CPU, pinned=True)
    assert not transfer.pinned  # nothing to pin for on a CPU
    transfer.pinned, empty, tried = True, torch.empty, []

    def limited(*shape, pin_memory=False, **others):
        if pin_memory:
            tried.append(shape)
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return empty(*shape, **others)
    monkeypatch.setattr(torch, "empty", limited)
    with caplog.at_level(logging.WARNING):
        buffers = [transfer.empty((1 << 20, 64), torch.float32) for _ in range(3)]
    assert [tuple(b.shape) for b in buffers] == [(1 << 20, 64)] * 3
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "No more host memory can be pinned (CUDA error: out of memory); the rest goes to ordinary memory, "
        "whose copies do not run beside the computation. `ulimit -l` is the usual limit."]


def test_host_buffers_do_not_overlap():
    transfer = Transfer(CPU, pinned=False)
    shapes = [(3,), (1,), (5, 7), (2, 2, 2), (0,), (11,)] * 20
    dtypes = torch.uint8, torch.bfloat16, torch.float64
    buffers = [transfer.empty(shape, dtypes[index % 3]).fill_(index % 100)
               for index, shape in enumerate(shapes)]
    for index, (buffer, shape) in enumerate(zip(buffers, shapes, strict=True)):
        assert tuple(buffer.shape) == shape
        assert bool((buffer == index % 100).all())
        assert buffer.data_ptr() % 64 == 0 or not buffer.numel()
