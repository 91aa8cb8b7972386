"""Which optimizations work here and, when not, why and what to do: pure functions of collected `Facts`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from training.hardware import opstates
from training.records import Figure, Support

PACKAGES = ("torch", "deepspeed", "bitsandbytes", "flash-attn", "liger-kernel", "triton", "ninja")
CUDNN_PACKAGES = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
REQUIREMENTS = f"{sys.executable} -m pip install -r requirements.txt"
CC, CXX = ("gcc", "cc", "clang"), ("g++", "c++", "clang++")
TOOLS = (*CC, *CXX, "ninja", "deepspeed", "nvcc", "git")
NVME_BYTES_PER_S = 1e9
INSTALLER = "bash install_extreme_optimizations.sh --only"
COMPILER_ADVICE = "Install a compiler: `sudo apt install build-essential` or `sudo dnf install gcc-c++`."


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the answers depend on.

    `capability`: the weakest GPU's, None without one that torch can use. `trials`: support name -> "" when
    it was tried and worked, else the reason; a name that is absent was not tried. `tools`: name -> path.
    `built_ops`: compiled and cached; `installed_ops`: compiled with deepspeed's installation. `libaio`: its
    header was found. `cudnn`: its version, "" when unknown.
    """

    system: str
    cpu_flags: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    torch_cuda: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    built_ops: tuple[str, ...] = ()
    installed_ops: tuple[str, ...] = ()
    libaio: bool = False
    cudnn: str = ""
    trials: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    idle_gpus: tuple[str, ...] = ()
    gpu_advice: str = ""


def evaluate(facts: Facts) -> dict[str, Support]:
    """One answer per optimization, by its name."""
    return {name: rule(facts) for name, rule in RULES.items()}


def _cuda(facts: Facts) -> Support:
    if facts.capability:
        return Support(works=True, why=f"torch with CUDA {facts.torch_cuda or '?'}, compute capability "
                                       f"{_dotted(facts.capability)}")
    if not facts.idle_gpus:
        return Support(works=False, why="no NVIDIA GPU was found", what_to_do=facts.gpu_advice)
    build = f"torch {facts.packages.get('torch', '?')} "
    reason = "cannot open it" if facts.torch_cuda else "is a CPU build"
    return Support(works=False, why=f"there is {', '.join(facts.idle_gpus)}, but {build}{reason}",
                   what_to_do=facts.gpu_advice)


def _bf16(facts: Facts) -> Support:
    if facts.capability:
        if facts.capability >= (8, 0):
            return Support(works=True, why=f"compute capability {_dotted(facts.capability)} has bf16 units")
        return Support(works=False, why=f"compute capability {_dotted(facts.capability)} has no bf16 units "
                                        "(8.0 and newer have)", what_to_do="Use float16.")
    return _half_on_cpu(facts, "bf16", ("avx512_bf16", "amx_bf16"), "bf16")


def _fp16(facts: Facts) -> Support:
    if facts.capability:
        if facts.capability >= (7, 0):
            return Support(works=True, why=f"compute capability {_dotted(facts.capability)} has fp16 tensor "
                                           "cores")
        return Support(works=False, why=f"compute capability {_dotted(facts.capability)} has no fp16 tensor "
                                        "cores (7.0 and newer have)", what_to_do="Use float32.")
    return _half_on_cpu(facts, "fp16", ("avx512_fp16", "amx_fp16"), "asimdhp")


def _half_on_cpu(facts: Facts, kind: str, flags: tuple[str, ...], arm_flag: str) -> Support:
    """A 16-bit type on a CPU is judged by its measured matmul, else by the CPU's instructions."""
    fp32, half = (_value(facts, f"cpu.matmul_{name}") for name in ("fp32", kind))
    if fp32 and half:
        if half >= fp32:
            return Support(works=True, why=f"{kind} matmul is {half / fp32:.1f} times as fast as fp32 here")
        return Support(works=False, why=f"works but {fp32 / half:.0f} times slower than fp32 here",
                       what_to_do="Use float32 on this CPU.")
    native = sorted({*flags, arm_flag} & set(facts.cpu_flags))
    if native:
        return Support(works=True, why=f"the CPU has {', '.join(native)}; its speed was not measured")
    return Support(works=False, why=f"the CPU has no {kind} instructions ({', '.join(flags)})",
                   what_to_do="Use float32 on this CPU.")


def _flash_attention_2(facts: Facts) -> Support:
    if facts.capability is None:
        return Support(works=False, why="it runs on GPUs only", what_to_do="Nothing: SDPA serves.")
    if facts.capability < (8, 0):
        return Support(works=False, why=f"it needs compute capability 8.0 (Ampere); this GPU has "
                                        f"{_dotted(facts.capability)}", what_to_do="Nothing: SDPA serves.")
    if "flash-attn" not in facts.packages:
        return Support(works=False, why="the flash-attn package is not installed",
                       what_to_do=f"{INSTALLER} flash-attn")
    return _tried(facts, "flash_attention_2", f"flash-attn {facts.packages['flash-attn']}",
                  f"{INSTALLER} flash-attn")


