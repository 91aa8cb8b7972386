"""Lookahead around any optimizer: slow weights that follow the fast ones every few updates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Lookahead(torch.optim.Optimizer):
    """After every `steps` updates of `inner`: slow += share * (fast - slow), then fast = slow.

    The parameters are the fast weights; `state[parameter]["slow"]` is a copy, 4 bytes a float32 parameter,
    made before the first update. The inner optimizer's state is left as it is at a move, as in the paper's
    language models. Between two moves the parameters are the fast ones, so a run whose number of updates is
    no multiple of `steps` ends with those. Source: arXiv:1907.08610, algorithm 1.
    """

    def __init__(self, inner: torch.optim.Optimizer, steps: int, share: float):
        super().__init__(inner.param_groups, {})  # the same dictionaries: a rate that is set here is inner's
        self.inner = inner
        self.steps = steps
        self.share = share
        self.updates = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of the fast weights, and after every `steps` of them a move of the slow ones."""
        for parameter in self._parameters():
            if "slow" not in self.state[parameter]:
                self.state[parameter]["slow"] = parameter.detach().clone()
        self.inner.step()
        self.updates += 1
        if self.updates % self.steps == 0:
            for parameter in self._parameters():
                slow = self.state[parameter]["slow"]
                slow.add_(parameter - slow, alpha=self.share)
                parameter.copy_(slow)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
