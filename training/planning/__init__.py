"""Stage 2 of the chain: what to run on this machine."""

from training.planning.calculator import OptimalConfigCalculator

__all__ = ["OptimalConfigCalculator"]
