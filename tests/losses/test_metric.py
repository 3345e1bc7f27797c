"""ArcFace, CosFace, Proxy-Anchor and multi-similarity losses against their plain float64 formulas."""

import math

import pytest
import torch

import fastcl
from fastcl import functional as F
from tests.support import plain_losses as plain
from tests.support.backends import VARIANTS
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, KINDS
from tests.support.tolerances import check

CLASS_LOSSES = {
    "arcface": (F.arcface_loss, plain.arcface, ({}, {"margin": 80.0, "scale": 8.0})),
    "cosface": (F.cosface_loss, plain.cosface, ({}, {"margin": -0.1, "scale": 8.0})),
    "proxy_anchor": (F.proxy_anchor_loss, plain.proxy_anchor, ({}, {"margin": -0.1, "alpha": 4.0})),
}


@pairs(
    name=list(CLASS_LOSSES), kind=KINDS, dtype=DTYPES, backend=VARIANTS, which=[0, 1], reduction=["mean", "sum", "none"]
)
def test_class_losses_are_their_formulas(name, kind, dtype, backend, which, reduction) -> None:
    loss, formula, options = CLASS_LOSSES[name]
    arguments = {**plain.class_rows(kind, dtype), **options[which], "reduction": reduction}
    plain.judge(formula, loss, arguments, ("embeddings", "prototypes"))


@pairs(
    kind=KINDS, dtype=DTYPES, backend=VARIANTS, two_sets=[False, True], reduction=["mean", "sum", "none"],
    weights=[(2.0, 50.0, 0.5), (5.0, 20.0, -0.2)],
)  # fmt: skip
def test_multi_similarity_is_its_formula(kind, dtype, backend, two_sets, reduction, weights) -> None:
    rows = plain.class_rows(kind, dtype)
    options = dict(zip(("alpha", "beta", "base"), weights, strict=True))
    arguments = {"embeddings": rows["embeddings"], "labels": rows["labels"] - 1, "reduction": reduction, **options}
    leaves = ("embeddings",)
    if two_sets:
        other = plain.class_rows("random", dtype, n=11, seed=3)
        arguments |= {"contrasts": other["embeddings"], "contrast_labels": other["labels"]}
        leaves = ("embeddings", "contrasts")
    plain.judge(plain.multi_similarity, F.multi_similarity_loss, arguments, leaves)


def test_arcface_keeps_the_digits_of_small_angles() -> None:
    """The arccosine of a float32 cosine does not: it knows an angle of 0.001 to three digits."""
    rows = plain.class_rows("random", torch.float64)
    noise = rows["embeddings"]
    x = (rows["prototypes"][rows["labels"]] + 0.001 * noise).float()
    arguments = {"labels": rows["labels"], "scale": 8.0}
    leaves = [x.requires_grad_(), rows["prototypes"].float().requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got = F.arcface_loss(leaves[0], prototypes=leaves[1], **arguments)
    truth = plain.arcface(wide[0], prototypes=wide[1], **arguments)
    check("loss", got, truth, [truth])
    # The gradient is finite, although the derivative of the arccosine is not; its direction is that of x - w.
    found, true = torch.autograd.grad(got, leaves), torch.autograd.grad(truth, wide)
    for mine, theirs in zip(found, true, strict=True):
        assert (mine - theirs).norm() <= 3e-4 * theirs.norm()


@pytest.mark.parametrize("sign", [1, -1])
def test_arcface_at_the_ends_of_the_angle(sign: int) -> None:
    """At 0 and at 180 degrees, where the angle has no derivative, the gradient is that of the other classes."""
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = (sign * w[:1]).requires_grad_()
    m, s = math.radians(28.6), 4.0
    loss = F.arcface_loss(x, torch.tensor([0]), w, scale=s)
    target = math.cos(m) if sign > 0 else -1 - m * math.sin(m)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-s * target)), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = s / (1 + math.exp(s * target))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, expected]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 90.0, 180.0])
def test_arcface_beyond_the_easy_margin(margin: float) -> None:
    """Angles on both sides of 180 degrees minus the margin."""
    rows = plain.class_rows("random", torch.float64, n=40)
    arguments = {"margin": margin, "scale": 3.0, "reduction": "none"}
    torch.testing.assert_close(F.arcface_loss(**rows, **arguments), plain.arcface(**rows, **arguments))


