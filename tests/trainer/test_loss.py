"""The chunked loss against Hugging Face's own, and against float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from training.trainer import loss as subject

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "vocab_size": 97, "initializer_range": 0.2, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def tiny(family, **more):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **more})).train()


def batch(rows=2, length=24, targets=11, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :length - targets] = -100
    return ids, labels


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mean_loss(model, ids, labels, chunk, mask=None):
    total, tokens = subject.causal_loss(model, ids, labels, mask, chunk)
    return total / tokens


@pytest.mark.parametrize("chunk", [0, 1, 4, 7, 1000])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma2", "granite", "cohere", "gpt2"])
def test_loss_and_gradients_equal_hugging_faces(family, chunk):
    more = {"llama": {"tie_word_embeddings": True}, "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
            "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25},
            "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}.get(family, {})
    model = tiny(family, **more)
    ids, labels = batch()
    expected = model(input_ids=ids, labels=labels).loss
    wanted = gradients(model, expected)
    assert subject.verify_chunked(model)
    found = mean_loss(model, ids, labels, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    got = gradients(model, found)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_against_float64_by_hand_with_padding_on_the_right():
    model = tiny("qwen2").double()
    ids, labels = batch()
    ids[1, 20:], labels[1, 20:] = 0, -100
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    logits = model(input_ids=ids[:1]).logits[:, :-1], model(input_ids=ids[1:, :20]).logits[:, :-1]
    expected = (F.cross_entropy(logits[0][0], labels[0, 1:], reduction="sum")
                + F.cross_entropy(logits[1][0], labels[1, 1:20], reduction="sum"))
    for given in (None, mask):
        found, tokens = subject.causal_loss(model, ids, labels, given, 5)
        assert tokens == 11 + 7
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_window_without_targets_costs_nothing_and_moves_nothing():
    model = tiny("llama")
    ids, labels = batch(rows=1)
    total, tokens = subject.causal_loss(model, ids, torch.full_like(labels, -100), None, 4)
    assert (float(total.detach()), tokens) == (0.0, 0)
    assert all(g.abs().max() == 0 for g in gradients(model, total).values())


def test_the_head_sees_target_positions_only_and_a_chunk_at_most():
    model = tiny("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    subject.verify_chunked(model)
    seen.clear()
    mean_loss(model, *batch(), chunk=8).backward()
    assert [shape[0] for shape in seen] == [8, 8, 6]


def test_a_family_that_does_more_with_its_logits_takes_the_whole_path():
    model = tiny("llama")
    original = model.lm_head.forward
    plain = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            output.logits = output.logits * 3.0
            return output

    model.__class__ = Odd
    assert not subject.verify_chunked(model)
    ids, labels = batch()
    logits = model(input_ids=ids).logits[:, :-1]
    expected = F.cross_entropy(logits.reshape(-1, 97), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(mean_loss(model, ids, labels, 4), expected)
    assert model.lm_head.forward == original


def test_gradients_that_pass_only_through_the_decoder_match_with_a_frozen_head():
    model = tiny("phi")
    model.lm_head.requires_grad_(False)
    ids, labels = batch()
    wanted = gradients(model, model(input_ids=ids, labels=labels).loss)
    got = gradients(model, mean_loss(model, ids, labels, 3))
    assert "lm_head.weight" not in got
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recomputing_for_partitioned_weights_gives_the_same_gradients():
    model = tiny("llama")
    ids, labels = batch()
    wanted = gradients(model, mean_loss(model, ids, labels, 4))
    model.lm_head.weight.ds_id = 1  # how ZeRO-3 marks a parameter
    got = gradients(model, mean_loss(model, ids, labels, 4))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_weights_get_their_gradient_summed_in_float32():
    model = tiny("llama").to(torch.bfloat16)
    ids, labels = batch()
    got = gradients(model, mean_loss(model, ids, labels, 2))
    exact = tiny("llama")
    exact.load_state_dict(model.state_dict())
    wanted = gradients(exact, mean_loss(exact, ids, labels, 0))
    assert got["lm_head.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(got["lm_head.weight"].float(), wanted["lm_head.weight"], rtol=0.1, atol=2e-3)


def test_verifying_leaves_modes_and_random_state_alone():
    model = tiny("phi", resid_pdrop=0.3)
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert subject.verify_chunked(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
