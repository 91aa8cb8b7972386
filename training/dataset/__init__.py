"""Stage 4: a repository becomes windows of tokens on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.dataset.generator import DatasetGenerator as DatasetGenerator
    from training.dataset.store import WindowStore as WindowStore

_PLACES = {"DatasetGenerator": "generator", "WindowStore": "store"}
__all__ = ["DatasetGenerator", "WindowStore"]


def __getattr__(name: str) -> Any:
    """Both classes on first use (PEP 562): the trainer reads the store and needs no parser."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"training.dataset.{_PLACES[name]}"), name)
