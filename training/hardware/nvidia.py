"""What NVIDIA's driver reports: `fetch_*` runs nvidia-smi, everything else is a pure function of its text."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.records import Gpu

MIB = 1 << 20
FIELDS = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version",
          "mig.mode.current")
# Drivers before 510 do not know compute_cap, before 450 not mig.mode.current.
OLD_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "driver_version")
WSL_BINARY = "/usr/lib/wsl/lib/nvidia-smi"
ARCHITECTURES = {(7, 0): "Volta", (7, 2): "Volta", (7, 5): "Turing", (8, 9): "Ada", (9, 0): "Hopper"}
BY_MAJOR = {3: "Kepler", 5: "Maxwell", 6: "Pascal", 7: "Volta", 8: "Ampere", 9: "Hopper",
            10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}
# For old drivers that do not tell the capability: first match wins.
NAMES = (("RTX 50", "12.0"), ("RTX 40", "8.9"), ("L40", "8.9"), ("L4", "8.9"), ("RTX 30", "8.6"),
         ("A100", "8.0"), ("H100", "9.0"), ("H200", "9.0"), ("B200", "10.0"), ("RTX 20", "7.5"),
         ("GTX 16", "7.5"), ("T4", "7.5"), ("V100", "7.0"), ("GTX 10", "6.1"), ("P100", "6.0"))
FAULTS = (
    ("version mismatch", "the driver was updated while its old kernel module is loaded",
     "Reboot the machine."),
    ("couldn't communicate", "the NVIDIA driver is not loaded",
     "Install or load the driver (`sudo modprobe nvidia`), or reboot after an update."),
    ("no devices were found", "the driver runs and finds no GPU",
     "Check that the GPU is seated, powered and passed to this container or virtual machine."),
    ("is lost", "the GPU has fallen off the bus", "Reboot the machine; check power and cooling."),
    ("insufficient permissions", "this user may not open the GPU", "Add the user to the `video` group."),
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one call of nvidia-smi gave. `code` None: it did not run or did not end; `text` says which."""

    code: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The driver's view. `problem` tells why `gpus` is empty or not to be trusted ("" when all is well).

    `installed`: there is an nvidia-smi. `notes`: what a reader of the numbers should know.
    """

    installed: bool
    gpus: tuple[Gpu, ...] = ()
    version: str = ""
    problem: str = ""
    what_to_do: str = ""
    notes: tuple[str, ...] = ()


def architecture(capability: str) -> str:
    """The architecture's name for a compute capability; `unknown` when it is not in the table.

    >>> [architecture(c) for c in ("7.5", "8.6", "8.9", "9.0", "12.0")]
    ['Turing', 'Ampere', 'Ada', 'Hopper', 'Blackwell']
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", capability.strip())
    if not match:
        return "unknown"
    major, minor = int(match[1]), int(match[2])
    return ARCHITECTURES.get((major, minor)) or BY_MAJOR.get(major, "unknown")


