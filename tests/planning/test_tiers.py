"""The table of tiers, as shipped and as people edit it."""

import pytest

from training.errors import EliteError
from training.planning import tables, tiers

SHIPPED = [(1, 4096, 512, 48), (2, 8192, 2048, 32), (3, 16384, 2048, 24), (4, 32768, 4096, 12),
           (5, 57344, 7168, 8), (6, 131072, 16384, 8), (7, 262144, 32768, 6),
           (8, 524288, 65536, 4), (9, 1048576, 131072, 4), (10, 2097152, 262144, 3), (11, 4194304, 524288, 2)]


def test_the_shipped_table_is_the_designs():
    assert [(t.tier, t.context_tokens, t.target_tokens, t.lora_rank) for t in tiers.load()] == SHIPPED
    assert [t.tier for t in tiers.load() if t.streamed] == [8, 9, 10, 11]
    assert tiers.load()[10].improvement == 16384


def test_people_may_add_a_tier(tmp_path):
    path = tmp_path / "tiers.yaml"
    path.write_text(tiers.TABLE.read_text() + "  - "
                                              "{tier: 12, context_tokens: 8388608, target_tokens: 1048576, "
                                              "lora_rank: 2, min_vram_gib: 48, needs: [streamed]}\n")
    assert tiers.load(path)[-1].context_tokens == 8388608


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "holds no list under `tiers`"),
    ("tiers: [{tier: 1}]", "row 1 must have exactly the keys"),
    ("tiers: [{tier: 2, context_tokens: 4096, target_tokens: 512, lora_rank: 4, min_vram_gib: 4, needs: []}]",
     "row 1 has tier 2; tiers count up from 1"),
    ("tiers: [{tier: 1, context_tokens: 0, target_tokens: 512, lora_rank: 4, min_vram_gib: 4, needs: []}]",
     "row 1 has context_tokens 0; the least is 1"),
    ("tiers: [{tier: 1, context_tokens: 64, target_tokens: 512, lora_rank: 4, min_vram_gib: 4, needs: []}]",
     "row 1 has more target than context"),
    ("tiers: "
     "[{tier: 1, context_tokens: 64, target_tokens: 8, lora_rank: 4, min_vram_gib: 4, needs: [magic]}]",
     "known are flash, deepspeed, streamed"),
    ("tiers: [{", "Cannot read the tiers"),
])
def test_a_wrong_table_says_where(tmp_path, text, message):
    path = tmp_path / "tiers.yaml"
    path.write_text(text)
    with pytest.raises(EliteError) as error:
        tiers.load(path)
    assert message in str(error.value)


def test_contexts_must_ascend(tmp_path):
    path = tmp_path / "tiers.yaml"
    row = "{{tier: {}, context_tokens: {}, target_tokens: 8, lora_rank: 4, min_vram_gib: 4, needs: []}}"
    path.write_text(f"tiers: [{row.format(1, 64)}, {row.format(2, 64)}]")
    with pytest.raises(EliteError, match="contexts must ascend"):
        tiers.load(path)


def test_the_documentations_rows_are_the_table():
    assert [row["context_tokens"] for row in tables.tier_rows()] == [row[1] for row in SHIPPED]
