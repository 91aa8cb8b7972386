"""The training subprocess with a fault in it, which the environment names: ELITE_TEST_FAULT, as JSON.

    {"where": "loss", "step": 5, "batch": 1, "above": 2, "error": "CUDA error: out of memory"}

`where`: loss, evaluation, save, export, limit (RLIMIT_AS), stop (asks for one), disk (only measures it).
`above`: only while micro-batches are larger than that. A fault of save or export comes once in a run.
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training import model_trainer_unified

FAULT = json.loads(os.environ.get("ELITE_TEST_FAULT", "{}"))
ROOM_BYTES = 256 << 20
CLASSES = {"OutOfMemoryError": None, "MemoryError": MemoryError, "OSError": OSError, "ValueError": ValueError}


def raised():
    """The error of a text `Class: words`; without a known class a RuntimeError."""
    import torch

    kind, _, words = FAULT["error"].partition(": ")
    if kind == "OutOfMemoryError":
        return torch.OutOfMemoryError(words)
    return CLASSES[kind](words) if kind in CLASSES else RuntimeError(FAULT["error"])


def first(run):
    """Whether no process of this run came here before."""
    try:
        os.close(os.open(run.path / "faulted", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def use_up():
    """Ask for more than a limit of addresses leaves, of torch or of Python: the allocator's own error."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return torch.ones(1 << 30) if FAULT["error"] == "torch" else bytearray(1 << 30)


def arm_loss():
    from training.trainer import loop

    plain, batches = loop.Training.loss, {}

    def loss(training, batch):
        step = training.progress.step
        batches[step] = batches.get(step, -1) + 1
        here = step == FAULT["step"] and batches[step] == FAULT.get("batch", 0)
        if here and training.config["training.micro_batch"] > FAULT.get("above", 0):
            if FAULT["where"] == "stop":
                training.run.stop.write_text("SIGTERM")
            elif FAULT["where"] == "limit":
                use_up()
            else:
                raise raised()
        return plain(training, batch)
    loop.Training.loss = loss


def arm_evaluation():
    from training.trainer import evaluation

    plain = evaluation.evaluate

    def evaluate(model, store, config, *rest):
        if config["evaluation.completions"]:
            raise raised()
        return plain(model, store, config, *rest)
    evaluation.evaluate = evaluate


def arm_once(owner, name, run_of):
    plain = getattr(owner, name)

    def failing(*arguments, **named):
        if first(run_of(*arguments)):
            raise raised()
        return plain(*arguments, **named)
    setattr(owner, name, failing)


def arm_disk():
    """The most bytes in the run directory when a checkpoint is whole and no older one deleted yet."""
    from training.trainer import checkpoints

    plain = checkpoints._commit

    def commit(staging, final, facts):
        plain(staging, final, facts)
        held = sum(path.stat().st_size for path in final.parent.rglob("*") if path.is_file())
        most = final.parent / "most-bytes"
        most.write_text(str(max(held, int(most.read_text()) if most.exists() else 0)))
    checkpoints._commit = commit


def arm():
    from training.rundir import RunDirectory
    from training.trainer import export, loop

    where = FAULT.get("where", "")
    if where in ("loss", "stop", "limit"):
        arm_loss()
    elif where == "evaluation":
        arm_evaluation()
    elif where == "disk":
        arm_disk()
    elif where == "save":
        arm_once(loop.Training, "save", lambda training, *_: training.run)
    elif where == "export":
        arm_once(export, "export", lambda *given: RunDirectory(given[3]))


def main(arguments=None):
    arm()
    return model_trainer_unified.main(arguments)


if __name__ == "__main__":
    model_trainer_unified.leave(main())
