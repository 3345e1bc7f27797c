"""docs/evidence.md and the pages below it say what the committed rows of the studies say."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from fastcl.train.study import read_csv
from fastcl.train.study_tables import grouped

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
PAGES = sorted(EVIDENCE.glob("*.md"))
ROWS = sorted(EVIDENCE.glob("*/*.csv"))
SPREAD = r"[+-]?\d+\.\d+ ± \d+\.\d+"


def maker() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "site" / "evidence.py"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_committed_rows(path) -> None:
    text = path.read_text(encoding="utf-8")
    folder = path.with_suffix("")
    assert maker()["page"](text, folder) == text
    rows = sorted(folder.glob("*.csv"))
    assert text.count("<!-- end -->") == len(rows) > 0
    for own in rows:
        assert f"]({folder.name}/{own.stem}.png)" in text
        assert own.with_suffix(".png").stat().st_size > 5000
    names = {f"{own.stem}{kind}" for own in rows for kind in (".csv", ".json", ".png")}
    assert {held.name for held in folder.iterdir()} == names


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_rows_are_of_three_seeds_and_of_every_entry(path) -> None:
    name, plan = maker()["plan_of"](path)
    found = grouped(read_csv(path))
    assert set(found) == {(entry.group, entry.what) for entry in plan.entries}
    assert all([row["seed"] for row in rows] in ([0, 1, 2], [0, 1, 2, 3, 4]) for rows in found.values())
    part = json.loads(path.with_suffix(".json").read_text()).get("only")
    assert path.stem == (f"{name}-part" if part else name)
    assert Path(plan.base.data).stem == path.parent.name


def test_verdicts_quote_the_tables() -> None:
    """Every mean with its deviation, and every number with one decimal in a table, is in a table made of rows."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    made = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    studies = text[text.index("\n## Studies") : text.index("\n## What is not shown")]
    quoted = re.findall(SPREAD, studies)
    assert len(quoted) > 20
    assert [number for number in quoted if number not in made] == []
    lines = "\n".join(line for line in studies.splitlines() if line.startswith("|"))
    alone = re.findall(r"(?<![\d.^-])\d\d\.\d(?!\d)", re.sub(SPREAD, "", lines))
    assert alone
    assert [number for number in alone if f"| {number} ± " not in made] == []


def test_the_rows_of_a_whole_study_take_the_place_of_a_parts(tmp_path) -> None:
    module = maker()
    module["taken"].__globals__["EVIDENCE"] = tmp_path / "evidence"
    (tmp_path / "evidence").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    source = EVIDENCE / "digits"
    shutil.copy(source / "batch.csv", run / "batch-part.csv")
    (run / "batch-part.json").write_text(json.dumps({"study": "batch", "only": ["simclr"], "options": {}}))
    module["taken"](run)
    kept = tmp_path / "evidence" / "digits"
    assert sorted(path.name for path in kept.iterdir()) == ["batch-part.csv", "batch-part.json"]
    for kind in ("csv", "json"):
        shutil.copy(source / f"batch.{kind}", run)
    module["taken"](run)
    assert sorted(path.name for path in kept.iterdir()) == ["batch.csv", "batch.json"]
