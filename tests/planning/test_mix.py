"""What an epoch is made of, against a count by hand, and what the planner takes for each base."""

import math
from fractions import Fraction

import pytest

from training import models
from training.errors import Problems, UsageError
from training.hardware.profiler import from_preset
from training.longcontext.costs import costs
from training.planning import OptimalConfigCalculator, memory, mix, presets, streaming
from training.records import RepositoryFacts, Request
from training.settings import Config, most_targets

SHARES = ("dataset.fim_share", "dataset.whole_share", "dataset.commit_share", "dataset.replay_share")
FACTS = RepositoryFacts(path="/r", name="repo", files=200, code_files=180, code_bytes=5_000_000,
                        languages={"python": 180}, commits=340)


def window(context, target, *shares, replay=""):
    return {"dataset.context_tokens": context, "dataset.target_tokens": target, "dataset.replay": replay,
            **dict(zip(SHARES, shares, strict=False))}


def by_hand(files, context, target, fim, whole, commits, replay):
    """Windows and mean targets by exact fractions, waste left out."""
    every = Fraction(files) / (1 - Fraction(commits) - Fraction(replay))
    cross = Fraction(files) * (1 - Fraction(fim) - Fraction(whole)) if target < context else Fraction(0)
    packed = every - cross + Fraction(23, 10) * Fraction(commits) * every    # what is context of a patch
    filled = target * Fraction(84, 100)                                       # what files fill of a target
    return cross / filled, packed / context, every / (cross / filled + packed / context)


@pytest.mark.parametrize(("context", "target", "shares"), [
    (4096, 512, ("1/4", "1/4", "1/8", "1/4")), (65536, 7168, ("0", "0", "0", "0")),
    (512, 512, ("1/4", "1/2", "1/8", "0")), (131072, 16384, ("0", "1", "0", "0"))])
def test_windows_and_mean_targets_are_those_of_a_count_by_hand(context, target, shares):
    values = window(context, target, *(float(Fraction(share)) for share in shares), replay="/other")
    cross, dense, mean = by_hand(10**9, context, target, *shares)
    found = mix.windows(10**9, values)
    assert found == pytest.approx(float(cross + dense * Fraction(101, 100)), abs=2)
    assert mix.mean_targets(values) == pytest.approx(float(mean))


def test_a_second_corpus_counts_only_where_one_is_named():
    assert mix.per_file_token(window(4096, 512, 0.0, 0.0, 0.0, 0.2)) == (1.0, 0.0, 0.0)
    assert mix.per_file_token(window(4096, 512, 0.0, 0.0, 0.0, 0.2, replay="/other")) == (1.0, 0.25, 0.0)


@pytest.mark.parametrize(("shares", "replay", "most"), [
    ((0.0, 0.0, 0.0, 0.2), "", 512), ((0.1, 0.0, 0.0, 0.0), "", 4096), ((0.0, 0.1, 0.0, 0.0), "", 4096),
    ((0.0, 0.0, 0.1, 0.0), "", 4096), ((0.0, 0.0, 0.0, 0.1), "/other", 4096)])
def test_one_dense_kind_makes_windows_of_nothing_but_targets(shares, replay, most):
    values = window(4096, 512, *shares, replay=replay)
    assert most_targets(values) == most
    assert most_targets(mix.uniform(values, 2048, 256)) == 256


def test_memory_holds_the_window_with_the_most_targets_and_time_does_not_pay_for_it():
    base = models.registry()["phi-2"]
    values = {**Config({"dataset.context_tokens": 8192, "dataset.target_tokens": 512, "lora.enabled": True,
                        "dataset.fim_share": 0.0, "dataset.commit_share": 0.0, "device.kind": "cuda",
                        "lora.targets": list(base.lora_targets), "model.dtype": "bfloat16"})}
    few = {**values, "dataset.whole_share": 0.0}
    every = {**few, "dataset.target_tokens": 8192}
    assert memory.logits_bytes(base.shape, values) == memory.logits_bytes(base.shape, every)
    assert memory.logits_bytes(base.shape, values) > memory.logits_bytes(base.shape, few)
    stream = {**values, "stream.chunk_tokens": 2048}
    found = costs(streaming.geometry(base.shape, stream), streaming.policy_of(stream), 8192, targets=8192)
    assert streaming.costs_of(base.shape, stream) == found


