"""The structure of the house: who imports whom, how long things are, and what a start must not load."""

import ast
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from training.configuration import reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([ROOT / "elite_train.py", *(ROOT / "training").rglob("*.py")])
BASICS = {"records", "rundir", "settings", "errors", "keys", "texts"}
START = {"bootstrap", "setup_venv", "pipview"}
# Each room and the rooms it may import. `training.x` and `training.x.y` are both room x.
ARROWS = {
    "errors": set(),
    "records": {"errors"},
    "rundir": {"errors", "records"},
    "keys": set(),
    "texts": set(),
    "settings": {"errors", "keys", "texts"},
    "bootstrap": {"setup_venv"},
    "pipview": set(),
    "setup_venv": {"bootstrap", "pipview", "errors"},
    "curve": set(),
    "expectations": set(),
    "families": set(),
    "windows": {"families"},
    "shapes": BASICS | {"families", "windows"},
    "weights": BASICS,
    "models": BASICS | {"shapes", "weights"},
    "configuration": BASICS,
    "console": {"records", "rundir", "errors", "texts"},
    "hardware": BASICS,
    "dataset": BASICS | {"curve", "expectations"},
    "manager": BASICS | {"configuration"},
    "doctor": BASICS | {"hardware"},
    "planning": BASICS | {"curve", "expectations", "families", "models", "shapes", "weights", "longcontext"},
    "longcontext": set(),
    "trainer": BASICS | {"curve", "models", "shapes", "weights", "configuration", "dataset", "longcontext"},
    "ledger": BASICS | {"configuration", "dataset", "hardware", "manager", "models", "planning", "trainer"},
    "ledger_tables": BASICS | {"ledger", "planning"},
    "stream_tables": set(),
    "planner_tables": set(),
    "peer_tables": set(),
    "reliability_tables": set(),
    "documentation": BASICS | {"configuration", "hardware", "ledger", "models", "planning", "ledger_tables",
                               "planner_tables", "peer_tables", "reliability_tables",
                               "stream_tables"},
    "command": BASICS | {"models", "configuration", "console", "dataset", "hardware", "manager", "planning",
                         "weights"},
    "model_trainer_unified": BASICS | {"trainer", "configuration", "dataset", "models", "manager"},
}
# Of the dataset room the trainer reads the finished store only.
TRAINER_READS = {"training.dataset.store"}
# Of the streamed step the planner reads what needs no torch.
PLANNER_READS = {f"training.longcontext.{name}" for name in ("policy", "costs", "geometry", "errors")}
TORCH_ROOMS = {"trainer", "model_trainer_unified", "longcontext"}
TORCH_FILES = {"training/hardware/probe.py"}
NO_TORCH_FILES = {f"training/longcontext/{name}.py"
                  for name in ("__init__", "blocks", "policy", "costs", "geometry", "flops", "errors")}
HEAVY = {"torch", "transformers", "peft", "deepspeed", "bitsandbytes"}


def room_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if len(parts) > 1 else parts[0]


def imports(path, top_only=False):
    """The modules that a file imports, by full dotted name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "training":
                yield from (f"training.{alias.name}" for alias in node.names)
            else:
                yield node.module


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    if room in ("elite_train", "__init__"):
        return
    assert room in ARROWS, f"the room {room} has no row in ARROWS"
    met = {name.split(".")[1] for name in imports(path) if name.startswith("training.")}
    assert met - {room} <= ARROWS[room], f"{relative(path)} imports {sorted(met - {room} - ARROWS[room])}"
    if room == "trainer":
        read = {name for name in imports(path) if name.startswith("training.dataset")}
        assert read <= TRAINER_READS, f"{relative(path)} imports {sorted(read - TRAINER_READS)}"
    if room == "planning":
        read = {name for name in imports(path) if name.startswith("training.longcontext")}
        assert read <= PLANNER_READS, f"{relative(path)} imports {sorted(read - PLANNER_READS)}"


def test_nothing_imports_the_command_itself():
    assert [relative(path) for path in SOURCES if "elite_train" in set(imports(path))] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_heavy_libraries_are_imported_at_the_top_only_where_training_happens(path):
    if relative(path) not in NO_TORCH_FILES and (
            room_of(path) in TORCH_ROOMS or relative(path) in TORCH_FILES):
        return
    heavy = {name.split(".")[0] for name in imports(path, top_only=True)} & HEAVY
    assert not heavy, f"{relative(path)} imports {sorted(heavy)} at its top"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_have_at_most_400_lines(path):
    assert path.read_text(encoding="utf-8").count("\n") <= 400


def test_functions_are_short():
    lengths = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{relative(path)}:{node.name}"] = node.end_lineno - node.lineno + 1
    p95 = statistics.quantiles(lengths.values(), n=20)[18]
    assert {name: size for name, size in lengths.items() if size > 60} == {}
    assert p95 <= 30, f"the 95th percentile of {len(lengths)} functions is {p95} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_library_prints_nothing(path):
    calls = [node.lineno for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert calls == [], f"{relative(path)} prints on lines {calls}"


def test_help_takes_less_than_0_3_seconds():
    """CPU seconds: what a quiet machine's clock shows, and what a busy one does not blur."""
    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "elite_train.py", "--help"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    best = min(once() for _ in range(5))
    assert best < 0.3, f"--help took {best:.2f} s"


@pytest.mark.parametrize("arguments", [["--help"], ["runs"], ["doctor"],
                                       ["plan", "--repo", "training", "--base-model", "embedded"],
                                       ["plan", "--repo", "training", "--base-model", "phi-2"]])
def test_these_commands_load_no_torch(arguments, tmp_path):
    code = ("import runpy, sys; sys.argv = ['elite_train.py', *sys.argv[1:]]\n"
            "try:\n    runpy.run_path('elite_train.py', run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            f"sys.stderr.write('loaded: ' + ' '.join(sorted(set(sys.modules) & {HEAVY!r})))")
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded: "


def test_the_configuration_page_is_what_the_schema_generates():
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference(), "run `make docs`"
