"""The catalogue: 43 optimizations with code, a test and two arms that differ; and the ledger's own rules."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from training import ledger, models
from training.errors import UsageError
from training.keys import BY_NAME
from training.ledger import arms, base, measuring, records
from training.ledger.judging import Arm
from training.planning import streaming
from training.records import HardwareProfile, Support
from training.settings import Config, contradictions, parse_assignment

ROOT = Path(__file__).resolve().parent.parent
PROFILE = HardwareProfile(name="box", source="measured", date="d", system="s", cpu_name="c", cpu_cores=2,
                          cpu_flags=(), ram_total_bytes=1, ram_available_bytes=1, gpus=(), disk_path="/",
                          disk_free_bytes=1,
                          supports={"deepspeed": Support(works=False, why="it is not installed")})
ITEMS = {item.id: item for item in ledger.catalogue()}
DEFAULTS = {name: key.default for name, key in BY_NAME.items()}


def settings(item, arm, extra=()):
    """An arm's settings as the ledger gives them to the planner, over the schema's defaults."""
    made = arms.Runs(repo="", profile=PROFILE, work=Path()).settings(item.model, item.trains, item.arm(arm))
    kind = {"model.base": "/a/base"} if item.model == "adapter" else {}
    return {**kind, **made, **dict(extra)}


def each(pick=lambda item: True):
    return pytest.mark.parametrize("item", [item for item in ITEMS.values() if pick(item)],
                                   ids=lambda item: item.id)


def arm(memory=100.0, rate=100.0, loss=5.0):
    return Arm(memory_bytes=memory, tokens_per_s=rate, loss=loss)


def test_there_are_27_standard_and_16_extreme_optimizations_each_once():
    rows = ledger.catalogue()
    counts = {group: sum(item.group == group for item in rows) for group in ledger.GROUPS}
    assert counts["standard"] == 27
    assert counts["extreme"] == 16
    assert len(ITEMS) == len(rows)


@each()
def test_both_arms_are_configurations_that_differ_in_the_same_keys(item):
    on, off = Config(settings(item, "on")), Config(settings(item, "off"))
    assert dict(on) != dict(off)
    assert item.on.keys() == item.off.keys()
    assert not item.on.keys() & item.both.keys()
    changed = {name for name in on if on[name] != off[name]}
    assert changed <= item.on.keys()


@each()
def test_its_code_and_the_test_that_can_fail_are_there(item):
    path, _, symbol = item.code.partition(":")
    assert (ROOT / path).is_file()
    assert (ROOT / item.test).is_file()
    if symbol:
        named = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert symbol in named


@each()
def test_every_field_is_one_of_the_known_and_has_words(item):
    assert set(item.changes) <= set(ledger.catalogue.__globals__["CHANGES"])
    assert item.changes
    assert item.model in ("embedded", "adapter")
    assert item.paper
    assert item.default
    assert bool(item.why_not_here) == bool(item.script) == ("cuda" in item.needs)


@each(lambda item: item.conflicts)
def test_its_conflicts_cannot_be_had_together(item):
    for conflict in item.conflicts:
        values = settings(item, "on")
        if conflict in ITEMS:
            other = ITEMS[conflict]
            shared = item.on.keys() & other.on.keys()
            if any(item.on[name] != other.on[name] for name in shared):
                continue
            values = settings(item, "on", {**other.both, **other.on, **item.both, **item.on}.items())
            swapped = settings(item, "on", {**item.both, **item.on, **other.both, **other.on}.items())
            assert refused(values) or refused(swapped), conflict
        else:
            assert refused(settings(item, "on", [parse_assignment(conflict)])), conflict


def refused(values):
    """What the schema's rules or the planner say against these settings."""
    return contradictions({**DEFAULTS, **values}) or streaming.problems(values, 4, values.get("device.kind",
                                                                                             "cpu"))


@each(lambda item: "cuda" not in item.needs)
def test_both_arms_can_be_planned_on_a_cpu_and_the_plan_keeps_their_keys(item):
    base = models.embedded(settings(item, "on")) if item.model == "embedded" else models.registry()["phi-2"]
    made = arms.Runs(repo=str(ROOT / "training" / "planning"), profile=PROFILE, work=Path())
    for arm_name in ("on", "off"):
        wanted = made.settings(item.model, item.trains, item.arm(arm_name))
        assert {name: made.config(wanted, base, 0)[name] for name in wanted} == wanted


@each(lambda item: "cuda" in item.needs)
def test_what_only_a_gpu_can_show_says_so_and_names_the_script(item):
    assert item.arm("on")["device.kind"] == "cuda"
    said = ledger.missing_needs(item, PROFILE)
    assert said == f"needs hardware: {item.why_not_here}; `{item.script}` measures it there"
    words = item.script.split()
    assert (ROOT / words[1]).is_file()
    assert words[2:] in (["ledger", "--only", item.id], ["--suite"])


