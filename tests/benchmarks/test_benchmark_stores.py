"""The benchmark suites of queue, top-k and k-means: baselines agree, a wrong one is reported, pages are right."""

import json

import pytest
import torch

from benchmarks import clusters, nearest, queue_step
from benchmarks.__main__ import main

CPU = torch.device("cpu")
ONCE = {"rounds": (1, 1), "seconds": 0.0}
STORES = [(nearest, nearest.Case(5, 60, 4, 8)), (queue_step, queue_step.Case(4, 16, 8))]
SUITES = [*STORES, (clusters, clusters.Case(60, 4, 8, 3))]
PEERS = {nearest: nearest.FAISS, queue_step: queue_step.LIGHTLY, clusters: clusters.SKLEARN}


@pytest.mark.parametrize(("suite", "case"), SUITES)
def test_rows_tell_error_and_time_and_name_who_is_missing(suite, case) -> None:
    rows = {row["provider"]: row for row in suite.measure(case, CPU, **ONCE)}
    for name in ("fastcl chunked", "eager"):
        assert rows[name]["status"] == "ok", rows[name]
        assert rows[name]["p50_ms"] > 0
        assert rows[name]["error"] < 1e-5
    peer = PEERS[suite]
    assert rows[peer]["status"] in ("ok", "missing")
    assert rows[peer]["status"] == "ok" or "Error" in rows[peer]["reason"]


@pytest.mark.parametrize(("suite", "case"), STORES)
def test_a_wrong_peer_is_told_and_not_timed(monkeypatch, suite, case) -> None:
    name = "searches" if suite is nearest else "steps"
    found, missing = nearest.searches(CPU) if suite is nearest else queue_step.steps(case, CPU)
    if suite is nearest:
        found["off"] = (lambda keys, k: lambda queries: torch.zeros(5, 4)), "torch"
        found["broken"] = (lambda keys, k: lambda queries: 1 / 0), "torch"
    else:
        found["off"] = (lambda query, *_: lambda: (torch.tensor(1.0), query.detach())), "torch"
        found["broken"] = (lambda *_: lambda: 1 / 0), "torch"
    monkeypatch.setattr(suite, name, lambda *_: (found, missing))
    rows = {row["provider"]: row for row in suite.measure(case, CPU, **ONCE)}
    assert rows["off"]["status"] == "wrong"
    assert "p50_ms" not in rows["off"]
    assert rows["broken"]["status"] == "error"
    assert "ZeroDivisionError" in rows["broken"]["reason"]


def test_a_wrong_clustering_is_told(monkeypatch) -> None:
    found, missing = clusters.clusterings(CPU)
    found["off"] = (lambda case, rows, init: lambda: 1.05 * clusters.lloyd(case, rows, init)), "torch"
    monkeypatch.setattr(clusters, "clusterings", lambda *_: (found, missing))
    rows = {row["provider"]: row for row in clusters.measure(clusters.Case(60, 4, 8, 3), CPU, **ONCE)}
    assert rows["off"]["status"] == "wrong"
    assert rows["eager"]["status"] == "ok"


def test_every_step_enqueues_its_keys() -> None:
    case = queue_step.Case(4, 16, 8)
    query, key, stored = case.rows(CPU)
    later = torch.cat([torch.nn.functional.normalize(key, dim=1), stored[4:]])
    truth = queue_step.formula(query, key, later)
    found, _ = queue_step.steps(case, CPU)
    for name, (make, _) in found.items():
        step = make(query, key, stored)
        first, _ = step()
        second, _ = step()
        assert not torch.allclose(first, second), name
        torch.testing.assert_close(second, truth.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("suite", "case"), SUITES)
def test_the_command_writes_rows_and_page(tmp_path, monkeypatch, capsys, suite, case) -> None:
    monkeypatch.setattr(suite, "QUICK", (case,))
    assert main(["--suite", suite.SUITE, "--quick", "--out", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / f"{suite.SUITE}.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert case.name in (tmp_path / suite.PAGE).read_text()
