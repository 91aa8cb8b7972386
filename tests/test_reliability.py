"""docs/reliability.md: every row is there once, and names a test that exists or says why there is none."""

import json
from pathlib import Path

import pytest

from training import reliability_tables

ROOT = Path(__file__).resolve().parent.parent
ROWS = [row for section in reliability_tables.rows().values() for row in section]


def test_every_row_is_there_once():
    assert sorted(row["row"] for row in ROWS) == list(range(1, 81))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["row"]))
def test_a_row_names_a_test_that_exists_or_says_why_there_is_none(row):
    assert row["fault"]
    assert row["expected"]
    assert row["answer"]
    for test in filter(None, (part.strip() for part in row["test"].replace("\n", " ").split(","))):
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, test
    if not row["test"]:
        assert row["answer"].startswith(("not applicable:", "not built:")), row["answer"]


def test_the_page_shows_what_was_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(reliability_tables, "RESULTS", tmp_path)
    assert "No full count was made yet." in reliability_tables.page()
    one = {"passed": 199, "of": 200, "note": "one | torn"}
    other = {"passed": 1, "of": 200, "note": ""}
    for date, tests in (("2026-01-01", {"a": other, "b": other}), ("2026-01-02", {"a": one})):
        made = {"date": date, "cores": 2, "rows": {"1": tests}}
        (tmp_path / f"reliability-{date}.json").write_text(json.dumps(made))
    page = reliability_tables.page()
    assert "Counted on 2026-01-01 (2 CPU cores), 2026-01-02 (2 CPU cores)." in page
    assert "| 200 of 400; one / torn |" in page


def test_a_row_that_lacks_a_field_or_comes_twice_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(reliability_tables, "TABLES", tmp_path)
    (tmp_path / "crash.yaml").write_text("rows:\n- {row: 1, fault: x}\n")
    with pytest.raises(ValueError, match="do not have exactly"):
        reliability_tables.rows()
    whole = json.dumps(dict.fromkeys(reliability_tables.FIELDS, "x") | {"row": 1})
    (tmp_path / "crash.yaml").write_text(f"rows: [{whole}, {whole}]\n")
    with pytest.raises(ValueError, match="twice"):
        reliability_tables.rows()
