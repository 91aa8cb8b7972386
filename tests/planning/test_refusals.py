"""Refusals: the largest term, a way out that was tried, and --anyway."""

import dataclasses
import random
import re

import pytest
from test_calculator import FACTS, LARGE, profile, value

from training import models
from training.errors import CannotWrite, DoesNotFit, UsageError
from training.planning import OptimalConfigCalculator
from training.records import GIB, Plan, Request, from_data, to_data
from training.settings import parse_assignment

NAMES = ("tiny-starcoder", "qwen2.5-coder-0.5b", "phi-2", "qwen2.5-coder-7b", "qwen2.5-coder-32b",
         "qwen3-coder-30b-a3b")
FAR = {"model.rope_factor": 2048.0}
ADVICE = re.compile(r"Nearest setting that fits: (.*)\.$")
WAYS = re.compile(r"Nearest setting that fits: --|Free some, give --output|see what would do with `plan --")


def calculate(machine, name, facts=LARGE, **request):
    return OptimalConfigCalculator(machine).calculate(Request(repo="/r", **request), models.registry()[name],
                                                      facts)


def refused(machine, name, **request):
    with pytest.raises((DoesNotFit, CannotWrite)) as error:
        calculate(machine, name, **request)
    return str(error.value)


def follow(text, name, request):
    """The base's name and the request after a refusal's advice."""
    flags = ADVICE.search(text).group(1)
    settings = {} if "without --set" in flags else dict(request.get("settings", {}))
    window_free = "left to the planner" in flags or "--tier" in flags or "--context" in flags
    changed = {key: value for key, value in request.items()
               if not (window_free or "without --set" in flags) or key not in ("tier", "context_tokens")}
    for flag, given in re.findall(r"--(tier|context|base-model|set) ([^ ]+)", flags):
        if flag == "set" and "=" in given:
            key, parsed = parse_assignment(given)
            settings[key] = parsed
        elif flag == "base-model":
            name = given.rstrip(",")
        elif flag in ("tier", "context"):
            changed[{"tier": "tier", "context": "context_tokens"}[flag]] = int(given)
    return name, {**changed, "settings": settings}


def machines(seed, count):
    chosen = random.Random(seed)
    for _ in range(count):
        gpu = chosen.choice((0.0, 1.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0))
        yield chosen, profile(gpu, chosen.choice(("7.5", "8.6")), chosen.choice((1, 1, 2)),
                              ram_gib=chosen.choice((1, 2, 4, 16, 64)),
                              disk_gib=chosen.choice((1, 3, 30, 500)))


def asked(chosen):
    settings = chosen.choice(({}, {}, FAR, {**FAR, "stream.pages": "device"}, {"training.micro_batch": 64},
                              {"stream.chunk_tokens": 0, **FAR}))
    window = chosen.choice(({}, {"tier": chosen.randint(2, 11)}, {"tier": 11}, {"context_tokens": 30_000}))
    return {**window, "settings": settings}


def test_the_way_out_of_a_refusal_is_a_plan_that_fits():
    seen = set()
    for chosen, machine in machines(4, 45):
        name, request = chosen.choice(NAMES), asked(chosen)
        try:
            made = calculate(machine, name, **request)
        except UsageError:
            continue
        except (DoesNotFit, CannotWrite) as error:
            text = str(error)
            assert WAYS.search(text), text
            assert "The largest term is " in text
            assert "\n" not in text
            if ADVICE.search(text):
                other, nearer = follow(text, name, request)
                calculate(machine, other, **nearer)
                seen.add(ADVICE.search(text).group(1).split()[0])
        else:
            assert from_data(Plan, to_data(made)) == made
    assert seen >= {"--set", "--base-model"}


