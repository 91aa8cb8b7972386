"""Optimizations that are tried, not guessed: each trial runs the real thing once on tiny tensors.

A trial returns "" when it worked, else the reason in one line. `torch` is passed in.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
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


def _bitsandbytes(torch: Any) -> Any:
    """Import bitsandbytes without torch's compiler, which its fallback kernels ask for by a decorator and
    these trials do not use: 3.4 s instead of 5.7 s for the first trial on two cores."""
    real = torch.compile
    torch.compile = lambda function=None, **_: function if function else (lambda inner: inner)
    try:
        import bitsandbytes
    finally:
        torch.compile = real
    return bitsandbytes


def bitsandbytes_4bit(torch: Any, device: str) -> str:
    """One NF4 linear layer with double quantization, forward and backward, near the unquantized result."""
    bitsandbytes = _bitsandbytes(torch)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4",
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
    bitsandbytes = _bitsandbytes(torch)
    parameter = torch.nn.Parameter(torch.ones(128, 128, device=device))
    optimizer = bitsandbytes.optim.Adam8bit([parameter], lr=0.01)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]["state1"]
    if state.dtype != torch.uint8:
        return f"the optimizer's state is {state.dtype}, not 8 bit"
    moved = float((1 - parameter).abs().mean())
    return "" if 0.005 < moved < 0.02 else f"a step of 0.01 moved the weights by {moved:.4f}"


def sdpa_flash(torch: Any, device: str) -> str:
    """Causal attention, forward and backward, with only the flash kernel allowed."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.sum().backward()
    return "" if bool(q.grad.isfinite().all()) else "the gradient is not finite"


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


def run_all(torch: Any, device: str, installed: dict[str, str]) -> dict[str, str]:
    """Every trial whose package is installed and whose device is here, by support name."""
    chosen: dict[str, Trial] = {"sdpa_flash": sdpa_flash}
    if "bitsandbytes" in installed:
        chosen |= {"bitsandbytes_4bit": bitsandbytes_4bit, "bitsandbytes_8bit": bitsandbytes_8bit}
    if device != "cpu" and "flash-attn" in installed:
        chosen["flash_attention_2"] = flash_attention_2
    if device != "cpu" and "liger-kernel" in installed:
        chosen["liger"] = liger
    return {name: attempt(trial, torch, device) for name, trial in chosen.items()}
