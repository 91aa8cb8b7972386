"""ELITE: a source repository in, a code model tuned on it out.

The command, and the front door of the five stages: HardwareProfiler -> OptimalConfigCalculator ->
ConfigurationManager -> DatasetGenerator -> TrainingManager. Each stage leaves a file in the run directory.
"""
import sys

if sys.version_info < (3, 10):  # noqa: UP036  Python 3.6 and newer can read this file, so they can be told
    sys.stderr.write(f"ELITE needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}.\n")
    sys.exit(66)

if __name__ == "__main__":
    from training.bootstrap import ensure
    ensure(sys.argv)

import importlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from training.command.choices import Choices, Number, Words, flag, refuse_early, value, with_choices
from training.command.ending import Session, guarded

# What can be imported from here and where it lives; loaded on first use, since some of it takes seconds.
EXPORTS = {"HardwareProfiler": "training.hardware.profiler",
           "OptimalConfigCalculator": "training.planning.calculator",
           "AdvancedOptimizer": "training.planning.tuning",
           "UltraAdvancedOptimizer": "training.planning.tuning",
           "ConfigurationManager": "training.configuration",
           "DatasetGenerator": "training.dataset.generator",
           "TrainingManager": "training.manager.manager"}
__all__ = [*EXPORTS, "app"]
SAMPLES = 3                      # windows that `dataset` shows
ALLOW = "Resume although this changed since the checkpoint; repeatable."