def _sdpa(name: str, what: str, least: tuple[int, int] | None, instead: str) -> Callable[[Facts], Support]:
    """A rule for one of torch's attention kernels. `least`: the capability it needs, None where it also runs
    on CPUs; a GPU below it, and a CPU where it has no kernel, are told what serves `instead`."""
    def rule(facts: Facts) -> Support:
        if "torch" not in facts.packages:
            return Support(works=False, why="torch is not installed", what_to_do=REQUIREMENTS)
        if facts.capability is None and name not in ("sdpa_flash", "sdpa_math"):
            return Support(works=False, why=f"{what} runs on GPUs only", what_to_do=f"Nothing: {instead}.")
        if facts.capability and least and facts.capability < least:
            return Support(works=False, why=f"{what} needs compute capability {_dotted(least)}; this GPU has "
                                            f"{_dotted(facts.capability)}", what_to_do=f"Nothing: {instead}.")
        return _tried(facts, name, what, f"Nothing: {instead}.")
    return rule


def _cudnn(facts: Facts) -> Support:
    if facts.capability is None:
        return Support(works=False, why="it serves GPUs only", what_to_do="Nothing.")
    if not facts.cudnn:
        return Support(works=False, why="torch has no cuDNN here",
                       what_to_do="Install a CUDA build of torch.")
    return _tried(facts, "cudnn", f"cuDNN {facts.cudnn}", "Reinstall torch, whose wheel brings cuDNN.")


def _deepspeed(facts: Facts) -> Support:
    version = facts.packages.get("deepspeed")
    if not version:
        return Support(works=False, why="deepspeed is not installed",
                       what_to_do=REQUIREMENTS)
    if "deepspeed" not in facts.tools:
        return Support(works=False, why=f"deepspeed {version} is installed without its launcher",
                       what_to_do=f"{sys.executable} -m pip install --force-reinstall --no-deps "
                                  f"deepspeed=={version}")
    return Support(works=True, why=f"deepspeed {version}, launcher {facts.tools['deepspeed']}")


def _deepspeed_op(op: str) -> Callable[[Facts], Support]:
    def rule(facts: Facts) -> Support:
        if not (base := _deepspeed(facts)).works:
            return base
        return opstates.state(op, facts, _compiler(facts), f"{INSTALLER} deepspeed-ops")
    return rule


def _bitsandbytes(name: str) -> Callable[[Facts], Support]:
    def rule(facts: Facts) -> Support:
        version = facts.packages.get("bitsandbytes")
        if not version:
            return Support(works=False, why="bitsandbytes is not installed",
                           what_to_do=REQUIREMENTS)
        return _tried(facts, name, f"bitsandbytes {version}",
                      f"{sys.executable} -m pip install --force-reinstall --no-deps bitsandbytes=={version}")
    return rule


def _triton(facts: Facts) -> Support:
    if facts.capability is None:
        return Support(works=False, why="its kernels run on GPUs only", what_to_do="Nothing.")
    if "triton" not in facts.packages:
        return Support(works=False, why="triton is not installed", what_to_do=f"{INSTALLER} triton")
    if facts.capability < (7, 5):
        return Support(works=False, why=f"triton {facts.packages['triton']} needs compute capability 7.5; "
                                        f"this GPU has {_dotted(facts.capability)}", what_to_do="Nothing.")
    return _tried(facts, "triton", f"triton {facts.packages['triton']}", f"{INSTALLER} triton")


def _liger(facts: Facts) -> Support:
    if not (base := _triton(facts)).works:
        return Support(works=False, why=f"it is built on triton: {base.why}", what_to_do=base.what_to_do)
    if "liger-kernel" not in facts.packages:
        return Support(works=False, why="liger-kernel is not installed",
                       what_to_do=f"{INSTALLER} liger-kernel")
    return _tried(facts, "liger", f"liger-kernel {facts.packages['liger-kernel']}",
                  f"{INSTALLER} liger-kernel")


def _compile(facts: Facts) -> Support:
    if missing := missing_compiler(facts.tools):
        return Support(works=False, why=f"torch.compile needs a compiler and {missing}",
                       what_to_do=COMPILER_ADVICE)
    if facts.capability and not _triton(facts).works:
        return Support(works=False, why=f"on a GPU torch.compile needs triton: {_triton(facts).why}",
                       what_to_do=f"{INSTALLER} triton")
    if facts.trials.get("triton") == "":
        return Support(works=True, why="torch.compile compiled a kernel here")
    return Support(works=True, why="what torch.compile needs is here; a compilation was not tried (it takes "
                                   "10 s and more)")


def _nvme(facts: Facts) -> Support:
    figure = facts.figures.get("disk.write")
    if figure is None or figure.value is None:
        reason = figure.method if figure else "the disk's write speed was not measured"
        return Support(works=False, why=reason, what_to_do="Run `elite_train.py profile`.")
    speed = f"the run's disk writes {figure.value / 1e9:.2f} GB/s with fsync"
    if figure.value < NVME_BYTES_PER_S:
        return Support(works=False, why=f"{speed}; streaming to disk needs {NVME_BYTES_PER_S / 1e9:.0f} GB/s",
                       what_to_do="Put --output on a faster disk (NVMe).")
    return Support(works=True, why=speed)


