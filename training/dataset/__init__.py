"""Stage 4: a repository becomes windows of tokens on disk."""

from training.dataset.generator import DatasetGenerator
from training.dataset.store import WindowStore

__all__ = ["DatasetGenerator", "WindowStore"]