def __getattr__(name: str) -> Any:
    """The stage classes, imported on first use (PEP 562)."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'elite_train' has no attribute {name!r}")
    found = getattr(importlib.import_module(EXPORTS[name]), name)
    globals()[name] = found
    return found


app = typer.Typer(rich_markup_mode=None, add_completion=False,
                  context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__.split("\n")[0])
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output; the rest goes to "
                                                  "standard error.")]


@app.callback(invoke_without_command=True)
@with_choices()
def main(ctx: typer.Context, choices: Choices,
         auto: Annotated[bool, flag("--auto", "Ask nothing; take every default.")] = False,
         resume: Annotated[bool, flag("--resume", "Continue the run in --output.")] = False,
         fresh: Annotated[bool, flag("--fresh", "Move an old run aside and start anew.")] = False,
         allow_change: Annotated[Words, value(ALLOW, "KEY")] = None,
         dry_run: Annotated[bool, flag("--dry-run", "Stop after the plan; write nothing.")] = False,
         json: Json = False,
         no_setup: Annotated[bool, flag("--no-setup", "Never install anything.")] = False) -> None:
    """A source repository in, a code model tuned on it out. Without a subcommand: the whole chain."""
    if ctx.invoked_subcommand is not None:
        return refuse_early(ctx)
    from training.command import continuing, interview, request
    from training.console.view import View
    session, view = ctx.obj, View(json)
    path = request.run_to_resume(choices, fresh) if resume else None
    allowed = continuing.allowed(allow_change, resume)
    if path is None and not auto:
        interview.need_terminal()
        path = interview.unfinished(view.console) if choices == Choices() else None
        choices = choices if path else interview.fill(view.console, choices, fresh)
    if path is not None:
        return go_on(session, view, path, allowed)
    chain(session, view, choices, fresh=fresh, dry_run=dry_run, ask=not auto)


def chain(session: Session, view: Any, choices: Choices, *, fresh: bool, dry_run: bool, ask: bool) -> None:
    """The five stages in their order; every arrow is also a file in the run directory."""
    from training import models
    from training.command import interview, places, request, trying
    from training.configuration import ConfigurationManager
    from training.console import stages
    from training.dataset.generator import DatasetGenerator
    from training.hardware.profiler import HardwareProfiler
    from training.manager.preflight import check_disk
    from training.planning import evidence
    from training.planning.calculator import OptimalConfigCalculator
    made = request.check(choices, DatasetGenerator.survey, fresh=fresh, claim=not dry_run)
    view.show(stages.opening, made.facts, made.request)
    with view.stage("Hardware") as progress:
        profile = HardwareProfiler(made.output).profile(progress=progress)
    view.show(stages.hardware, profile)
    with view.stage("Plan") as progress:
        chosen = interview.choose_base(made.request, profile, view.console if ask else None)
        measured = evidence.read(profile)
        plan = OptimalConfigCalculator(profile, measured).calculate(made.request, chosen.base, made.facts)
        if plan.choices["training.trial"].value:
            check_disk(made.output, 0 if dry_run or made.request.anyway else plan.memory.disk_bytes)
            models.fetch(chosen.base, progress, plan.choices["model.revision"].value)
        plan = trying.planned(plan, made, profile, chosen.base, session.argv, progress, measured)
    view.show(stages.base, chosen.base.name, chosen.why, chosen.fallback)
    view.show(stages.plan, plan)
    view.show(stages.trial, plan)
    if dry_run:
        return view.document(plan)
    check_disk(made.output, 0 if made.request.anyway else plan.memory.disk_bytes)
    if ask:
        interview.agree(view.console, plan.total_s)
    with view.stage("Configuration"):
        old = places.move_aside(made.output) if fresh else None
        session.run = made.output
        config = ConfigurationManager(made.output).write(plan, profile, ["python3", *session.argv])
    view.show(stages.configuration, made.output, old)
    with view.stage("Dataset") as progress:
        models.fetch(chosen.base, progress, config["model.revision"])
        manifest = DatasetGenerator(config, made.output, chosen.base).generate(progress)
    view.show(stages.dataset, manifest)
    train(view, made.output)


def train(view: Any, path: Path, allowed: tuple[str, ...] = ()) -> None:
    """Stage 5, and what came out. `allowed`: what may have changed since the checkpoint."""
    from training.command import checks
    from training.console import stages
    from training.manager.facts import summary
    from training.manager.manager import TrainingManager
    from training.planning import convergence
    with view.stage("Training") as progress:
        manager = TrainingManager(path, forecast=convergence.at_end, allowed=allowed, checks=checks.ALL)
        result = manager.train(progress)
    view.show(stages.result, summary(path))
    view.document(result)


def go_on(session: Session, view: Any, path: Path, allowed: tuple[str, ...] = ()) -> None:
    """Continue a run: stages whose files are there are not repeated."""
    from training.command import continuing
    from training.configuration import ConfigurationManager
    from training.console import stages
    from training.dataset.generator import DatasetGenerator
    session.run = path
    config = ConfigurationManager(path).load()
    view.say(f"Continuing {path}.", "head")
    if not continuing.dataset_is_whole(path):
        with view.stage("Dataset") as progress:
            manifest = DatasetGenerator(config, path, continuing.base_of(config, progress)).generate(progress)
        view.show(stages.dataset, manifest)
    train(view, path, allowed)


@app.command()
def profile(quick: Annotated[bool, flag("--quick", "Two seconds, without torch.")] = False,
            json: Json = False) -> None:
    """Measure this machine."""
    from training.console import stages
    from training.console.view import View
    from training.hardware.profiler import HardwareProfiler
    view = View(json)
    with view.stage("Hardware") as progress:
        measured = HardwareProfiler().profile(quick=quick, progress=progress, fresh=True)
    view.show(stages.hardware, measured, True)
    view.document(measured)


@app.command()
@with_choices()
def plan(choices: Choices,
         hardware: Annotated[str, value("A machine of configs/hardware/, or a profile.", "NAME|FILE")] = "",
         vram: Annotated[Number, value("GPU memory to plan with.", "GIB")] = None,
         ram: Annotated[Number, value("Host memory to plan with.", "GIB")] = None,
         disk: Annotated[Number, value("Disk to plan with.", "GIB")] = None,
         every: Annotated[bool, flag("--all", "Every machine of configs/hardware/ with every base model of "
                                              "docs/models.md.")] = False,
         json: Json = False) -> None:
    """Plan a run, for this machine or another, without starting it."""
    from training import models
    from training.command import machines, request
    from training.console import stages
    from training.console.view import View
    from training.dataset.generator import DatasetGenerator
    from training.planning import evidence, trial
    from training.planning.calculator import OptimalConfigCalculator
    view = View(json)
    if every:
        return plan_all(view, choices, (hardware, vram, ram, disk))
    made = request.check(choices, DatasetGenerator.survey, claim=False)
    machine = machines.described(hardware, vram, ram, disk)
    must_load = machine.source != "preset" and not hardware
    chosen = models.choose(made.request.base_model, machine, online=True, must_load=must_load)
    calculator = OptimalConfigCalculator(machine, () if hardware else evidence.read(machine))
    planned = trial.assumed(calculator.calculate(made.request, chosen.base, made.facts))
    view.show(stages.opening, made.facts, made.request)
    with view.stage("Hardware"):
        view.show(stages.hardware, machine)
    with view.stage("Plan"):
        view.show(stages.base, chosen.base.name, chosen.why, chosen.fallback)
        view.show(stages.plan, planned)
    view.document(planned)


def plan_all(view: Any, choices: Choices, sizes: tuple[Any, ...]) -> None:
    """What every machine reaches with every base model, for a repository or one of a stated size."""
    from training.command import machines, request
    from training.console import stages
    from training.dataset.generator import DatasetGenerator
    from training.planning.outlook import REFERENCE, outlook
    made = request.check(choices, DatasetGenerator.survey, claim=False, instead=REFERENCE)
    rows = list(outlook(machines.every(*sizes), machines.bases(made.request.base_model), made.request,
                        made.facts))
    view.show(stages.outlook, rows, made.facts, made.request)
    view.document({"repository": made.facts, "plans": rows})


@app.command()
@with_choices("repo", "context", "base_model", "seed", "config", "set")
def dataset(choices: Choices,
            output: Annotated[str, value("Where the dataset's own files go.", "DIR")] = "",
            json: Json = False) -> None:
    """Make only the dataset, and show what is in it."""
    from training.command import alone
    from training.console import stages
    from training.console.view import View
    from training.dataset.generator import DatasetGenerator
    from training.dataset.sources.reasons import advice
    view = View(json)
    made = alone.checked(choices, output, DatasetGenerator.survey)
    generator = DatasetGenerator(made.config, made.folder, made.base, made.folder)
    with view.stage("Dataset") as progress:
        manifest = generator.generate(progress)
    view.show(stages.manifest, manifest, advice)
    view.show(stages.windows, generator.samples(SAMPLES))
    listed = "; left_out.tsv there lists every file left out" if manifest["files"]["dropped"] else ""
    view.say(f"Written to {made.folder}{listed}.")
    view.document(manifest)


@app.command()
def resume(ctx: typer.Context,
           run: Annotated[str, typer.Argument(help="A run's folder, or its name in runs/; the latest "
                                                   "unfinished one if not given.", metavar="[RUN]")] = "",
           allow_change: Annotated[Words, value(ALLOW, "KEY")] = None, json: Json = False) -> None:
    """Continue an interrupted run."""
    from training.command import continuing
    from training.console.view import View
    allowed = continuing.allowed(allow_change, True)
    go_on(ctx.obj, View(json), continuing.meant(run), allowed)


@app.command()
def runs(json: Json = False) -> None:
    """List the runs in runs/."""
    from training.command.places import RUNS
    from training.console import stages
    from training.console.view import View
    from training.manager.runs import list_runs
    from training.records import to_data
    view, found = View(json), to_data(list_runs(RUNS))
    view.show(stages.runs, found, RUNS.absolute())
    view.document(found)


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run's folder, or its name in runs/.", metavar="RUN")],
           json: Json = False) -> None:
    """Show what a run brought, and write its report.html."""
    from training.command.places import RUNS
    from training.console import stages
    from training.console.view import View
    from training.manager.facts import summary
    from training.manager.report import write_report
    from training.manager.runs import find_run
    view, path = View(json), find_run(run, RUNS)
    write_report(path)
    view.show(stages.result, summary(path))
    view.document(summary(path))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed, what works here, and what to do about the rest."""
    from training import doctor as checks
    from training.console import stages
    from training.console.view import View
    view, found = View(json), checks.examine()
    view.show(stages.doctor, checks.rows(found))
    view.document(found)
    raise typer.Exit(checks.exit_code(found))


