"""DebiasedLoss and HardNegativeLoss against the papers' formulas in float64."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.backends import BACKENDS, VARIANTS, running
from tests.support.oracle import CANCELLING, TRUTH, Evaluation, eager_evaluations, op_masks, similarities
from tests.support.pairs import pairs
from tests.support.tolerances import ROUNDINGS, accumulation_dtype, check

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def formula(
    x: Tensor,
    clusters: Tensor,
    t: float | Tensor,
    tau_plus: float,
    beta: float,
    y: Tensor | None = None,
    of: Tensor | None = None,
) -> Tensor:
    """The loss of each anchor, every exponential relative to the row's largest logit; NaN for one without positives."""
    unit = torch.nn.functional.normalize(x, dim=1)
    other = unit if y is None else torch.nn.functional.normalize(y, dim=1)
    s = unit @ other.T / t
    of = clusters if of is None else of
    allowed = ~torch.eye(len(x), dtype=torch.bool) if y is None else torch.ones_like(s, dtype=torch.bool)
    positive = (clusters[:, None] == of[None, :]) & (clusters[:, None] >= 0) & allowed
    negative = allowed & ~positive
    terms = []
    for i in range(len(x)):
        pos, neg = s[i][positive[i]], s[i][negative[i]]
        if len(pos) == 0:
            terms.append(s.new_tensor(torch.nan))
            continue
        top = s[i][allowed[i]].max().detach()
        p, n = (pos - top).exp(), (neg - top).exp()
        if len(neg):
            importance = (beta * (neg - neg.max().detach())).exp()
            ng = ((importance * n).sum() / importance.mean() - tau_plus * len(neg) * p.mean()) / (1 - tau_plus)
            ng = torch.maximum(ng, len(neg) * (-1 / torch.as_tensor(t, dtype=s.dtype) - top).exp())
        else:
            ng = s.new_zeros(())
        terms.append((p.sum() + ng).log() + top - pos.mean())
    return torch.stack(terms)


