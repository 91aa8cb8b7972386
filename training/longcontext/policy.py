"""Where the parts of a streamed step live, and how large its pieces are.

No torch here: a planner reads this before anything heavy is imported. `costs.py` has the bytes and FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from training.longcontext.errors import StreamError

PLACES = ("device", "pinned", "pageable", "disk")
PAGE_PLACES = ("device", "pinned", "pageable")
ENCODINGS = ("exact", "int8", "int4")
QUANTIZATION_GROUP = 64
LEAST = {"chunk_tokens": 1, "page_tokens": 0, "loss_tokens": 1, "mlp_tokens": 0, "keep_every": 1}
ALLOWED = {"inputs": PLACES, "encoding": ENCODINGS, "pages": PAGE_PLACES, "keys": ("recompute", "keep"),
           "attention": ("recompute", "keep"), "weights": ("resident", "streamed")}


@dataclass(frozen=True, kw_only=True)
class StreamPolicy:
    """How one streamed step is carried out. All choices but `encoding` give the same gradients.

    `chunk_tokens`: queries of one call of a decoder layer.
    `page_tokens`: keys of one attention kernel call; 0 takes `chunk_tokens`.
    `loss_tokens`: positions whose logits exist at once.
    `mlp_tokens`: positions an MLP works on at once inside a chunk; 0 is the whole chunk.
    `inputs`: where layer inputs (and kept attention outputs, and the running gradient) are stored.
    `keep_every`: every k-th layer's input is kept, the others are recomputed from it.
    `encoding`: of kept inputs; "exact" keeps the model's own type, "int8" and "int4" are lossy.
    `pages`: where a layer's keys, values and their gradients live; off the device they stream in a ring.
    `attention`: "recompute" runs the attention forward again in the backward pass; "keep" stores its output
    and log-sum-exp with the inputs.
    `keys`: "recompute" rebuilds a layer's keys and values in the backward pass; "keep" stores them.
    `weights`: "resident", or "streamed": frozen weights of decoder layers stay on the host and visit the
    device one layer at a time.
    `directory`: of the input store on disk; empty is the system's temporary folder.
    `overlap`: copies run beside the computation and begin before they are needed; False makes each wait.
    """

    chunk_tokens: int = 4096
    page_tokens: int = 0
    loss_tokens: int = 1024
    mlp_tokens: int = 0
    inputs: str = "device"
    keep_every: int = 1
    encoding: str = "exact"
    pages: str = "device"
    attention: str = "recompute"
    keys: str = "recompute"
    weights: str = "resident"
    directory: str = ""
    overlap: bool = True

    def __post_init__(self) -> None:
        problems = [*self._sizes(), *self._words()]
        if problems:
            raise StreamError(" ".join(problems))

    def _sizes(self) -> list[str]:
        wrong = []
        for name, lowest in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                wrong.append(f"{name} is {value!r}; it must be a whole number of at least {lowest}.")
        return wrong

    def _words(self) -> list[str]:
        found = [f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(words)}."
                 for name, words in ALLOWED.items() if getattr(self, name) not in words]
        return found if isinstance(self.overlap, bool) else [
            *found, f"overlap is {self.overlap!r}; it must be true or false."]

    @property
    def keys_per_call(self) -> int:
        """Keys of one attention kernel call."""
        return self.page_tokens or self.chunk_tokens

    @property
    def exact(self) -> bool:
        """Whether the gradients equal the plain step's up to rounding."""
        return self.encoding == "exact"

    def describe(self) -> str:
        """The choices that differ from the defaults, in one line."""
        chosen = {field.name: getattr(self, field.name) for field in fields(self)
                  if getattr(self, field.name) != field.default}
        return ", ".join(f"{name}={value}" for name, value in chosen.items()) or "defaults"
