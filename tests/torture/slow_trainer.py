"""The real trainer with one place in it that takes long, as it may with a slow disk or a long context.

    python slow_trainer.py [--run-dir DIR ...]     the place and its seconds in SLOW_AT and SLOW_S

`REACHED` appears in the run directory when the place is entered for the first time in this process.
"""

import importlib
import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
REACHED = ".reached"
PLACES = {"import": None, "load": ("phases", "load"), "warm-up": ("device", "begin"),
          "train": ("phases", "causal_loss"), "save": ("checkpoints", "_commit"),
          "evaluate": ("evaluation", "evaluate"), "export": ("export", "export"),
          "crash": ("loop", "read_update")}


def main(arguments, at, seconds=60.0, skip=0):
    """`skip`: calls of the place that are as quick as ever."""
    run, calls = Path(arguments[arguments.index("--run-dir") + 1]), []

    def linger():
        calls.append(1)
        if len(calls) != skip + 1:
            return
        (run / REACHED).write_text(at)
        if at == "crash":
            raise RuntimeError("it broke")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
    if at == "import":
        slow_import("training.trainer.phases", linger)
    elif at:
        slow_call(*PLACES[at], linger)
    trainer = runpy.run_path(str(ROOT / "training" / "model_trainer_unified.py"), run_name="slow")
    return trainer["main"](arguments)


def slow_call(module, name, linger):
    """Let a function take long before it does its work."""
    module = importlib.import_module(f"training.trainer.{module}")
    work = getattr(module, name)

    def slow(*given, **more):
        linger()
        return work(*given, **more)
    setattr(module, name, slow)


def slow_import(name, linger):
    """Let the import of a module take long."""
    class Finder:
        def find_spec(self, wanted, path=None, target=None):
            if wanted == name:
                linger()

    parent, _, own = name.rpartition(".")
    if sys.modules.pop(name, None):
        delattr(sys.modules[parent], own)
    sys.meta_path.insert(0, Finder())


if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ.get("SLOW_AT", ""), float(os.environ.get("SLOW_S", "60")),
                int(os.environ.get("SLOW_SKIP", "0")))
    sys.stdout.flush()
    os._exit(code)