def as_released(out_1: Tensor, out_2: Tensor, t: float, tau_plus: float, beta: float) -> Tensor:
    """The estimator of github.com/joshr17/HCL, for normalised views."""
    b = len(out_1)
    out = torch.cat([out_1, out_2])
    neg = torch.exp(out @ out.T / t)
    mask = ~torch.eye(b, dtype=torch.bool).repeat(2, 2)
    neg = neg.masked_select(mask).view(2 * b, -1)
    pos = torch.exp((out_1 * out_2).sum(-1) / t)
    pos = torch.cat([pos, pos])
    n = b * 2 - 2
    importance = (beta * neg.log()).exp()
    reweighted = (importance * neg).sum(-1) / importance.mean(-1)
    ng = (-tau_plus * n * pos + reweighted) / (1 - tau_plus)
    ng = torch.clamp(ng, min=n * math.exp(-1 / t))
    return (-torch.log(pos / (pos + ng))).mean()


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    """Pairs of neighbours: noise of size `spread` around common centres."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(n // 2 + 1, d, generator=g, dtype=torch.float64).repeat_interleave(2, 0)[:n]
    return (centres + spread * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype)


CLUSTERS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, -1, 4, 4, 5, 5])
PARAMETERS = [(0.5, 0.1, 1.0), (0.1, 0.0, 0.5), (0.2, 0.1, 0.0), (0.5, 0.7, 2.0), (0.3, 0.0, 0.0), (0.05, 0.3, 1.0)]


@pytest.mark.parametrize(("t", "tau_plus", "beta"), PARAMETERS)
@pytest.mark.parametrize("two_sets", [False, True])
def test_is_the_formula(t, tau_plus, beta, two_sets, backend) -> None:
    x = rows(13, 7, 1).requires_grad_()
    temperature = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    y = rows(11, 7, 2).requires_grad_() if two_sets else None
    of = CLUSTERS[:11].flip(0) if two_sets else None
    leaves = [x, temperature, *([] if y is None else [y])]
    expected = formula(x, CLUSTERS, temperature, tau_plus, beta, y, of)
    counted = expected.isfinite()
    weights = torch.linspace(0.5, 1.5, 13, dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * weights)[counted].sum(), leaves)
    loss = fastcl.HardNegativeLoss(temperature, tau_plus, beta, reduction="none")
    got = loss(x, CLUSTERS, contrasts=y, contrast_clusters=of)
    assert torch.equal(got[~counted], torch.zeros(int((~counted).sum()), dtype=torch.float64))
    torch.testing.assert_close(got[counted], expected[counted], rtol=0, atol=1e-11)
    gradients = torch.autograd.grad((got * weights).sum(), leaves)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.5])
def test_is_what_its_authors_released(tau_plus: float, beta: float) -> None:
    z = torch.nn.functional.normalize(rows(14, 5, 3), dim=1).view(7, 2, 5).requires_grad_()
    expected = as_released(z[:, 0], z[:, 1], 0.4, tau_plus, beta)
    got = fastcl.HardNegativeLoss(0.4, tau_plus, beta, normalize=False)(z)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (got, expected)))
    if beta == 0:
        assert torch.equal(fastcl.DebiasedLoss(0.4, tau_plus, normalize=False)(z), got)


def test_without_correction_it_is_infonce() -> None:
    z = rows(12, 5, 4).view(6, 2, 5)
    torch.testing.assert_close(fastcl.DebiasedLoss(0.3, 0.0)(z), cluster_infonce(z, temperature=0.3))


def evaluated(x: Tensor, clusters: Tensor, t: float, tau_plus: float, beta: float, how: Evaluation) -> Tensor:
    """The mean loss, or a part of it, in one of several equivalent ways; every row has positives and negatives.

    Parts "hard" and "false": the denominator as a function of one term of the estimate of the negatives alone, times
    the factor by which a relative error of the term grows in the denominator, and so in its gradient.
    """
    temperature = torch.tensor(t, dtype=how.dtype)
    s = similarities(x, x, 1 / temperature, True, True, how)
    positive, negative = op_masks(len(x), None, clusters, None, None, None)
    top = s.masked_fill(~(positive | negative), -torch.inf).amax(1, keepdim=True).detach()
    hard = s.masked_fill(~negative, -torch.inf).amax(1, keepdim=True).detach()
    p, n = ((s - top).exp() * mask for mask in (positive, negative))
    num_pos, num_neg = positive.sum(1), negative.sum(1)
    importance = (beta * (s - hard)).exp() * negative
    hard_part, false_part, sum_pos = (importance * n).sum(1) / importance.sum(1), p.sum(1) / num_pos, p.sum(1)
    if how.part in ("hard", "false"):
        sum_pos = sum_pos.detach()
        if how.part == "hard":
            false_part = false_part.detach()
        else:
            hard_part = hard_part.detach()
    ng = num_neg * (hard_part - tau_plus * false_part) / (1 - tau_plus)
    ng = torch.maximum(ng, num_neg * (-1 / temperature - top[:, 0]).exp())
    parts = {"denominator": (sum_pos + ng).log() + top[:, 0], "positives": (s * positive).sum(1) / num_pos}
    terms = num_neg * (hard_part + tau_plus * false_part) / (1 - tau_plus)
    parts |= dict.fromkeys(("hard", "false"), parts["denominator"] * (terms / (sum_pos + ng)).detach())
    rows: Tensor = parts.get(how.part, parts["denominator"] - parts["positives"])
    return rows.mean()


def check_precision(
    x: Tensor, clusters: Tensor, t: float, tau_plus: float, beta: float, estimate_cancels: bool = False
) -> None:
    """By the error rule, of the loss and its gradient. estimate_cancels: the estimate of the negatives cancels too."""
    accumulation = accumulation_dtype(x.dtype)

    def differentiated(how: Evaluation) -> tuple[Tensor, Tensor]:
        leaf = x.detach().to(how.dtype).requires_grad_()
        loss = evaluated(leaf, clusters, t, tau_plus, beta, how)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    truth, true_gradient = differentiated(TRUTH)
    cancelling = [differentiated(how) for how in CANCELLING]
    size, of_gradient = (sum(part[k].abs() for part in cancelling) for k in range(2))
    if estimate_cancels:
        terms = [differentiated(Evaluation(part=part))[1].abs() for part in ("hard", "false")]
        rounding = (1 + 2 * beta) / t / ROUNDINGS[accumulation]  # one rounding of the largest logits, at all scales
        of_gradient = of_gradient + rounding * (terms[0] + terms[1])
    draws = [differentiated(how) for how in eager_evaluations(accumulation)]
    eager, of_draws = ([draw[k] for draw in draws] for k in range(2))
    leaf = x.detach().requires_grad_()
    loss = fastcl.HardNegativeLoss(t, tau_plus, beta)(leaf, clusters)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.dtype == accumulation
    check("loss", loss, truth, eager, accumulation=accumulation, magnitude=size)
    check(
        "gradient",
        gradient,
        true_gradient,
        of_draws,
        accumulation=accumulation,
        half_rows=x.dtype,
        magnitude=of_gradient,
    )


@pairs(spread_and_t=list(product([1.0, 0.02], [0.5, 0.05, 0.01])), backend=VARIANTS, dtype=DTYPES, beta=[0.0, 1.0])
def test_precision(spread_and_t, dtype, beta: float, backend) -> None:
    """Random and converged rows."""
    spread, t = spread_and_t
    check_precision(rows(26, 16, 5, dtype, spread), torch.arange(26) // 2, t, 0.1, beta)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("tau_plus", [0.1, 0.5])
@pytest.mark.parametrize("t", [0.05, 0.1])
@pytest.mark.parametrize("seed", [1, 2])
def test_precision_where_the_estimate_of_the_negatives_nearly_cancels(seed, t, tau_plus, beta) -> None:
    """A rounding of a logit becomes a rounding of the estimate times tau_plus * N, in eager PyTorch as well.

    The papers' quotient of sums rounds a logit once, for numerator and denominator. Low temperatures would overflow
    there, so the loss uses log-sum-exps at two scales. They round the logit separately, at beta and at 1 + beta times
    its size, and the exponential has that error. So each term of the estimate may have one rounding of a logit.
    """
    for backend in (name for name in BACKENDS if name in ("reference", "chunked", "cpu")):
        with running(backend):
            check_precision(rows(200, 32, seed, torch.float32), torch.arange(200) // 2, t, tau_plus, beta, True)


def test_anchors_without_negatives_or_positives() -> None:
    x = rows(4, 3, 6).requires_grad_()
    loss = fastcl.HardNegativeLoss(reduction="none")(x, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(loss, formula(x, torch.zeros(4, dtype=torch.long), 0.5, 0.1, 1.0))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.isfinite().all()
    alone = fastcl.HardNegativeLoss()(x, torch.arange(4))
    assert alone.item() == 0
    assert torch.equal(torch.autograd.grad(alone, x)[0], torch.zeros_like(x))


def test_gradcheck() -> None:
    x = rows(8, 3, 7).requires_grad_()
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    clusters = torch.arange(8) // 2
    for loss in (fastcl.HardNegativeLoss(tau_plus=0.2), fastcl.DebiasedLoss()):
        assert torch.autograd.gradcheck(lambda x, t, loss=loss: loss(x, clusters, temperature=t), (x, temperature))


def test_weights_reductions_and_a_learned_temperature() -> None:
    x, clusters = rows(6, 3, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    each = formula(x, clusters, 0.5, 0.1, 1.0)
    weights = torch.tensor([0.0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(fastcl.HardNegativeLoss(reduction="sum")(x, clusters), each.sum())
    got = fastcl.HardNegativeLoss()(x, clusters, weights=weights)
    torch.testing.assert_close(got, (each * weights).sum() / weights.sum())
    learned = fastcl.DebiasedLoss(nn.Parameter(torch.tensor(0.2)))
    learned(x, clusters).backward()
    assert [name for name, _ in learned.named_parameters()] == ["temperature"]
    assert learned.temperature.grad is not None
    assert "learned" in repr(learned)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"tau_plus": 1.0}, ValueError, "tau_plus"),
        ({"tau_plus": -0.1}, ValueError, "tau_plus"),
        ({"tau_plus": "much"}, TypeError, "tau_plus"),
        ({"beta": -1}, ValueError, "beta"),
        ({"beta": math.inf}, ValueError, "beta"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"gather": "star"}, ValueError, "gather"),
        ({"normalize": 1}, TypeError, "normalize"),
    ],
)
def test_errors_of_the_constructor(arguments, error, named) -> None:
    with pytest.raises(error, match=named):
        fastcl.HardNegativeLoss(**arguments)


def test_errors_of_a_call() -> None:
    with pytest.raises(ValueError, match="clusters"):
        fastcl.HardNegativeLoss()(torch.ones(4, 3))
    with pytest.raises(TypeError, match="clusters"):
        fastcl.DebiasedLoss()(torch.ones(4, 3), torch.ones(4))


def test_compiles() -> None:
    x, clusters = rows(8, 3, 9), torch.arange(8) // 2
    loss = fastcl.HardNegativeLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, clusters), loss(x, clusters))
