"""The model of a run: the embedded one from scratch, or a base from disk, with or without NF4 and LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.errors import DataError, MissingInput, UsageError
from training.settings import Config
from training.trainer import embedded, fused, quantization, rope
from training.trainer.failing import is_out_of_memory
from training.trainer.imports import quick_imports
from training.trainer.loss import causal_lm, verify_chunked

if TYPE_CHECKING:
    from training.dataset.store import WindowStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMED_AT_MOST = 12
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train. `trainable`: parameters by name; `notes`: decisions and reasons; `base`: where
    its weights came from, which is `model.base` unless heads were pooled."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    kind: str
    notes: tuple[str, ...]
    base: str = ""


def load(config: Config, dataset: WindowStore, device: torch.device, base: str = "") -> LoadedModel:
    """The model of this configuration on `device`, in training mode. `kind` is `adapter` or `model`. `base`:
    a folder to take in place of `model.base`, see `grouped`.

    Weights that are trained without DeepSpeed are float32, computed in `model.dtype` under autocast; frozen
    ones are stored in `model.dtype` or NF4. Raises MissingInput (no such base), DataError (torn checkpoint,
    vocabulary too small), UsageError (context, targets, kernel, quantization that cannot be honoured).
    """
    notes: list[str] = []
    base = base or config["model.base"]
    if base == "embedded":
        model: Any = embedded.build(config, dataset.vocab_tokens, dataset.pad_id, dataset.eos_id)
        model = model.to(device)
    else:
        model = pretrained(config, device, base, notes)
    _check_vocabulary(model, dataset.vocab_tokens, base)
    if config["model.fused_kernels"]:
        notes.append(fused.apply(model))
    if config["lora.enabled"]:
        model = _with_adapter(model, config, device, base, notes)
    if (dtype := autocast_type(config)) is not None:
        _compute_in(model, device, dtype)
    streamed = bool(config["stream.chunk_tokens"])
    if config["training.kept_layers"] or config["training.kept_inputs"] or config["training.compile"]:
        from training.trainer import compilation  # brings Transformers

        notes += compilation.arrange(model, config)
    elif config["training.checkpointing"] and not streamed:
        _recompute_activations(causal_lm(model))
    if not verify_chunked(model) and not streamed:
        notes.append("The loss makes all logits at once: this family's are not its head on its decoder.")
    model.train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return LoadedModel(model, trainable, "adapter" if config["lora.enabled"] else "model", tuple(notes), base)


def pretrained(config: Config, device: torch.device, base: str, notes: list[str]) -> Any:
    """The model of `base`, a hub id or a folder, from local files in its storage type. Raises as `load`."""
    with quick_imports():
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its reports of missing weights are raised below, in one line
    where = _where(config)
    try:
        shape = AutoConfig.from_pretrained(base, **where)
    except Exception as error:  # a config.json can hold anything, and some twenty classes come of it
        raise not_loadable(base, error) from error
    if note := rope.extend(shape, config["dataset.context_tokens"], config["model.rope_factor"]):
        notes.append(note)
    blockwise = "in the streamed step" if config["stream.chunk_tokens"] else "on a ring of devices"
    if ((config["stream.chunk_tokens"] or config["parallel.ring"] > 1)
            and (dropped := _without_attention_dropout(shape, blockwise))):
        notes.append(dropped)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, config=shape, output_loading_info=True, **where, **_storage(config, device))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise not_loadable(base, error) from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise DataError(f"The checkpoint {base} lacks {len(missing):,} weights of its own architecture, "
                        f"the first {missing[0]}; download it again.")
    if note:
        rope.verify(model)
    return model.to(device) if config["model.quantization"] == "none" else model


def _without_attention_dropout(shape: Any, where: str) -> str:
    """Switch off dropout on attention weights, which no blockwise kernel draws again; the note says so."""
    text = shape.get_text_config()
    active = {name: getattr(text, name) for name in ATTENTION_DROPOUT if getattr(text, name, None)}
    for name in active:
        setattr(text, name, 0.0)
    listed = ", ".join(f"{name} {value:g}" for name, value in active.items())
    return f"Dropout on attention weights is off {where} (the base has {listed})." * bool(listed)


def _where(config: Config) -> dict[str, Any]:
    return {"revision": config["model.revision"] or None, "trust_remote_code": False,
            "local_files_only": True}


def _storage(config: Config, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the storage type and the attention kernel."""
    dtype = DTYPES[config["model.dtype"]]
    trained_here = not config["lora.enabled"] and not config["deepspeed.stage"]
    chosen: dict[str, Any] = {"dtype": torch.float32 if trained_here else dtype,
                              "attn_implementation": config["model.attention"],
                              "use_safetensors": True}  # the other format is a pickle
    if config["model.quantization"] == "nf4":
        chosen |= {"quantization_config": quantization.nf4(config, dtype), "device_map": {"": device}}
    return chosen


