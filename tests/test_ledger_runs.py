"""Real pairs of the ledger: the trainer itself, forked from a server that has its libraries."""

import json
import re
import types
from pathlib import Path

import pytest

from training import ledger, models
from training.hardware.profiler import HardwareProfiler
from training.ledger import arms, measuring
from training.rundir import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
TINY = {"embedded.hidden": 32, "embedded.layers": 2, "embedded.heads": 2, "embedded.kv_heads": 2,
        "embedded.mlp": 64, "embedded.vocab_tokens": 512, "dataset.context_tokens": 64,
        "dataset.target_tokens": 64, "training.max_steps": 6, "training.eval_steps": 2,
        "evaluation.windows": 2, "training.micro_batch": 2}


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("records", "settings", "keys", "models", "shapes", "rundir"):
        text = (ROOT / "training" / f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.real
def test_a_real_pair_runs_both_arms_with_two_seeds_and_again_bitwise_alike(repository, tmp_path, monkeypatch):
    kept = []
    keep = types.SimpleNamespace(rmtree=lambda folder, **_: kept.append(Path(folder)))
    monkeypatch.setattr(measuring, "shutil", keep)
    profile = HardwareProfiler().profile(quick=True)
    made = ledger.Ledger(str(repository), profile, tmp_path / "work", pairs=2, reduced=TINY)
    item, = ledger.catalogue(["one-cycle"])
    entry, = made.measure([item], lambda *state: None)
    assert entry.verdict in ("helped", "hurt", "mixed", "no difference"), entry.why
    assert entry.steps == 6
    for arm in (*entry.on, *entry.off):
        assert arm.memory_bytes > 100e6
        assert arm.tokens_per_s > 0
        assert arm.disk_bytes > 0
        times = [seconds for seconds, _ in arm.curve]
        assert times == sorted(times)
        assert len(times) == 4                           # before, two between, at the end
        assert arm.curve[-1] == (arm.seconds, arm.loss)
    assert len({arm.loss for arm in (*entry.on, *entry.off)}) == 4     # each seed and each schedule
    assert {"loss", "loss_at_time", "tokens_per_s", "memory_bytes"} == entry.changes.keys()
    again = made._run(measuring.Pair(item=item, seed=0, off=""), "off", lambda detail: None)
    assert again.loss == entry.off[0].loss
    assert len({(folder / "dataset").resolve() for folder in kept}) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", json.loads(RunDirectory(kept[0]).result.read_text())["digest"])


@pytest.mark.real
def test_a_run_that_fails_is_told_in_the_trainers_own_words(repository, tmp_path):
    profile = HardwareProfiler().profile(quick=True)
    made = ledger.Ledger(str(repository), profile, tmp_path / "work", pairs=2, reduced=TINY)
    settings = made.runs.settings("embedded", True, {})
    folder, config = made.runs.folder(settings, models.resolve("embedded"), 0, lambda detail: None)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(arms.RunFailed, match=r"plan\.json is not a Plan"):
        made.runs.train(folder, config, lambda detail: None)
