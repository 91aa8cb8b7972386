import math

import pytest
import torch
from torch import nn
from trainer_fakes import VOCAB, TinyModel, config_of, same, training_of, weights_of

from training.errors import UsageError
from training.trainer import gradients
from training.trainer.engine import PlainEngine
from training.trainer.loop import seed_all


class Layered(TinyModel):
    """TinyModel with its middle in a numbered layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.mix, self.norm])
        del self.mix, self.norm

    def forward(self, ids):
        mix, norm = self.layers
        return self.head(self.drop(norm(nn.functional.gelu(mix(self.embed(ids))))))


def named(model):
    return dict(model.named_parameters())


def with_gradients(model, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(named(model).items()):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * size
    return named(model)


def authors_clip(gradient, weight, clipping, eps=1e-3):
    """arXiv:2102.06171, equation 3, one unit at a time: a row of a matrix, or a whole vector."""
    if weight.ndim == 1:
        most = max(weight.norm().item(), eps) * clipping
        norm = gradient.norm().item()
        return gradient if norm < most else gradient * (most / max(norm, 1e-6))
    return torch.stack([authors_clip(g, w, clipping, eps) for g, w in zip(gradient, weight, strict=True)])


ZERO_BORN = {"layers.0.weight", "layers.1.bias"}  # a row and a vector of zeros: clipped at any size


@pytest.mark.parametrize(("size", "clipped"), [
    (1e-3, ZERO_BORN), (1.0, ZERO_BORN | {"layers.0.bias", "layers.1.weight"})])
def test_units_are_clipped_as_the_paper_says_and_only_in_decoder_layers(size, clipped):
    model = Layered()
    with torch.no_grad():
        model.layers[0].weight[3] = 0.0  # a unit that starts at zero: eps counts
    trainable = with_gradients(model, size=size)
    before = {name: parameter.grad.clone() for name, parameter in trainable.items()}
    gradients.clip_units(trainable, 0.02)
    for name, parameter in trainable.items():
        expected = before[name]
        if name.startswith("layers."):
            expected = authors_clip(expected, parameter.detach(), 0.02)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-8, msg=name)
    changed = {name for name in trainable if not torch.equal(trainable[name].grad, before[name])}
    assert changed == clipped


def test_a_matrix_of_shape_inputs_outputs_has_its_units_in_columns():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(1)
    model = nn.Sequential(Conv1D(5, 3))
    trainable = with_gradients(model)
    names = gradients.inputs_first(model, trainable)
    before = trainable["0.weight"].grad.clone()
    gradients.clip_units(trainable, 0.01, names)
    expected = authors_clip(before.T, model[0].weight.detach().T, 0.01).T
    assert names == {"0.weight"}
    torch.testing.assert_close(trainable["0.weight"].grad, expected)


def test_stacked_experts_are_clipped_by_expert_and_output():
    experts = nn.Parameter(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2)))
    experts.grad = torch.ones(2, 4, 3)
    gradients.clip_units({"layers.0.experts": experts}, 0.01)
    for expert in range(2):
        expected = authors_clip(torch.ones(4, 3), experts[expert].detach(), 0.01)
        torch.testing.assert_close(experts.grad[expert], expected)


def test_clipping_units_of_a_model_without_layers_is_refused():
    model = TinyModel()
    with pytest.raises(UsageError, match=r"training\.adaptive_clip is for parameters of decoder layers"):
        PlainEngine(model, named(model), config_of(training__adaptive_clip=0.1), torch.device("cpu"))


def test_noise_has_the_papers_deviation_and_falls_with_the_updates():
    assert gradients.noise_deviation(0.3, 0) == math.sqrt(0.3)
    for update in (0, 9, 999):
        weight = nn.Parameter(torch.zeros(400, 500))
        weight.grad = torch.zeros(400, 500)
        gradients.add_noise({"w": weight}, 0.3, update, seed=5)
        expected = math.sqrt(0.3 / (1 + update) ** 0.55)
        assert float(weight.grad.std()) == pytest.approx(expected, rel=0.01)
        assert abs(float(weight.grad.mean())) < 0.01 * expected


def test_noise_depends_on_seed_update_and_parameter_and_moves_no_other_generator():
    def drawn(update, seed):
        trainable = {name: nn.Parameter(torch.zeros(8)) for name in ("a", "b")}
        for parameter in trainable.values():
            parameter.grad = torch.zeros(8)
        gradients.add_noise(trainable, 0.3, update, seed)
        return [tuple(parameter.grad.tolist()) for parameter in trainable.values()]

    seed_all(1, 2, 0)
    before = torch.get_rng_state()
    found = drawn(0, 5), drawn(1, 5), drawn(0, 6)
    assert torch.equal(before, torch.get_rng_state())
    assert len({noise for pair in found for noise in pair}) == 6
    assert drawn(0, 5) == found[0]


def test_noise_is_added_to_unscaled_gradients_before_clipping():
    norms = {}
    for dtype in ("float32", "float16"):
        model = Layered().eval()
        engine = PlainEngine(model, named(model), config_of(model__dtype=dtype, training__gradient_noise=1.0,
                                                            training__clip_norm=0.5), torch.device("cpu"))
        engine.backward(model(torch.arange(6)[None]).square().mean(), last=True)
        norms[dtype] = engine.step(0.0)
    elements = sum(parameter.numel() for parameter in Layered().parameters())
    assert norms["float32"] == pytest.approx(math.sqrt(elements), rel=0.1)  # noise of deviation 1 prevails
    assert norms["float16"] == pytest.approx(norms["float32"], rel=1e-4)


@pytest.mark.parametrize("key", ["training__gradient_noise", "training__adaptive_clip"])
def test_each_changes_the_course_of_a_training_and_survives_a_stop_bit_for_bit(tmp_path, key):
    settings = {key: 1e-3}
    plain = training_of(tmp_path / "plain", config_of(), model=Layered())
    whole = training_of(tmp_path / "whole", config_of(**settings), model=Layered())
    plain.train()
    whole.train()
    first = training_of(tmp_path / "halves", config_of(**settings), model=Layered())
    for _ in range(4):
        first._train_one()
    first.save()
    again = training_of(tmp_path / "halves", config_of(**settings), model=Layered())
    assert again.progress.step == 4
    again.train()
    assert not same(weights_of(plain), weights_of(whole))
    assert same(weights_of(whole), weights_of(again))


def ids():
    return torch.arange(12)[None] % VOCAB


def update(engine, model, seed, end):
    torch.manual_seed(seed)
    for last in (False, True):
        engine.backward(model(ids()).square().mean(), last=last)
    return end()


@pytest.mark.parametrize("settings", [{}, {"model__dtype": "float16"}, {"training__gradient_noise": 0.1},
                                      {"optimizer__lookahead_steps": 2}, {"optimizer__name": "muon"}])
def test_a_discarded_update_leaves_nothing_behind(settings):
    ends = []
    for discarding in (False, True):
        model = Layered()
        engine = PlainEngine(model, named(model), config_of(**settings), torch.device("cpu"))
        update(engine, model, 0, lambda engine=engine: engine.step(0.01))
        if discarding:
            before = engine.capture()
            update(engine, model, 1, engine.discard)
            assert all(parameter.grad is None for parameter in model.parameters())
            after = engine.capture()
            assert same(before.weights, after.weights)
            assert same(before.optimizer, after.optimizer)
            assert before.numbers == after.numbers
        norm = update(engine, model, 2, lambda engine=engine: engine.step(0.01))
        ends.append((norm, engine.capture()))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1].weights, ends[1][1].weights)
    assert same(ends[0][1].optimizer, ends[1][1].optimizer)


def test_going_back_to_an_earlier_state_draws_the_same_noise_again():
    model = Layered()
    engine = PlainEngine(model, named(model), config_of(training__gradient_noise=0.1), torch.device("cpu"))
    update(engine, model, 0, lambda: engine.step(0.01))
    kept = engine.capture()
    norms = []
    for _ in range(2):
        norms.append(update(engine, model, 1, lambda: engine.step(0.01)))
        with torch.no_grad():
            for name, parameter in named(model).items():
                parameter.copy_(kept.weights[name])
        engine.restore(kept)
    assert norms[0] == norms[1]
