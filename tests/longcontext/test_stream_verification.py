"""verify() passes what is exact, names what is not, and leaves the model as it was."""

import re

import pytest
import torch
from families import DENSE, make, plain, tokens
from peft import LoraConfig, get_peft_model

from training.longcontext import StreamError, StreamPolicy, Unsupported, attention, pages, passes, verify


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2", "Mixtral", "DeepseekV3"])
def test_a_good_model_passes(family):
    model = make(family)
    found = verify(model)
    assert found.tokens == 96
    assert found.plain_loss == pytest.approx(found.streamed_loss, rel=1e-5)
    assert found.gradient_distance < 1e-4
    assert found.parameter in dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_good_model_passes_in_the_types_of_training(dtype):
    assert verify(make("Llama", dtype)).gradient_distance < {torch.float32: 1e-4, torch.bfloat16: 0.25}[dtype]


@pytest.mark.parametrize("policy", [StreamPolicy(encoding="int4"), StreamPolicy(weights="streamed"),
                                    StreamPolicy(inputs="disk", pages="pageable", mlp_tokens=7)], ids=str)
def test_a_policy_is_checked_without_its_named_losses(policy):
    model = make("Llama", torch.float32)
    devices = [p.data_ptr() for p in model.parameters()]
    assert verify(model, policy).gradient_distance < 1e-4
    assert [p.data_ptr() for p in model.parameters()] == devices


def sees_the_chunk(model):
    """A layer that does something with the length of what it is given."""
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, *a, **k: forward(hidden, *a, **k) * (1 + 0.01 * hidden.shape[1])


def mixes_neighbours(model):
    """A layer that looks at the token before, past the attention: only a chunk's first token differs."""
    mlp = model.model.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, -1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("damage", [sees_the_chunk, mixes_neighbours])
def test_a_layer_that_sees_more_than_the_chunks_do_is_found(damage, dtype):
    model = make("Llama", dtype)
    damage(model)
    with pytest.raises(Unsupported) as caught:
        verify(model)
    assert re.fullmatch(r"LlamaForCausalLM: on 96 tokens the streamed step's loss is \d\.\d{6} and the "
                        r"model's own \d\.\d{6}, its gradient of [\w.]+ \d\.\d\de[+-]\d\d off\. Train it "
                        r"with the plain step \(stream\.chunk_tokens=0\)", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_lost_share_of_a_gradient_is_found_although_the_loss_is_right(dtype, monkeypatch):
    """Without what later chunks add to an earlier one's keys and values."""
    gradients = pages.Resident.gradients
    monkeypatch.setattr(pages.Resident, "gradients", lambda held, start, stop:
                        tuple(t * (start >= 40) for t in gradients(held, start, stop)))
    model = make("Llama", dtype)
    with pytest.raises(Unsupported, match=r"its gradient of model\.\S+ \d"):
        verify(model)


def test_what_fails_in_the_streamed_step_alone_is_told_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("The size of tensor a (8) must match\nsomething")
    monkeypatch.setattr(attention, "_attend", fail)
    with pytest.raises(Unsupported, match=r"^LlamaForCausalLM: the streamed step fails on 96 tokens "
                                          r"\(The size of tensor a \(8\) must match\)$"):
        verify(make("Llama"))


def test_running_out_of_memory_is_not_a_feature(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(attention, "_attend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        verify(make("Llama"))


def test_nothing_to_train_is_told():
    with pytest.raises(StreamError, match=r"^No parameter is trainable\.$"):
        verify(make("Llama").requires_grad_(False))


def test_gradients_modes_and_random_state_stay_as_they_were():
    model = get_peft_model(make("Llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    model.model.model.layers[1].eval()
    ids, labels = tokens(1, 12)
    model(input_ids=ids, labels=labels).loss.backward()
    grads = {name: None if p.grad is None else (p.grad, p.grad.clone())
             for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verify(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    for name, parameter in model.named_parameters():
        held = grads[name]
        assert (parameter.grad is None) == (held is None)
        assert held is None or (parameter.grad is held[0] and torch.equal(*held))


def test_a_failed_comparison_leaves_the_model_as_it_was_too():
    model = make("Llama")
    sees_the_chunk(model)
    with pytest.raises(Unsupported):
        verify(model)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", list(DENSE)[:6])
def test_layer_calls_that_are_made_again_pass_too(family, monkeypatch):
    monkeypatch.setattr(passes, "CALLS_BYTES", 0)
    assert verify(make(family)).gradient_distance < 1e-4


def test_the_plain_model_works_after_a_streamed_step_and_the_other_way_round():
    model = make("Gemma2")
    ids, labels = tokens(2, 21)
    before = plain(model, ids, labels)
    verify(model)
    after = plain(model, ids, labels)
    assert torch.equal(before.loss, after.loss)
    assert model.config._attn_implementation == "eager"
