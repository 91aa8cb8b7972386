"""Every configuration key as a value, its source and its reason, for one window length on one machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from training.families import UNFUSED
from training.longcontext.policy import StreamPolicy
from training.planning import mix
from training.planning.evidence import Evidence
from training.planning.recipe import DEPENDENT, PRESET, optimizer_choices, optimizer_name
from training.planning.situation import Situation
from training.planning.streaming import stream_choices
from training.planning.tiers import tier_of
from training.planning.timing import window_s, windows_in
from training.planning.tuning import AdvancedOptimizer, UltraAdvancedOptimizer
from training.planning.tuning.advanced import LORA_ALPHA, Work
from training.records import Choice
from training.settings import KEYS, contradictions

EMBEDDED_CONTEXT = 512           # beyond 128 tokens a model this small gains nothing (docs/research.md)
EMBEDDED_BUDGET_S = 150.0        # of 300 s: profile 15, trial 15, dataset 25, imports 10, evaluations 20
EMBEDDED_EPOCHS = 8
CPU_CONTEXT = 1024
CPU_BUDGET_S = 1800.0
CPU_STEPS = 20                   # least updates within the budget of a base on a CPU, where windows allow
BASE_EPOCHS = 3                  # epochs over a small repository flatten near 4 (docs/research.md)
SAVE_EVERY_S = 300
MOST_SAVING = 0.02              # of the time between two saves that one may take, once it was measured
LOGITS_BYTES = 512 << 20         # of one chunk's logits and their gradients


_EMBEDDED = {used: {key.name: Choice(key.default, "preset", about) for key in KEYS
                    if key.name.startswith("embedded.")}
             for used, about in ((True, "about 4 M parameters, trained in minutes"),
                                 (False, "unused: not that base"))}


@dataclass(frozen=True, kw_only=True)
class Window:
    """The window a plan is made for, and why. `recompute`: the plain step recomputes activations. `stream`:
    the streamed step's policy, or None for the plain step; `step_why`: why that step."""

    context_tokens: int
    target_tokens: int
    rank: int
    source: str
    why: str
    recompute: bool = False
    stream: StreamPolicy | None = None
    step_why: str = ""
    stream_why: Mapping[str, str] = field(default_factory=dict)


class Chooser(Mapping[str, Any]):
    """Collects choices; a key the user set keeps the user's value. Reads as a mapping of the values so far.

    `described`: the machine is a description, so what would be "measured" is "preset". `evidence`: what was
    measured here about keys, which holds before what is planned for them.
    """

    def __init__(self, user: Mapping[str, Any], described: bool = False, evidence: tuple[Evidence, ...] = ()):
        self.user, self.described = user, described
        self.evidence = {name: each for each in evidence for name in each.keys}
        self.choices: dict[str, Choice] = {}

    def put(self, name: str, value: Any, source: str, why: str) -> Any:
        """Record a choice and return the value that holds."""
        if name in self.user:
            self.choices[name] = Choice(self.user[name], "user", "set by the user")
        elif (known := self.evidence.get(name)) and known.holds(name, value):
            self.force(name, known.keys[name], "measured", known.why)
        else:
            self.force(name, value, source, why)
        return self.choices[name].value

    def take(self, found: Mapping[str, Choice]) -> None:
        """Record choices made elsewhere."""
        renamed = self.described and any(choice.source == "measured" for choice in found.values())
        if not renamed and found.keys().isdisjoint(self.user) and found.keys().isdisjoint(self.evidence):
            self.choices.update(found)
            return
        for name, choice in found.items():
            self.put(name, choice.value, choice.source, choice.why)

    def force(self, name: str, value: Any, source: str, why: str) -> None:
        """Record a choice that already weighed what the user set."""
        known = "preset" if self.described and source == "measured" else source
        self.choices[name] = Choice(value, known, why)

    def __getitem__(self, name: str) -> Any:
        return self.choices[name].value

    def __iter__(self) -> Any:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)