def plan(name="qwen2.5-coder-7b", facts=FACTS, **request):
    calculator = OptimalConfigCalculator(from_preset(presets.load("rtx-3090")))
    return calculator.calculate(Request(repo="/r", **request), models.resolve(name), facts)


def chosen(made):
    return {name.split(".")[1]: made.choices[name].value for name in
            (*SHARES, "dataset.fim_rate", "dataset.split", "evaluation.context_targets")}


def test_a_base_with_sentinels_gets_the_whole_mix():
    made = plan()
    assert chosen(made) == {"fim_share": 0.25, "whole_share": 0.15, "commit_share": 0.1, "replay_share": 0.0,
                            "fim_rate": 0.5, "split": "auto", "context_targets": 8}
    assert made.choices["dataset.commit_share"].why == ("340 commits: message and old text, then the patch")
    assert made.choices["dataset.split"].why == ("the newest files by commit time, as git's 340 commits tell")
    assert plan(settings={"dataset.replay": "/other"}).choices["dataset.replay_share"].value == 0.2


def test_a_base_without_sentinels_gets_no_infilling_and_says_so():
    made = plan("phi-2")
    assert (made.choices["dataset.fim_share"].value, made.choices["dataset.fim_rate"].value) == (0.0, 0.0)
    assert made.choices["dataset.fim_share"].why == (
        "phi-2 knows no fill-in-the-middle sentinels, so cross-file windows take it")


@pytest.mark.parametrize(("commits", "share", "why"), [
    (0, 0.0, "0 commits in git's history; from 20 on they are trained on"),
    (19, 0.0, "19 commits in git's history; from 20 on they are trained on"),
    (20, 0.1, "20 commits: message and old text, then the patch")])
def test_few_commits_are_left_out(commits, share, why):
    facts = RepositoryFacts(**{**FACTS.__dict__, "commits": commits})
    choice = plan(facts=facts).choices["dataset.commit_share"]
    assert (choice.value, choice.why) == (share, why)


def test_the_embedded_model_sees_left_to_right_text_in_packed_windows():
    made = plan("embedded")
    assert chosen(made) == {"fim_share": 0.0, "whole_share": 0.0, "commit_share": 0.0, "replay_share": 0.0,
                            "fim_rate": 0.0, "split": "auto", "context_targets": 8}


def test_one_share_makes_room_for_the_other_that_the_user_set():
    made = plan(settings={"dataset.whole_share": 0.9})
    assert made.choices["dataset.fim_share"].value == 0.1
    assert made.choices["dataset.fim_share"].why == "what dataset.whole_share 0.9 leaves"


def test_shares_that_cannot_be_honoured_are_refused_at_once_with_the_way_out():
    with pytest.raises(Problems) as caught:
        plan("phi-2", settings={"dataset.fim_rate": 0.5, "dataset.replay_share": 0.3})
    assert [str(problem) for problem in caught.value.problems] == [
        "dataset.fim_rate is 0.5 and phi-2 knows no fill-in-the-middle sentinels; leave it out, or take a "
        "base that docs/models.md lists with FIM.",
        "dataset.replay_share is 0.3 and no second corpus is named; set dataset.replay to a folder or git "
        "URL, or leave it out."]
    with pytest.raises(UsageError, match=r"dataset\.commit_share 0\.6 and dataset\.replay_share 0\.4 leave "
                                         r"the files less than a tenth; lower one\."):
        plan(settings={"dataset.replay": "/other", "dataset.commit_share": 0.6, "dataset.replay_share": 0.4})
    with pytest.raises(UsageError, match=r"dataset\.curriculum_stages 8 halves windows of 4,096 tokens to "
                                         r"fewer than 64; lower it\."):
        plan(context_tokens=4096, settings={"dataset.curriculum_stages": 8})


def test_a_repository_smaller_than_the_window_is_told_what_to_expect():
    small = RepositoryFacts(**{**FACTS.__dict__, "code_files": 14, "code_bytes": 39_360})
    asked = plan(facts=small, context_tokens=65536, epochs=8)
    assert asked.notes[-1] == (
        "12,300 tokens of code in 14 files: windows hold at most that, not the 65,536 asked for. Expect the "
        "model to learn names and style of these files, no more; 8 epochs repeat the same text.")
    own = plan(facts=small)
    assert own.context_tokens <= 12_300
    assert own.notes[-1].startswith("12,300 tokens of code in 14 files. Expect the model to learn names")
    assert not any("Expect" in note for note in plan().notes)
    assert math.isfinite(own.total_s)
