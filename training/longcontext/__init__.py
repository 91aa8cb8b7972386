"""The streamed step: exact training gradients of a Hugging Face causal LM, one layer and one chunk at a time.

A library of its own: it knows Transformers and PyTorch and nothing of ELITE. `StreamPolicy` and the formulas
of `policy` need no torch, so importing this package does not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.longcontext.errors import StoreFull, StreamError, Unsupported
from training.longcontext.policy import StreamPolicy

if TYPE_CHECKING:
    from training.longcontext.step import StreamedStep
    from training.longcontext.verification import Verdict, verify

__all__ = ["StoreFull", "StreamError", "StreamPolicy", "StreamedStep", "Unsupported", "Verdict", "verify"]
_HOMES = {"StreamedStep": "step", "verify": "verification", "Verdict": "verification"}


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
