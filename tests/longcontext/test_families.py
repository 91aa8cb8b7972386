"""The streamed step's gradients equal the model's own, family by family; what cannot be is refused."""

from functools import partial

import pytest
from families import FAMILIES, NOT_SUPPORTED, ROPE, assert_equal, gradients, make, plain, streamed, tokens

from training.longcontext import StreamedStep, StreamPolicy, Unsupported, passes

POLICY = StreamPolicy(chunk_tokens=8, loss_tokens=5)
WINDOWED = [name for name, family in FAMILIES.items() if family.changes.get("sliding_window")]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_parameter_equal_eagers(family):
    model = make(family)
    ids, labels = tokens(2, 29)
    assert_equal(streamed(model, POLICY, ids, labels), plain(model, ids, labels))


@pytest.mark.parametrize(("window", "chunk", "page"), [(1, 8, 0), (5, 8, 3), (11, 4, 6)])
@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows_below_at_and_above_the_chunk_size(family, window, chunk, page):
    model = make(family, sliding_window=window)
    ids, labels = tokens(2, 29)
    expected = plain(model, ids, labels)
    assert_equal(streamed(model, StreamPolicy(chunk_tokens=chunk, page_tokens=page), ids, labels), expected)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3", "Olmo3"])
def test_a_window_changes_the_loss_so_that_the_tests_above_can_fail(family):
    model = make(family, sliding_window=3)
    ids, labels = tokens(2, 29)
    narrow = streamed(model, POLICY, ids, labels).loss
    wide = make(family, sliding_window=64)
    wide.load_state_dict(model.state_dict())
    assert abs(float(narrow - streamed(wide, POLICY, ids, labels).loss)) > 1e-4


def _scaled(kind, **others):
    return {"rope_parameters": {**ROPE, "rope_type": kind, "factor": 4.0,
                                "original_max_position_embeddings": 16, **others}}


LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES = [("Llama", {}), ("Llama", _scaled("linear")), ("Llama", _scaled("yarn")),
         ("Qwen3", _scaled("dynamic")), ("Phi3", _scaled("longrope", **LONG)),
         ("Llama", _scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0))]


@pytest.mark.parametrize("remembered", [True, False], ids=["kept", "made-again"])
@pytest.mark.parametrize(("family", "rope"), ROPES, ids=lambda value: _rope_name(value))
def test_rotary_embeddings_of_every_type_at_changing_lengths(family, rope, remembered, monkeypatch):
    """Dynamic and long RoPE depend on the longest position of the call, which one chunk does not see."""
    if not remembered:
        monkeypatch.setattr(passes, "CALLS_BYTES", 0)
    model = make(family, max_position_embeddings=16 if "dynamic" in str(rope) else 128, **rope)
    step = StreamedStep(model, POLICY)
    for length in (29, 12, 40):
        ids, labels = tokens(2, length)
        expected = plain(model, ids, labels)
        assert_equal(gradients(model, partial(step, ids, labels)), expected)


def _rope_name(value):
    return value if isinstance(value, str) else value.get("rope_parameters", {}).get("rope_type", "default")


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "GPT2", "Cohere", "Phi"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_separate_heads(family, tied):
    model = make(family, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    ids, labels = tokens(2, 21)
    assert_equal(streamed(model, POLICY, ids, labels), plain(model, ids, labels))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_query_heads_of_every_ratio(heads):
    model = make("Llama", num_key_value_heads=heads)
    ids, labels = tokens(2, 21)
    assert_equal(streamed(model, StreamPolicy(chunk_tokens=5, page_tokens=3), ids, labels),
                 plain(model, ids, labels))


INTERFACE = "does not use Transformers' attention interface"
REFUSED = {
    "Falcon": f"FalconForCausalLM {INTERFACE}",
    "Bloom": f"BloomForCausalLM {INTERFACE}",
    "Mpt": f"MptForCausalLM {INTERFACE}",
    "GPTJ": f"GPTJForCausalLM {INTERFACE}",
    "Bert": "attention that sees later tokens",
    "CTRL": "CTRLModel changes its input embeddings in place",
    "Doge": "an attention mask that the model builds or changes itself",
    "DiffLlama": "DiffLlamaDecoderLayer runs attention 2 times through Transformers' attention interface; "
                 "once was expected",
    "GptOss": "attention sinks",
    "Qwen3Next": "layers of type linear_attention",
    "MiniMax": "layers of type linear_attention",
    "Lfm2Conv": "layers of type conv",
    "Mamba": "layers of type linear_attention",
    "Llama4": "layers of type chunked_attention",
    "DeepseekV32": "layers that keep more than keys and values in the cache",
    "Gemma3n": "token embeddings that enter at every layer",
    "Gemma4": "token embeddings that enter at every layer",
    "Mixtral with a router loss": "the router's auxiliary loss; set output_router_logits to false in the "
                                  "model's config",
}


@pytest.mark.parametrize("family", NOT_SUPPORTED)
def test_what_cannot_be_exact_is_refused_in_one_line(family):
    model = make(family)
    ids, labels = tokens(1, 21)
    with pytest.raises(Unsupported) as caught:
        StreamedStep(model, POLICY)(ids, labels)
    assert str(caught.value) == REFUSED[family]


def test_layers_that_share_keys_and_values_are_refused():
    model = make("Gemma3n", hidden_size_per_layer_input=8)
    model.config.hidden_size_per_layer_input = 0
    with pytest.raises(Unsupported, match=r"^layers that share keys and values$"):
        StreamedStep(model, POLICY)


def test_active_attention_dropout_is_refused_and_names_its_rate():
    model = make("Qwen2", attention_dropout=0.25)
    ids, labels = tokens(1, 21)
    with pytest.raises(Unsupported, match=r"^attention dropout 0\.25 is active; set it to 0 in the"):
        StreamedStep(model, POLICY)(ids, labels)
    assert_equal(streamed(model.eval(), POLICY, ids, labels), plain(model, ids, labels))


def test_layer_calls_that_depend_on_the_tokens_are_noticed_without_a_word_in_the_config():
    """Layer calls are made again from blank embeddings when they are many."""
    model = make("Llama")
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: [t + x.mean() for t in rotary(x, position_ids)]
    ids, labels = tokens(1, 21)
    with pytest.raises(Unsupported, match=r"^layers that are given more of the tokens than their hidden"):
        StreamedStep(model, POLICY)(ids, labels)
