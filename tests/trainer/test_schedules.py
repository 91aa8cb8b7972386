import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from training.trainer.schedules import share

HIGHEST = 0.3


def rates_by_torch(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=HIGHEST)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def after_warmup(optimizer, warmup, decay):
    rise = LambdaLR(optimizer, lambda step: (step + 1) / (warmup + 1))
    return SequentialLR(optimizer, [rise, decay], [warmup]) if warmup else decay


@pytest.mark.parametrize(("steps", "warmup_share"), [(40, 0.1), (100, 0.03), (17, 0.0), (10, 0.5)])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_cosine_equals_torchs_after_its_warm_up(steps, warmup_share, least):
    warmup = int(warmup_share * steps)
    expected = rates_by_torch(lambda o: after_warmup(o, warmup, CosineAnnealingLR(
        o, steps - 1 - warmup, eta_min=least * HIGHEST)), steps)
    ours = [HIGHEST * share("cosine", step, steps, warmup_share, least) for step in range(steps)]
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("least", [0.0, 0.25])
def test_linear_equals_torchs_after_its_warm_up(least):
    expected = rates_by_torch(lambda o: after_warmup(o, 5, LinearLR(o, 1.0, least, 44)), 50)
    ours = [HIGHEST * share("linear", step, 50, 0.1, least) for step in range(50)]
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("steps", "warmup_share"), [(50, 0.3), (100, 0.1), (20, 0.5), (1000, 0.03)])
def test_one_cycle_equals_torchs(steps, warmup_share):
    least = 0.001
    expected = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=HIGHEST)
    schedule = OneCycleLR(optimizer, HIGHEST, total_steps=steps, pct_start=warmup_share,
                          final_div_factor=1 / 25 / least)
    for step in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    ours = [HIGHEST * share("one_cycle", step, steps, warmup_share, least) for step in range(steps)]
    assert ours == pytest.approx(expected, abs=1e-9)


def test_constant_stays_at_the_highest_rate_after_its_warm_up():
    assert [share("constant", step, 10, 0.2, 0.1) for step in range(10)] == pytest.approx(
        [1 / 3, 2 / 3] + [1.0] * 8)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_every_rate_lies_between_zero_and_the_highest_and_the_first_is_not_zero(schedule, steps):
    rates = [share(schedule, step, steps, 0.03, 0.1) for step in range(steps)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    assert rates[0] > 0.0
    assert max(rates) > 0.9


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="no schedule named 'spiral'"):
        share("spiral", 0, 10, 0.0, 0.0)