def window_of(situation: Situation, context: int, source: str, why: str, recompute: bool = False) -> Window:
    """The window for a context: its tier's target and rank; below the table all of it is target."""
    number = tier_of(context, situation.tiers)
    row = situation.tiers[max(0, number - 1)]
    return Window(context_tokens=context, target_tokens=row.target_tokens if number else context,
                  rank=row.lora_rank, source=source, why=why, recompute=recompute)


def derive(situation: Situation, window: Window) -> dict[str, Choice]:
    """A choice for every key of settings.KEYS, with what was measured as far as the rest of the plan can
    honour it: what contradicts that is left out, the smallest gain first."""
    kept = situation.evidence
    made = _derive(situation, window, kept)
    while kept and _contradict(made):
        fewer = [kept[:index] + kept[index + 1:] for index in reversed(range(len(kept)))]
        plans = ((some, _derive(situation, window, some)) for some in fewer)
        kept, made = next(((some, plan) for some, plan in plans if not _contradict(plan)),
                          (fewer[0], _derive(situation, window, fewer[0])))
    return made


def _contradict(made: Mapping[str, Choice]) -> bool:
    return bool(contradictions({name: choice.value for name, choice in made.items()}))


def _derive(situation: Situation, window: Window, evidence: tuple[Evidence, ...]) -> dict[str, Choice]:
    chooser = Chooser(situation.user, situation.profile.source == "preset", evidence)
    chooser.take(PRESET)
    _device(chooser, situation)
    _model(chooser, situation, window)
    _adapter(chooser, situation, window)
    _dataset(chooser, situation, window)
    _deepspeed(chooser, situation, window)
    _memory_savers(chooser, situation, window)
    _evaluation(chooser, situation)
    each_s = window_s(situation.base.shape, chooser, situation.profile)
    _batch(chooser, situation, each_s)
    _ultra(chooser, situation, each_s)
    chooser.take({"optimizer.name": optimizer_name(chooser, situation)})
    chooser.take(optimizer_choices(chooser, situation))
    _length(chooser, situation, each_s)
    _rest(chooser, situation)
    for name, (value, switch, off, used, unused) in DEPENDENT.items():
        chooser.put(name, value, "preset", unused if chooser[switch] == off else used)
    return {key.name: chooser.choices[key.name] for key in KEYS}


def _device(chooser: Chooser, situation: Situation) -> None:
    chooser.take(AdvancedOptimizer(situation.profile, situation.user).devices())


def _model(chooser: Chooser, situation: Situation, window: Window) -> None:
    base, embedded = situation.base, situation.embedded
    native = window.context_tokens if embedded else base.shape.native_context
    user_base = situation.request.base_model not in ("", "auto")
    chooser.force("model.base", base.location, "user" if user_base else "measured",
                  f"{base.name}, {base.shape.total_parameters / 1e6:,.1f} M parameters, {base.licence}")
    newest = "unused" if embedded else "the newest in the cache or on the hub"
    chooser.put("model.revision", "", "derived", newest)
    chooser.put("model.context_native", native, "derived",
                "made for this window" if embedded else "from the base's config.json")
    factor = window.context_tokens / native
    rounded = max(1.0, math.ceil(2 * factor) / 2)
    chooser.put("model.rope_factor", rounded, "derived",
                f"YaRN: {window.context_tokens:,} tokens are {factor:.3g} times the native {native:,}"
                if rounded > 1 else f"{window.context_tokens:,} tokens are within the native {native:,}")
    _precision(chooser, situation)


def _precision(chooser: Chooser, situation: Situation) -> None:
    embedded = situation.embedded
    tuning = AdvancedOptimizer(situation.profile, situation.user)
    chooser.take({"model.dtype": tuning.precision(chooser["device.kind"], embedded)})
    lora = chooser.put("lora.enabled", not embedded, "derived",
                       "trained from scratch, so every weight is trained" if embedded else
                       f"a small adapter on {situation.base.shape.total_parameters / 1e9:.2f} B weights")
    works, why = situation.works("bitsandbytes_4bit")
    if embedded or not lora:
        quantization, source, reason = "none", "derived", "trained weights are not quantized"
    elif works:
        quantization, source, reason = "nf4", "measured", "4.127 bits a frozen weight instead of 16 (QLoRA)"
    else:
        quantization, source, reason = "none", "measured", f"4-bit layers do not work here: {why}"
    chooser.put("model.quantization", quantization, source, reason)
    chooser.put("model.double_quant", True, "derived", "0.37 bits a weight less (arXiv:2305.14314)")
    _kernel(chooser, situation)


