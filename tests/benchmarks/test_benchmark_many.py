"""The benchmark suite of two processes: baselines compute the same, and the page's tables follow from the model."""

import json

import pytest
import torch
from torch import distributed as dist

from benchmarks import many, traffic
from benchmarks.__main__ import main


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("two_sets", [True, False])
def test_all_compute_the_same(tmp_path, monkeypatch, capsys, two_sets) -> None:
    monkeypatch.setattr(many, "QUICK", (many.Case(24, two_sets, 8),))
    assert main(["--suite", "distributed", "--quick", "--out", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "distributed.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {row["provider"]: row for row in rows}
    for name in ("fastcl chunked", "fastcl chunked, ring", "eager", "eager, all logits"):
        assert found[name]["status"] == "ok", found[name]
        assert found[name]["error"] < 1e-5
        assert found[name]["p50_ms"] > 0
    assert found["Inf-CL"]["reason"] == "needs a GPU"
    assert "open_clip" in found if two_sets else "lightly" in found
    assert many.QUICK[0].name in (tmp_path / many.PAGE).read_text()


def test_the_formula_is_a_loss_of_ours() -> None:
    """The formula that errors are measured against is one of the library's losses."""
    import fastcl

    for two_sets in (True, False):
        case = many.Case(12, two_sets, 5)
        left, right = (rows.double() for rows in case.sets())
        criterion = fastcl.ClusterInfoNCE(many.TEMPERATURE, symmetric=two_sets)
        ours = criterion(left, contrasts=right) if two_sets else criterion(torch.stack([left, right], 1))
        torch.testing.assert_close(many.formula(case, left, right), ours)


def test_tables_on_paper_are_the_models() -> None:
    page = traffic.PAGE.read_text()
    assert traffic.written(page) == page


def test_the_model_counts_bytes() -> None:
    """Two GPUs of a node, computed by hand: a row has 512 numbers."""
    row = 100 * 512
    assert traffic.gathered(2, 100).traffic == row * 2 + row * 4
    assert traffic.ring(2, 100).traffic == 2 * row * 2 + row * 4
    assert traffic.open_clip(2, 100).traffic == 2 * (row * 2 + row * 2)
    assert traffic.gathering(2, row) == row / traffic.INSIDE
    assert traffic.gathering(16, row) > traffic.gathering(8, row)
    for way in traffic.WAYS.values():
        assert 0 <= way(32, 100).waiting <= way(32, 100).wire
        assert way(32, 100).memory > 0
