"""The tables and pictures of docs/evidence, from the rows in its folders: ``python docs/site/evidence.py``.

``python docs/site/evidence.py FOLDER...`` takes the rows of finished studies first, from the folders that they wrote.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from fastcl.train.studies import Plan, planned
from fastcl.train.study import read_csv
from fastcl.train.study_pictures import PICTURES
from fastcl.train.study_tables import tables

EVIDENCE = Path(__file__).parents[1] / "evidence"


def plan_of(rows: Path) -> tuple[str, Plan]:
    """The study that wrote the rows, and what it planned."""
    about = json.loads(rows.with_suffix(".json").read_text(encoding="utf-8"))
    name = about.pop("study")
    return name, planned(name, about)


def page(text: str, folder: Path) -> str:
    """The page with tables and picture of the rows in a folder, each between its two marks."""
    for rows in sorted(folder.glob("*.csv")):
        name, plan = plan_of(rows)
        made = tables(plan.study, read_csv(rows), plan.heading)
        made += f"\n![{plan.study.about}]({folder.name}/{rows.stem}.png)\n"
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, made=made: f"{m[1]}\n{made}{m[2]}", text, flags=re.DOTALL)
        assert count == 1, f"{folder}.md has no place for {name}"
    return text


def taken(folder: Path) -> None:
    """Copy the rows of a study, and how to plan it; those of the whole take the place of a part's."""
    for rows in sorted(folder.glob("*.csv"), key=lambda path: len(path.stem)):
        name, plan = plan_of(rows)
        kept = EVIDENCE / Path(plan.base.data).stem
        kept.mkdir(exist_ok=True)
        for old in kept.glob(f"{name}*"):
            old.unlink()
        for kind in (".csv", ".json"):
            shutil.copy(rows.with_suffix(kind), kept)
        return


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        taken(folder)
    for path in sorted(EVIDENCE.glob("*.md")):
        kept = path.with_suffix("")
        path.write_text(page(path.read_text(encoding="utf-8"), kept), encoding="utf-8")
        for rows in sorted(kept.glob("*.csv")):
            name, plan = plan_of(rows)
            PICTURES[name](rows.with_suffix(".png"), f"{name}: {plan.heading}", read_csv(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