def _kernel(chooser: Chooser, situation: Situation) -> None:
    family = situation.base.shape.family
    if family in UNFUSED:
        chooser.put("model.attention", "eager", "derived",
                    f"transformers offers {family} no fused kernel; the streamed step brings its own")
        return
    flash, why_not = situation.works("flash_attention_2")
    use_flash = (chooser["device.kind"] == "cuda" and flash and chooser["model.dtype"] != "float32"
                 and "flash_attention_2" in situation.profile.supports)
    chooser.put("model.attention", "flash_attention_2" if use_flash else "sdpa", "measured",
                "the kernel works on this GPU" if use_flash else
                f"PyTorch's fused kernel; FlashAttention-2: {why_not}" if chooser["device.kind"] == "cuda"
                else "PyTorch's fused CPU kernel, memory linear in the window")


def _adapter(chooser: Chooser, situation: Situation, window: Window) -> None:
    lora = chooser["lora.enabled"]
    rank = chooser.put("lora.rank", window.rank, "preset",
                       f"configs/tiers.yaml at {window.context_tokens:,} tokens" if lora else
                       "unused: no adapter")
    chooser.put("lora.alpha", LORA_ALPHA, "preset",
                f"QLoRA's, whose learning rate is used; alpha / rank is {LORA_ALPHA / rank:.3g}" if lora else
                "unused: no adapter")
    chooser.put("lora.dropout", 0.0, "derived",
                "none, so that recomputed activations equal the first" if lora else "unused: no adapter")
    chooser.put("lora.targets", list(situation.base.lora_targets) if lora else [], "preset",
                "every linear layer (arXiv:2305.14314, section 4)" if lora else "unused: no adapter")


def _dataset(chooser: Chooser, situation: Situation, window: Window) -> None:
    facts = situation.facts
    chooser.choices["dataset.repo"] = Choice(facts.path, "user", f"{facts.code_files:,} code files, "
                                             f"about {situation.repository_tokens:,} tokens")
    chooser.force("dataset.context_tokens", window.context_tokens, window.source, window.why)
    packed = window.target_tokens >= window.context_tokens
    chooser.put("dataset.target_tokens", window.target_tokens, "preset",
                "files are packed and every token is a target" if packed else
                f"configs/tiers.yaml; the other {window.context_tokens - window.target_tokens:,} are context")
    share, why = mix.held_out(facts.code_files)
    chooser.put("dataset.held_out_share", share, "derived", why)
    chooser.put("dataset.max_file_bytes", 1 << 20, "preset", "larger source files are mostly generated")
    _mix(chooser, situation)


def _mix(chooser: Chooser, situation: Situation) -> None:
    """What windows are made of, and what is held out."""
    base, facts = situation.base, situation.facts
    chooser.put("dataset.also", [], "preset", "one repository; `--repo` may be given again")
    chooser.put("dataset.split", "auto", "preset",
                f"the newest files by commit time, as git's {facts.commits:,} commits tell" if facts.commits
                else "git tells no times here: clusters of like files, drawn by the seed")
    replay = chooser.put("dataset.replay", "", "preset", "no second corpus was named")
    planned = mix.shares(sentinels=bool(base.fim), base=base.name, embedded=situation.embedded,
                         is_packed=mix.packed(chooser), commits=facts.commits, replay=str(replay))
    for name, (share, why) in planned.items():
        chooser.put(name, share, "derived", why)
    _fitted(chooser)
    stages = chooser.put("dataset.curriculum_stages", 1, "preset",
                         "windows are as long as they get from the first step on; shorter ones first were "
                         "not measured to help")
    chooser.put("dataset.curriculum_share", 0.3, "preset",
                "unused: one stage" if stages == 1 else "the shorter stages end within the first epoch")


