"""Every configuration key: its name, type, limits and meaning. Rules between keys are in `settings.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Key:
    """One configuration key. `low` and `high` are inclusive; `choices` lists the only values allowed."""

    name: str
    kind: type[Any]
    default: Any
    about: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


def _key(name: str, default: Any, about: str, low: float | None = None, high: float | None = None,
         choices: tuple[str, ...] = ()) -> Key:
    return Key(name=name, kind=type(default), default=default, about=about, low=low, high=high,
               choices=choices)


KEYS: tuple[Key, ...] = (
    _key("run.name", "", "Name of the model and of its run directory."),
    _key("run.seed", 1234, "Seed of every random choice.", 0, 2**31 - 1),
    _key("model.base", "embedded", "Hub id, local folder, or `embedded`."),
    _key("model.revision", "", "Commit of the hub repository; empty takes the newest."),
    _key("model.context_native", 4096, "Context the base was trained for, tokens.", 1),
    _key("model.rope_factor", 1.0, "YaRN factor on the rotary embedding; 1 leaves it as it is.", 1.0),
    _key("model.quantization", "none", "Storage of the frozen weights.", choices=("none", "nf4")),
    _key("model.double_quant", True, "Quantize the NF4 block constants too (0.37 bits a parameter less)."),
    _key("model.dtype", "float32", "Type of the computation.", choices=("float32", "bfloat16", "float16")),
    _key("model.attention", "sdpa", "Attention kernel.", choices=("sdpa", "flash_attention_2", "eager")),
    _key("model.kv_heads", 0, "Key/value heads that the base's are pooled to by their mean; 0: as it is.", 0),
    _key("model.heal_steps", 0, "Updates before the run that train pooled keys and values only.", 0),
    _key("model.fused_kernels", False, "Liger's Triton kernels for norms, rotary embedding and MLP."),
    _key("embedded.vocab_tokens", 4096, "Vocabulary of the embedded model's BPE, tokens.", 300, 65536),
    _key("embedded.hidden", 256, "Width of the embedded model.", 32, 4096),
    _key("embedded.layers", 4, "Layers of the embedded model.", 1, 64),
    _key("embedded.heads", 4, "Attention heads of the embedded model.", 1, 64),
    _key("embedded.kv_heads", 4, "Key/value heads of the embedded model.", 1, 64),
    _key("embedded.mlp", 704, "Width of the embedded model's MLP.", 32, 16384),
    _key("lora.enabled", False, "Train a LoRA adapter on a frozen base; false trains every weight."),
    _key("lora.rank", 16, "LoRA rank.", 1, 1024),
    _key("lora.alpha", 32, "LoRA scale; the update is multiplied by alpha / rank.", 1, 4096),
    _key("lora.dropout", 0.0, "Dropout on the adapter's input.", 0.0, 0.9),
    _key("lora.plus_ratio", 1.0, "Learning rate of an adapter's B as a multiple of A's (LoRA+).", 1.0, 64.0),
    _key("lora.rank_stabilized", False, "Multiply the update by alpha / sqrt(rank) (rsLoRA)."),
    _key("lora.dora", False, "Train each output's magnitude apart from its direction (DoRA)."),
    _key("lora.targets", [], "Names of the linear layers that get an adapter; empty takes the registry's."),
    _key("dataset.repo", "", "Folder or git URL the windows come from."),
    _key("dataset.also", [], "More repositories, folders or git URLs, as `--repo` given again; each "
         "one's paths start with its name."),
    _key("dataset.context_tokens", 4096, "Length of a window, context and target together, tokens.", 1),
    _key("dataset.target_tokens", 512, "Tokens at the end of a cross-file window that are trained on.", 1),
    _key("dataset.held_out_share", 0.05, "Share of the files kept for evaluation.", 0.001, 0.5),
    _key("dataset.split", "auto", "What is held out: the newest files by commit time, or clusters of like "
         "files drawn at random; auto: by time where git knows it.", choices=("auto", "time", "cluster")),
    _key("dataset.fim_share", 0.25, "Of the files' tokens, the share in code files that stand alone with a "
         "middle to fill in, if the base can.", 0.0, 1.0),
    _key("dataset.whole_share", 0.15, "Of the files' tokens, the share in full windows of whole files, "
         "dependencies first; the rest has its context composed per target.", 0.0, 1.0),
    _key("dataset.fim_rate", 0.5, "Of the code targets with composed context, the share that also has a "
         "middle to fill in.", 0.0, 1.0),
    _key("dataset.packing", True, "Several short files share a window; false: each has one by itself."),
    _key("dataset.commit_share", 0.1, "Of all target tokens, the share from commits: message and old text, "
         "then the patch.", 0.0, 0.9),
    _key("dataset.replay", "", "A second corpus, folder or git URL, mixed in against forgetting."),
    _key("dataset.replay_share", 0.2, "Of all target tokens, the share from the second corpus, if there is "
         "one.", 0.0, 0.9),
    _key("dataset.curriculum_stages", 1, "Stages of growing context, each twice the one before; 1: full "
         "context from the start.", 1, 16),
    _key("dataset.curriculum_share", 0.3, "Share of the first epoch that the shorter stages take.", 0.0, 1.0),
    _key("dataset.curriculum_pace", "fixed", "When a stage ends: at its share, or earlier, once the loss no "
         "longer falls (dynamic).", choices=("fixed", "dynamic")),
    _key("dataset.max_file_bytes", 1 << 20, "Larger files are left out, bytes.", 1),
    _key("training.epochs", 3, "Passes over the training windows.", 1, 1000),
    _key("training.max_steps", 0, "Ends the run at this step; 0: by epochs.", 0),
    _key("training.budget_s", 0.0, "Seconds of training steps granted; the number of steps is fitted to the "
         "measured speed of the first ones. 0: no limit.", 0.0),
    _key("training.trial", True, "Take a few real steps before the run, to measure its memory and time."),
    _key("training.micro_batch", 1, "Windows a device computes at once.", 1, 4096),
    _key("training.accumulation", 8, "Micro-batches summed before an update.", 1, 4096),
    _key("training.learning_rate", 2e-4, "Highest learning rate.", 1e-8, 1.0),
    _key("training.schedule", "cosine", "Course of the learning rate.",
         choices=("cosine", "linear", "constant", "one_cycle")),
    _key("training.warmup_share", 0.03, "Share of the steps with a rising learning rate.", 0.0, 0.5),
    _key("training.min_lr_share", 0.1, "Last learning rate as a share of the highest.", 0.0, 1.0),
    _key("training.weight_decay", 0.01, "AdamW's weight decay on matrices.", 0.0, 1.0),
    _key("training.clip_norm", 1.0, "Gradients are scaled down to this norm; 0: never.", 0.0),
    _key("training.adaptive_clip", 0.0, "Each unit's gradient is scaled down to this share of its weights' "
         "norm (AGC); 0: never.", 0.0, 10.0),
    _key("training.gradient_noise", 0.0, "Variance of Gaussian noise on the first gradient; it falls with "
         "the steps. 0: none.", 0.0, 10.0),
    _key("training.label_smoothing", 0.0, "Share of the target's probability that is spread over the whole "
         "vocabulary; in the training loss only, which metrics.jsonl then shows so.", 0.0, 0.5),
    _key("training.averaging", "none", "Average of the weights that is evaluated beside the last ones; the "
         "better of the two is the result.", choices=("none", "ema", "swa")),
    _key("training.ema_decay", 0.99, "Share of the average that each update keeps (ema).", 0.0, 0.99999),
    _key("training.averaging_start", 0.75, "Share of the updates before averaging begins.", 0.0, 0.99),
    _key("training.spike_sigma", 6.0, "An update whose loss lies so many deviations above the last ones is "
         "skipped, and a second one in a row rolls back; 0: never.", 0.0, 100.0),
    _key("training.spike_window", 128, "Updates that a loss is compared with.", 8, 100000),
    _key("training.checkpointing", True, "Recompute activations in the backward pass."),
    _key("training.kept_layers", 0, "Of the layers that are recomputed, so many keep their activations.", 0),
    _key("training.kept_inputs", 0, "Layer inputs kept at once where activations are recomputed; the "
         "others are computed again too (Griewank). 0: every layer's.", 0),
    _key("training.compile", False, "Compile each decoder layer with torch.compile."),
    _key("training.loss_chunk_tokens", 1024, "Tokens whose logits exist at once in the loss; 0: all.", 0),
    _key("training.eval_steps", 0, "Evaluate every so many steps; 0: before and after only.", 0),
    _key("training.save_steps", 100, "Checkpoint every so many steps; 0: at the end and when stopped.", 0),
    _key("training.keep_checkpoints", 2, "Newest checkpoints kept.", 1, 1000),
    _key("training.keep_best", True, "Keep the checkpoint with the lowest held-out loss, too."),
    _key("optimizer.name", "adamw", "Optimizer.",
         choices=("adamw", "adamw_8bit", "paged_adamw_8bit", "muon")),
    _key("optimizer.beta1", 0.9, "Decay of the first moment.", 0.0, 0.9999),
    _key("optimizer.beta2", 0.95, "Decay of the second moment.", 0.0, 0.99999),
    _key("optimizer.eps", 1e-8, "Added to the root of the second moment.", 0.0, 1.0),
    _key("optimizer.lookahead_steps", 0, "Updates between two moves of Lookahead's slow weights; 0: none.", 0,
         10000),
    _key("optimizer.lookahead_share", 0.5, "Share of the way that the slow weights move.", 0.0, 1.0),
    _key("deepspeed.stage", 0, "ZeRO stage; 0: without DeepSpeed.", 0, 3),
    _key("deepspeed.offload_optimizer", False, "Keep the optimizer's state in host memory."),
    _key("deepspeed.offload_parameters", False, "Keep parameters in host memory (stage 3)."),
    _key("parallel.compression", "none", "How gradients travel between devices without DeepSpeed.",
         choices=("none", "powersgd")),
    _key("parallel.compression_rank", 4, "Rank of PowerSGD's factors.", 1, 256),
    _key("parallel.ring", 1, "Devices that share one window, each a part of its tokens (ring attention).", 1,
         1024),
    _key("device.kind", "cpu", "Where the model is trained.", choices=("cpu", "cuda")),
    _key("device.count", 1, "Devices, one process each.", 1, 1024),
    _key("device.threads", 0, "CPU threads of a process; 0: the machine's cores shared out.", 0, 4096),
    _key("device.gpus", "", "Which GPUs, by index (`0,2`); empty: the first ones."),
    _key("device.allocator", "default", "How memory is taken. On a GPU: segments that grow, or `split`, "
         "which keeps blocks above 512 MiB whole. On a CPU `mapped` gives blocks from 1 MiB on back at once.",
         choices=("default", "expandable", "split", "mapped")),
    _key("device.memory_share", 0.0, "Share of a GPU's memory that a process may take; 0: all.", 0.0, 1.0),
    _key("device.pool_share", 0.0, "Share of the planned device memory taken at the start; 0: none.", 0.0,
         1.0),
    _key("device.warmup_steps", 0, "Steps on made-up windows before the first real one; they change no "
         "weight.", 0, 100),
    _key("device.defragment_steps", 0, "Every so many updates idle device memory is given back when it is a "
         "fifth or more of what is reserved; 0: never.", 0),
    _key("device.cudnn_autotune", False, "cuDNN tries its convolution algorithms and keeps the fastest."),
    _key("device.matmul_precision", "highest", "Factors of float32 matrix products: float32, TF32, or bf16.",
         choices=("highest", "high", "medium")),
    _key("evaluation.windows", 32, "Held-out windows an evaluation reads.", 1),
    _key("evaluation.context_targets", 8, "Held-out targets whose loss is taken at growing length of "
         "composed, random and foreign context.", 0, 1000),
    _key("evaluation.completions", 8, "Held-out spans completed before and after training.", 0, 10000),
    _key("evaluation.completion_tokens", 48, "Longest completion, tokens.", 1, 4096),
    _key("stream.chunk_tokens", 0, "Queries of one call of a decoder layer in the streamed step; 0: the "
         "plain step.", 0),
    _key("stream.page_tokens", 0, "Keys of one attention kernel call; 0: as many as queries.", 0),
    _key("stream.mlp_tokens", 0, "Positions an MLP works on at once inside a chunk; 0: the whole chunk.", 0),
    _key("stream.inputs", "device", "Where layer inputs are kept for the backward pass.",
         choices=("device", "pinned", "pageable", "disk")),
    _key("stream.keep_every", 1, "Of so many layers one input is kept; the others are computed again.", 1),
    _key("stream.encoding", "exact", "How kept layer inputs are stored; int8 and int4 are lossy.",
         choices=("exact", "int8", "int4")),
    _key("stream.pages", "device", "Where the keys and values of the layer being worked on live.",
         choices=("device", "pinned", "pageable")),
    _key("stream.attention", "recompute", "Compute attention again in the backward pass, or keep its output.",
         choices=("recompute", "keep")),
    _key("stream.keys", "recompute", "Compute keys and values again in the backward pass, or keep them.",
         choices=("recompute", "keep")),
    _key("stream.weights", "resident", "Frozen weights stay on the device, or visit it layer by layer.",
         choices=("resident", "streamed")),
    _key("stream.overlap", True, "Copies run beside the computation; false: they wait for each other."),
)
BY_NAME = {key.name: key for key in KEYS}
SECTIONS = tuple(dict.fromkeys(key.name.split(".")[0] for key in KEYS))
