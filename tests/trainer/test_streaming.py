"""The trainer's streamed loss: its policy, its types, what it refuses, and what surrounds plain calls."""

import math

import pytest
import torch
from checkpoints import make_tiny_checkpoint
from trainer_fakes import config_of

from training.errors import CannotWrite
from training.longcontext import StreamError, Unsupported
from training.settings import KEYS
from training.trainer import loading, streaming
from training.trainer.loss import causal_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Qwen2 of two layers with dropout on its attention weights."""
    folder = tmp_path_factory.mktemp("base") / "qwen2"
    return make_tiny_checkpoint(folder, "qwen2", hidden=32, vocab_tokens=300, context_tokens=64,
                                attention_dropout=0.1)


class Dataset:
    """What loading asks of a dataset."""

    vocab_tokens, pad_id, eos_id = 300, 0, 0


def loaded(base, **settings):
    config = config_of(model__base=str(base), dataset__context_tokens=64, stream__chunk_tokens=7,
                       training__loss_chunk_tokens=4, **settings)
    return config, loading.load(config, Dataset(), CPU)


def gradients(loss, model, ids):
    model.zero_grad(set_to_none=True)
    value = loss(model, ids, ids, None, 4)[0]
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(value.detach()), found


def test_every_stream_key_reaches_the_policy(tmp_path):
    config = config_of(stream__chunk_tokens=96, stream__page_tokens=32, stream__mlp_tokens=16,
                       stream__inputs="disk", stream__keep_every=2, stream__encoding="int8",
                       stream__pages="pageable", stream__attention="keep", stream__keys="keep",
                       stream__weights="resident", stream__overlap=False, training__loss_chunk_tokens=0)
    policy = streaming.policy_of(config, tmp_path)
    for key in (key for key in KEYS if key.name.startswith("stream.")):
        assert getattr(policy, key.name.removeprefix("stream.")) == config[key.name]
        assert config[key.name] != key.default or key.name == "stream.weights"
    assert (policy.loss_tokens, policy.directory) == (96, str(tmp_path))


def test_attention_dropout_is_switched_off_with_a_note_and_nothing_is_recomputed_twice(base):
    _, found = loaded(base, training__checkpointing=True)
    assert found.model.config.attention_dropout == 0.0
    assert found.notes == (
        "Dropout on attention weights is off in the streamed step (the base has attention_dropout 0.1).",)
    assert not found.model.model.gradient_checkpointing


def test_the_plain_step_keeps_the_bases_dropout(base):
    config = config_of(model__base=str(base), dataset__context_tokens=64)
    assert loading.load(config, Dataset(), CPU).model.config.attention_dropout == 0.1


@pytest.mark.parametrize(("dtype", "close", "each"), [("float32", 1e-5, 1e-5), ("bfloat16", 0.02, 0.15),
                                                      ("float16", 0.003, 0.02)])
def test_the_streamed_loss_has_the_plain_loss_and_gradients(base, tmp_path, dtype, close, each):
    """As a whole and each. (The gradients of a key's bias cancel: of 300 random windows the bfloat16 ones
    were up to 0.061 apart, the plain step's own up to 0.061 from float32; all together up to 0.0125.)"""
    config, found = loaded(base, model__dtype=dtype)
    model = found.model.eval()
    ids = torch.randint(300, (2, 33))
    plain, expected = gradients(causal_loss, model, ids)
    value, given = gradients(streaming.StreamedLoss(model, config, tmp_path, CPU), model, ids)
    assert value == pytest.approx(plain, rel=close)
    assert given.keys() == expected.keys() == dict(model.named_parameters()).keys()
    off = {name: float(torch.norm((given[name] - expected[name]).double())) for name in given}
    sizes = {name: float(torch.norm(expected[name].double())) for name in given}
    assert math.hypot(*off.values()) <= close * math.hypot(*sizes.values())
    assert {name: off[name] / sizes[name] for name in off if off[name] > each * sizes[name]} == {}


def test_a_window_without_targets_gives_every_parameter_a_gradient_of_zero(base, tmp_path):
    config, found = loaded(base)
    loss = streaming.StreamedLoss(found.model, config, tmp_path, CPU)
    value, tokens = loss(found.model, torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100), None, 4)
    value.backward()
    assert (float(value.detach()), tokens) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in found.model.parameters())


