"""Several ranks without DeepSpeed make the plain engine's updates; PowerSGD sends less and can be resumed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from parallel_worker import WideModel
from safetensors.torch import load_file
from trainer_fakes import FakeStore, TinyModel, config_of, training_of

from training.errors import UsageError
from training.trainer import phases
from training.trainer.batches import Layout, read_update
from training.trainer.journal import read_lines
from training.trainer.powersgd import WHOLE_UPDATES

HERE = Path(__file__).resolve().parent
PATIENCE_S = 120
POWER = {"parallel__compression": "powersgd", "parallel__compression_rank": 2}


def work(*jobs):
    """Run parallel_worker.py: for each (ranks, trainings) these, one after the other."""
    worker = subprocess.run([sys.executable, str(HERE / "parallel_worker.py"), json.dumps(jobs)],
                            text=True, capture_output=True, timeout=PATIENCE_S)
    assert worker.returncode == 0, worker.stderr[-4000:]
    assert worker.stdout + worker.stderr == ""


def outcome(path, rank=0):
    return json.loads((path / f"outcome-{rank}.json").read_text())


def curve(path):
    return [(line["loss"], line["grad_norm"], line["lr"], line["tokens"])
            for line in read_lines(path / "metrics.jsonl")]


def flat(rows):
    return [value for row in rows for value in row]


def by_plain_engine(path, model):
    """The plain engine's curve and weights, with the same windows an update."""
    torch.set_num_threads(1)
    config = config_of(training__micro_batch=1, training__accumulation=4, training__clip_norm=0.5)
    training_of(path, config, FakeStore(11), model).train()
    return curve(path), {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return by_plain_engine(tmp_path_factory.mktemp("plain"), TinyModel(dropout=0.0))


def assert_near(found, expected):
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-3, atol=1e-4)


