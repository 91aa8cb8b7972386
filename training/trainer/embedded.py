"""The embedded model: a small Llama made from scratch for the run's own vocabulary and context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.settings import Config
from training.trainer.imports import quick_imports

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM


def build(config: Config, vocab_tokens: int, pad_id: int, eos_id: int | None) -> LlamaForCausalLM:
    """A random Llama in float32 on the CPU, the same for the same `run.seed`; its embeddings are tied.

    Only Llama's own modules of Transformers are imported: the Auto classes cost another second.
    """
    with quick_imports():
        import torch
        from transformers.models.llama.configuration_llama import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=vocab_tokens, hidden_size=config["embedded.hidden"],
        intermediate_size=config["embedded.mlp"], num_hidden_layers=config["embedded.layers"],
        num_attention_heads=config["embedded.heads"], num_key_value_heads=config["embedded.kv_heads"],
        max_position_embeddings=config["dataset.context_tokens"], tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=eos_id)
    shape._attn_implementation = config["model.attention"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["run.seed"])
        model = LlamaForCausalLM(shape).float()
    # Set after construction: a padding index would stop the input embedding of that token from learning, and
    # padding may share its id with the separator between files.
    model.config.pad_token_id = pad_id
    model.generation_config.pad_token_id = pad_id
    return model