@app.command()
def ledger(only: Annotated[Words, value("One optimization; repeatable.", "ID")] = None,
           json: Json = False) -> None:
    """Measure the optimizations on this machine."""
    from training.console import stages
    from training.console.view import View
    from training.hardware.profiler import HardwareProfiler
    from training.ledger import Ledger, catalogue, save
    view, items, here = View(json), catalogue(only), str(Path(__file__).resolve().parent)
    with view.stage("Hardware") as progress:
        machine = HardwareProfiler().profile(progress=progress, fresh=True)
    entries = []
    with view.stage("Measuring") as progress, tempfile.TemporaryDirectory(prefix="elite-ledger-") as work:
        for entry in Ledger(here, machine, Path(work)).measure(items, progress):
            entries.append(entry)
            written = save([entry], machine)  # at once: a run that is stopped keeps what it measured
    view.show(stages.ledger, entries)
    view.say(f"Written to {written}.")
    view.document(entries)
    raise typer.Exit(any(entry.verdict == "failed" for entry in entries))


def run(session: Session) -> None:
    """Parse the command line and run the command; every error is left to `guarded`."""
    command: Any = typer.main.get_command(app)
    arguments = [each for each in session.argv[1:] if each != "--no-setup"]  # that was for the set-up
    with command.make_context("elite_train.py", arguments, obj=session) as context:
        command.invoke(context)


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv))