STOPS = (1, WHOLE_UPDATES, 5)
THREE = {"training__accumulation": 1}
SIX = {ranks: {"training__accumulation": 6 // ranks} for ranks in (2, 3)}  # windows an update


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of all trainings over two and three ranks; one given a second time goes on."""
    home = tmp_path_factory.mktemp("ranks")

    def job(name, **options):
        return {"path": str(home / name), **options}
    power = {"wide": True, "settings": POWER}
    two = [job("two"), job("wide", wide=True), job("poisoned", bad_call=5), job("moved", max_steps=3),
           job("power", **power), *(job(f"power-{stop}", **power, max_steps=stop) for stop in STOPS),
           *(job(f"power-{stop}", **power) for stop in STOPS), job("power-poisoned", **power, bad_call=8),
           job("power-dropped", **power, discard_at=4, max_steps=4),
           job("power-moved", wide=True, settings=POWER | SIX[2], max_steps=5)]
    three = [job("three", settings=THREE), job("three-parts", settings=THREE, max_steps=4),
             job("three-parts", settings=THREE), job("power-moved", wide=True, settings=POWER | SIX[3])]
    work((2, two), (3, three))
    return home


def test_two_ranks_make_the_plain_engines_updates(done, plain):
    assert flat(curve(done / "two")) == pytest.approx(flat(plain[0]), rel=1e-5)
    assert_near(outcome(done / "two")["weights"], plain[1])


def test_two_ranks_have_the_same_weights_to_the_bit(done):
    assert outcome(done / "two", 0)["weights"] == outcome(done / "two", 1)["weights"]


def test_rank_0_alone_works_on_the_model_and_all_ranks_hear_what_it_raises(done):
    first, second = (outcome(done / "two", rank) for rank in (0, 1))
    assert first["value"] is not None
    assert second["value"] is None
    assert first["refusals"] == second["refusals"] == [["StoppedByUser", "enough"]] * 2
    assert first["summed"] == second["summed"] == 3.0


def test_a_parameter_that_a_rank_does_not_use_gets_the_plain_engines_gradient(done, tmp_path):
    expected = by_plain_engine(tmp_path, WideModel())
    assert flat(curve(done / "wide")) == pytest.approx(flat(expected[0]), rel=1e-5)
    assert_near(outcome(done / "wide", 1)["weights"], expected[1])


def test_three_ranks_killed_and_resumed_are_what_they_were_to_the_bit(done):
    """Three, since the sum of two numbers does not depend on their order."""
    assert curve(done / "three-parts") == curve(done / "three")
    assert outcome(done / "three-parts")["weights"] == outcome(done / "three")["weights"]


def test_plain_python_goes_on_from_a_checkpoint_of_two_ranks(done, plain):
    config = config_of(training__micro_batch=1, training__accumulation=4, training__clip_norm=0.5)
    training_of(done / "moved", config, FakeStore(11), TinyModel(dropout=0.0)).train()
    assert flat(curve(done / "moved")) == pytest.approx(flat(plain[0]), rel=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_update_on_all(done):
    assert [outcome(done / "poisoned", rank)["skipped"] for rank in (0, 1)] == [1, 1]
    assert [row[1] is None for row in curve(done / "poisoned")] == [False, False, True] + [False] * 6


def numbers_sent(rank):
    """Of one update with factors of this rank: a matrix of less gain than 2 goes whole."""
    sent = 0
    for parameter in WideModel().parameters():
        n, m = parameter.shape[0], parameter.numel() // parameter.shape[0]
        factors = (n + m) * min(n, m, rank)
        sent += factors if 2 * factors < n * m else n * m
    return sent


def test_powersgd_sends_the_factors_in_place_of_the_matrices(done):
    sent = outcome(done / "power")["sent"]
    whole = sum(p.numel() for p in WideModel().parameters())
    assert sent[:WHOLE_UPDATES] == [whole] * WHOLE_UPDATES
    assert set(sent[WHOLE_UPDATES:]) == {numbers_sent(2)}
    assert numbers_sent(2) < whole / 8


def test_powersgd_still_lowers_the_loss_and_keeps_ranks_the_same(done):
    losses = [row[0] for row in curve(done / "power")]
    assert losses[-1] < losses[WHOLE_UPDATES] < losses[0]
    assert losses != [row[0] for row in curve(done / "wide")]
    assert outcome(done / "power", 0)["weights"] == outcome(done / "power", 1)["weights"]


@pytest.mark.parametrize("stop", STOPS)
def test_powersgd_killed_and_resumed_is_what_it_was_to_the_bit(done, stop):
    assert curve(done / f"power-{stop}") == curve(done / "power")
    for rank in (0, 1):
        assert outcome(done / f"power-{stop}", rank)["weights"] == outcome(done / "power", rank)["weights"]


def test_a_checkpoint_holds_each_ranks_own_errors_and_one_copy_of_the_factors(done):
    kept = load_file(done / "power-moved" / "checkpoint-5" / "optimizer.safetensors")
    names = sorted(name for name in kept if name.startswith("powersgd/"))
    assert names == ["powersgd/0/error/0", "powersgd/1/error/0", "powersgd/p/0", "powersgd/q/0"]
    assert not torch.equal(kept["powersgd/0/error/0"], kept["powersgd/1/error/0"])


def test_another_number_of_ranks_drops_the_errors_and_says_so(done):
    told = (done / "power-moved" / "log-0").read_text()
    assert "has the errors of 2 ranks and there are 3; error feedback starts from zero" in told
    assert len(curve(done / "power-moved")) == 6


def test_an_update_that_is_not_finite_leaves_no_trace_in_errors_and_factors(done):
    assert [outcome(done / "power-poisoned", rank)["skipped"] for rank in (0, 1)] == [1, 1]
    rows = curve(done / "power-poisoned")
    assert rows[-1][0] < rows[0][0]


def test_what_is_discarded_leaves_nothing_in_the_errors(done):
    kept = load_file(done / "power-dropped" / "checkpoint-4" / "optimizer.safetensors")
    assert not [name for name in kept if name.startswith("powersgd/")]


def test_processes_of_a_ring_read_the_same_windows_and_count_their_targets_once():
    store, layout = FakeStore(8), Layout(windows=8, micro=2, accumulation=1, ranks=2, ring=2)
    found = [read_update(store, 0, layout, rank, seed=3) for rank in range(4)]
    ids = [[batch.ids.tolist() for batch in batches] for batches, _ in found]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    whole = read_update(store, 0, Layout(windows=8, micro=4, accumulation=1, ranks=1), 0, seed=3)[1]
    assert [found[1][1], found[3][1], found[0][1] + found[2][1]] == [0, 0, whole]


def test_several_devices_and_one_process_are_refused():
    session = SimpleNamespace(config=config_of(device__count=2), ranks=1)
    with pytest.raises(UsageError, match=r"device\.count is 2 and this is one process; start as many"):
        phases._join(session, torch.device("cpu"))


def test_compiled_layers_are_refused_on_a_ring():
    with pytest.raises(UsageError, match=r"cannot go together; set training\.compile=false\."):
        config_of(device__count=2, parallel__ring=2, training__compile=True)


@pytest.mark.parametrize(("waits_s", "codes"), [(60.0, [70, 3]), (0.5, [0, 3])])
def test_a_rank_whose_peer_has_ended_does_not_wait_for_hours(tmp_path, waits_s, codes):
    job = forked.server().start(HERE / "left_alone_worker.py", tmp_path / "log",
                                {"alone_s": 1.0, "waits_s": waits_s}, ranks=2)
    assert job.wait(30) == codes, job.text()
    assert ("Rank 1 ended 1 s ago" in job.text()) == (codes[0] == 70)
