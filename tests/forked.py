"""Ranks as forks of one process that has imported what they need: seconds of imports once, not per rank.

`run` forks from the calling process. `server()` is a process of its own for that, one for each process of
tests, with torch, transformers, DeepSpeed and the trainer imported; `Server.start` forks ranks from it.
"""

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from training.model_trainer_unified import leave  # noqa: E402

TRAINER = ROOT / "training" / "model_trainer_unified.py"
PATIENCE_S = 300
PRELOADED = ("torch", "deepspeed", "transformers.models.qwen2.modeling_qwen2", "peft", "safetensors.torch",
             "transformers.models.llama.modeling_llama", "training.trainer.phases", "training.trainer.zero",
             "training.trainer.session", "training.longcontext")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(ranks, work, *arguments):
    """Call `work` in as many forks, each with a rank's environment; exits with 1 when one of them fails."""
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                   "GLOO_SOCKET_IFNAME": "lo"}
    left = {_fork(rank, work, arguments) for rank in range(ranks)}
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _fork(rank, work, arguments):
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    _leave_after(functools.partial(work, *arguments))
    return 0


def _leave_after(work):
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(code if isinstance(code, int) else 0)


class Job:
    """Ranks under way. `pids`: by rank; `log`: what all of them print."""

    def __init__(self, server, pids, log):
        self.server, self.pids, self.log = server, pids, log

    def poll(self):
        """Exit codes by rank, below 0 for a signal; None for one that still runs."""
        self.server.read(0)
        return [self.server.ended.get(pid) for pid in self.pids]

    def wait(self, timeout=PATIENCE_S):
        """Exit codes by rank. Raises TimeoutError after killing what is left."""
        limit = time.monotonic() + timeout
        while None in (codes := self.poll()):
            if time.monotonic() > limit:
                self.kill()
                raise TimeoutError(f"ranks {self.pids} still run after {timeout} s: {self.text()[-3000:]}")
            self.server.read(0.2)
        return codes

    def kill(self, number=signal.SIGKILL):
        """Signal every rank that still runs."""
        for pid, code in zip(self.pids, self.poll(), strict=True):
            if code is None:
                os.kill(pid, number)

    def text(self):
        """What was printed; nothing before a rank opened the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Process:
    """One forked process with the methods of a Popen that tests use; `args` are its arguments."""

    def __init__(self, job, args):
        self.job, self.args, self.pid = job, args, job.pids[0]

    @property
    def returncode(self):
        return self.job.poll()[0]

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        self.job.kill(number)

    def kill(self):
        self.job.kill()

    def communicate(self, timeout=PATIENCE_S):
        """(what it printed, None), at its end."""
        self.job.wait(timeout)
        return self.job.text(), None


def trainer(run, log, environment=None):
    """The training subprocess on a run directory, forked."""
    arguments = ["--run-dir", str(run)]
    return Process(server().start(TRAINER, log, {"arguments": arguments}, environment=environment), arguments)


class Server:
    """A process that forks ranks."""

    def __init__(self):
        own, other = socket.socketpair()
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, str(other.fileno())], env=environment,
                                        pass_fds=(other.fileno(),), start_new_session=True)
        other.close()
        self.socket, self.text, self.started, self.ended = own, b"", [], {}
        atexit.register(self.close)

    def start(self, script, log, arguments, ranks=0, environment=None):
        """Fork `ranks` processes, each with a rank's environment, that call `main(**arguments)` of a script,
        in a process group of their own; 0: one process that is no rank."""
        given = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        given |= {"DS_ACCELERATOR": "cpu", **(environment or {})}
        if ranks:
            given |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                      "GLOO_SOCKET_IFNAME": "lo"}
        order = {"script": str(script), "log": str(log), "ranks": ranks or 1, "environment": given,
                 "arguments": arguments}
        self.socket.sendall(json.dumps(order).encode() + b"\n")
        while not self.started:
            self.read(PATIENCE_S)
        return Job(self, self.started.pop(), Path(log))

    def run(self, script, log, arguments, ranks=0, environment=None):
        """The same to the end; fails with what was printed unless every process ended with 0."""
        job = self.start(script, log, arguments, ranks, environment)
        assert not any(job.wait()), job.text()[-4000:]

    def read(self, timeout):
        """Take in what the server told."""
        if not select.select([self.socket], [], [], timeout)[0]:
            return
        part = self.socket.recv(1 << 16)
        assert part, "the process that forks ranks has ended"
        *lines, self.text = (self.text + part).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "started" in told:
                self.started.append(told["started"])
            else:
                self.ended[told["ended"]] = told["code"]

    def close(self):
        self.socket.close()
        self.process.wait()


@functools.cache
def server():
    """The one of this process of tests."""
    return Server()


def serve(descriptor):
    """Fork what is asked for over a socket, and tell what ended, until the socket is closed."""
    for name in PRELOADED:
        __import__(name)
    link, running, text = socket.socket(fileno=descriptor), set(), b""
    while True:
        if select.select([link], [], [], 0.02 if running else None)[0]:
            part = link.recv(1 << 16)
            if not part:
                break
            *lines, text = (text + part).split(b"\n")
            for line in lines:
                pids = _ranks(json.loads(line), link)
                running |= set(pids)
                link.sendall(json.dumps({"started": pids}).encode() + b"\n")
        while running and (found := os.waitpid(-1, os.WNOHANG))[0]:
            running.discard(found[0])
            told = {"ended": found[0], "code": os.waitstatus_to_exitcode(found[1])}
            link.sendall(json.dumps(told).encode() + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _ranks(order, link):
    pids = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if not pid:
            link.close()
            _become(order, rank, pids[0] if pids else 0)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _become(order, rank, group):
    os.setpgid(0, group)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(order["environment"])
    if "WORLD_SIZE" in os.environ:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    _leave_after(lambda: runpy.run_path(order["script"], run_name="forked")["main"](**order["arguments"]))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