def test_a_lower_tier_is_nearer_than_another_base():
    machine, request = profile(24, ram_gib=16, disk_gib=60), {"tier": 11, "settings": FAR}
    text = refused(machine, "phi-2", **request)
    assert re.search(r"Nearest setting that fits: --tier \d+\.$", text), text
    name, nearer = follow(text, "phi-2", request)
    assert calculate(machine, name, **nearer).tier == nearer["tier"]
    with pytest.raises(DoesNotFit):
        calculate(machine, name, **{**nearer, "tier": nearer["tier"] + 1})


def test_what_the_user_set_is_blamed_before_the_window_is_cut():
    text = refused(profile(24), "phi-2", tier=2, settings={"training.micro_batch": 128,
                                                           "stream.chunk_tokens": 0})
    assert text.startswith("This run needs ")
    assert re.search(r"Nearest setting that fits: --set (training.micro_batch|stream.chunk_tokens)=", text)


def test_the_largest_host_term_is_named():
    text = refused(profile(24, ram_gib=16), "phi-2", tier=11, settings={**FAR, "stream.pages": "pinned",
                                                                        "stream.inputs": "disk"})
    assert re.search(r"needs [\d,.]+ GiB of host memory; 14\.4 GiB is usable\. The largest term is "
                     r"(their gradients|keys and values|layer inputs) \([\d.]+ GiB\)\. "
                     r"Nearest setting that fits: --(tier \d+|set stream\.)", text), text


def test_the_largest_term_on_disk_is_named():
    text = refused(profile(24, disk_gib=1), "qwen2.5-coder-7b")
    assert text.startswith("This run writes ")
    assert "The largest term is the base model (14.2 GiB). Free some, give --output on another disk" in text


def test_a_machine_too_small_for_anything_is_told_how_to_ask_for_a_larger_one():
    assert refused(profile(ram_gib=1e-9), "embedded").endswith(
        "No base model fits this machine, not even embedded; free memory, or see what would do with "
        "`plan --ram GIB`.")


@pytest.mark.parametrize("ram_bytes", [0, 1, GIB])
@pytest.mark.parametrize("gpu_gib", [0, 24])
def test_a_machine_without_host_memory_gets_a_refusal_or_a_plan(ram_bytes, gpu_gib):
    bare = dataclasses.replace(profile(gpu_gib), ram_total_bytes=ram_bytes, ram_available_bytes=ram_bytes)
    for name in ("embedded", "phi-2"):
        made = calculate(bare, name, anyway=True)
        if "--anyway" not in "".join(made.notes):
            assert (calculate(bare, name), ram_bytes) == (made, GIB)
            continue
        assert made.notes[0].startswith("--anyway: it runs although it does not fit. This run needs ")
        assert WAYS.search(refused(bare, name))


def test_anyway_runs_a_plan_that_does_not_fit_and_says_so():
    asked_for = {"tier": 6, "settings": {"stream.chunk_tokens": 0}}
    text = refused(profile(24), "qwen2.5-coder-7b", **asked_for)
    made = calculate(profile(24), "qwen2.5-coder-7b", anyway=True, **asked_for)
    assert (made.tier, value(made, "stream.chunk_tokens")) == (6, 0)
    assert made.memory.device_bytes > made.room["device_bytes"]
    assert made.notes[0] == f"--anyway: it runs although it does not fit. {text.rpartition(' Nearest')[0]}"
    fitting = calculate(profile(24), "qwen2.5-coder-7b", facts=FACTS, anyway=True)
    assert not [note for note in fitting.notes if "--anyway" in note]


def test_anyway_does_not_lift_what_a_model_cannot_do():
    with pytest.raises(UsageError, match="beyond what starcoderbase-1b can be trained at"):
        calculate(profile(24), "starcoderbase-1b", tier=8, anyway=True)


@pytest.mark.parametrize("count", [1, 2])
def test_a_ring_of_more_devices_than_there_are_is_refused_in_one_line(count):
    with pytest.raises(UsageError, match=rf"^device\.count {count} is no multiple of parallel\.ring 3\.$"):
        calculate(profile(), "embedded", settings={"parallel.ring": 3, "device.count": count})
