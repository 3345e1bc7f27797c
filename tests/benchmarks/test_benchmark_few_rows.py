"""The benchmark suite of few rows: the plain formulas are those of the losses."""

import json

import pytest
import torch

from benchmarks import few_rows
from benchmarks.__main__ import main
from benchmarks.few_rows import CASES, EAGER, LOSSES, Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes seconds, and is not what is tested


@pytest.mark.parametrize("loss", LOSSES)
def test_providers_agree(loss: str, monkeypatch) -> None:
    case = Case(loss, 30, 16)
    found = few_rows.losses(case, CPU)
    found["off"] = lambda *given: 2 * found[EAGER](*given)
    monkeypatch.setattr(few_rows, "losses", lambda *_: found)
    measured = {row["provider"]: row for row in few_rows.measure(case, CPU, rounds=(1, 1), seconds=0.0)}
    assert measured.pop("off")["status"] == "wrong"
    for name, row in measured.items():
        assert row["status"] == "ok", (name, row)
        assert row["error"] < 1e-5


def test_the_command_writes_rows_and_page(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(few_rows, "QUICK", (Case("KoLeo", 8),))
    assert main(["--suite", few_rows.SUITE, "--quick", "--out", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "## KoLeo, N=8" in (tmp_path / few_rows.PAGE).read_text()


def test_with_only_the_rows_of_other_cases_stay(tmp_path, monkeypatch) -> None:
    """Also those of a page that was written before rows said their circumstances."""
    monkeypatch.setattr(few_rows, "QUICK", (Case("KoLeo", 8), Case("KoLeo", 9), Case("KoLeo", 10)))

    def rows(circumstances: str, only: str) -> list[dict]:
        few_rows.run(tmp_path, CPU, True, circumstances, only)
        return [json.loads(line) for line in (tmp_path / "few.jsonl").read_text().splitlines()]

    first = rows("An old machine.", "")
    old = [{name: value for name, value in row.items() if name != "circumstances"} for row in first]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    second = rows("A new machine.", "N=9")
    assert [row["case"] for row in second] == [row["case"] for row in first]
    for before, after in zip(first, second, strict=True):
        if after["case"] == "KoLeo, N=9":
            assert after["circumstances"] == "A new machine."
        else:
            assert after == before
    text = (tmp_path / few_rows.PAGE).read_text()
    assert text.startswith("# Few rows\n\nAn old machine.\n\n- KoLeo, N=9: A new machine.\n\n## KoLeo, N=8\n")
    third = rows("A third machine.", "N=")
    assert {row["circumstances"] for row in third} == {"A third machine."}


def test_every_loss_has_its_cases() -> None:
    assert {case.loss for case in CASES} == set(LOSSES)
