"""DCLWLoss against its plain float64 formula."""

import pytest
import torch
from torch import nn

import fastcl
from fastcl.functional import dclw_loss
from tests.losses.test_formulas_of_papers import weighted_dcl
from tests.support import plain_losses as plain
from tests.support.backends import VARIANTS
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, KINDS


@pairs(
    kind=KINDS, dtype=DTYPES, backend=VARIANTS, temperature=[0.1, 0.5], sigma=[0.5, 0.05],
    reduction=["mean", "sum", "none"],
)  # fmt: skip
def test_is_its_formula(kind, dtype, backend, temperature, sigma, reduction) -> None:
    z0, z1 = plain.two_views(kind, dtype)
    arguments = {"z0": z0, "z1": z1, "temperature": temperature, "sigma": sigma, "reduction": reduction}
    plain.judge(plain.dclw, dclw_loss, arguments, ("z0", "z1"))


def test_is_the_five_lines_of_the_documentation() -> None:
    z0, z1 = plain.two_views("random", torch.float64)
    torch.testing.assert_close(fastcl.DCLWLoss(0.2, 0.3)(z0, z1), weighted_dcl(z0, z1, 0.2, 0.3))


def test_of_equal_weights_is_the_decoupled_loss() -> None:
    z0, z1 = plain.two_views("random", torch.float64)
    torch.testing.assert_close(fastcl.DCLWLoss(0.2, sigma=1e12)(z0, z1), fastcl.DCLLoss(0.2)(z0, z1))


def test_learned_temperature() -> None:
    z0, z1 = plain.two_views("random", torch.float64)
    loss = fastcl.DCLWLoss(nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), 0.7)
    assert repr(loss) == "DCLWLoss(temperature=0.3 (learned), sigma=0.7, reduction='mean')"
    loss(z0, z1).backward()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    plain.dclw(z0, z1, temperature=t, sigma=0.7).backward()
    torch.testing.assert_close(loss.temperature.grad, t.grad)


def test_statistics_and_shapes() -> None:
    z0, z1 = plain.two_views("random", torch.float32)
    loss, stats = fastcl.DCLWLoss()(z0, z1, return_stats=True)
    assert torch.equal(loss, fastcl.DCLWLoss()(z0, z1))
    assert stats == fastcl.DCLLoss()(z0, z1, return_stats=True)[1]
    assert fastcl.DCLWLoss(reduction="none")(z0, z1).shape == (13, 2)


def test_a_single_pair_has_no_negatives() -> None:
    z0, z1 = (z.requires_grad_() for z in plain.two_views("random", torch.float32, n=1))
    loss = fastcl.DCLWLoss()(z0, z1)
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros(1, 9)) for g in torch.autograd.grad(loss, [z0, z1]))


x = torch.randn(4, 3)
WRONG = {
    "temperature": (lambda: fastcl.DCLWLoss(0), "temperature: expected a positive number .*, got 0"),
    "sigma": (lambda: fastcl.DCLWLoss(sigma=0), "sigma: expected a positive number .*, got 0"),
    "sigma nan": (lambda: dclw_loss(x, x, sigma=float("nan")), "sigma: expected a finite number .*, got nan"),
    "sigma tensor": (lambda: fastcl.DCLWLoss(sigma=torch.ones(())), "sigma: expected a number, got a tensor"),
    "reduction": (lambda: fastcl.DCLWLoss(reduction="max"), "reduction: expected one of .*, got 'max'"),
    "z0": (lambda: fastcl.DCLWLoss()(x[0], x), r"z0: expected shape \[N, D\], got \[3\]"),
    "z1": (lambda: fastcl.DCLWLoss()(x, x[:3]), r"z1: expected shape \[4, 3\], as z0, got \[3, 3\]"),
    "return_stats": (lambda: fastcl.DCLWLoss()(x, x, return_stats=1), "return_stats: expected True or False, got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("option", ["gather", "margin", "weight_fn", "gather_distributed"])
def test_options_that_it_does_not_have_are_refused_by_name(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        fastcl.DCLWLoss(**{option: True})
