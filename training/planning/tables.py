"""Rows for the documentation: the tiers, and what each base needs at each of them."""

from __future__ import annotations

from typing import Any

from training.planning import presets, tiers


def tier_rows() -> list[dict[str, Any]]:
    """The table of tiers for docs/tiers.md."""
    return [{"tier": row.tier, "context_tokens": row.context_tokens, "target_tokens": row.target_tokens,
             "lora_rank": row.lora_rank, "min_vram_gib": row.min_vram_gib, "needs": list(row.needs),
             "improvement": row.improvement} for row in tiers.load()]


def preset_rows() -> list[dict[str, Any]]:
    """The hardware presets for docs/tiers.md and `plan --hardware`."""
    rows = []
    for name in presets.names():
        data = presets.load(name)
        gpu = data.get("gpu") or {}
        rows.append({"preset": name, "gpu": gpu.get("name", "none"), "count": gpu.get("count", 0),
                     "vram_gib": gpu.get("total_gib", 0), "ram_gib": data["ram_gib"],
                     "source": data.get("source", "")})
    return rows
