"""Public names have documentation, and the metadata of the project agrees with itself."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import yaml

import fastcl
from tests.support.sources import sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it there

ROOT = Path(__file__).parents[2]
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PUBLIC = [
    *((fastcl, name) for name in fastcl.__all__),
    *((fastcl.functional, name) for name in fastcl.functional.__all__),
    (fastcl.distributed, "gather_rows"),
]


@pytest.mark.parametrize(("where", "name"), PUBLIC, ids=[f"{where.__name__}.{name}" for where, name in PUBLIC])
def test_public_names_are_documented(where, name) -> None:
    assert (inspect.getdoc(vars(where)[name]) or "").strip(), f"{name} has no docstring of its own"
    written = re.compile(rf"(?<![\w.-])(fastcl\.)?((functional|distributed)\.)?{name}(?!\w)")
    pages = [page for page, text in DOCS.items() if written.search(text)]
    assert set(pages) - {"internals.md", "versions.md"}, f"{name} is on no page of docs/"


def test_all_public_names_are_listed() -> None:
    for module in (fastcl, fastcl.functional):
        defined = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        }
        assert defined <= set(module.__all__)
        assert sorted(module.__all__) == module.__all__
        assert len(set(module.__all__)) == len(module.__all__)


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fastcl.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == fastcl.__version__


def test_the_same_authors_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["authors"] == PROJECT["project"]["authors"] == [{"name": "fastcl developers"}]


def test_the_same_pythons_everywhere() -> None:
    prefix = "Programming Language :: Python :: 3."
    pythons = [f"3.{c.removeprefix(prefix)}" for c in PROJECT["project"]["classifiers"] if c.startswith(prefix)]
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    assert PROJECT["tool"]["cibuildwheel"]["build"].split() == [f"cp{python.replace('.', '')}-*" for python in pythons]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == pythons
    assert f"{pythons[0]} to {pythons[-1]}" in DOCS["versions.md"]


def test_extras_that_are_named_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    named = {
        (str(path), extra.strip())
        for path in sources(".md", ".py", ".toml", ".yml")
        for found in re.findall(r"(?:fastcl|\"\.)\[([a-z,\s_-]+)\]", (ROOT / path).read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert {"train", "test", "dev"} <= {extra for _, extra in named}
    assert [one for one in named if one[1] not in extras] == []