def test_what_this_machine_lacks_is_said_instead_of_measured(tmp_path):
    item = ITEMS["zero-2-offload"]
    assert ledger.missing_needs(item, PROFILE) == "needs deepspeed: it is not installed"
    assert ledger.missing_needs(dataclasses.replace(item, needs=()), PROFILE) == ""
    made = list(ledger.Ledger(str(ROOT / "training"), PROFILE, tmp_path).measure([item], lambda *state: None))
    assert [(entry.verdict, entry.why) for entry in made] == [
        ("not applicable here", "needs deepspeed: it is not installed")]


def test_an_unknown_id_gets_the_nearest():
    with pytest.raises(UsageError, match=r"No optimization one-cycl\. Nearest: one-cycle\."):
        ledger.catalogue(["one-cycl"])


def test_one_pair_is_refused():
    with pytest.raises(ValueError, match="spread"):
        ledger.Ledger("r", PROFILE, Path(), pairs=1)


def test_entries_measured_again_the_same_day_replace_the_old_ones(tmp_path):
    def entry(name, verdict):
        return records.entry(dataclasses.replace(ITEMS["ema"], id=name), PROFILE, verdict)

    ledger.save([entry("a", "helped"), entry("b", "hurt")], PROFILE, folder=tmp_path)
    path = ledger.save([entry("b", "mixed")], PROFILE, folder=tmp_path)
    found = json.loads(path.read_text())
    assert {row["id"]: row["verdict"] for row in found["entries"]} == {"a": "helped", "b": "mixed"}
    assert {row["machine"] for row in found["entries"]} == {"c, 2 cores, no GPU"}
    assert found["machine"] == {"cpu": "c", "cores": 2, "gpus": []}


def test_another_machine_on_the_same_day_has_a_file_of_its_own(tmp_path):
    entry = records.entry(ITEMS["ema"], PROFILE, "helped")
    one = ledger.save([entry], PROFILE, folder=tmp_path)
    other = ledger.save([entry], dataclasses.replace(PROFILE, cpu_cores=8), folder=tmp_path)
    assert one != other
    assert one.name.endswith("-c-2-cores-no-gpu.json")


class Fake(measuring.Ledger):
    """A ledger whose runs are made up: what ran, and figures by arm."""

    def __init__(self, tmp_path, fail=""):
        super().__init__(str(ROOT / "training"), PROFILE, tmp_path)
        self.ran, self.fail = [], fail

    def _run(self, pair, arm_name, told):
        self.ran.append(f"{pair.item.id} {arm_name} {pair.seed}")
        if pair.item.id == self.fail:
            raise arms.RunFailed("it broke.")
        return arm(rate=100 if arm_name == "off" else 80 + pair.seed)

    def _base(self, item, told):
        return arms.resolve("embedded")


def test_arms_take_turns_and_training_runs_share_the_arm_without_it(tmp_path):
    made = Fake(tmp_path)
    items = [ITEMS[name] for name in ("ema", "accumulation", "label-smoothing")]
    entries = list(made.measure(items, lambda *state: None))
    timed = [f"accumulation {name} {seed}" for seed in range(3) for name in ("off", "on")]
    trained = [run for seed in range(3) for run in (f"ema off {seed}", f"ema on {seed}",
                                                    f"label-smoothing on {seed}")]
    assert made.ran == timed + trained
    assert [entry.id for entry in entries] == ["accumulation", "ema", "label-smoothing"]
    assert {entry.verdict for entry in entries} == {"hurt"}


def test_a_run_that_fails_is_an_entry_and_the_others_go_on(tmp_path):
    made = Fake(tmp_path, fail="accumulation")
    entries = list(made.measure([ITEMS["accumulation"], ITEMS["ema"]], lambda *state: None))
    assert [(entry.verdict, entry.why) for entry in entries] == [("failed", "it broke."), ("hurt", "")]


def test_the_time_left_is_told_before_each_run_and_falls(tmp_path):
    told = []
    made = Fake(tmp_path)
    made._run = lambda pair, name, tell: tell("step 1") or arm()
    list(made.measure([ITEMS["ema"]], lambda phase, done, total, detail: told.append((done, total, detail))))
    assert told[0] == (0, 3, "ema, pair 1 of 3: step 1; about 1 min left")
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)


def test_the_console_shows_every_entry_and_why_one_is_missing(tmp_path):
    import io

    from rich.console import Console

    from training.console import stages
    from training.console.theme import STYLES
    shown = Console(file=io.StringIO(), theme=STYLES, width=80)
    ran = records.entry(ITEMS["ema"], PROFILE, on=[arm(loss=4.9)] * 2, off=[arm()] * 2)
    stages.ledger(shown, [ran, records.entry(ITEMS["cuda-warmup"], PROFILE, "not applicable here", "no GPU")])
    text = shown.file.getvalue()
    assert re.search(r"ema +helped +\+0\.0 % +\+0\.0 % +-2\.0 %", text)
    assert "cuda-warmup: no GPU" in text


def test_code_of_the_base_is_that_of_the_interpreter_and_no_more_than_asked(tmp_path):
    folder = base.other_code(tmp_path / "code", most_bytes=200_000)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert 0 < sum(sizes) <= 200_000
