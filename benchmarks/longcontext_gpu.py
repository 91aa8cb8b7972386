"""One streamed step of a real model's shape under a hard cap on device memory.

    python3 benchmarks/longcontext_gpu.py --cap-gib 8 --shape phi-2 --context 524288
    python3 benchmarks/longcontext_gpu.py --suite [--minutes 25]      the cases that matter first

Random weights of the real shapes, NF4 with LoRA on all linear layers, one whole step (forward and backward).
The cap is set with `set_per_process_memory_fraction`, so that a step which needs more fails. `--layers`
builds fewer decoder layers where a whole step would take too long: device memory per layer is the same, and
the row says so. Speed is compared with the attention kernel alone: its measured rate on blocks of the step's
own sizes gives the seconds that the step's attention would take with nothing else around it. FLOPs are
counted causally: 2 S^2 x heads x head dimension a forward, 2.5 times that a backward. Writes
benchmarks/results/longcontext-gpu-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "phi-2": {"type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
              "partial_rotary_factor": 0.4, "attention_dropout": 0.0, "resid_pdrop": 0.0},
    "qwen2.5-coder-0.5b": {"type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
                           "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                           "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2.5-coder-1.5b": {"type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
                           "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                           "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2.5-coder-7b": {"type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
                         "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                         "num_key_value_heads": 4},
    "llama-3.1-8b": {"type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}
# The worked example of phi-2 in 8 GiB: a large attention chunk, because 32 key heads are much to move per
# query, and small MLP tiles.
RING = {"inputs": "pinned", "pages": "pinned", "mlp_tokens": 8192, "loss_tokens": 512}
SUITE: list[dict[str, Any]] = [
    {"shape": "phi-2", "context": 524288, "cap_gib": 8, "asked_layers": 4,
     "policy": RING | {"chunk_tokens": 32768, "page_tokens": 16384}},
    {"shape": "llama-3.1-8b", "context": 131072, "cap_gib": 80, "asked_layers": 0,
     "policy": {"chunk_tokens": 16384, "page_tokens": 131072, "attention": "keep", "keys": "keep",
                "mlp_tokens": 8192}},
    {"shape": "llama-3.1-8b", "context": 262144, "cap_gib": 120, "asked_layers": 0,
     "policy": {"chunk_tokens": 16384, "page_tokens": 65536, "inputs": "pinned", "attention": "keep",
                "mlp_tokens": 8192}},
    {"shape": "llama-3.1-8b", "context": 524288, "cap_gib": 24, "asked_layers": 4,
     "policy": RING | {"pages": "device", "chunk_tokens": 16384, "page_tokens": 32768}},
    {"shape": "qwen2.5-coder-0.5b", "context": 1048576, "cap_gib": 12, "asked_layers": 2,
     "policy": RING | {"pages": "device", "chunk_tokens": 16384, "page_tokens": 65536}},
    {"shape": "qwen2.5-coder-0.5b", "context": 4194304, "cap_gib": 24, "asked_layers": 1,
     "policy": RING | {"chunk_tokens": 32768, "page_tokens": 65536}},
    {"shape": "phi-2", "context": 524288, "cap_gib": 8, "asked_layers": 0,
     "policy": RING | {"chunk_tokens": 32768, "page_tokens": 16384}},
]


def build(shape: str, layers: int, device: Any) -> Any:
    """A PEFT model of random NF4 weights (16 bit on a CPU, fp32 there), one linear layer on the device at a
    time.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("type"), **values, max_position_embeddings=1 << 23)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:config.num_hidden_layers]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.get_decoder().layers:
        quantize(layer, device, dtype)
    materialize(model, device, dtype)
    model.tie_weights()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model.to(device).train()


def quantize(layer: Any, device: Any, dtype: Any) -> None:
    """Replace a decoder layer's linear layers by NF4 ones of the same shape."""
    import bitsandbytes
    import torch

    for name, linear in list(layer.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        new = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                                         compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        weight = torch.randn(linear.weight.shape, dtype=dtype) * 0.02 if device.type == "cpu" else \
            torch.randn(linear.weight.shape, dtype=dtype, device=device).mul_(0.02)
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4",
                                                compress_statistics=True)
        parent = layer.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new.to(device))