def test_float16_weights_take_the_loss_scale_into_the_head(base, tmp_path):
    """Divided by very many tokens, the gradient by the logits is below float16's least number."""
    config, found = loaded(base)
    model = found.model.eval()
    ids = torch.randint(300, (1, 12))
    _, expected = gradients(causal_loss, model.double(), ids)
    loss = streaming.StreamedLoss(model.half(), config, tmp_path, CPU)
    share = 1e-10
    for scale in (1.0, 2.0**23):
        model.zero_grad(set_to_none=True)
        (loss(model, ids, ids, None, 4)[0] * share * scale).backward()
        for name, parameter in model.named_parameters():
            found_here, wanted = parameter.grad.double() / (share * scale), expected[name]
            if scale == 1.0:
                assert not found_here.any(), name
            else:
                assert torch.norm(found_here - wanted) <= 0.02 * torch.norm(wanted), name


def test_scaled_losses_have_exactly_scaled_gradients(base, tmp_path):
    config, found = loaded(base)
    loss = streaming.StreamedLoss(found.model.eval(), config, tmp_path, CPU)
    ids = torch.randint(300, (2, 20))
    results = []
    for scale in (1.0, 1024.0):
        found.model.zero_grad(set_to_none=True)
        (loss(found.model, ids, ids, None, 4)[0] * scale).backward()
        results.append([p.grad / scale for p in found.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_streamed_weights_visit_for_a_plain_call_too(base, tmp_path):
    config, found = loaded(base, lora__enabled=True, stream__weights="streamed")
    ids = torch.randint(300, (1, 20))
    with torch.no_grad():
        expected = causal_loss(found.model, ids, ids, None, 4)[0]
        loss = streaming.StreamedLoss(found.model, config, tmp_path, CPU)
        weights = loss.step._machine.weights
        with loss.aside():
            assert causal_loss(found.model, ids, ids, None, 4)[0] == expected
        travelled = weights.bytes_streamed
        causal_loss(found.model, ids, ids, None, 4)
    assert travelled == sum(p.numel() * 4 for layer in found.model.get_base_model().model.layers
                            for p in layer.parameters() if not p.requires_grad)
    assert weights.bytes_streamed == travelled


def test_the_check_says_what_it_compared(base, tmp_path):
    config, found = loaded(base, stream__keep_every=2)
    line = streaming.check(found.model, config, tmp_path, CPU)
    assert line.startswith("streamed step (stream.chunk_tokens=7, stream.keep_every=2): on 96 tokens its ")
    assert found.model.training


def test_a_model_that_cannot_be_exact_is_refused(base, tmp_path):
    config, found = loaded(base)
    found.model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(Unsupported, match="attention that sees later tokens"):
        streaming.check(found.model, config, tmp_path, CPU)


def test_more_kept_layers_than_there_are_is_refused(base, tmp_path):
    config, found = loaded(base, stream__keep_every=3)
    with pytest.raises(StreamError, match=r"keep_every is 3 and the model has 2 layers\."):
        streaming.check(found.model, config, tmp_path, CPU)


def test_the_folder_of_layer_inputs_is_there_while_it_is_needed(tmp_path):
    on_disk = config_of(stream__chunk_tokens=8, stream__inputs="disk")
    with streaming.directory(on_disk, tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    with streaming.directory(config_of(stream__chunk_tokens=8), tmp_path):
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(CannotWrite, match=r"Cannot make .*stream for layer inputs: No such file"), \
            streaming.directory(on_disk, tmp_path / "nowhere"):
        pass
