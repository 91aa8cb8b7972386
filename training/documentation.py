"""The generated pages of docs/: settings, the tables in `configs/`, and what the ledger measured.

    python -m training.documentation        writes them; a test compares them with what is committed
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from training import (
    configuration,
    ledger_tables,
    models,
    peer_tables,
    planner_tables,
    reliability_tables,
    stream_tables,
)
from training.hardware.profiler import from_preset
from training.planning import outlook, policies, presets, tables
from training.planning.calculator import OptimalConfigCalculator
from training.records import GIB, Request, TierRow

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("qwen2.5-coder-0.5b", "phi-2", "qwen2.5-coder-7b", "qwen2.5-coder-14b")
# Machines whose tiers are shown one by one, with this base.
LADDERS, LADDER_BASE = ("rtx-2060-super", "rtx-3090"), "phi-2"
REQUEST = Request(repo="example", output="runs/example", model_name="example")


MODELS = """# Base models

Generated from `configs/models.yaml` by `make docs`. `--base-model` takes a name of this table, any other
hub id, a local folder, `embedded`, or `auto`, which picks by measured memory and speed and says why.

{table}

Parameters are computed from each model's config and agree with the published counts within 1 %. "Weights
in NF4" counts the quantized linear layers with their constants, and embeddings and head in 16 bit.

A context beyond the native one is reached with YaRN, and the plan prints the factor and the reason. A model
without rotary embeddings is refused there.

## What each machine reaches

Tier, context in tokens, and hours of training, as `python3 elite_train.py plan --all` prints them; `s` is the
streamed step, `-` no plan. For a repository of {tokens:,} tokens and 48 hours, from the descriptions in
`configs/hardware/`: **computed, not measured**.

{reached}

The licence column is a summary; the model's own page decides.

To add a model, add an entry to `configs/models.yaml` and run `make docs`.
"""

TIERS = """# Tiers

Generated from `configs/tiers.yaml` and `configs/hardware/` by `make docs`.

{tiers}

The chosen tier is the lowest of what device memory, host memory, disk, hours (`--max-hours`, 48 by
default), the repository (no window longer than its tokens) and the model allow (32 times its native
context, the most YaRN was tested at; `--set model.rope_factor=N` goes further at your own risk). Tier 0 is
a window shorter than tier 1's.

Each window is trained through the plain step (a whole forward and backward pass, activations recomputed
where they do not fit) or the streamed step (one layer and one chunk at a time, the same gradients up to
rounding). The planner compares both: on a GPU it takes the streamed step where the plain one does not fit,
or by operations and rates takes more than {faster:.0%} of the streamed step's time; on a CPU from
{cpu_context:,} tokens on, where it was measured to take less memory and less time. `stream.*` keys
(docs/configuration.md) choose by hand; `--set stream.chunk_tokens=0` is the plain step.

For the streamed step the planner works out every policy's device memory, host memory, disk and seconds, and
takes the fastest that fits; of policies within {tie:.0%} of each other the simpler one. It keeps layer
inputs in device memory if they fit, else in pinned host memory (at most half of all of it), pageable host
memory, or on disk; keeps fewer of them and rebuilds the rest when memory is short; streams keys and values,
and as the last resort the frozen weights. Lossy encodings are used only when you ask for them.

## Plans for known machines

Planned for a repository of {tokens:,} tokens, 48 hours, from the descriptions in `configs/hardware/`:
**computed, not measured**. `python3 elite_train.py plan --all` makes this table for every base model
([models](models.md)), with `--repo DIR` for your repository.
`python3 elite_train.py plan --hardware NAME --base-model MODEL` prints one plan in full;
`python3 elite_train.py plan --vram 24 --ram 64` plans for a card that you do not have.

{plans}

## What each tier takes

The same repository with `{ladder_base}`, tier by tier. Figures beyond their limit are in brackets: a context
that the base model cannot be stretched to, GiB of device memory, host memory and disk, hours of all epochs.
Device memory is seldom what decides: the streamed step moves what does not fit to the host and the disk,
and pays in hours.

{ladders}

