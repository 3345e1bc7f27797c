"""The benchmark suite of pair losses: baselines agree, a wrong one is reported, and the GPU plan's truth is right."""

import pytest
import torch

from benchmarks import gpu_pairs, pair_losses
from benchmarks.pair_losses import Case

CPU = torch.device("cpu")
ONCE = {"rounds": (1, 1), "seconds": 0.0}
CASES = [Case(loss, 24, 8) for loss in ("SigLIP", "NT-Xent over pairs", "contrastive")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.loss)
def test_baselines_agree(case, monkeypatch) -> None:
    found, missing = pair_losses.losses(case, CPU)
    found.pop("torch.compile")
    found["off"] = (lambda case, device: lambda *leaves: sum(leaf.sum() for leaf in leaves)), "torch"
    monkeypatch.setattr(pair_losses, "losses", lambda *_: (found, missing))
    rows = {row["provider"]: row for row in pair_losses.measure(case, CPU, **ONCE)}
    for name in ("fastcl chunked", "eager"):
        assert rows[name]["status"] == "ok", rows[name]
        assert rows[name]["p50_ms"] > 0
        assert rows[name]["error"] < 1e-5
    assert rows["off"]["status"] == "wrong"
    peer = pair_losses.OPEN_CLIP if case.loss == "SigLIP" else pair_losses.METRIC_LEARNING
    assert rows[peer]["status"] in ("ok", "missing")


def test_the_truth_by_blocks_is_that_of_the_formula(monkeypatch) -> None:
    monkeypatch.setattr(gpu_pairs, "BLOCK", 7)
    leaves = [leaf.detach().double().requires_grad_() for leaf in Case("SigLIP", 24, 8).inputs(CPU)]
    loss, gradient = gpu_pairs.truth(*leaves)
    expected = pair_losses.siglip(*leaves)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaves)[0])


def test_a_problem_of_the_gpu_plan() -> None:
    problem = gpu_pairs.PairProblem(Case("SigLIP", 24, 8, torch.bfloat16))
    posed = problem.pose(CPU, {})
    for name in ("fastcl chunked", "eager"):
        contestant = posed.contestant(name)
        verdict = contestant.judge()
        assert verdict.status == "ok", (name, verdict)
        first, second = (step()[0] for step in contestant.steps)
        assert first != second