def test_cosface_is_cluster_infonce_with_a_margin(backend) -> None:
    rows = plain.class_rows("random", torch.float64)
    expected = F.cluster_infonce(
        rows["embeddings"], rows["labels"], contrasts=rows["prototypes"], contrast_clusters=torch.arange(7),
        temperature=1 / 64, margin=0.35,
    )  # fmt: skip
    torch.testing.assert_close(F.cosface_loss(**rows), expected)


@pytest.mark.parametrize("name", list(CLASS_LOSSES))
def test_one_class(name: str) -> None:
    """There is no other class: softmax losses are 0."""
    rows = plain.class_rows("random", torch.float64)
    x, w = rows["embeddings"].requires_grad_(), rows["prototypes"][:1].requires_grad_()
    loss, formula, _ = CLASS_LOSSES[name]
    labels = torch.zeros(17, dtype=torch.int32)
    got = loss(x, labels, w)
    torch.testing.assert_close(got, formula(x, labels, w))
    assert (got == 0) == (name != "proxy_anchor")
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(got, [x, w]))


def test_no_contrasts_and_no_classes(backend) -> None:
    rows = plain.class_rows("random", torch.float32)
    x, none = rows["embeddings"].requires_grad_(), rows["prototypes"][:0].requires_grad_()
    for loss in (
        F.multi_similarity_loss(x, rows["labels"], none, rows["labels"][:0]),
        *(form(x[:0], rows["labels"][:0], none) for form, _, _ in CLASS_LOSSES.values()),
    ):
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, [x, none])
        assert not any(gradient.any() for gradient in gradients)


MODULES = {
    "arcface": (fastcl.ArcFaceLoss, "W", "margin=28.6, scale=64.0"),
    "cosface": (fastcl.CosFaceLoss, "W", "margin=0.35, scale=64.0"),
    "proxy_anchor": (fastcl.ProxyAnchorLoss, "proxies", "margin=0.1, alpha=32.0"),
}


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_own_class_vectors_or_take_them(name: str) -> None:
    kind, parameter, options = MODULES[name]
    loss, rows = kind(7, 9), plain.class_rows("random", torch.float32)
    assert repr(loss) == f"{kind.__name__}(num_classes=7, embedding_size=9, {options}, reduction='mean')"
    assert {key: tuple(value.shape) for key, value in loss.state_dict().items()} == {
        parameter: (9, 7) if parameter == "W" else (7, 9)
    }
    own = getattr(loss, parameter)
    vectors = own.T if parameter == "W" else own
    form = CLASS_LOSSES[name][0]
    got = loss(rows["embeddings"], rows["labels"])
    assert torch.equal(got, form(rows["embeddings"], rows["labels"], vectors))
    got.backward()
    assert own.grad.shape == own.shape
    assert own.grad.any()
    own.grad = None
    prototypes = rows["prototypes"].requires_grad_()
    given = loss(rows["embeddings"], rows["labels"], prototypes=prototypes)
    assert torch.equal(given, form(rows["embeddings"], rows["labels"], prototypes))
    given.backward()
    assert own.grad is None
    assert prototypes.grad.any()


def test_class_vectors_begin_as_those_of_the_peer() -> None:
    torch.manual_seed(0)
    assert fastcl.ArcFaceLoss(100, 200).W.std().item() == pytest.approx(1, rel=0.02)
    assert fastcl.CosFaceLoss(100, 200).W.std().item() == pytest.approx(1, rel=0.02)
    assert fastcl.ProxyAnchorLoss(100, 200).proxies.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.02)


def test_rows_of_two_dtypes() -> None:
    """Half-precision embeddings under a float32 classifier, as under autocast."""
    rows = plain.class_rows("random", torch.float32)
    half = rows["embeddings"].bfloat16()
    for loss, _, _ in CLASS_LOSSES.values():
        wide = {**rows, "embeddings": half.float()}
        torch.testing.assert_close(loss(**{**rows, "embeddings": half}), loss(**wide))


x, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
WRONG = {
    "labels None": (lambda: fastcl.ArcFaceLoss(5, 3)(x, None), "labels: expected a tensor, got NoneType"),
    "labels too large": (lambda: fastcl.ArcFaceLoss(2, 3)(x, labels), "labels: expected numbers from 0 to 1, got 2"),
    "labels negative": (lambda: fastcl.CosFaceLoss(5, 3)(x, labels - 1), "labels: expected .* 0 to 4, got -1"),
    "labels floating": (lambda: fastcl.ProxyAnchorLoss(5, 3)(x, labels.float()), "labels: expected integers, got"),
    "labels bool": (lambda: fastcl.MultiSimilarityLoss()(x, labels > 1), "labels: expected integers, got torch.bool"),
    "labels too few": (lambda: fastcl.MultiSimilarityLoss()(x, labels[:2]), r"labels: expected shape \[4\], got \[2\]"),
    "labels one-hot": (lambda: fastcl.CosFaceLoss(5, 3)(x, labels[:, None]), r"labels: expected shape \[4\], got"),
    "embeddings wide": (lambda: fastcl.ArcFaceLoss(5, 2)(x, labels), r"embeddings: expected rows of dimension 2, got"),
    "embeddings int": (lambda: fastcl.CosFaceLoss(5, 3)(x.long(), labels), "embeddings: expected float64, float32"),
    "embeddings views": (lambda: fastcl.MultiSimilarityLoss()(x[None], labels), r"embeddings: expected shape \[N, D\]"),
    "prototypes narrow": (
        lambda: fastcl.ProxyAnchorLoss(5, 3)(x, labels, prototypes=x[:, :2]),
        r"prototypes: expected rows of dimension 3, got shape \[4, 2\]",
    ),
    "prototypes few": (lambda: F.cosface_loss(x, labels, x[:1]), "labels: expected numbers from 0 to 0, got 2"),
    "no classes": (lambda: fastcl.ArcFaceLoss(0, 3), "num_classes: expected at least 1, got 0"),
    "no dimension": (lambda: fastcl.ProxyAnchorLoss(3, 0), "embedding_size: expected at least 1, got 0"),
    "margin nan": (lambda: fastcl.ArcFaceLoss(5, 3, math.nan), "margin: expected a finite number .*, got nan"),
    "margin inf": (lambda: fastcl.CosFaceLoss(5, 3, math.inf), "margin: expected a finite number .*, got inf"),
    "margin of proxies": (lambda: fastcl.ProxyAnchorLoss(5, 3, math.nan), "margin: expected a finite .*, got nan"),
    "margin 181": (lambda: fastcl.ArcFaceLoss(5, 3, 181), "margin: expected degrees from 0 to 180, got 181"),
    "margin text": (lambda: F.cosface_loss(x, labels, x, margin="0"), "margin: expected a number, got str"),
    "scale 0": (lambda: fastcl.CosFaceLoss(5, 3, scale=0), "scale: expected a positive number .*, got 0"),
    "scale tensor": (lambda: fastcl.ArcFaceLoss(5, 3, scale=torch.ones(())), "scale: expected a number, got a tensor"),
    "alpha": (lambda: fastcl.ProxyAnchorLoss(5, 3, alpha=-1.0), "alpha: expected a positive number .*, got -1"),
    "alpha of pairs": (lambda: fastcl.MultiSimilarityLoss(alpha=math.inf), "alpha: expected a finite .*, got inf"),
    "beta": (lambda: fastcl.MultiSimilarityLoss(beta=0), "beta: expected a positive number .*, got 0"),
    "base": (lambda: fastcl.MultiSimilarityLoss(base=math.nan), "base: expected a finite number .*, got nan"),
    "reduction": (lambda: fastcl.ArcFaceLoss(5, 3, reduction="avg"), "reduction: expected one of .*, got 'avg'"),
    "reduction of pairs": (lambda: fastcl.MultiSimilarityLoss(reduction=None), "reduction: expected .*, got None"),
    "contrasts alone": (lambda: fastcl.MultiSimilarityLoss()(x, labels, x), "contrast_labels: expected a tensor"),
    "contrast_labels alone": (
        lambda: fastcl.MultiSimilarityLoss()(x, labels, None, labels),
        "contrasts: expected a tensor, as contrast_labels is given, got None",
    ),
    "contrasts narrow": (
        lambda: fastcl.MultiSimilarityLoss()(x, labels, x[:, :2], labels),
        r"contrasts: expected rows of dimension 3, got shape \[4, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("option", ["gather", "return_stats", "weight_regularizer", "distance"])
def test_options_that_they_do_not_have_are_refused_by_name(option: str) -> None:
    for make in (
        lambda **o: fastcl.ArcFaceLoss(5, 3, **o),
        lambda **o: fastcl.CosFaceLoss(5, 3, **o),
        lambda **o: fastcl.ProxyAnchorLoss(5, 3, **o),
        fastcl.MultiSimilarityLoss,
    ):
        with pytest.raises(TypeError, match=option):
            make(**{option: True})
        with pytest.raises(TypeError, match=option):
            make()(x, labels, **{option: True})
