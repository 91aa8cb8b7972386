"""Muon: directions are orthogonal, and both kinds of parameters move as torch's own optimizers move them."""

import pytest
import torch

from training.trainer.muon import Muon, orthogonalized


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_singular_values_come_near_one_and_the_directions_stay(shape):
    source = matrix(*shape)
    found = orthogonalized(source[None])[0]
    left, _, right = torch.linalg.svd(source, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    turned = left.T @ found @ right.T
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-4


def test_matrices_move_as_in_torchs_muon_up_to_its_bfloat16():
    first, second = (torch.nn.Parameter(matrix(32, 20)) for _ in range(2))
    ours = Muon([{"params": [first], "orthogonal": True, "weight_decay": 0.1}], lr=0.02)
    theirs = torch.optim.Muon([second], lr=0.02, weight_decay=0.1, momentum=0.95,
                              adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        first.grad, second.grad = (matrix(32, 20, seed=step + 1) for _ in range(2))
        ours.step()
        theirs.step()
    moved = (second - matrix(32, 20)).norm()
    assert (first - second).norm() < 0.02 * moved


def test_the_rest_moves_as_in_torchs_adamw():
    first, second = (torch.nn.Parameter(matrix(7)) for _ in range(2))
    ours = Muon([{"params": [first], "orthogonal": False, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    theirs = torch.optim.AdamW([second], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        first.grad, second.grad = (matrix(7, seed=step + 1) for _ in range(2))
        ours.step()
        theirs.step()
    assert torch.allclose(first, second, atol=1e-7)


def test_a_matrix_keeps_one_moment_and_the_rest_two():
    weight, bias = torch.nn.Parameter(matrix(6, 4)), torch.nn.Parameter(matrix(6))
    optimizer = Muon([{"params": [weight], "orthogonal": True}, {"params": [bias], "orthogonal": False}],
                     lr=0.1)
    weight.grad, bias.grad = matrix(6, 4), matrix(6)
    optimizer.step()
    assert set(optimizer.state[weight]) == {"momentum"}
    assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_only_matrices_are_orthogonalized():
    with pytest.raises(ValueError, match=r"only matrices are orthogonalized, not shape \(3,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))], "orthogonal": True}], lr=0.1)


def test_matrices_of_one_shape_move_together_as_each_does_alone():
    shapes = [(12, 8), (8, 12), (12, 8), (12, 8), (8, 8)]
    together, alone = ([torch.nn.Parameter(matrix(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
                       for _ in range(2))
    ours = Muon([{"params": together, "orthogonal": True}], lr=0.02)
    each = [Muon([{"params": [parameter], "orthogonal": True}], lr=0.02) for parameter in alone]
    for step in range(3):
        for index, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = other.grad = matrix(*one.shape, seed=100 * step + index)
        ours.step()
        for optimizer in each:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
