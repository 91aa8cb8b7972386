"""The ladder when memory runs out: exact rungs only, each one once, and never another training."""

import pytest

from training.manager.ladder import DEVICE, HOST, next_rung
from training.settings import Config, contradictions
from training.trainer.identities import identity

CUDA = {"device.kind": "cuda", "dataset.context_tokens": 8192, "dataset.target_tokens": 8192,
        "training.micro_batch": 4, "training.accumulation": 2, "training.checkpointing": False,
        "training.loss_chunk_tokens": 1024, "model.dtype": "bfloat16", "lora.enabled": True,
        "lora.targets": ["q_proj"]}


def climbed(values, memory=DEVICE, phase="train"):
    """Every rung in turn, and the configuration after the last."""
    config, rungs = Config(values), []
    while (rung := next_rung(config, memory, phase)) is not None:
        config = Config({**config, **rung.changes})
        rungs.append(rung.name)
        assert len(rungs) < 40, "the ladder has no end"
    return rungs, config


def test_on_a_gpu_the_cheapest_change_comes_first_and_the_disk_last():
    rungs, last = climbed(CUDA | {"device.allocator": "split"})
    assert rungs == [
        "micro-batches of 2 in place of 4", "micro-batches of 1 in place of 2", "expandable segments",
        "activations computed again", "the loss in pieces of 256 tokens", "the loss in pieces of 64 tokens",
        "the streamed step", "chunks of 1,024 tokens", "chunks of 256 tokens",
        "layer inputs in pinned host memory", "layer inputs in a file on disk"]
    assert (last["training.micro_batch"], last["training.accumulation"]) == (1, 8)


def test_on_a_cpu_nothing_is_pinned():
    rungs, last = climbed({"dataset.context_tokens": 4096, "dataset.target_tokens": 4096})
    assert last["stream.inputs"] == "disk"
    assert not any("pinned" in rung or "segments" in rung for rung in rungs)


@pytest.mark.parametrize("values", [CUDA, {"dataset.context_tokens": 4096, "dataset.target_tokens": 4096},
                                    CUDA | {"deepspeed.stage": 2}, CUDA | {"training.micro_batch": 6},
                                    CUDA | {"training.compile": True}])
@pytest.mark.parametrize("memory", [DEVICE, HOST])
@pytest.mark.parametrize("phase", ["train", "evaluate_after"])
def test_no_rung_changes_the_training_or_contradicts_the_rest(values, memory, phase):
    config = Config(values)
    before = identity(config, "d")
    while (rung := next_rung(config, memory, phase)) is not None:
        config = Config({**config, **rung.changes})
        assert contradictions(config) == []
        assert identity(config, "d") == before


def test_an_evaluation_gives_up_its_own_extras_before_the_training_gives_anything():
    rungs, _ = climbed(CUDA | {"evaluation.context_targets": 8, "evaluation.completions": 4},
                       phase="evaluate_before")
    assert rungs[:2] == ["no context curve in the evaluation", "no completions in the evaluation"]
    assert climbed(CUDA)[0] == rungs[2:]


def test_where_main_memory_ran_out_beside_a_gpu_it_is_taken_off_main_memory():
    streamed = CUDA | {"stream.chunk_tokens": 4096, "stream.inputs": "pinned", "deepspeed.stage": 2,
                       "deepspeed.offload_optimizer": True}
    rungs, last = climbed(streamed, HOST)
    assert rungs == ["layer inputs on disk", "optimizer state stays on the device"]
    assert (last["stream.inputs"], last["deepspeed.offload_optimizer"]) == ("disk", False)


@pytest.mark.parametrize(("micro", "accumulation", "expected"), [
    (4, 1, (2, 2)), (6, 1, (3, 2)), (3, 2, (1, 6)), (5, 3, (1, 15)), (7, 1, (1, 7))])
def test_an_update_keeps_its_windows(micro, accumulation, expected):
    found = next_rung(Config(CUDA | {"training.micro_batch": micro, "training.accumulation": accumulation}),
                      DEVICE, "train")
    assert (found.changes["training.micro_batch"], found.changes["training.accumulation"]) == expected