To add a tier or a machine, edit `configs/tiers.yaml` or add a file to `configs/hardware/`.
"""


def models_page() -> str:
    """docs/models.md: the registry, and what each machine reaches with it."""
    rows = [[f"`{row['name']}`", row["hub"], f"{row['parameters'] / 1e9:.2f} B", row["licence"],
             f"{row['native_context']:,}", "yes" if row["fim"] else "no", f"{row['nf4_bytes'] / GIB:.1f} GiB"]
            for row in models.rows() if row["name"] != models.EMBEDDED]
    head = ["Name", "Hub id", "Parameters", "Licence", "Native context", "FIM", "Weights in NF4"]
    found = plans()
    reached = [[f"`{name}`", *[found[machine, name].cell for machine in presets.by_memory()]]
               for name in models.registry() if name != models.EMBEDDED]
    return MODELS.format(table=_table(head, rows), tokens=outlook.REFERENCE_TOKENS,
                         reached=_table(["Name", *(f"`{name}`" for name in presets.by_memory())], reached))


def tiers_page() -> str:
    """docs/tiers.md: the tiers, what plans for known machines come to, and what each tier takes."""
    rows = [[str(row["tier"]), f"{row['context_tokens']:,}", f"{row['target_tokens']:,}",
             str(row["lora_rank"]), f"{row['min_vram_gib']} GB", ", ".join(row["needs"]) or "-"]
            for row in tables.tier_rows()]
    head = ["Tier", "Context", "Target", "LoRA rank", "Meant for", "Needs"]
    known = [[f"`{machine}`", *[_planned(plans()[machine, name]) for name in SHOWN]]
             for machine in presets.by_memory()]
    return TIERS.format(tiers=_table(head, rows), tokens=outlook.REFERENCE_TOKENS, ladder_base=LADDER_BASE,
                        plans=_table(["Machine", *[f"`{name}`" for name in SHOWN]], known),
                        ladders="\n\n".join(f"`{name}`:\n\n{_ladder(name)}" for name in LADDERS),
                        faster=policies.FASTER, cpu_context=policies.CPU_CONTEXT, tie=policies.TIE - 1)


@functools.cache
def plans() -> dict[tuple[str, str], outlook.Outlook]:
    """What every machine reaches with every base model of the registry, by both names."""
    machines = {name: from_preset(presets.load(name)) for name in presets.by_memory()}
    bases = [base for base in models.registry().values() if base.location != models.EMBEDDED]
    return {(row.machine, row.model): row for row in outlook.outlook(machines, bases, REQUEST)}


def _planned(row: outlook.Outlook) -> str:
    if row.refused:
        return "does not fit"
    step = ", streamed" if row.step == "streamed" else ""
    return f"tier {row.tier}: {row.context_tokens:,} tokens{step}, {row.hours:.1f} h"


def _ladder(machine: str) -> str:
    """Every tier of the table on one machine."""
    calculator = OptimalConfigCalculator(from_preset(presets.load(machine)))
    made = calculator.calculate(REQUEST, models.resolve(LADDER_BASE), outlook.REFERENCE)

    def cell(row: TierRow, limit: str, figure: str) -> str:
        return figure if row.fits[limit] else f"({figure})"
    rows = [[str(row.tier), cell(row, "model", f"{row.context_tokens:,}"), row.step,
             *[cell(row, limit, f"{size / GIB:,.1f}") for limit, size in (
                 ("device_memory", row.device_bytes), ("host_memory", row.host_bytes),
                 ("disk", row.disk_bytes))],
             cell(row, "hours", f"{row.total_s / 3600:,.1f}")] for row in made.tiers]
    return _table(["Tier", "Context", "Step", "Device", "Host", "Disk", "Hours"], rows)


def optimizations_page() -> str:
    """docs/optimizations.md: the catalogue, what the ledgers measured, and the streamed step."""
    return ledger_tables.optimizations_page(f"{peer_tables.section()}\n{stream_tables.section()}")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration.reference, "models.md": models_page,
                                       "tiers.md": tiers_page, "optimizations.md": optimizations_page,
                                       "planning.md": planner_tables.page,
                                       "reliability.md": reliability_tables.page,
                                       "research.md": ledger_tables.research_page}


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
