"""KoLeo, LDReg and hypersphere losses against their plain float64 formulas."""

import math

import pytest
import torch

import fastcl
from fastcl.functional import hypersphere_loss, koleo_loss, ldreg_loss
from tests.support import plain_losses as plain
from tests.support.backends import VARIANTS
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, KINDS


@pairs(
    kind=KINDS, dtype=DTYPES, backend=VARIANTS, p=[2.0, 1.0, 3.0], eps=[1e-8, 0.1], reduction=["mean", "sum", "none"]
)
def test_koleo_is_its_formula(kind, dtype, backend, p, eps, reduction) -> None:
    x, y = plain.two_views(kind, dtype, n=9)
    arguments = {"embeddings": torch.stack((x, y), 1).flatten(0, 1), "p": p, "eps": eps, "reduction": reduction}
    plain.judge(plain.koleo, koleo_loss, arguments, ("embeddings",))


@pairs(kind=KINDS, dtype=DTYPES, backend=VARIANTS, t=[1.0, 3.0], lam=[1.0, 0.0, -0.5], alpha=[2.0, 1.0])
def test_hypersphere_is_its_formula(kind, dtype, backend, t, lam, alpha) -> None:
    x, y = plain.two_views(kind, dtype)
    arguments = {"z_a": x, "z_b": y, "t": t, "lam": lam, "alpha": alpha}
    plain.judge(plain.hypersphere, hypersphere_loss, arguments, ("z_a", "z_b"))


@pairs(kind=KINDS, dtype=DTYPES, backend=VARIANTS, k=[2, 5, 64], reduction=["mean", "sum", "none"])
def test_ldreg_is_its_formula(kind, dtype, backend, k, reduction) -> None:
    x = plain.two_views(kind, dtype, n=9)[0]
    plain.judge(plain.ldreg, ldreg_loss, {"embeddings": x, "k": k, "reduction": reduction}, ("embeddings",))


def test_ldreg_of_rows_far_from_the_origin_and_of_equal_rows() -> None:
    x = plain.two_views("random", torch.float64)[0]
    far = (x + 1e4).float()
    torch.testing.assert_close(ldreg_loss(far, k=5).double(), plain.ldreg(far.double(), k=5), rtol=1e-5, atol=0)
    twice = x.repeat(3, 1).requires_grad_()  # two neighbours at distance 0
    loss = ldreg_loss(twice, k=3)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, twice)[0].isfinite().all()
    assert ldreg_loss(x[:2]) == 0


def test_koleo_gives_both_ends_of_a_pair_a_gradient() -> None:
    """Three rows on the circle: the third row's nearest row is the second, and the third is nearest to none."""
    angles = torch.tensor([0.0, 0.4, 1.2], dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), 1).requires_grad_()
    loss = koleo_loss(x, eps=1e-12, reduction="none")
    distances = 2 * torch.tensor([0.2, 0.2, 0.4], dtype=torch.float64).sin()
    torch.testing.assert_close(loss, -distances.log())
    (gradient,) = torch.autograd.grad(loss[0], x)
    slope = 0.5 / math.tan(0.2)  # of -log(2 sin(angle / 2)) in the angle between the two
    along = torch.stack((-angles.sin(), angles.cos()), 1)
    torch.testing.assert_close((gradient * along).sum(1), torch.tensor([slope, -slope, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_koleo_of_equal_rows(p: float, backend) -> None:
    """At distance 0 the loss is -log(eps) and its gradient 0."""
    x = torch.ones(5, 3).requires_grad_()
    loss = koleo_loss(x, p=p, eps=1e-6)
    assert loss.item() == pytest.approx(-math.log(1e-6))
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(5, 3))


def test_koleo_keeps_the_digits_of_near_neighbours() -> None:
    """1 - cosine of a distance of 0.0001 is less than a rounding of float32."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat_interleave(2, 0)
    x = x.float() * (1 + 1e-4 * torch.randn(12, 8, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(koleo_loss(x).double(), plain.koleo(x), rtol=1e-4, atol=0)


def test_hypersphere_is_alignment_and_uniformity(backend) -> None:
    x, y = plain.two_views("random", torch.float64)
    expected = fastcl.alignment(x, y, 1.5) + 0.3 * (fastcl.uniformity(x, 3.0) + fastcl.uniformity(y, 3.0)) / 2
    torch.testing.assert_close(fastcl.HypersphereLoss(3.0, 0.3, 1.5)(x, y), expected)


def test_hypersphere_of_one_pair_is_its_alignment() -> None:
    x, y = plain.two_views("random", torch.float64, n=1)
    torch.testing.assert_close(fastcl.HypersphereLoss()(x, y), fastcl.alignment(x, y))


def test_reprs() -> None:
    assert repr(fastcl.KoLeoLoss()) == "KoLeoLoss(p=2, eps=1e-08, reduction='mean')"
    assert repr(fastcl.HypersphereLoss()) == "HypersphereLoss(t=1, lam=1, alpha=2)"


x = torch.randn(4, 3)
WRONG = {
    "p below 1": (lambda: fastcl.KoLeoLoss(0.5), "p: expected a number of at least 1, got 0.5"),
    "p inf": (lambda: fastcl.KoLeoLoss(math.inf), "p: expected a finite number .*, got inf"),
    "eps 0": (lambda: fastcl.KoLeoLoss(eps=0), "eps: expected a positive number .*, got 0"),
    "k": (lambda: fastcl.LDRegLoss(1), "k: expected at least 2, got 1"),
    "gather": (lambda: ldreg_loss(x, gather="ring"), "gather: expected True or False, got 'ring'"),
    "eps nan": (lambda: koleo_loss(x, eps=math.nan), "eps: expected a finite number .*, got nan"),
    "reduction": (lambda: fastcl.KoLeoLoss(reduction="max"), "reduction: expected one of .*, got 'max'"),
    "views": (lambda: fastcl.KoLeoLoss()(x[None]), r"embeddings: expected shape \[N, D\], got \[1, 4, 3\]"),
    "integers": (lambda: fastcl.KoLeoLoss()(x.long()), "embeddings: expected float64, float32.*, got torch.int64"),
    "t": (lambda: fastcl.HypersphereLoss(t=0), "t: expected a positive number .*, got 0"),
    "lam": (lambda: fastcl.HypersphereLoss(lam=math.nan), "lam: expected a finite number .*, got nan"),
    "alpha": (lambda: fastcl.HypersphereLoss(alpha=-1), "alpha: expected a positive number .*, got -1"),
    "z_a": (lambda: fastcl.HypersphereLoss()(x[0], x), r"z_a: expected shape \[N, D\], got \[3\]"),
    "z_b": (lambda: fastcl.HypersphereLoss()(x, x[:3]), r"z_b: expected shape \[4, 3\], as z_a, got \[3, 3\]"),
    "z_b None": (lambda: fastcl.HypersphereLoss()(x, None), "z_b: expected a tensor, got NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("option", ["gather", "return_stats", "weights"])
def test_options_that_they_do_not_have_are_refused_by_name(option: str) -> None:
    for kind, rows in ((fastcl.KoLeoLoss, (x,)), (fastcl.HypersphereLoss, (x, x))):
        with pytest.raises(TypeError, match=option):
            kind(**{option: True})
        with pytest.raises(TypeError, match=option):
            kind()(*rows, **{option: True})
    with pytest.raises(TypeError, match="reduction"):
        fastcl.HypersphereLoss(reduction="mean")
