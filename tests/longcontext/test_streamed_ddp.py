"""DistributedDataParallel around a StreamedStep: single-process gradients, with accumulation too."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from streamed_worker import VOCAB, tiny_qwen  # noqa: E402

from training.longcontext import StreamedStep, StreamPolicy  # noqa: E402
from training.trainer.loss import causal_loss  # noqa: E402

RANKS, ROUNDS = 2, 3
POLICY = StreamPolicy(chunk_tokens=5, page_tokens=3, loss_tokens=4)


def windows():
    """(ranks, rounds, B, S): each rank's micro-batches."""
    return torch.randint(VOCAB, (RANKS, ROUNDS, 2, 17), generator=torch.Generator().manual_seed(3))


def trained(step, batches, sync):
    """Gradients after all batches; only the last one exchanges them."""
    for index, ids in enumerate(batches):
        with nullcontext() if index == len(batches) - 1 else sync():
            step(ids, ids).backward()


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/meeting")
    model = tiny_qwen().double()
    fired = {}
    step = torch.nn.parallel.DistributedDataParallel(StreamedStep(model, POLICY))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: fired.__setitem__(name, fired.get(name, 0) + 1))
    trained(step, windows()[rank], step.no_sync)
    torch.save(({name: p.grad for name, p in model.named_parameters()}, fired), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(one_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_two_ranks_have_the_mean_of_what_one_process_computes(by_two):
    model = tiny_qwen().double()
    for ids in windows().flatten(0, 1):
        summed, tokens = causal_loss(model, ids, ids, None, 0)
        (summed / tokens / RANKS).backward()
    for gradients, _ in by_two:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_the_hooks_of_each_parameter_fire_once_a_micro_batch(by_two):
    for gradients, fired in by_two:
        assert fired == dict.fromkeys(gradients, ROUNDS)