def materialize(model: Any, device: Any, dtype: Any) -> None:
    """Embeddings, head, norms and biases, random; rotary frequencies as the model computes them."""
    import torch

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def measure(shape: str, context: int, cap_gib: float, asked_layers: int,
            policy: dict[str, Any]) -> dict[str, Any]:
    """One step in this process."""
    import torch

    from training.longcontext import StreamedStep, StreamPolicy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total), device)
    torch.manual_seed(0)
    model = build(shape, asked_layers, device)
    step = StreamedStep(model, StreamPolicy(**policy))
    ids = torch.randint(model.config.vocab_size, (1, context))
    warm = ids[:, :2 * policy["chunk_tokens"]] if context > 4 * policy["chunk_tokens"] else ids
    step(warm, warm).backward()
    model.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = step(ids, ids)
    value, forward_s = float(loss), time.perf_counter() - start
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    config = model.config
    flops = attention_flops(config, context, policy)
    pure = pure_seconds(config, context, policy, device)
    return {"seconds": seconds, "forward_s": forward_s, "loss": value, "layers": config.num_hidden_layers,
            "layers_of_shape": SHAPES[shape]["num_hidden_layers"],
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "attention_flops": flops, "attention_tflop_per_s": flops / seconds / 1e12,
            "pure_kernel_s": pure, "share_of_pure_kernel": pure / seconds}


def forwards(policy: dict[str, Any]) -> int:
    """How often a step runs the attention's forward."""
    return 1 if policy.get("attention") == "keep" else 2


def attention_flops(config: Any, context: int, policy: dict[str, Any]) -> float:
    """Of a whole step, causal."""
    width = config.num_attention_heads * (getattr(config, "head_dim", None)
                                          or config.hidden_size // config.num_attention_heads)
    return 2.0 * context**2 * width * config.num_hidden_layers * (forwards(policy) + 2.5)


def pure_seconds(config: Any, context: int, policy: dict[str, Any], device: Any) -> float:
    """Seconds of the step's attention at the kernel's own rate on a full block of the policy's size."""
    import torch

    from training.longcontext import kernels

    queries = min(policy["chunk_tokens"], context)
    keys = min(policy.get("page_tokens") or queries, context)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(1, config.num_attention_heads, queries, size, dtype=dtype, device=device)
    k = torch.randn(1, config.num_key_value_heads, keys, size, dtype=dtype, device=device)
    kernel, scale = kernels.choose(device, dtype, size), size**-0.5
    out, lse = kernels.forward(kernel, q, k, k, "full", scale)
    forward = timed(lambda: kernels.forward(kernel, q, k, k, "full", scale), device)
    backward = timed(lambda: kernels.backward(kernel, out, q, k, k, out, lse, "full", scale), device)
    pairs = context**2 / 2 / (queries * keys) * config.num_hidden_layers
    return pairs * (forwards(policy) * forward + backward)


def timed(work: Any, device: Any, repeats: int = 3) -> float:
    """The least seconds of some runs."""
    import torch

    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def run(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One case in a process of its own; a failure is a row too."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps(case)], env=environment,
                              text=True, capture_output=True, check=False, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return {**case, "error": f"not done in {seconds:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {**case, "error": said[-1][:300]}
    return {**case, **json.loads(done.stdout.splitlines()[-1])}


def result(row: dict[str, Any]) -> str:
    """What a row found, for people."""
    if "error" in row:
        return str(row["error"])
    peak = f"{row['reserved_bytes'] / GIB:.2f} GiB reserved" if row["reserved_bytes"] else "no device"
    return (f"{row['seconds']:.1f} s, {peak}, host {row['host_peak_bytes'] / GIB:.1f} GiB, "
            f"{row['attention_tflop_per_s']:.1f} TFLOP/s, "
            f"{row['share_of_pure_kernel']:.0%} of the kernel alone")


def line(row: dict[str, Any]) -> str:
    """A row for people, with its case."""
    layers = f", {row['asked_layers']} layers" if row["asked_layers"] else ""
    return f"{row['shape']:20} {row['context']:>9,} tokens{layers}, cap {row['cap_gib']:g} GiB: {result(row)}"


def record(rows: list[dict[str, Any]]) -> None:
    """The rows so far, so that an interrupted suite has lost nothing."""
    date = datetime.date.today().isoformat()
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results")) / f"longcontext-gpu-{date}.json"
    out.write_text(json.dumps({"date": date, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """One case, or the suite until its minutes are over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="phi-2")
    parser.add_argument("--context", type=int, default=524288)
    parser.add_argument("--cap-gib", type=float, default=8)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the shape has")
    parser.add_argument("--policy", default=json.dumps(SUITE[0]["policy"]), help="a StreamPolicy as JSON")
    parser.add_argument("--suite", action="store_true")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    one = {"shape": options.shape, "context": options.context, "cap_gib": options.cap_gib,
           "asked_layers": options.layers, "policy": json.loads(options.policy)}
    rows, end = [], time.monotonic() + options.minutes * 60
    for case in SUITE if options.suite else [one]:
        left = end - time.monotonic()
        rows.append(run(case, left) if left > 0 else {**case, "error": "not measured"})
        print(line(rows[-1]), flush=True)
        record(rows)


if __name__ == "__main__":
    main()
