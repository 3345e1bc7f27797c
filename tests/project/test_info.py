"""``python -m fastcl.info``."""

from pathlib import Path

import pytest

from fastcl.info import families_table, report
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


def test_the_table_of_the_docs_is_generated() -> None:
    """docs/internals.md has what `families_table` makes of the chooser's tables."""
    docs = (Path(__file__).parents[2] / "docs" / "internals.md").read_text(encoding="utf-8")
    assert families_table() in docs
    assert docs.count("| family |") == 1
