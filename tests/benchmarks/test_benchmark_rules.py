"""The benchmark suite of rules about pairs: its dense baseline and fastcl agree, and a wrong provider is reported."""

import pytest
import torch

from benchmarks import pair_rules
from benchmarks.pair_rules import RULES, WITHOUT, Case

CPU = torch.device("cpu")


@pytest.mark.parametrize("rule", RULES)
def test_providers_agree(rule, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes seconds, and is not what is tested
    case = Case(rule, 24, 8)
    rows, found = pair_rules.losses(case, CPU)
    truth = found["fastcl chunked"][1]
    found["off"] = (lambda rows: rows.sum()), truth
    monkeypatch.setattr(pair_rules, "losses", lambda *_: (rows, found))
    measured = {row["provider"]: row for row in pair_rules.measure(case, CPU, rounds=(1, 1), seconds=0.0)}
    assert measured.pop("off")["status"] == "wrong"
    assert any(WITHOUT in name for name in measured)
    for name, row in measured.items():
        assert row["status"] == "ok", (name, row)
        assert row["error"] < 1e-5
