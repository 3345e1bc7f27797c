"""docs/evidence.md says what the committed rows of the studies say."""

import runpy
from pathlib import Path

import pytest

from fastcl.train.studies import STUDIES, grouped
from fastcl.train.study import read_csv

ROOT = Path(__file__).parents[2]
ROWS = sorted((ROOT / "docs" / "evidence").glob("*.csv"))


def test_the_tables_are_those_of_the_committed_rows() -> None:
    maker = runpy.run_path(str(ROOT / "docs" / "site" / "evidence.py"))
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert maker["page"](text) == text
    assert set(maker["headings"]()) == {path.stem for path in ROWS}
    for path in ROWS:
        assert f"](evidence/{path.stem}.png)" in text
        assert path.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_the_rows_are_of_three_seeds_and_of_every_entry(path) -> None:
    from fastcl.train.study import DEFAULT

    found = grouped(read_csv(path))
    assert set(found) == {(entry.group, entry.what) for entry in STUDIES[path.stem].entries(DEFAULT)}
    assert all([row["seed"] for row in rows] == [0, 1, 2] for rows in found.values())