def capability_of(gpu: Gpu) -> tuple[int, int]:
    """A GPU's compute capability as numbers; (0, 0) when the driver does not tell it."""
    major, _, minor = gpu.capability.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def run_smi(arguments: list[str], timeout_s: float = 10.0) -> Reply:
    """Run nvidia-smi. A driver in trouble can hang it for minutes, hence the limit."""
    binary = shutil.which("nvidia-smi") or (WSL_BINARY if Path(WSL_BINARY).exists() else "")
    if not binary:
        return Reply(code=None, text="nvidia-smi: command not found")
    try:
        done = subprocess.run([binary, *arguments], capture_output=True, timeout=timeout_s, check=False,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Reply(code=None, text=f"nvidia-smi did not answer within {timeout_s:g} s")
    except OSError as error:
        return Reply(code=None, text=f"nvidia-smi cannot be run: {error.strerror}")
    text = (done.stdout or b"") + (done.stderr or b"")
    return Reply(code=done.returncode, text=text.decode("utf-8", "replace"))


def fetch(ask: Callable[[list[str]], Reply] = run_smi) -> Driver:
    """The GPUs as the driver reports them, MIG instances in place of a divided GPU. `ask` runs nvidia-smi."""
    fields: tuple[str, ...] = FIELDS
    reply = ask(_query(fields))
    if reply.code not in (0, None) and "not a valid field" in reply.text:
        fields = OLD_FIELDS
        reply = ask(_query(fields))
    driver = parse(reply, fields)
    if divided := {int(row["index"]) for row in rows(reply.text, fields) if _is_divided(row)}:
        return with_instances(driver, divided, ask(["-L"]).text, ask([]).text)
    return driver


def _query(fields: tuple[str, ...]) -> list[str]:
    return [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def rows(text: str, fields: tuple[str, ...] = FIELDS) -> list[dict[str, str]]:
    """The lines of a CSV reply as mappings; lines that are no data are left out."""
    found = []
    for values in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(values) == len(fields) and values[0].strip().isdigit():
            found.append(dict(zip(fields, (value.strip() for value in values), strict=True)))
    return found


def parse(reply: Reply, fields: tuple[str, ...] = FIELDS) -> Driver:
    """A `--query-gpu` reply as a Driver; errors become `problem` and `what_to_do`."""
    if reply.code is None and "not found" in reply.text:
        return Driver(installed=False, problem="no nvidia-smi, so no NVIDIA driver")
    if reply.code is None:
        return Driver(installed=True, problem=_one_line(reply.text),
                      what_to_do="Reboot; if it stays, reinstall the NVIDIA driver.")
    found = rows(reply.text, fields)
    if not found:
        return _fault(reply.text)
    notes = tuple(f"GPU {row['index']}: the driver tells no memory size (shared with the CPU)."
                  for row in found if _mib(row["memory.total"]) is None)
    return Driver(installed=True, gpus=tuple(_gpu(row) for row in found),
                  version=found[0]["driver_version"], notes=notes)


def _fault(text: str) -> Driver:
    for mark, problem, what_to_do in FAULTS:
        if mark in text.lower():
            return Driver(installed=True, problem=f"{problem} ({_one_line(text)})", what_to_do=what_to_do)
    return Driver(installed=True, problem=f"nvidia-smi answered: {_one_line(text) or 'nothing'}",
                  what_to_do="Run `nvidia-smi` by hand; reinstall the NVIDIA driver if it fails.")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160]


def _gpu(row: dict[str, str]) -> Gpu:
    capability = row.get("compute_cap", "")
    if not re.fullmatch(r"\d+\.\d+", capability):
        capability = next((known for mark, known in NAMES if mark in row["name"]), "")
    return Gpu(index=int(row["index"]), name=row["name"], architecture=architecture(capability),
               capability=capability, total_bytes=(_mib(row["memory.total"]) or 0) * MIB,
               free_bytes=(_mib(row["memory.free"]) or 0) * MIB)


def _mib(text: str) -> int | None:
    return int(float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _is_divided(row: dict[str, str]) -> bool:
    return row.get("mig.mode.current", "").lower() == "enabled"


def instances(text: str) -> dict[int, list[str]]:
    """The MIG devices per GPU index in `nvidia-smi -L`'s text, in its order, each by its profile (`3g.20gb`;
    `1c.3g.71gb` is a part of the cores of a 3g.71gb, all of whose memory it shares)."""
    found: dict[int, list[str]] = {}
    index = -1
    for line in text.splitlines():
        if match := re.match(r"GPU (\d+):", line):
            index = int(match[1])
        elif match := re.match(r"\s+MIG (\S+)\s+Device", line):
            found.setdefault(index, []).append(match[1])
    return found


def instance_memory(table: str) -> dict[tuple[int, int], tuple[int, int]]:
    """(GPU, MIG device) -> used and total bytes, from the `MIG devices` part of plain `nvidia-smi`."""
    row = re.compile(r"\|\s*(\d+)\s+\d+\s+\d+\s+(\d+)\s*\|\s*(\d+)MiB\s*/\s*(\d+)MiB")
    return {(int(gpu), int(device)): (int(used) * MIB, int(total) * MIB)
            for gpu, device, used, total in row.findall(table)}


def with_instances(driver: Driver, divided: set[int], listing: str, table: str) -> Driver:
    """The GPUs a process can use where those in `divided` are in MIG mode: the whole ones, else the first MIG
    device, since CUDA opens one in a process (pytorch/pytorch#102715).

    Its size is that of the table (a `1g.18gb` has 16,384 MiB); where there is none, nine tenths of the
    profile's. The full profile asks CUDA itself.
    """
    found, sizes = instances(listing), instance_memory(table)
    gpus = tuple(gpu for gpu in driver.gpus if gpu.index not in divided)
    usable = [gpu for gpu in driver.gpus if gpu.index in divided and gpu.index in found]
    told = tuple(_mig_note(index, found.get(index, []), bool(gpus)) for index in sorted(divided))
    notes = driver.notes + told
    if not gpus and not usable:
        return dataclasses.replace(driver, gpus=(), notes=notes,
                                   problem="every GPU is in MIG mode without an instance",
                                   what_to_do="Create a MIG instance or switch MIG off.")
    gpus = gpus or (_first_instance(usable[0], found[usable[0].index], sizes),)
    return dataclasses.replace(driver, gpus=gpus, notes=notes)


def _mig_note(index: int, profiles: list[str], beside_whole: bool) -> str:
    if not profiles:
        return (f"GPU {index} is in MIG mode without an instance, so it cannot be used. "
                "Create one (`nvidia-smi mig -cgi`) or switch MIG off.")
    used = "it is left out beside whole GPUs" if beside_whole else "a process uses one, the first"
    return (f"GPU {index} is divided by MIG into {len(profiles)} ({', '.join(profiles)}); {used} unless "
            "CUDA_VISIBLE_DEVICES names another by its UUID (`nvidia-smi -L`).")


def _first_instance(gpu: Gpu, profiles: list[str], sizes: dict[tuple[int, int], tuple[int, int]]) -> Gpu:
    match = re.search(r"\.(\d+)gb", profiles[0])
    guess = int(match[1]) * 1024 * MIB * 9 // 10 if match else 0
    used_bytes, total_bytes = sizes.get((gpu.index, 0), (0, guess))
    return dataclasses.replace(gpu, name=f"{gpu.name} MIG {profiles[0]}", total_bytes=total_bytes,
                               free_bytes=total_bytes - used_bytes)


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; CUDA stops at the first invalid entry.

    UUIDs cannot be matched here and leave all; the full profile asks CUDA itself.
    """
    if setting is None or setting.strip().upper().startswith(("GPU-", "MIG-")):
        return gpus
    by_index = {gpu.index: gpu for gpu in gpus}
    kept: list[Gpu] = []
    for part in setting.split(","):
        index = int(part) if part.strip().isdigit() else -1
        if index not in by_index:
            break
        kept.append(by_index[index])
    return tuple(kept)


def torch_index(driver_version: str, capability: str) -> str:
    """The PyTorch wheel index that fits this driver and GPU.

    CUDA 13 needs driver 580 and a Turing GPU or newer; CUDA 12.6 runs on drivers from 525 (NVIDIA's CUDA
    compatibility tables).
    """
    major = int(driver_version.split(".")[0]) if driver_version.split(".")[0].isdigit() else 0
    recent = not re.fullmatch(r"\d+\.\d+", capability) or float(capability) >= 7.5
    return "https://download.pytorch.org/whl/" + ("cu130" if major >= 580 and recent else "cu126")
