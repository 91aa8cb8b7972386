"""Optimizations that are tried, not guessed: each trial runs the real thing once on tiny tensors.

A trial returns "" when it worked, else the reason in one line. `torch` is passed in.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

Trial = Callable[[Any, str], str]


def attempt(trial: Trial, torch: Any, device: str) -> str:
    """Run one trial; whatever it raises or prints becomes its answer, never an end of the probe."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return trial(torch, device)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def bitsandbytes(torch: Any) -> Any:
    """Import bitsandbytes without torch's compiler, which its fallback kernels ask for by a decorator and
    these trials do not use: 3.4 s instead of 5.7 s for the first trial on two cores."""
    real = torch.compile
    torch.compile = lambda function=None, **_: function if function else (lambda inner: inner)
    try:
        import bitsandbytes as library
    finally:
        torch.compile = real
    return library


def bitsandbytes_4bit(torch: Any, device: str) -> str:
    """One NF4 linear layer with double quantization, forward and backward, near the unquantized result."""
    library = bitsandbytes(torch)
    layer = library.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4",
                                       compress_statistics=True)
    weight = layer.weight.detach().clone().to(device)
    layer = layer.to(device)
    x = torch.randn(8, 128, device=device, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    exact = x.detach() @ weight.T
    error = float((out.detach() - exact).norm() / exact.norm())
    if layer.weight.dtype != torch.uint8:
        return f"the weight was not quantized, it is {layer.weight.dtype}"
    # NF4's own error on normal weights is near 0.09; a broken kernel gives 1 or more.
    return "" if error < 0.3 and bool(x.grad.isfinite().all()) else f"the NF4 result is {error:.0%} off"


def bitsandbytes_8bit(torch: Any, device: str) -> str:
    """One Adam8bit step on a tensor large enough to be kept in 8 bit (4,096 elements or more)."""
    library = bitsandbytes(torch)
    parameter = torch.nn.Parameter(torch.ones(128, 128, device=device))
    optimizer = library.optim.Adam8bit([parameter], lr=0.01)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]["state1"]
    if state.dtype != torch.uint8:
        return f"the optimizer's state is {state.dtype}, not 8 bit"
    moved = float((1 - parameter).abs().mean())
    return "" if 0.005 < moved < 0.02 else f"a step of 0.01 moved the weights by {moved:.4f}"


def sdpa(kind: str) -> Trial:
    """A trial of one SDPA kernel alone (`kind`: torch's SDPBackend name): causal, forward and backward, near
    the formula written out."""
    def trial(torch: Any, device: str) -> str:
        dtype = torch.float32 if device == "cpu" else torch.float16
        q, k, v = (torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
                   for _ in range(3))
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kind)):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.sum().backward()
        later = torch.ones(64, 64, dtype=torch.bool, device=device).triu(1)
        plain_q, plain_k, plain_v = (one.detach().float() for one in (q, k, v))
        scores = (plain_q @ plain_k.transpose(-1, -2) / 8).masked_fill(later, -torch.inf)
        error = float((out.detach().float() - scores.softmax(-1) @ plain_v).abs().max())
        if error > 0.02:
            return f"its result is {error:.2g} off"
        return "" if bool(q.grad.isfinite().all()) else "the gradient is not finite"
    return trial


def cudnn(torch: Any, device: str) -> str:
    """One convolution, which torch gives to cuDNN on a GPU."""
    if not torch.backends.cudnn.is_available():
        return "torch was built without it"
    x = torch.randn(1, 2, 8, 8, device=device)
    with torch.backends.cudnn.flags(enabled=True):
        out = torch.nn.functional.conv2d(x, torch.ones(1, 2, 3, 3, device=device))
    exact = x.cpu().double().unfold(2, 3, 1).unfold(3, 3, 1).sum((1, 4, 5))
    # TF32 rounds inputs to 10 bits: 18 terms of size 1 are then within 0.02.
    return "" if float((out[:, 0].cpu().double() - exact).abs().max()) < 0.05 else "its convolution is wrong"


def flash_attention_2(torch: Any, device: str) -> str:
    """The flash-attn wheel's own kernel, forward and backward; a wheel for another torch fails to import."""
    from flash_attn import flash_attn_func

    q, k, v = (torch.randn(1, 64, 2, 64, device=device, dtype=torch.float16, requires_grad=True)
               for _ in range(3))
    flash_attn_func(q, k, v, causal=True).sum().backward()
    return "" if bool(q.grad.isfinite().all()) else "the gradient is not finite"


def liger(torch: Any, device: str) -> str:
    """Liger's RMSNorm kernel, forward and backward; it is compiled by Triton."""
    from liger_kernel.transformers import LigerRMSNorm

    norm = LigerRMSNorm(64).to(device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    norm(x).sum().backward()
    return "" if bool(x.grad.isfinite().all()) else "the gradient is not finite"


def triton(torch: Any, device: str) -> str:
    """One kernel that torch.compile writes in Triton, compiled and compared with plain torch."""
    x = torch.arange(64.0, device=device)
    out = torch.compile(lambda values: values * 2 + 1)(x)
    return "" if bool(torch.equal(out, x * 2 + 1)) else "the compiled kernel gives another result"


SDPA = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION",
        "sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_math": "MATH"}
ON_CPU = ("sdpa_flash", "sdpa_math")


def run_all(torch: Any, device: str, installed: Collection[str], compiler: bool = False) -> dict[str, str]:
    """Every trial whose package is installed and whose device is here, by support name.

    `compiler`: there is a C compiler, which Triton needs; its trial takes some ten seconds, on a GPU only.
    """
    chosen: dict[str, Trial] = {name: sdpa(kind) for name, kind in SDPA.items()
                                if device != "cpu" or name in ON_CPU}
    if "bitsandbytes" in installed:
        chosen |= {"bitsandbytes_4bit": bitsandbytes_4bit, "bitsandbytes_8bit": bitsandbytes_8bit}
    if device != "cpu":
        chosen["cudnn"] = cudnn
        packages = {"flash-attn": ("flash_attention_2", flash_attention_2), "liger-kernel": ("liger", liger)}
        chosen |= {name: trial for package, (name, trial) in packages.items() if package in installed}
        if "triton" in installed and compiler:
            chosen["triton"] = triton
    return {name: attempt(trial, torch, device) for name, trial in chosen.items()}
