"""DeepSpeed through the streamed step: the plain curve and weights, each hook once, each gather twice."""

import json
import sys
from pathlib import Path

import forked
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "trainer"))
from streamed_worker import LAYERS, settings, tiny_qwen  # noqa: E402
from trainer_fakes import FakeStore, training_of  # noqa: E402

from training.trainer.engine import PlainEngine  # noqa: E402
from training.trainer.journal import read_lines  # noqa: E402
from training.trainer.loss import causal_loss  # noqa: E402
from training.trainer.streaming import StreamedLoss  # noqa: E402

PER_LAYER, OUTSIDE = 12, 3  # parameters of a layer, and around the layers
MICRO_BATCHES = {1: 22, 2: 12}  # of two epochs of 11 windows, by ranks; one rank's last is without a window


def work(path, ranks=1, **options):
    """Run streamed_worker.py in `ranks` processes; what it wrote."""
    arguments = {"path": str(path), "ranks": ranks, **options}
    forked.server().run(HERE / "streamed_worker.py", path / "worker.log", arguments, ranks)
    return json.loads((path / "outcome.json").read_text())


def curve(path):
    return [value for line in read_lines(path / "metrics.jsonl")
            for value in (line["loss"], line["grad_norm"], line["lr"], line["tokens"])]


def plain_training(path, tied=False, streamed=False):
    """One process without DeepSpeed; curve and sums of the final weights."""
    torch.set_num_threads(1)
    config, model = settings(), tiny_qwen(tied)
    engine = PlainEngine(model, dict(model.named_parameters()), config, torch.device("cpu"))
    loss = StreamedLoss(model, config, path, engine.device) if streamed else causal_loss
    training_of(path, config, FakeStore(11), model, engine, loss).train()
    return curve(path), {name: float(p.detach().sum()) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return [plain_training(tmp_path_factory.mktemp("plain"), tied) for tied in (False, True)]


@pytest.mark.parametrize("tied", [False, True])
def test_the_plain_engine_trains_the_same_through_the_streamed_step(tmp_path, plain, tied):
    found = plain_training(tmp_path, tied, streamed=True)
    assert found[0] == pytest.approx(plain[tied][0], rel=1e-4)
    assert found[1] == pytest.approx(plain[tied][1], rel=1e-3, abs=1e-3)


@pytest.mark.real
@pytest.mark.parametrize(("stage", "ranks", "offload", "tied"), [
    (1, 2, False, False), (2, 1, True, False), (2, 2, True, False), (2, 2, False, True)])
def test_zero_1_and_2_give_the_plain_engines_curve_and_weights(tmp_path, plain, stage, ranks, offload, tied):
    found = work(tmp_path, ranks=ranks, stage=stage, offload=offload, tied=tied)
    assert curve(tmp_path) == pytest.approx(plain[tied][0], rel=1e-4)
    assert found["sums"] == pytest.approx(plain[tied][1], rel=1e-3, abs=1e-3)
    assert set(found["hooks"].values()) == {MICRO_BATCHES[ranks]}
    assert len(found["hooks"]) == LAYERS * PER_LAYER + OUTSIDE - tied
    streamed, plain, _ = found["held_out"]
    assert streamed == pytest.approx(plain, rel=1e-5)


@pytest.mark.real
@pytest.mark.parametrize(("keep_every", "offload", "tied"), [(1, False, False), (2, True, True)])
def test_zero_3_gathers_a_layer_once_a_visit(tmp_path, plain, keep_every, offload, tied):
    """Once forward and once backward, and once more where layer inputs are computed again."""
    found = work(tmp_path, ranks=2, stage=3, offload=offload, persist=0, tied=tied, keep_every=keep_every)
    assert curve(tmp_path) == pytest.approx(plain[tied][0], rel=1e-4)
    assert found["sums"] == pytest.approx(plain[tied][1], rel=1e-3, abs=1e-3)
    assert set(found["hooks"].values()) == {MICRO_BATCHES[2]}
    layers, outside = found["layers"], found["outside"]
    backward = [layers[2], layers[1], *[layers[0]] * keep_every]  # layer 1's input comes from layer 0's
    visits = [outside, *layers, outside, outside, *backward, outside]
    assert found["gathers"]["whole"] == visits * 2  # micro-batches of a rank in an update
    assert found["gathers"]["exchanges"] == 2 * sum(map(len, visits))
    once = [outside, *layers, outside]
    assert found["evaluated"] == {"whole": once, "exchanges": sum(map(len, once))}
    streamed, whole, again = found["held_out"]
    assert streamed == again == pytest.approx(whole, rel=1e-5)


@pytest.mark.real
def test_zero_3_leaves_parameters_whole_that_deepspeed_keeps_so(tmp_path, plain):
    found = work(tmp_path, ranks=2, stage=3, persist=300)
    assert curve(tmp_path) == pytest.approx(plain[False][0], rel=1e-4)
    assert found["sums"] == pytest.approx(plain[False][1], rel=1e-3, abs=1e-3)
