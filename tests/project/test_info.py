"""``python -m fastcl.info``."""

import json
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl.info import facts, families_table, main, report
from fastcl.ops.backends import native
from fastcl.ops.backends.choose import AVAILABLE, MISSING


def test_every_backend_is_available_or_missing_with_a_reason() -> None:
    lines = report().splitlines()
    for name in AVAILABLE:
        assert any(line.split()[:2] == [name, "available"] for line in lines)
    for name, reason in MISSING.items():
        assert any(line.split()[:2] == [name, "missing"] and line.endswith(reason) for line in lines)


@pytest.mark.parametrize(
    ("variable", "expected"), [(None, "cpu" if "cpu" in AVAILABLE else "chunked"), ("reference", "reference")]
)
def test_says_what_will_be_used(variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCL_BACKEND", raising=False)
    if variable:
        monkeypatch.setenv("FASTCL_BACKEND", variable)
    for what in ("contrastive_stats", "sinkhorn"):
        used = [line.split() for line in report().splitlines() if what in line]
        assert {(words[1], words[2], words[3]) for words in used if words[1] == "cpu"} == {
            ("cpu", rows, expected) for rows in ("float64", "float32", "bfloat16", "float16")
        }


def test_says_why_nothing_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "cuda")
    monkeypatch.delitem(AVAILABLE, "cuda", raising=False)
    monkeypatch.setitem(MISSING, "cuda", "left out")
    assert (
        f"FASTCL_BACKEND: expected one of {', '.join(map(repr, AVAILABLE))}, got 'cuda', "
        f"which is not available here: {MISSING['cuda']}" in report()
    )


def test_a_folder_of_sources_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prefers the working directory to an installed package."""

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(native, "import_module", missing)
    module, reason = native._load()
    assert module is None
    assert reason == f"nothing is built in {Path(fastcl.__file__).parent}: pip install -e . builds there"


def test_json_has_the_facts_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == facts()
    assert (found["fastcl"], found["torch"], found["error"]) == (fastcl.__version__, torch.__version__, None)
    assert {name for name, backend in found["backends"].items() if backend["available"]} == set(AVAILABLE)
    assert {name: found["backends"][name]["reason"] for name in MISSING} == MISSING
    assert (found["native"] is not None) == ("Native module\n  built with" in report())
    lines = report().splitlines()
    for choice in found["choices"]:
        assert any(" ".join(choice.values()) == " ".join(line.split()) for line in lines)
    assert len(found["choices"]) == len(lines) - 1 - lines.index(next(x for x in lines if x.startswith("Will be used")))


def test_json_says_why_nothing_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "nothing")
    found = facts()
    assert (found["asked_for"], found["choices"]) == ("nothing", [])
    assert found["error"].startswith("FASTCL_BACKEND: expected one of ")


def test_the_table_of_the_docs_is_generated() -> None:
    """docs/internals.md has what `families_table` makes of the chooser's tables."""
    docs = (Path(__file__).parents[2] / "docs" / "internals.md").read_text(encoding="utf-8")
    assert families_table() in docs
    assert docs.count("| family |") == 1