def _fitted(chooser: Chooser) -> None:
    """Where the user set one of two shares of the files, the other leaves it its room."""
    for name, other in (("fim_share", "whole_share"), ("whole_share", "fim_share")):
        taken = float(chooser[f"dataset.{other}"])
        if f"dataset.{other}" in chooser.user and chooser[f"dataset.{name}"] + taken > 1:
            chooser.put(f"dataset.{name}", round(1 - taken, 4), "derived",
                        f"what dataset.{other} {taken:g} leaves")


def _deepspeed(chooser: Chooser, situation: Situation, window: Window) -> None:
    stage, why = _stage(chooser, situation, window)
    stage = chooser.put("deepspeed.stage", stage, "derived", why)
    offload = stage > 0 and chooser["device.kind"] == "cuda" and situation.works("deepspeed_cpu_adam")[0]
    chooser.put("deepspeed.offload_optimizer", offload, "derived",
                "its state is read once an update and leaves device memory to the window" if offload else
                "plain Python keeps it on the device" if not stage else "DeepSpeed's CPU Adam serves GPUs "
                                                                        "only here")
    chooser.put("deepspeed.offload_parameters", False, "derived", "the weights fit the devices")


def _stage(chooser: Chooser, situation: Situation, window: Window) -> tuple[int, str]:
    count, kind = int(chooser["device.count"]), chooser["device.kind"]
    works, why_not = situation.works("deepspeed")
    if not works and count == 1:
        return 0, f"DeepSpeed does not work here ({why_not}); one device needs none"
    if count > 1:
        weights = situation.base.shape.total_parameters * 4
        if kind == "cuda" and not chooser["lora.enabled"] and weights > situation.device_bytes / 2:
            return 3, f"{count} devices share out the weights, which fill more than half of one"
        return 2, f"{count} devices share out gradients and optimizer state"
    tier = tier_of(window.context_tokens, situation.tiers)
    if situation.embedded or (kind == "cpu" and not window.stream):
        return 0, "one process on a CPU, or a small model, gains nothing from ZeRO"
    if tier <= 2:
        return 0, f"one device at tier {tier} needs no DeepSpeed"
    if kind == "cpu":
        return 2, f"tier {tier} runs under DeepSpeed on every machine; one CPU process gains nothing"
    return 2, f"tier {tier}: optimizer state moves to the host"


def _memory_savers(chooser: Chooser, situation: Situation, window: Window) -> None:
    if window.stream:
        why = "the streamed step computes activations again by itself"
    elif situation.device == "cpu" and situation.embedded and not window.recompute:
        why = "memory suffices, and recomputing would cost a third of the time"
    else:
        why = "only each layer's input is kept" if window.recompute else "every layer's activations fit"
    chooser.put("training.checkpointing", window.recompute, "derived", why)
    fitting = LOGITS_BYTES // (16 * situation.base.shape.vocab)
    chunk = max(64, min(1024, 1 << max(0, fitting.bit_length() - 1)))
    chooser.put("training.loss_chunk_tokens", chunk, "derived",
                f"logits of {chunk:,} x {situation.base.shape.vocab:,} with their gradients take about "
                f"{16 * chunk * situation.base.shape.vocab / 2**20:,.0f} MiB")
    for name, (value, why) in stream_choices(window.stream, window.step_why, window.stream_why).items():
        chooser.put(name, value, "derived", why)


def _evaluation(chooser: Chooser, situation: Situation) -> None:
    slow = situation.device == "cpu" and not situation.embedded
    chooser.put("evaluation.windows", 8 if slow else 32, "derived",
                "few, since reading is slow here" if slow else "enough for a loss within about 2 %")
    chooser.put("evaluation.completions", 2 if slow else 8, "derived",
                "few, since writing is slow here" if slow else "a look at what it writes, not a score")
    chooser.put("evaluation.completion_tokens", 48, "preset", "about four lines of code")
    chooser.put("evaluation.context_targets", 0 if slow else 8, "derived",
                "none, since reading is slow here" if slow else
                "held-out targets behind composed, random and foreign context of growing length")


