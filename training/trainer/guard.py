"""Tells a loss spike from noise: pure functions of the last losses, so that every rank judges alike.

OLMo-core's SkipStepOptimizer skips an update whose loss lies more than 6 deviations above the last 128;
PaLM (arXiv:2204.02311, section 5.1) went back about 100 steps and passed over 200 to 500 batches, after
which the spikes did not come again: they come from a state of the weights and some data together. Here the
first spike is skipped, and a second one in a row goes back to a checkpoint and on with other windows.

Losses are in nats per target token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# So many spikes in a row mean that the weights are to blame and not the windows: skipping helps no more.
IN_A_ROW = 2
# Without any checkpoint to go back to, as many end the run as updates that are not finite do.
IN_A_ROW_ALONE = 3
# A third time the cause is neither chance nor some windows.
ROLLBACKS = 2
# The least share of the window, and the least number, of losses that a deviation is taken from. The relative
# error of a deviation of n values is 1 / sqrt(2 n): an eighth at a quarter of 128, a quarter at 8.
LEAST_SHARE, LEAST = 0.25, 8
# On windows known by heart, or nearly the same ones, the last losses lie within some thousandths of each
# other, and any other window is then 6 deviations off. At 6 x 0.05 nats the text is e^0.3 = 1.35 times less
# likely per token than the mean; less than that is a harder window and does no harm.
LEAST_DEVIATION = 0.05


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss far above the last ones, in nats per target token. `values`: how many it is compared with."""

    loss: float
    mean: float
    deviation: float
    values: int

    def __str__(self) -> str:
        """
        >>> str(Spike(loss=4.0, mean=2.0, deviation=0.1, values=128))
        'loss 4.0000 is 20.0 deviations of 0.1000 above 2.0000, the mean of the last 128'
        """
        above = (self.loss - self.mean) / self.deviation
        return (f"loss {self.loss:.4f} is {above:.1f} deviations of {self.deviation:.4f} above "
                f"{self.mean:.4f}, the mean of the last {self.values}")


def judge(losses: Sequence[float], loss: float, sigma: float, window: int) -> Spike | None:
    """The spike that `loss` is after these `losses` of applied updates, or None.

    None, too, while there are too few of them, when `sigma` is 0, and for a loss that is not finite: such an
    update is skipped for its gradient.

    >>> print(judge([2.0, 2.2] * 8, 2.8, sigma=6.0, window=16))
    loss 2.8000 is 6.8 deviations of 0.1033 above 2.1000, the mean of the last 16
    >>> print(judge([2.0, 2.2] * 8, 2.7, sigma=6.0, window=16))
    None
    """
    last = [value for value in losses[-window:] if math.isfinite(value)]
    if not sigma or not math.isfinite(loss) or len(last) < max(LEAST, LEAST_SHARE * window):
        return None
    mean = math.fsum(last) / len(last)
    variance = math.fsum((value - mean) ** 2 for value in last) / (len(last) - 1)
    deviation = max(math.sqrt(variance), LEAST_DEVIATION)
    if loss <= mean + sigma * deviation:
        return None
    return Spike(loss=loss, mean=mean, deviation=deviation, values=len(last))


def remembered(losses: Sequence[float], loss: float, window: int) -> list[float]:
    """The last `window` finite losses with one more.

    >>> remembered([1.0, 2.0, 3.0], 4.0, window=3), remembered([1.0], float("nan"), window=3)
    ([2.0, 3.0, 4.0], [1.0])
    """
    return [*losses, loss][-window:] if math.isfinite(loss) else list(losses)


def hopeless(spike: Spike, step: int, rollbacks: int, rate: float, sigma: float) -> str:
    """Why the run ends at update `step`, and what to change."""
    why = (f"the run went back to a checkpoint {rollbacks} times before" if rollbacks else
           f"{IN_A_ROW_ALONE} updates in a row were such, with no checkpoint to go back to")
    return (f"The {spike} (update {step}), and {why}. Lower training.learning_rate (now {rate:g}), or raise "
            f"training.spike_sigma (now {sigma:g}; 0: never) if such losses belong to the data.")
