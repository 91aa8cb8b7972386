"""How the trainer is started: its command line and environment (pure), a free port, the subprocess."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import CannotWrite, MissingInput
from training.manager import watchdog
from training.manager.allocators import allocator_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "model_trainer_unified.py"
# Left over from another launcher they would tell plain Python that it is one rank of several.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
                   "MASTER_ADDR", "MASTER_PORT")
# Asks the trainer to stop as on SIGTERM when its parent process is another one than at its start.
WATCH_PARENT = "ELITE_WATCH_PARENT"


def command(config: Mapping[str, Any], run_path: Path, python: str, *, script: Path = SCRIPT,
            arguments: Sequence[str] = (), port: int = 29500, devices: Sequence[str] = ()) -> list[str]:
    """The command line that starts the trainer on one run directory, with `arguments` before it.

    Plain Python on one device at `deepspeed.stage` 0, else DeepSpeed's launcher for one node, which sets the
    ranks' environment whatever they run. torch's own, `torch.distributed.run`, puts each rank in a session of
    its own (torch 2.13), where a signal to the trainer's process group does not reach it. DeepSpeed's
    `launch` module is called itself, not through `deepspeed`/`runner`: that layer imports DeepSpeed a second
    time (ranks start after 6.7 s instead of 3.2 s on 2 cores), exits 0 when its child dies of a signal, and
    reads a host file. `devices` are the values for CUDA_VISIBLE_DEVICES, one per rank (see `device_ids`).
    """
    trainer = [str(script), *arguments, "--run-dir", str(run_path)]
    if config["deepspeed.stage"] == 0 and config["device.count"] == 1:
        return [python, *trainer]
    return [python, *_isolation(), "-m", "deepspeed.launcher.launch",
            f"--world_info={_world_info(devices or device_ids(config, {}))}",
            "--master_addr=127.0.0.1", f"--master_port={port}", "--log_level=warning", *trainer]


def _isolation(version: tuple[int, ...] = sys.version_info[:2]) -> list[str]:
    # `-m` puts the working directory first on the module path, and that may be the scanned repository.
    # PYTHONSAFEPATH prevents it from 3.11 on.
    return [] if version >= (3, 11) else ["-I"]


def _world_info(devices: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps({"localhost": list(devices)}).encode()).decode()


def device_ids(config: Mapping[str, Any], base_env: Mapping[str, str]) -> list[str]:
    """One entry of CUDA_VISIBLE_DEVICES per rank, within what `base_env` makes visible.

    Indices are positions there, in CUDA's own order, as they were when the machine was measured. DeepSpeed's
    launcher sets the variable for CPU ranks too; -1 hides every GPU from them.
    Raises MissingInput when fewer devices are visible than `device.count` or `device.gpus` needs.
    """
    count = config["device.count"]
    if config["device.kind"] == "cpu":
        return ["-1"] * count
    named = config["device.gpus"].split(",") if config["device.gpus"] else range(count)
    indices = [int(index) for index in named]
    if "CUDA_VISIBLE_DEVICES" not in base_env:
        return [str(index) for index in indices]
    visible = [name.strip() for name in base_env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    needed = max(indices) + 1
    if len(visible) < needed:
        raise MissingInput(f"The run needs {needed} GPUs and CUDA_VISIBLE_DEVICES="
                           f"{base_env['CUDA_VISIBLE_DEVICES']} shows {len(visible)}; name {needed} there.")
    return [visible[index] for index in indices]


def environment(config: Mapping[str, Any], base_env: Mapping[str, str], *, python: str = sys.executable,
                cores: int | None = None) -> dict[str, str]:
    """The trainer's environment. What the user has set for threads or the allocator stays."""
    env = {name: value for name, value in base_env.items() if name not in _RANK_VARIABLES}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1",
            "TOKENIZERS_PARALLELISM": "false", watchdog.VARIABLE: "0", WATCH_PARENT: "1",
            # ninja, which DeepSpeed calls to build an op, lies beside the interpreter.
            "PATH": os.pathsep.join([str(Path(python).parent), base_env.get("PATH", os.defpath)]),
            "DS_ACCELERATOR": config["device.kind"]}
    if config["device.threads"]:
        env["OMP_NUM_THREADS"] = str(config["device.threads"])
    else:
        cores = cores or len(os.sched_getaffinity(0))
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // config["device.count"])))
    if config["device.kind"] == "cpu":
        # Spinning threads turn a busy neighbour into a step 17 times as long; passive ones cost nothing idle.
        env.setdefault("OMP_WAIT_POLICY", "passive")
        env["CUDA_VISIBLE_DEVICES"] = ""
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    elif config["device.gpus"]:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(device_ids(config, base_env))
    return env | allocator_environment(config, base_env)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(argv: Sequence[str], env: Mapping[str, str], log_path: Path, lock_handle: int
          ) -> tuple[subprocess.Popen[bytes], int]:
    """Start the trainer in its own session, output appended to `log_path`, the lock inherited.

    Returns the process and the write end of its standard input, to be kept open while it may live.
    Raises CannotWrite when the log cannot be opened, MissingInput when the program cannot be started.
    """
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotWrite(f"Cannot write {log_path}: {error.strerror}.") from error
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(argv, env=dict(env), stdin=read_end, stdout=log, stderr=log,
                                   start_new_session=True, pass_fds=(lock_handle,),
                                   preexec_fn=watchdog.die_with_parent)
    except OSError as error:
        os.close(write_end)
        raise MissingInput(f"Cannot start {argv[0]}: {error.strerror}.") from error
    finally:
        os.close(log)
        os.close(read_end)
    return process, write_end