def _batch(chooser: Chooser, situation: Situation, each_s: float) -> None:
    """`each_s`: seconds of a window's forward and backward, here and below."""
    scratch = situation.embedded and not chooser["stream.chunk_tokens"]
    work = Work(windows=windows_in(situation.facts.code_bytes, chooser), devices=int(chooser["device.count"]),
                context_tokens=int(chooser["dataset.context_tokens"]), scratch=scratch)
    if chooser["device.kind"] == "cpu" and not scratch:
        granted_s = min(CPU_BUDGET_S, situation.hours * 3600)
        work = replace(work, affordable=granted_s / CPU_STEPS / each_s if each_s else math.inf,
                       affordable_why=f"windows take {each_s:,.0f} s each, so that {CPU_STEPS} updates fit")
    chooser.take(AdvancedOptimizer(situation.profile, situation.user).batch(work))


def _ultra(chooser: Chooser, situation: Situation, each_s: float) -> None:
    """Warm-up, allocator, pool, clipping, kernel choice."""
    micro_s = each_s * int(chooser["training.micro_batch"])
    chooser.take(UltraAdvancedOptimizer(situation.profile, situation.user).choices(chooser, micro_s))


def _length(chooser: Chooser, situation: Situation, per_window_s: float) -> None:
    """Epochs and seconds. On a CPU and for the embedded model the seconds decide, unless a length was set."""
    chooser.put("training.max_steps", 0, "derived", "the epochs decide")
    budget_s, why = _budget(chooser, situation)
    budget_s = chooser.put("training.budget_s", budget_s, "derived", why)
    most = EMBEDDED_EPOCHS if situation.embedded else BASE_EPOCHS
    epoch_s = windows_in(situation.facts.code_bytes, chooser) * per_window_s
    if budget_s and math.isfinite(epoch_s):
        epochs = math.ceil(budget_s / epoch_s)
        why = f"an epoch takes about {epoch_s:,.0f} s of {budget_s:,.0f} granted"
    else:
        epochs, why = most, "more epochs over one repository add little (they flatten near 4)"
    chooser.put("training.epochs", max(1, min(most, epochs)), "derived" if budget_s else "preset", why)
    _saving(chooser, per_window_s)


def _budget(chooser: Chooser, situation: Situation) -> tuple[float, str]:
    if "training.epochs" in situation.user or chooser["training.max_steps"]:
        return 0.0, "the length was set"
    granted_s = situation.hours * 3600
    if situation.embedded:
        return min(EMBEDDED_BUDGET_S, granted_s), "the whole command ends within five minutes"
    if chooser["device.kind"] == "cpu" and situation.request.max_hours is None:
        return CPU_BUDGET_S, "half an hour on a CPU, unless --epochs or --max-hours says otherwise"
    return 0.0, "the epochs decide"


def _saving(chooser: Chooser, per_window_s: float) -> None:
    step_s = per_window_s * int(chooser["training.micro_batch"]) * int(chooser["training.accumulation"])
    every = int(SAVE_EVERY_S / step_s) if math.isfinite(step_s) and step_s else 100
    chooser.put("training.save_steps", max(1, min(1000, every)), "derived",
                f"about every {SAVE_EVERY_S // 60} minutes" if every else "a step takes longer than that")
    chooser.put("training.eval_steps", 0, "derived", "before and after the training")
    chooser.put("training.keep_checkpoints", 2, "preset", "the newest, and one before it in case")


def _rest(chooser: Chooser, situation: Situation) -> None:
    name = f"{situation.base.name}-{situation.facts.name or 'repository'}"
    chooser.put("run.name", name, "derived", "base and repository")
    chooser.put("training.trial", True, "preset", "real steps check the plan before hours are spent")
    chooser.put("run.seed", 1234, "preset", "the same run twice gives the same weights")
    chooser.take(_EMBEDDED[situation.embedded])

