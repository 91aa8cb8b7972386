"""MLPs in tiles: the same results, and a forward that somebody else put on the module is there again."""

import torch
from torch import nn

from training.longcontext.tiles import tiled


def test_tiles_give_the_whole_modules_output_and_gradients():
    module = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    x = torch.randn(2, 7, 6)
    expected = module(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    with tiled([module], 3):
        found = module(x.clone().requires_grad_())
        grads = torch.autograd.grad(found.square().sum(), list(module.parameters()))
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, wanted, strict=True))


def test_a_forward_of_somebody_else_is_used_and_put_back():
    module = nn.Linear(4, 4)
    calls = []
    plain = module.forward
    module.forward = lambda x: calls.append(len(x)) or plain(x)
    own = module.forward
    with tiled([module], 2):
        module(torch.randn(1, 5, 4))
    assert calls
    assert module.forward is own
    del module.forward
    with tiled([module], 2):
        pass
    assert "forward" not in module.__dict__
