"""The tables and pictures of docs/evidence.md, from the rows in docs/evidence: ``python docs/site/evidence.py``.

``python docs/site/evidence.py FOLDER...`` takes the rows of finished studies first, from the folders that they wrote.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from fastcl.train.studies import STUDIES, tables
from fastcl.train.study import read_csv
from fastcl.train.study_pictures import PICTURES

DOCS = Path(__file__).parents[1]
PAGE, ROWS = DOCS / "evidence.md", DOCS / "evidence"


def page(text: str) -> str:
    """The page with tables and picture of the rows that are there, each between its two marks."""
    for name, study in STUDIES.items():
        path = ROWS / f"{name}.csv"
        if path.exists():
            made = tables(study, read_csv(path), headings()[name])
            made += f"\n![{study.about}](evidence/{name}.png)\n"
            pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
            text, count = re.subn(pattern, lambda m, made=made: f"{m[1]}\n{made}{m[2]}", text, flags=re.DOTALL)
            assert count == 1, f"{PAGE} has no place for {name}"
    return text


def headings() -> dict[str, str]:
    """What each study trained, in a few words."""
    found: dict[str, str] = json.loads((ROWS / "headings.json").read_text(encoding="utf-8"))
    return found


def main(folders: list[str]) -> None:
    known = headings() if (ROWS / "headings.json").exists() else {}
    for folder in map(Path, folders):
        (path,) = folder.glob("*.csv")
        shutil.copy(path, ROWS / path.name)
        first = (folder / f"{path.stem}.md").read_text(encoding="utf-8").partition(".\n")[0]
        known[path.stem] = first.rpartition("; ")[2]
    (ROWS / "headings.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name in known:
        PICTURES[name](ROWS / f"{name}.png", f"{name}: {known[name]}", read_csv(ROWS / f"{name}.csv"))


if __name__ == "__main__":
    main(sys.argv[1:])
