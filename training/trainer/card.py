"""The model card of a result, and the lines of Python that load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.records import Quality
from training.settings import Config

QUALITY = tuple(field.name for field in dataclasses.fields(Quality) if field.name != "context_curve")


def load_lines(folder: str, kind: str, base: str = "", rope: Mapping[str, Any] | None = None,
               context_tokens: int = 0) -> str:
    """Python that loads a result with plain Transformers or PEFT. `rope`: YaRN parameters the base needs."""
    if kind == "model":
        return (f'from transformers import AutoModelForCausalLM, AutoTokenizer\n'
                f'model, tokenizer = (AutoModelForCausalLM.from_pretrained("{folder}"), '
                f'AutoTokenizer.from_pretrained("{folder}"))')
    if not rope:
        return (f'from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer\n'
                f'model, tokenizer = (AutoPeftModelForCausalLM.from_pretrained("{folder}"), '
                f'AutoTokenizer.from_pretrained("{folder}"))')
    return (f'from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer\n'
            f'base = AutoModelForCausalLM.from_pretrained(\n'
            f'    "{base}", max_position_embeddings={context_tokens}, rope_parameters={dict(rope)!r})\n'
            f'model, tokenizer = (PeftModel.from_pretrained(base, "{folder}"), '
            f'AutoTokenizer.from_pretrained("{folder}"))')


def card(config: Config, kind: str, loading: str, facts: Mapping[str, Any],
         dataset: Mapping[str, Any], rope: Mapping[str, Any] | None) -> str:
    """README.md of a result: from what and on what it was trained, its figures, how to load it."""
    base = config["model.base"]
    licence = licence_of(base)
    made_from = ("from scratch, with a tokenizer trained on the repository" if base == "embedded"
                 else f"from {base}")
    if config["model.kv_heads"]:
        made_from += f", its key and value heads pooled to {config['model.kv_heads']}"
    if config["model.quantization"] == "nf4":
        made_from += " stored in NF4"
    what = "LoRA adapter" if kind == "adapter" else "model"
    apart = bool(config["model.kv_heads"]) and kind == "adapter"
    lines = [*_front("" if apart else base, kind, licence), f"# {config['run.name'] or 'code model'}", "",
             f"A {what} for code, trained with ELITE {made_from}.", "",
             "```python", loading, "```", "",
             "| | |", "|---|---|",
             f"| Base | {base} |",
             f"| Licence of the base | {licence or 'see the base model'} |",
             f"| Repository | {Path(config['dataset.repo']).name or '-'} |",
             f"| Context | {config['dataset.context_tokens']:,} tokens |",
             *(f"| {name} | {value} |" for name, value in _flat(_figures(facts, dataset))), ""]
    if rope:
        native = rope["original_max_position_embeddings"]
        lines += [f"The base knows {native:,} tokens; the rest is reached with YaRN. "
                  "Without these `rope_parameters` positions mean something else to the model:", "",
                  f"    {dict(rope)!r}", ""]
    if apart:
        lines += [f"The adapter fits the base with {config['model.kv_heads']} key and value heads only, not "
                  f"{base} itself. That base is the folder `base` beside this one, and `adapter_config.json` "
                  "names it: keep the two together, and write the new place there when they move. Heads were "
                  "pooled by their mean (Ainslie et al. 2023, arXiv:2305.13245).", ""]
    lines += ["It was trained on one repository and repeats that code's style, and may repeat its text; the "
              "licence of that code applies to what it repeats.", ""]
    return "\n".join(lines)


def _front(base: str, kind: str, licence: str) -> list[str]:
    """The metadata block that model hubs read; a local folder is no name there, nor is a pooled base."""
    lines = ["---", f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
             "pipeline_tag: text-generation", "tags: [code]"]
    if base and base != "embedded" and not Path(base).exists():
        lines.append(f"base_model: {base}")
        lines += [f"license: {licence}"] if licence else []
    return [*lines, "---", ""]


def licence_of(base: str) -> str:
    """The registry's licence of a base, by hub id or short name; empty when it is not listed."""
    from training import models

    known = models.registry()
    found = [entry.licence for name, entry in known.items() if base in (name, entry.location)]
    return found[0] if found and base != "embedded" else ""


def _figures(facts: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The dataset's counts and the run's figures; of an evaluation, `records.Quality`'s single numbers."""
    counts = {name: manifest[name] for name in ("files", "tokens", "windows") if name in manifest}
    kept = {name: {key: value.get(key) for key in QUALITY} if name in ("before", "after") and value else value
            for name, value in facts.items()}
    return {"dataset": counts, **kept}


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested figures as rows, numbers readable, what was not measured left out.

    >>> _flat({"steps": 1200, "after": {"loss": 1.23456, "exact_match": None}})
    [('steps', '1,200'), ('after loss', '1.235')]
    """
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        title = f"{before}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{title} ")
        elif isinstance(value, bool | str) and value != "":
            rows.append((title, " ".join(str(value).split())))
        elif isinstance(value, int):
            rows.append((title, f"{value:,}"))
        elif isinstance(value, float):
            rows.append((title, f"{value:,.4g}"))
    return rows
