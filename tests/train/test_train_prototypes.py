"""The trainer's methods with prototypes: priors, long-tailed data, and the picture of sizes."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import fastcl
from fastcl.train.__main__ import main
from fastcl.train.data import load, long_tailed
from fastcl.train.methods.prototypes import DINO, MSN, PMSN, prototype_masses
from tests.support.training import options, weights


@pytest.mark.parametrize(
    "method",
    [
        ["swav"],
        ["pmsn", "--prior", "uniform"],
        ["pmsn", "--long-tail", "3"],
        ["swav", "--prior", "power_law"],
        ["dino", "--prior", "power_law"],
    ],
)
def test_a_run_tells_how_large_its_prototypes_are(npz, tmp_path, capsys, method) -> None:
    assert main([*options(npz, tmp_path / "run", 2), "--method", *method]) == 0
    printed = capsys.readouterr().out
    assert "prototypes, prior " in printed
    assert "prototypes.png" in printed
    assert (tmp_path / "run" / "prototypes.png").stat().st_size > 5000
    told = json.loads((tmp_path / "run" / "results.json").read_text())["prototypes"]
    assert len(told["sizes"]) == len(told["prior"]) == 5
    assert sum(told["sizes"]) == pytest.approx(1)
    assert told["sizes"] == sorted(told["sizes"], reverse=True)
    before = weights(tmp_path / "run")["prototypes"]
    assert before.shape == (5, 128)


def test_another_run_is_drawn_beside(npz, tmp_path, capsys) -> None:
    few = ["--method", "swav"]
    assert main([*options(npz, tmp_path / "one", 1), *few]) == 0
    assert (
        main([*options(npz, tmp_path / "two", 1), *few, "--prior", "power_law", "--beside", str(tmp_path / "one")]) == 0
    )
    one, two = (
        int.from_bytes((tmp_path / name / "prototypes.png").read_bytes()[16:20], "big") for name in ("one", "two")
    )
    assert two > 1.5 * one  # pixels across
    with pytest.raises(SystemExit):
        main([*options(npz, tmp_path / "three", 1), *few, "--beside", str(tmp_path)])
    assert "--beside must name the folder of a finished run with prototypes" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_a_resumed_swav_run_has_the_numbers_of_a_whole_one(npz, tmp_path) -> None:
    from fastcl.train.loop import Run

    assert main([*options(npz, tmp_path / "whole", 3), "--method", "swav"]) == 0
    epoch = Run._epoch

    def interrupted(self, number, bar):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_epoch", interrupted)
        assert main([*options(npz, tmp_path / "part", 3), "--method", "swav"]) == 130
    assert main(["--resume", str(tmp_path / "part")]) == 0
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "part")[name]), name


def test_options_that_need_prototypes(npz, tmp_path, capsys) -> None:
    for given, message in (
        (["--method", "simclr", "--prior", "uniform"], "--prior needs a method with prototypes"),
        (["--method", "pmsn", "--long-tail", "1"], "expected a number above 1"),
        (["--method", "swav", "--prior", "counts"], "--prior counts needs --n-clusters of at least"),
    ):
        with pytest.raises(SystemExit):
            main([*options(npz, tmp_path / "run"), *given])
        assert message in capsys.readouterr().err


def test_a_long_tail_thins_the_training_images_alone() -> None:
    whole = load("digits", None, 0)
    for ratio, seed in ((20, 0), (5, 1)):
        thin = long_tailed(whole, ratio, seed)
        sizes = np.sort(np.bincount(thin.train_labels))[::-1]
        assert sizes[0] / sizes[-1] == pytest.approx(ratio, rel=0.1)
        expected = sizes[0] * np.arange(1, 11) ** (-np.log(ratio) / np.log(10))
        np.testing.assert_allclose(sizes, expected, atol=0.6)
        assert thin.test_images is whole.test_images
        digits = load_digits()
        assert (digits.target[thin.source_index] == thin.train_labels).all()
        np.testing.assert_array_equal(thin.train_images[:, 0], digits.images[thin.source_index] / np.float32(16))
    again = long_tailed(whole, 5, 1)
    assert (again.source_index == thin.source_index).all()
    other = long_tailed(whole, 5, 2)
    assert (np.bincount(other.train_labels) != np.bincount(thin.train_labels)).any()


def test_the_prior_of_counts_is_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [10, 60, 30])
    torch.testing.assert_close(prototype_masses("counts", 3, labels), torch.tensor([0.6, 0.3, 0.1]))
    torch.testing.assert_close(prototype_masses("counts", 5, labels), torch.tensor([0.3, 0.3, 0.15, 0.15, 0.1]))
    assert prototype_masses("uniform", 4, labels).tolist() == [0.25] * 4
    assert prototype_masses("power_law", 4, labels).argmax() == 0


SHAPE = torch.Size((1, 8, 8))


def test_msn_is_pmsn_with_a_uniform_prior() -> None:
    views, masses = torch.rand(6, 2, *SHAPE), torch.full((5,), 0.2)
    losses = []
    for kind, loss in ((MSN, fastcl.MSNLoss(0.1)), (PMSN, fastcl.PMSNLoss(0.1, prior=masses))):
        torch.manual_seed(0)
        method = kind(SHAPE, 0.1, masses)
        z = method.project(views)
        other = loss(z.transpose(0, 1).flatten(0, 1), z.flip(1).transpose(0, 1).flatten(0, 1), method.prototypes)
        losses += [method(views, None, torch.arange(6)), other]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_dino_is_its_formula() -> None:
    """Assignments of both views together, by the copy that has moved by one step."""
    torch.manual_seed(0)
    masses = torch.tensor([0.4, 0.3, 0.2, 0.1])
    method = DINO(SHAPE, 0.2, masses)
    before = deepcopy(method.state_dict())
    with torch.no_grad():
        method.prototypes += 1
    views = torch.rand(7, 2, *SHAPE)
    loss = method(views, None, torch.arange(7))
    moved = method.slow[2][0]
    torch.testing.assert_close(moved, before["prototypes"].lerp(method.prototypes.detach(), 0.05))
    z = F.normalize(method.project(views).double(), dim=2).transpose(0, 1)
    w, v = (F.normalize(x.detach().double(), dim=1) for x in (method.prototypes, moved))
    encoder, projector, _ = method.slow
    y = F.normalize(projector(encoder(views.flatten(0, 1))).double(), dim=1).view(7, 2, -1).transpose(0, 1)
    goals = fastcl.sinkhorn((y @ v.T).flatten(0, 1), epsilon=0.04, prior=masses.double()).assignments.view(2, 7, 4)
    expected = -(goals.flip(0) * (z @ w.T / 0.2).log_softmax(2)).sum(2).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("slow."), name
