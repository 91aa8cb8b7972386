"""Each DeepSpeed op that a run can use: installed, compiled, to be compiled, or why it cannot be."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from training.records import Support

if TYPE_CHECKING:
    from training.hardware.support import Facts

NAMES = ("cpu_adam", "async_io", "deepspeed_shm_comm", "fused_adam")
LINUX_ONLY = ("async_io", "deepspeed_shm_comm")
# Built against CUDA's headers where torch has a GPU (deepspeed 0.19.8, op_builder/{async_io,fused_adam}.py).
NEEDS_NVCC = ("async_io", "fused_adam")
AIO_HEADERS = ("/usr/include", "/usr/local/include")
AIO_ADVICE = "Install libaio's headers: `sudo apt install libaio-dev` or `sudo dnf install libaio-devel`."


def support_name(op: str) -> str:
    """The op's name among the supports.

    >>> support_name("cpu_adam"), support_name("deepspeed_shm_comm")
    ('deepspeed_cpu_adam', 'deepspeed_shm_comm')
    """
    return op if op.startswith("deepspeed_") else f"deepspeed_{op}"


def state(op: str, facts: Facts, compiler: Support, build_advice: str) -> Support:
    """Whether one op can be used. `compiler`: the answer on compilers; `build_advice`: how to compile it."""
    if reason := _useless(op, facts):
        return Support(works=False, why=reason, what_to_do="Nothing.")
    if op in facts.installed_ops:
        return Support(works=True, why="installed with deepspeed")
    if op in facts.built_ops:
        return Support(works=True, why="compiled and cached")
    if op == "async_io" and not facts.libaio:
        return Support(works=False, why="it must be compiled, and libaio.h was not found",
                       what_to_do=AIO_ADVICE)
    if op in NEEDS_NVCC and facts.capability and "nvcc" not in facts.tools:
        return Support(works=False, why="it must be compiled, and nvcc was not found",
                       what_to_do=f"Install the CUDA toolkit {facts.torch_cuda}, which torch was built with.")
    if not compiler.works:
        return Support(works=False, why=f"it must be compiled, and {compiler.why}",
                       what_to_do=compiler.what_to_do)
    return Support(works=True, why="will be compiled on first use, about 80 s on two cores",
                   what_to_do=build_advice)


def _useless(op: str, facts: Facts) -> str:
    if op == "fused_adam" and facts.capability is None:
        return "its kernel runs on GPUs only; CPU Adam serves"
    if op == "deepspeed_shm_comm" and facts.capability:
        return "it serves ranks on CPUs; those on GPUs exchange through NCCL"
    if op in LINUX_ONLY and facts.system != "Linux":
        return f"it is for Linux; this is {facts.system}"
    return ""


def libaio() -> bool:
    """Whether libaio's header is in the compiler's usual folders or in one that CFLAGS or CPATH names."""
    named = re.findall(r"-I\s*(\S+)", os.environ.get("CFLAGS", ""))
    named += [part for part in os.environ.get("CPATH", "").split(os.pathsep) if part]
    return any((Path(folder) / "libaio.h").is_file() for folder in (*AIO_HEADERS, *named))


def installed_ops() -> tuple[str, ...]:
    """The ops that deepspeed's installation carries compiled (DS_BUILD_...=1), read without importing it."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.origin:
        return ()
    try:
        text = (Path(spec.origin).parent / "git_version_info_installed.py").read_text(encoding="utf-8")
        match = re.search(r"^installed_ops\s*=\s*(\{.*\})", text, re.MULTILINE)
        built = ast.literal_eval(match[1]) if match else {}
        return tuple(sorted(str(name) for name, is_built in built.items() if is_built))
    except (OSError, ValueError, SyntaxError, AttributeError):
        return ()
