"""Peers' estimators: each held against a figure worked out by hand, or against the peer's own function."""

import components
import pytest

from benchmarks.planner_peers import FIXED_BYTES, PEERS, peers, peers_of, reasons
from training.records import GIB
from training.shapes import shape_from_config

# 128,256 x 4,096 embeddings and head; 32 layers of 41,943,040 (attention) and 176,160,768 (MLP) weights
LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
            "max_position_embeddings": 8192}
TINY = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 131, "max_position_embeddings": 128}
P = 8_030_261_248                # of LLAMA_8B: what Meta's model card rounds to 8.03 B


def lora(config=LLAMA_8B, context=2048, quantization="nf4", **more):
    return peers(config, context, 1, 16, quantization, True, "adamw_8bit", **more)


def full(config, dtype="bfloat16", optimizer="adamw", **more):
    return peers(config, 2048, 1, 0, "none", True, optimizer, dtype=dtype, **more)


def combination(**changes):
    return {"family": "llama", "config": TINY, "context_tokens": 64, "micro_batch": 1, "rank": 8,
            "quantization": "none", "dtype": "float32", "checkpointing": False, "streamed": False,
            "optimizer": "adamw", "targets": ("q_proj", "v_proj"), **changes}


def test_accelerate_counts_four_times_fp32_or_twice_without_the_head():
    body = 4 * (P - 128256 * 4096)
    assert full(LLAMA_8B, "float32")["accelerate"] == 4 * body
    assert full(LLAMA_8B)["accelerate"] == 2 * body


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "name"), [("float32", "float32"), ("bfloat16", "float16")])
def test_accelerate_s_own_functions_agree(tied, dtype, name):
    import torch
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel
    config = {**TINY, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    theirs = max(estimate_training_usage(calculate_maximum_sizes(model)[0], name).values())
    ours = full(config, dtype)["accelerate"]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert 0 <= theirs - ours <= 4 * buffers


@pytest.mark.parametrize("config", [TINY, {**TINY, "intermediate_size": 512}], ids=["embedding", "mlp"])
def test_deepspeed_s_own_functions_agree(config):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    model = components.make("llama", {key: value for key, value in config.items() if key != "model_type"})
    total = sum(p.numel() for p in model.parameters())
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    answers = full(config)
    assert answers["deepspeed zero-2"] == zero2(total, cpu_offload=False)[1]
    assert answers["deepspeed zero-3"] == zero3(total, largest, cpu_offload=False)[1]


def test_deepspeed_counts_twenty_bytes_a_parameter():
    assert full(LLAMA_8B)["deepspeed zero-2"] == 20 * P
    assert full(LLAMA_8B)["deepspeed zero-3"] == 18 * P + 4 * 128256 * 4096


def test_unsloth_on_its_own_example():
    # inside: 32 x 218,103,808 = 6,979,321,856; outside: 64 x 4,096 + 2 x 525,336,576 = 1,050,935,296
    # weights 6,979,321,856 x 2 / 3.2 + 2 x 1,050,935,296 = 6,463,946,752; adapter at rank 16:
    # 16 x 32 x (8192 + 5120 + 5120 + 8192 + 3 x 18432) = 41,943,040; states 4 bytes, adapter 2
    # activations of one layer: 2048 x (6144 + 2 + 28672) x 2.5 = 178,268,160; the gradients' floor is
    # min(0.15 x weights, max(activations, states 167,772,160)) = 178,268,160
    expected = 6_463_946_752 + 6 * 41_943_040 + 2 * 178_268_160 + int(1.4 * GIB)
    assert lora()["unsloth"] == expected
    assert lora(fixed=False)["unsloth"] == expected - int(1.4 * GIB)


def test_unsloth_without_checkpointing_counts_every_layer():
    long, short = lora(TINY, context=20_000), lora(TINY, context=10_000)
    # linear in the context: activations and, by the floor, gradients; at this size the floor is the weights'
    layer = 10_000 * (64 + 2 * 32 + 2 + 2 * 96) * 2.5
    assert long["unsloth"] - short["unsloth"] == layer
    plain = [peers(TINY, n, 1, 16, "nf4", False, "adamw_8bit")["unsloth"] for n in (10_000, 20_000)]
    assert plain[1] - plain[0] == 3 * layer


def test_soup_s_profile_by_hand():
    # 8.03 B is Soup's 8 B: H 4096, 32 layers; adapter 7 x 2 x 16 x 4096 x 32 = 29,360,128 weights, 2 bytes,
    # 8-bit states 2 bytes; activations 2048 x 4096 x 8 x isqrt(32) = 335,544,320
    weights = int(P / 1e9 * 0.5 * GIB)
    expected = weights + 2 * 29_360_128 + 2 * 29_360_128 + 335_544_320 + int(1.5 * GIB)
    assert lora()["soup profile"] == expected


def test_soup_invents_the_shape_of_a_small_model():
    # 5.5 M parameters: H = sqrt(5.5e6 / 384) = 119, raised to 128; 27 layers of 12 x 128^2
    shape = {**TINY, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 700, "vocab_size": 2000}
    total = shape_from_config(shape).total_parameters
    layers = total // (12 * 128 * 128)
    one, two = (peers(shape, n, 1, 8, "none", False, "adamw")["soup profile"] for n in (1000, 2000))
    assert two - one == 1000 * 128 * 8 * layers


def test_soup_s_fit_by_hand():
    # 2 bytes a weight; 1 % trained with 8 + 4 bytes; activations 2048 x 64 x sqrt(P / 1024) x 4 / 2; 5 % more
    activations = 2048 * 64 * (P / 1024) ** 0.5 * 4 * 0.5
    expected = 2 * P * 1.05 + 0.01 * P * 12 + activations + 0.5e9
    answer = peers(LLAMA_8B, 2048, 1, 16, "none", True, "adamw")["soup fit"]
    assert abs(answer - expected) < 2
    assert abs(full(LLAMA_8B)["soup fit"] - (2 * P * 1.05 + 12 * P + activations + 0.5e9)) < 2


def test_a_peer_without_an_answer_says_why():
    assert reasons(combination()) == dict.fromkeys(
        ("accelerate", "deepspeed zero-2", "deepspeed zero-3"),
        "it counts a training of all weights with Adam in 16 or 32 bits; of LoRA it knows nothing")
    assert reasons(combination(rank=0)) == {"soup profile": "it knows adapters only"}
    assert reasons(combination(streamed=True)) == dict.fromkeys(PEERS, "it knows no streamed step")
    assert set(peers_of(combination(streamed=True)).values()) == {None}
    mixture = {**TINY, "num_experts": 4}
    assert reasons(combination(family="mixtral", config={**mixture, "model_type": "mixtral"}))["unsloth"] == (
        "its rules for mixtures and latent attention are not written out here")


def test_a_combination_is_asked_as_its_parts_are():
    asked = combination(quantization="nf4", optimizer="adamw_8bit", rank=16, checkpointing=True,
                        context_tokens=2048, config=LLAMA_8B, targets=())
    assert peers_of(asked) == lora()


def test_the_fixed_part_is_what_a_model_of_nothing_costs():
    answers = lora(TINY, context=1)
    for name, constant in FIXED_BYTES.items():
        assert constant < answers[name] < constant + 2_000_000
