"""The benchmark suite of prototypes: all providers agree, and rows and page hold their memory."""

import json
from functools import partial

import pytest
import torch

from benchmarks import memory, prototypes
from benchmarks.__main__ import main
from benchmarks.prototypes import EAGER, HARD, KINDS, STORED, Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes seconds, and is not what is tested

    def apart(run: partial, threads: int) -> memory.Peak:  # without a process, which takes seconds too
        if run.args[1] == EAGER and run.args[0].alone:
            raise memory.TooLargeError("no room")
        return memory.Peak(1_000_000, "a test")

    monkeypatch.setattr(memory, "apart", apart)


@pytest.mark.parametrize("kind", KINDS)
def test_providers_agree(kind, monkeypatch) -> None:
    case = Case(kind, 300, 40, 8)
    found, missing = prototypes.losses(case, CPU)
    truth = found[EAGER][1]
    found["off"] = (lambda *given: 2 * truth(*given)), truth
    monkeypatch.setattr(prototypes, "losses", lambda *_: (found, missing))
    measured = {row["provider"]: row for row in prototypes.measure(case, CPU, rounds=(1, 1), seconds=0.0)}
    assert measured.pop("off")["status"] == "wrong"
    more = {"stored scores": "fastcl chunked", "features": HARD, "potentials": STORED}[kind]
    assert any(more in name for name in measured)
    for name in missing:
        assert measured.pop(name)["status"] == "missing"
    for name, row in measured.items():
        assert row["status"] == "ok", (name, row)
        assert row["error"] < 1e-5
        assert row["extra_bytes"] == 1_000_000


def test_the_command_writes_rows_and_page(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prototypes, "QUICK", (Case("features", 20, 30, 4, alone=True), Case("stored scores", 20, 30)))
    assert main(["--suite", prototypes.SUITE, "--quick", "--out", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "prototypes.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    page = (tmp_path / prototypes.PAGE).read_text()
    assert "| 1 MB |" in page
    assert "- eager: too large (more memory than the machine has (no room))" in page


def test_peaks_are_of_the_named_provider(monkeypatch) -> None:
    """The gradient of 2 MB, and at least two more matrices of eager."""
    case = Case("stored scores", 500, 1000)
    peaks = {name: prototypes._peak(case, name).extra for name in (EAGER, "fastcl chunked")}
    assert peaks[EAGER] > 1.2 * peaks["fastcl chunked"] >= 2_000_000
