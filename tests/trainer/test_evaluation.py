"""Evaluation: figures on held-out windows and completions, and that looking changes nothing."""

import math

import pytest
import torch
from tokenizers import Tokenizer

from tests.checkpoints import make_tiny_checkpoint
from tests.stores import SPANS, make_store
from training.errors import StoppedByUser
from training.settings import Config
from training.trainer import completion
from training.trainer.evaluation import evaluate, evenly_spaced
from training.trainer.loading import load
from training.trainer.loss import causal_lm, causal_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "phi", "phi", context_tokens=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory, phi):
    return make_store(tmp_path_factory.mktemp("store"), phi)


def settings(base="embedded", **more):
    adapter = {} if base == "embedded" else {"lora.enabled": True, "lora.targets": ["q_proj", "fc1"],
                                             "lora.dropout": 0.1, "model.quantization": "nf4"}
    return Config({"model.base": str(base), "embedded.hidden": 64, "embedded.layers": 2, "embedded.mlp": 128,
                   "dataset.target_tokens": 32, "dataset.context_tokens": 96, "evaluation.windows": 5,
                   "evaluation.completion_tokens": 12, **adapter, **more})


def ignore(*_):
    pass


def test_loss_and_bits_per_byte_are_those_of_the_models_own_logits(store):
    config = settings()
    model = load(config, store, CPU).model.eval()
    nats, tokens, size_bytes = 0.0, 0, 0
    for index in evenly_spaced(store.count("held_out"), 5):
        ids, labels = (torch.from_numpy(part) for part in store.window("held_out", index))
        with torch.no_grad():
            chances = model(ids[None]).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                nats -= float(chances[place - 1, ids[place]])
                tokens += 1
        size_bytes += store.target_bytes("held_out", index)
    found = evaluate(model, store, config, CPU, ignore)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size_bytes, rel=1e-5)
    assert found["windows"] == 5
    assert [s["path"] for s in found["samples"]] == ["a.py", "b.c", "c.py"]


def trained_weights(config, store, looks):
    loaded = load(config, store, CPU)
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(loaded.trainable.values(), lr=1e-3)
    for step in range(3):
        if looks:
            evaluate(loaded.model, store, config, CPU, ignore)
        ids, labels = (torch.from_numpy(part)[None] for part in store.window("train", step))
        causal_loss(loaded.model, ids, labels, None, 16)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in loaded.trainable.items()}


@pytest.mark.parametrize("adapter", [False, True])
def test_training_with_evaluations_between_is_bitwise_the_same(store, phi, adapter):
    """The adapter has dropout, so a drawn random number or a module left in evaluation mode would show."""
    config = settings(phi if adapter else "embedded")
    without, with_looks = trained_weights(config, store, False), trained_weights(config, store, True)
    assert all(torch.equal(without[name], with_looks[name]) for name in without)


def test_a_stop_between_windows_puts_everything_back(store, phi):
    loaded = load(settings(phi), store, CPU)
    causal_lm(loaded.model).model.layers[0].eval()
    modes = [module.training for module in loaded.model.modules()]
    state = torch.get_rng_state()
    seen = []

    def stop_at_six(phase, done, total, detail):
        seen.append((phase, done, total))
        if done == 6:
            raise StoppedByUser("stopped")

    with pytest.raises(StoppedByUser):
        evaluate(loaded.model, store, settings(phi), CPU, stop_at_six)
    assert seen == [("evaluate", done, 8) for done in range(7)]
    assert modes == [module.training for module in loaded.model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_greedy_completion_is_transformers_own(store, phi):
    for config in (settings(), settings(phi)):
        model = load(config, store, CPU).model.eval()
        before = torch.from_numpy(store.window("held_out", 0)[0][None, :40])
        with torch.no_grad():
            wanted = model.generate(input_ids=before, attention_mask=torch.ones_like(before),
                                    max_new_tokens=15, do_sample=False, eos_token_id=767, pad_token_id=0)
        assert completion.greedy(model, before, 15, lambda ids: ids[-1] == 767) == wanted[0, 40:].tolist()


def memorising(store, config, texts):
    """A model that has learned `texts` by heart."""
    loaded = load(config, store, CPU)
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer" / "tokenizer.json"))
    rows = [torch.tensor([[*tokenizer.encode(text).ids, 0]]) for text in texts]
    optimizer = torch.optim.AdamW(loaded.trainable.values(), lr=3e-3)
    for _ in range(40):
        total = sum(causal_loss(loaded.model, row, row, None, 0)[0] for row in rows)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loaded.model


def test_a_model_that_knows_the_spans_completes_them(store):
    config = settings(**{"evaluation.completion_tokens": 30})
    texts = [s["header"] + s["prefix"] + s["middle"] + s["suffix"] for s in SPANS]
    found = evaluate(memorising(store, config, texts), store, config, CPU, ignore)
    assert [s["completion"] for s in found["samples"]] == [s["middle"] for s in SPANS]
    assert (found["exact_match"], found["edit_similarity"], found["parse_rate"]) == (1.0, 1.0, 1.0)


def test_an_untrained_model_scores_low_and_rates_without_spans_are_none(store):
    model = load(settings(), store, CPU).model
    found = evaluate(model, store, settings(), CPU, ignore)
    assert found["exact_match"] == 0.0
    assert 0.0 <= found["edit_similarity"] < 0.5
    assert found["parse_rate"] in (0.0, 0.5, 1.0)
    without = evaluate(model, store, settings(**{"evaluation.completions": 0}), CPU, ignore)
    assert [without[name] for name in ("exact_match", "edit_similarity", "parse_rate")] == [None] * 3
    assert without["loss"] == found["loss"]


def test_a_long_prefix_is_cut_to_the_context(store):
    config = settings(**{"dataset.context_tokens": 40, "dataset.target_tokens": 8})
    model = load(config, store, CPU).model
    tokenizer = completion.open_tokenizer(store.path / "tokenizer")
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    completion.Completer(model, tokenizer, CPU, 40, 12).complete("x = 1\n" * 3000, 9)
    assert lengths[0] == 28
    assert sum(lengths) <= 40


def test_completions_are_cut_to_the_lines_expected():
    assert completion.first_lines("a\nb\nc", 1) == "a"
    assert completion.first_lines("a", 3) == "a"
    assert completion.lines_of("") == 1
    assert completion.lines_of("a\nb\n") == 2


def test_scores():
    assert completion.score("x = 1\n", "x = 1") == (True, 1.0)
    assert completion.score("", "") == (True, 1.0)
    assert completion.score("abcd", "") == (False, 0.0)
    assert completion.score("abcd", "abxd") == (False, 0.75)


@pytest.mark.parametrize(("text", "expected"), [
    ("    return a", True), ("    return (", False), ("return a", False), ("    '\\d'", True),
    ("    \0", False)])
def test_parsing_asks_whether_the_file_still_is_python(text, expected):
    assert completion.parses(SPANS[0], text) is expected


def test_spans_that_did_not_parse_before_are_not_counted():
    assert completion.parses(SPANS[1], "x") is None
    assert completion.parses({**SPANS[0], "parses": False}, "    return a") is None


def test_windows_are_spread_evenly():
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(100, 4) == [0, 25, 50, 75]
    assert evenly_spaced(5, 0) == []
