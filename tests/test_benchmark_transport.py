"""The benchmark suite of Sinkhorn: its baselines compute the same, and its rows say what each is worth."""

import json

import pytest
import torch
from sinkhorn_oracle import swav_loop

from benchmarks import transport
from benchmarks.__main__ import main

CASE = transport.Case(40, 24)
ONCE = {"rounds": (1, 1), "seconds": 0.0}


@pytest.mark.parametrize("gradient", [False, True])
def test_every_solver_solves_the_same_problem(gradient) -> None:
    case = transport.Case(40, 24, gradient=gradient)
    x, y = case.points(torch.device("cpu"))
    scores = x @ y.T
    expected = swav_loop(scores.double(), case.epsilon, case.n_iters)
    for name, (solve, _) in transport.providers(torch.device("cpu"))[0].items():
        if name == "GeomLoss" or (gradient and name == "OTT-JAX"):  # iterations, or a gradient, of its own
            continue
        torch.testing.assert_close(solve(case, scores, x, y).double(), expected, rtol=1e-4, atol=1e-6)


def test_rows_tell_error_and_time_and_name_who_is_missing() -> None:
    rows = {row["provider"]: row for row in transport.measure(CASE, torch.device("cpu"), **ONCE)}
    for name in ("fastcl chunked", transport.EAGER, "SwAV's loop"):
        row = rows[name]
        assert row["status"] == "ok"
        assert row["p50_ms"] > 0
        assert row["error"] < 1e-5
        assert 1e-6 < row["marginal_error"] < 0.1  # three iterations do not converge
    missing = transport.providers(torch.device("cpu"))[1]
    assert {name for name, row in rows.items() if row["status"] == "missing"} == set(missing)
    assert {"POT sinkhorn_log", "POT sinkhorn", "GeomLoss", "OTT-JAX"} <= set(rows)
    text = transport.page(list(rows.values()), "here")
    assert all(name in text for name in rows)


def test_a_wrong_solver_shows(monkeypatch) -> None:
    found, missing = transport.providers(torch.device("cpu"))
    found["off"] = (lambda case, scores, x, y: scores.softmax(1)), "torch"
    found["broken"] = (lambda case, scores, x, y: 1 / 0), "torch"
    monkeypatch.setattr(transport, "providers", lambda device: (found, missing))
    rows = {row["provider"]: row for row in transport.measure(CASE, torch.device("cpu"), **ONCE)}
    assert rows["off"]["error"] > 0.1
    assert rows["broken"]["status"] == "error"
    assert "ZeroDivisionError" in rows["broken"]["reason"]


def test_the_command_writes_rows_and_page(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(transport, "QUICK", (CASE,))
    assert main(["--suite", "sinkhorn", "--quick", "--out", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / transport.ROWS).read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert CASE.name in (tmp_path / transport.PAGE).read_text()