def _compiler(facts: Facts) -> Support:
    if missing := missing_compiler(facts.tools):
        return Support(works=False, why=missing, what_to_do=COMPILER_ADVICE)
    cxx = next(facts.tools[name] for name in CXX if name in facts.tools)
    if "ninja" not in facts.tools:
        return Support(works=False, why=f"{cxx} is here but ninja is not", what_to_do=f"{INSTALLER} ninja")
    return Support(works=True, why=f"{cxx} and {facts.tools['ninja']}")


def missing_compiler(tools: Mapping[str, str]) -> str:
    """Which compiler is missing, in words; "" when there are both.

    >>> missing_compiler({"gcc": "/usr/bin/gcc"})
    'no C++ compiler was found'
    """
    for language, names in (("C++", CXX), ("C", CC)):
        if not any(name in tools for name in names):
            return f"no {language} compiler was found"
    return ""


RULES: dict[str, Callable[[Facts], Support]] = {
    "cuda": _cuda, "bf16": _bf16, "fp16": _fp16, "flash_attention_2": _flash_attention_2,
    "sdpa_flash": _sdpa("sdpa_flash", "torch's own flash kernel", (8, 0),
                        "SDPA takes its memory-efficient kernel"),
    "sdpa_efficient": _sdpa("sdpa_efficient", "torch's memory-efficient kernel", (5, 0),
                            "SDPA takes another kernel"),
    "sdpa_cudnn": _sdpa("sdpa_cudnn", "cuDNN's attention", (8, 0), "SDPA takes another kernel"),
    "sdpa_math": _sdpa("sdpa_math", "torch's plain attention", None, "SDPA takes another kernel"),
    "cudnn": _cudnn, "deepspeed": _deepspeed,
    **{opstates.support_name(op): _deepspeed_op(op) for op in opstates.NAMES},
    "bitsandbytes_4bit": _bitsandbytes("bitsandbytes_4bit"),
    "bitsandbytes_8bit": _bitsandbytes("bitsandbytes_8bit"),
    "triton": _triton, "liger": _liger, "compile": _compile, "nvme": _nvme, "compiler": _compiler,
}


def _tried(facts: Facts, name: str, what: str, what_to_do: str) -> Support:
    answer = facts.trials.get(name)
    if answer is None:
        return Support(works=True, why=f"{what}; not tried")
    if answer:
        return Support(works=False, why=f"{what} was tried and failed: {answer}", what_to_do=what_to_do)
    return Support(works=True, why=f"{what}, tried on tiny tensors")


def _value(facts: Facts, name: str) -> float | None:
    figure = facts.figures.get(name)
    return figure.value if figure else None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def installed_packages(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that this interpreter finds, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def found_tools(names: tuple[str, ...] = TOOLS) -> dict[str, str]:
    """Paths of those programs, in the interpreter's own folder first, then on PATH."""
    beside = str(Path(sys.executable).parent)
    search = os.pathsep.join((beside, os.environ.get("PATH", "")))
    return {name: path for name in names if (path := shutil.which(name, path=search))}


def torch_cuda_version() -> str:
    """The CUDA version torch was built for, "" for a CPU build or no torch; read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else ""


def op_cache(torch_cuda: str) -> Path:
    """The folder where torch and DeepSpeed keep compiled ops for this Python and this torch."""
    if setting := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(setting)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = f"cu{torch_cuda.replace('.', '')}" if torch_cuda else "cpu"
    version = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return cache / "torch_extensions" / f"{version}_{kind}"


def built_ops(cache: Path) -> tuple[str, ...]:
    """The ops whose compiled library lies in the cache."""
    return tuple(sorted(library.parent.name for library in cache.glob("*/*.so")
                        if library.stem == library.parent.name))


def collect(*, cpu_flags: tuple[str, ...] = (), capability: tuple[int, int] | None = None,
            trials: dict[str, str] | None = None, figures: dict[str, Figure] | None = None,
            idle_gpus: tuple[str, ...] = (), gpu_advice: str = "", cudnn: str = "") -> Facts:
    """The facts of this interpreter and machine, added to what was measured. Imports no torch."""
    cuda = torch_cuda_version()
    return Facts(system=platform.system(), cpu_flags=cpu_flags, capability=capability, torch_cuda=cuda,
                 packages=installed_packages(), tools=found_tools(), built_ops=built_ops(op_cache(cuda)),
                 installed_ops=opstates.installed_ops(), libaio=opstates.libaio(),
                 cudnn=cudnn or next(iter(installed_packages(CUDNN_PACKAGES).values()), ""),
                 trials=trials or {}, figures=figures or {}, idle_gpus=idle_gpus, gpu_advice=gpu_advice)