def not_loadable(base: str, error: Exception) -> Exception:
    """The library's exception as one line with the way out."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, ImportError) or "flash" in reason.lower():
        return UsageError(f"The base model {base} cannot be loaded as configured: {reason} "
                          "Set model.attention=sdpa or install what is missing.")
    if isinstance(error, OSError) and Path(base).is_dir():
        return MissingInput(f"The base model folder {base} is not complete: {reason} Mend it, or train the "
                            "embedded model: --base-model embedded.")
    if isinstance(error, OSError):
        return MissingInput(f"The base model {base} is not on this machine; download it with "
                            f"`hf download {base}`, or train the embedded model: --base-model embedded.")
    if isinstance(error, ValueError):
        return UsageError(f"The base model {base} is not one that this version of Transformers can train: "
                          f"{reason} Choose another, or --base-model embedded.")
    return DataError(f"The checkpoint {base} does not fit its own configuration: {reason} Download it again.")


def _check_vocabulary(model: Any, vocab_tokens: int, base: str) -> None:
    """A larger embedding is fine (many are padded); a smaller one would index beyond its end."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_tokens > rows:
        raise DataError(f"The dataset's tokenizer has {vocab_tokens:,} tokens and the embedding of {base} "
                        f"{rows:,} rows; make the dataset again with that model's own tokenizer.")


def _with_adapter(model: Any, config: Config, device: torch.device, base: str, notes: list[str]) -> Any:
    """The frozen model with LoRA layers, initialised from `run.seed` alone; their weights are float32.

    `lora.rank_stabilized` scales by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732, section 3);
    `lora.dora` trains each output's magnitude beside them (Liu et al. 2024, arXiv:2402.09353, section 4).
    """
    with quick_imports():
        from peft import LoraConfig, get_peft_model

    existing = linear_names(model)
    targets = config["lora.targets"] or sorted({name.rsplit(".", 1)[-1] for name in existing})
    if not config["lora.targets"]:
        notes.append(f"LoRA on every linear layer ({', '.join(targets)}): lora.targets is empty.")
    check_targets(targets, existing)
    # Frozen norms keep their 16-bit type: their layers compute in float32 inside, and as float32 they would
    # hand float32 to 16-bit layers. PEFT's prepare_model_for_kbit_training would also double embeddings
    # and head.
    model.requires_grad_(False)
    if config["model.quantization"] == "nf4":
        quantization.keep_trainable_layout(model)
    wanted = LoraConfig(r=config["lora.rank"], lora_alpha=config["lora.alpha"], target_modules=targets,
                        lora_dropout=config["lora.dropout"], bias="none", task_type="CAUSAL_LM",
                        use_rslora=config["lora.rank_stabilized"], use_dora=config["lora.dora"])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config["run.seed"])
        adapted: Any = get_peft_model(model, wanted)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def linear_names(model: Any) -> list[str]:
    """Dotted names of the linear layers that can carry an adapter: all but the output layer."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is not head
            and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")]


def check_targets(targets: Iterable[str], existing: list[str]) -> None:
    """Raise UsageError naming what exists when a target matches no linear layer."""
    absent = [t for t in targets if not any(name == t or name.endswith("." + t) for name in existing)]
    if absent:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in existing})
        shown = ", ".join(leaves[:NAMED_AT_MOST]) + (" ..." if len(leaves) > NAMED_AT_MOST else "")
        raise UsageError(f"lora.targets names {', '.join(absent)}, which this model does not have; "
                         f"its linear layers are {shown}.")


def autocast_type(config: Config) -> torch.dtype | None:
    """What float32 weights that are trained without DeepSpeed are computed in; None: as they are."""
    dtype = DTYPES[config["model.dtype"]]
    plain = not config["lora.enabled"] and not config["deepspeed.stage"]
    return dtype if plain and dtype != torch.float32 else None


def _compute_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Run decoder and head under autocast; their float32 weights stay the ones that are trained."""
    for module in (model.get_decoder(), model.get_output_embeddings()):
        module.forward = torch.autocast(device.type, dtype=dtype)(module.forward)


def _recompute_activations(model: Any) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass.

    Non-reentrant checkpoints find the parameters inside by themselves, so the embedding's output needs no
    gradient; asking for it, as Transformers does, would add the first layer's input gradient to each step.
    """
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"The {model.config.model_type} family cannot recompute activations; "
                         "set training.checkpointing=false.") from error
    model.disable_input_require_grads()
