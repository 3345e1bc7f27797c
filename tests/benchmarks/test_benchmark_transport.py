"""The benchmark suite of Sinkhorn: its baselines compute the same, and its rows report each one's accuracy."""

import json

import pytest
import torch

from benchmarks import transport, transport_report
from benchmarks.__main__ import main
from tests.support.sinkhorn_oracle import swav_loop

CASE = transport.Case(40, 24)
ONCE = {"rounds": (1, 1), "seconds": 0.0}


@pytest.mark.parametrize("gradient", [False, True])
def test_every_solver_solves_the_same_problem(gradient) -> None:
    case = transport.Case(40, 24, gradient=gradient)
    x, y = case.points(torch.device("cpu"))
    scores = x @ y.T
    expected = swav_loop(scores.double(), case.epsilon, case.n_iters)
    for name, (solve, _) in transport.providers(torch.device("cpu"))[0].items():
        if name == "GeomLoss" or (gradient and name == "OTT-JAX"):  # its own number of iterations, or its own gradient
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
    assert ("fastcl cpu" + transport.GIVEN in rows) == ("fastcl cpu" in rows)
    assert {"POT sinkhorn_log", "POT sinkhorn", "GeomLoss", "OTT-JAX"} <= set(rows)
    text = transport_report.page(list(rows.values()))
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
    rows = [json.loads(line) for line in (tmp_path / transport_report.ROWS).read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    page, plot = ((tmp_path / name).read_bytes() for name in (transport_report.PAGE, transport_report.PLOT))
    assert CASE.name.encode() in page
    assert plot.startswith(b"\x89PNG")


def row(case: str, provider: str, milliseconds: float, **others) -> dict:
    here = {"processor": "One", "threads": 2, "torch": "2", "commit": "abc", "version": "1", "suite": "sinkhorn"}
    known = {"marginal_error": 0.0, "row_error": 0.0, "error": 0.0, "status": "ok", "n_iters": 3, "gradient": False}
    times = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds, "taken_by_others": 0.2}
    return {"case": case, "provider": provider, "ratio": {}, **here, **known, **times, **others}


def test_the_page_says_what_the_rows_say(tmp_path) -> None:
    ratio = {"peer": 4.0, transport.COPY: 0.2}
    rows = [row("a", "fastcl cpu", 10, ratio=ratio), row("a", "peer", 40), row("a", "fastcl chunked", 20)]
    transport_report.keep(tmp_path, rows)
    transport_report.write(tmp_path)
    text = (tmp_path / transport_report.PAGE).read_text()
    assert "| solver | time (20 to 80 %) | fastcl cpu is faster by |" in text
    assert "| peer | 40 ms (40 ms to 40 ms) | 4x |" in text
    assert "| 50 % |" in text  # four reads and one write take 2.5 copies' bytes, in the time of five copies
    assert "took up to 20 %" in text


def test_peers_are_compared_with_results_in_new_memory() -> None:
    given = row("a", "fastcl cpu" + transport.GIVEN, 5, ratio={"peer": 8.0})
    rows = [given, row("a", "fastcl cpu", 10, ratio={"peer": 4.0}), row("a", "peer", 40)]
    assert "| peer | 40 ms (40 ms to 40 ms) | 4x |" in transport_report.page(rows)


def test_rows_of_other_cases_stay_and_those_of_another_machine_go(tmp_path) -> None:
    transport_report.keep(tmp_path, [row("a", "x", 1), row("b", "x", 2)])
    transport_report.keep(tmp_path, [row("a", "x", 3)])
    assert {r["case"]: r["p50_ms"] for r in transport_report.read(tmp_path)} == {"a": 3, "b": 2}
    transport_report.keep(tmp_path, [row("c", "x", 4, processor="Another")])
    assert [r["case"] for r in transport_report.read(tmp_path)] == ["c"]


def test_the_report_is_drawn_again_from_the_rows(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(transport, "QUICK", (CASE,))
    main(["--suite", "sinkhorn", "--quick", "--out", str(tmp_path)])
    before = (tmp_path / transport_report.PAGE).read_text()
    (tmp_path / transport_report.PAGE).unlink()
    assert main(["--report", str(tmp_path)]) == 0
    assert (tmp_path / transport_report.PAGE).read_text() == before


def test_truth_in_blocks_is_the_plain_log_domain_loop(monkeypatch) -> None:
    x, y = CASE.points(torch.device("cpu"))
    scores = x @ y.T
    expected = transport.log_domain(CASE, scores.double(), x, y)
    monkeypatch.setattr(transport, "TRUTH_BLOCK", 7 * CASE.k)
    v = transport.true_potential(CASE, scores)
    torch.testing.assert_close(torch.softmax(scores.double() / CASE.epsilon + v, 1), expected, rtol=1e-12, atol=0)
    found = transport.errors(CASE, scores, v, expected * 1.5)
    assert found["error"] == pytest.approx(0.5)
    assert found["row_error"] == pytest.approx(0.5)
    assert found["marginal_error"] == pytest.approx((expected.mean(0) * 1.5 - 1 / CASE.k).abs().sum().item())
