"""A console to draw on, and a machine and a plan to draw."""

import io
import re

from rich.console import Console

from training.console.theme import STYLES, Outlasting
from training.records import (
    Choice,
    Figure,
    Gpu,
    HardwareProfile,
    Limit,
    Memory,
    Plan,
    Support,
)


def paper(width=80):
    stream = io.StringIO()
    return Console(file=Outlasting(stream), theme=STYLES, highlight=False, width=width), stream


def text_of(draw, *values, width=80):
    console, stream = paper(width)
    draw(console, *values)
    text = stream.getvalue()
    assert max(map(len, text.split("\n"))) <= width
    return re.sub(r"\s+", " ", text)


PROFILE = HardwareProfile(
    name="a machine", source="measured", date="2026-11-20", system="Linux", cpu_name="AMD EPYC", cpu_cores=2,
    cpu_flags=("avx2", "sse"), ram_total_bytes=8 << 30, ram_available_bytes=6 << 30,
    gpus=(Gpu(index=0, name="NVIDIA GeForce RTX 2060", architecture="Turing", capability="7.5",
              total_bytes=6 << 30, free_bytes=5 << 30),),
    disk_path="/a/very/long/path/" + "x" * 60, disk_free_bytes=90 << 30,
    figures={"gpu0.matmul_fp16": Figure(value=3.6e13, unit="FLOP/s", method="torch matmul, n=4096", repeats=7,
                                        spread=0.04),
             "gpu0.attention_forward": Figure(value=None, unit="FLOP/s", method="no kernel")},
    supports={"bf16": Support(works=False, why="needs Ampere", what_to_do="Use float16."),
              "triton": Support(works=True, why="")})
PLAN = Plan(
    tier=2, context_tokens=8192, target_tokens=2048, base_model="phi-2", steps=120, step_s=2.5, total_s=300.0,
    choices={"model.base": Choice("microsoft/phi-2", "user", "asked for"),
             "lora.rank": Choice(32, "preset", "tier 2"),
             "training.seed": Choice(1, "preset", "not shown"),
             "training.micro_batch": Choice(4, "measured", "two steps took 1.1 GiB, and 5.0 GiB is free")},
    memory=Memory(device_bytes=5 << 30, host_bytes=2 << 30, disk_bytes=1 << 30,
                  terms={"weights": 2 << 30, "activations": 3 << 30, "nothing": 0}),
    limits={"device_memory": Limit(tier=2, why="tier 3 needs 7.1 GiB and 5.0 GiB is free"),
            "hours": Limit(tier=5, why="48 h granted")},
    notes=("RoPE is scaled by 4 (YaRN), because the context exceeds the model's own 2,048.",))
