"""A causal LM made by transformers, taken apart: what shapes and windows are held against."""

from __future__ import annotations

import re

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

transformers.logging.set_verbosity_error()
UNREAD_TYPES = {"mistral", "ministral3", "phi3", "starcoder2", "mixtral", "phimoe"}   # read no layer_types
LINEAR = (nn.Linear, Conv1D)     # exactly these are quantized: transformers looks at type(module)


def make(model_type, overrides, device="meta"):
    """A model with random (or no) weights of a family's config with some keys given."""
    config = AutoConfig.for_model(model_type, **overrides)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def component(path, module, model):
    """The component that one parameter belongs to, by its path and the class of its module."""
    kind, bias = type(module).__name__.lower(), path.endswith(".bias")
    if module is model.get_input_embeddings():
        return "embeddings"
    if module is model.get_output_embeddings():
        return "biases" if bias else "head"
    if isinstance(module, nn.Embedding):
        return "positions"
    if "norm" in kind:
        return "norms"
    if "router" in kind or "statics" in kind or ".gate.wg" in path:
        return "router"
    if "experts" in kind:
        return "experts"
    if bias and isinstance(module, LINEAR):
        return "biases"
    if re.search(r"\.project_(in|out)\.", path):
        return "embeddings"
    return "attention" if re.search("attn|attention", path) else "mlp"


def parameters(model):
    """{component: parameters}, tied ones once."""
    found = {}
    for path, parameter in model.named_parameters():
        part = component(path, model.get_submodule(path.rpartition(".")[0]), model)
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def linears(model):
    """{(name, inputs, outputs): how many} of the linear layers outside the head."""
    found = {}
    for path, module in model.named_modules():
        if type(module) in LINEAR and module is not model.get_output_embeddings():
            size = tuple(module.weight.shape)
            key = (path.rpartition(".")[2], *(size if isinstance(module, Conv1D) else size[::-1]))
            found[key] = found.get(key, 0) + 1
    return found


def windows(model):
    """The window of each layer as the model reads it, 0 for full attention; () when no layer has one."""
    config, each = model.config, {}
    for path, module in model.named_modules():
        place = re.search(r"layers\.(\d+)\.self_attn$", path)
        if place and hasattr(module, "sliding_window"):
            seen = module.sliding_window if getattr(module, "is_sliding", True) else 0
            each[int(place[1])] = seen or 0
    layers = range(config.num_hidden_layers)
    if config.model_type == "gpt_neo":
        found = [config.window_size if config.attention_layers[i] == "local" else 0 for i in layers]
    elif config.model_type == "llama4_text":
        kinds = config.layer_types
        found = [config.attention_chunk_size if kinds[i] == "chunked_attention" else 0 for i in layers]
    elif each or config.model_type not in UNREAD_TYPES:
        found = [each.get(i, 0) for i in layers]
    else:                        # these hand config.sliding_window to the mask and to every layer's kernel
        found = [config.sliding_window or 0] * len(layers)
    return tuple(found) if any(found) else ()


def kept(model, hidden, width):
    """MLP-wide tensors that autograd keeps of the first MLP, its weights frozen."""
    model.requires_grad_(False)
    tokens, stored = 17, {}
    states = torch.randn(1, tokens, hidden, requires_grad=True)

    def keep(tensor):
        wide = tensor.dim() and tensor.shape[-1] in (width, 2 * width) and tokens in tensor.shape
        if wide and tensor.is_floating_point():
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = _mlp(model, states)
    assert result.shape == states.shape
    return sum(stored.values()) / (tokens * width * states.element_size())


def _mlp(model, states):
    found = {path: module for path, module in model.named_modules()
             if re.search(r"(layers|h|blocks)\.0(\.(mlp|ffn))?$", path)}
    layer = min(found.items(), key=lambda item: len(item[0]))[1]
    if len(found) == 1:          # opt, xglm, biogpt: no module of its own
        return layer.fc2(layer.activation_fn(layer.fc1(states)))
    mlp = max(found.items(), key=lambda item: len(item[0]))[1]
    if model.config.model_type in ("bloom", "mpt"):
        return mlp(states, torch.zeros_like(states))
    return mlp(states)
