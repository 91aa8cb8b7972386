"""Makes small random checkpoints with a real tokenizer, for tests and for trials without a download.

    python tests/checkpoints.py FOLDER --family phi

The folder then works as `--base-model FOLDER`. The weights are random: only the layout, the architecture and
the tokenizer are those of the family.
"""

from __future__ import annotations

import argparse
import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
TRAINED_ON = ("argparse.py", "dataclasses.py", "textwrap.py", "json/decoder.py")


def make_tiny_checkpoint(folder: str | Path, family: str = "phi", hidden: int = 64, layers: int = 2,
                         vocab_tokens: int = 768, context_tokens: int = 2048, seed: int = 0,
                         **config: Any) -> Path:
    """Write a checkpoint of `family` (phi, qwen2, gpt2) with tokenizer; returns the folder.

    `config` overrides fields of the family's Transformers configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, FIM if family == "qwen2" else (), vocab_tokens, context_tokens)
    sizes: dict[str, Any] = {"vocab_size": vocab_tokens, "initializer_range": 0.1,
                             "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        sizes |= {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": context_tokens}
    else:
        sizes |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
                  "intermediate_size": 4 * hidden, "max_position_embeddings": context_tokens,
                  "num_key_value_heads": 2 if family == "qwen2" else 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **config}))
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, extra: tuple[str, ...], vocab_tokens: int, context_tokens: int) -> None:
    """tokenizer.json and tokenizer_config.json: a byte-level BPE of exactly `vocab_tokens` at most."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_trained(extra, vocab_tokens), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "bos_token": END,
        "model_max_length": context_tokens, "clean_up_tokenization_spaces": False}), encoding="utf-8")


@functools.cache
def _trained(extra: tuple[str, ...], vocab_tokens: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train([str(library / name) for name in TRAINED_ON], trainers.BpeTrainer(
        vocab_size=vocab_tokens, special_tokens=[END, *extra], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer.to_str()


def main() -> None:
    """Command line: `FOLDER --family phi|qwen2`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=("phi", "qwen2"), default="phi")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-tokens", type=int, default=768)
    parser.add_argument("--context-tokens", type=int, default=2048)
    chosen = parser.parse_args()
    print(make_tiny_checkpoint(chosen.folder, chosen.family, chosen.hidden, chosen.layers,
                               chosen.vocab_tokens, chosen.context_tokens))


if __name__ == "__main__":
    main()
