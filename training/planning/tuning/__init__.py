"""What makes a run fast and steady on its machine: batch, rate, precision, devices, allocator, warm-up."""

from training.planning.tuning.advanced import AdvancedOptimizer as AdvancedOptimizer
from training.planning.tuning.ultra import UltraAdvancedOptimizer as UltraAdvancedOptimizer
