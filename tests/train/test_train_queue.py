"""The trainer's methods with a queue and a momentum encoder."""

import json

import pytest
import torch

from fastcl.train.__main__ import main
from fastcl.train.loop import Run
from fastcl.train.methods.contrastive import NNCLR, MoCo
from fastcl.train.methods.method import MOMENTUM
from tests.support.training import options, weights


@pytest.mark.parametrize("method", ["moco", "nnclr"])
def test_a_resumed_run_has_the_numbers_of_a_whole_one(npz, tmp_path, method) -> None:
    assert main([*options(npz, tmp_path / "whole", 3), "--method", method]) == 0
    epoch = Run._epoch

    def interrupted(self, number, bar):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_epoch", interrupted)
        assert main([*options(npz, tmp_path / "part", 3), "--method", method]) == 130
    assert main(["--resume", str(tmp_path / "part")]) == 0
    whole, part = (weights(tmp_path / name) for name in ("whole", "part"))
    assert whole.keys() == part.keys()
    assert {"queue.rows", "queue.sample_ids", "queue.enqueued", "slow.0.0.weight"} <= whole.keys()
    for name, value in whole.items():
        assert torch.equal(value, part[name]), name
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "part")]
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", [MoCo, NNCLR])
def test_a_step(kind) -> None:
    torch.manual_seed(0)
    method = kind(torch.Size((1, 8, 8)), 0.1)
    views, index = torch.rand(6, 2, 1, 8, 8), torch.tensor([4, 0, 9, 7, 3, 5])
    before = [parameter.clone() for parameter in method.slow.parameters()]
    for step in range(2):
        loss = method(views, None, index)
        loss.backward()
        assert loss.isfinite()
        assert len(method.queue) == 12 * (step + 1)
    assert method.queue.ids.tolist() == index.repeat_interleave(2).tolist() * 2
    assert all(parameter.grad is None for parameter in method.slow.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1.0)
    method(views, None, index)
    for old, new in zip(before, method.slow[0].parameters(), strict=False):
        torch.testing.assert_close(new, old + (1 - MOMENTUM))
    method.eval()
    kept = [parameter.clone() for parameter in method.slow.parameters()]
    method(views, None, index)
    assert all(torch.equal(a, b) for a, b in zip(kept, method.slow.parameters(), strict=True))


def test_moco_is_not_contrasted_with_its_own_stale_keys() -> None:
    """A queue that holds nothing but the image's own keys leaves the positive alone: loss 0."""
    method = MoCo(torch.Size((1, 8, 8)), 0.1)
    views, index = torch.rand(1, 2, 1, 8, 8), torch.tensor([4])
    for _ in range(3):
        assert method(views, None, index).item() == pytest.approx(0, abs=1e-6)
    assert method(views, None, torch.tensor([5])).item() > 0.1
