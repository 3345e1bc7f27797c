"""cluster_infonce against the plain formula."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from fastcl.functional import cluster_infonce as library_loss
from fastcl.ops.backends import rows as rows_arithmetic
from tests.support.backends import BACKENDS, INTERPRETED, QUICK, VARIANTS, needs_interpreter, running
from tests.support.judging import judge, objective, terms
from tests.support.oracle import TRUTH, Evaluation, differentiate, eager_evaluations, similarities
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, LossProblem, generator, loss_problem, loss_problems, rows
from tests.support.tolerances import check


def check_loss(arguments: dict[str, Any], leaves: tuple[str, ...], backends: tuple[str, ...] = VARIANTS) -> None:
    """Value and gradients of every backend against the float64 formula, by the error rule."""
    found = {}
    for backend in backends:
        with running(backend):
            found[backend] = differentiate(library_loss, arguments, leaves, objective)
    judge(arguments, leaves, found)


@settings(max_examples=150)
@given(loss_problems())
def test_matches_the_formula(problem: LossProblem) -> None:
    check_loss(problem.arguments(), problem.leaves, QUICK)


@needs_interpreter
@settings(max_examples=12)  # each takes seconds
@given(loss_problems(interpreted=True))
def test_triton_matches_the_formula(problem: LossProblem) -> None:
    check_loss(problem.arguments(), problem.leaves, INTERPRETED)


FORMS, DENOMINATORS, MARGINS, REDUCTIONS = (
    ["outside", "inside"],
    ["all", "negatives"],
    [0.0, 0.25],
    ["mean", "sum", "none"],
)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_form_of_pairs(margin, reduction, dtype) -> None:
    check_options(QUICK, form="pairs", margin=margin, reduction=reduction, dtype=dtype, contrast_dtype=dtype)


@pytest.mark.parametrize("backend", INTERPRETED, indirect=True)
def test_form_of_pairs_interpreted(backend) -> None:
    check_options((backend,), form="pairs", margin=0.2)


def check_options(backends: tuple[str, ...], **options: Any) -> None:
    """In self-contrast and, in both directions, in two sets."""
    problem = loss_problem(pattern="negatives", **options)
    check_loss(problem.arguments(), problem.leaves, backends)
    problem = loss_problem(
        contrasts="paired", m=18, pattern="negatives", symmetric=True, ids=True, bias=True, weights=True, **options
    )
    check_loss(problem.arguments(), problem.leaves, backends)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(form, denominator, margin, reduction) -> None:
    """Every combination."""
    check_options(QUICK, form=form, denominator=denominator, margin=margin, reduction=reduction)


@pytest.mark.parametrize("backend", INTERPRETED, indirect=True)
@pairs(form=FORMS, denominator=DENOMINATORS, margin=MARGINS, reduction=REDUCTIONS)
def test_options_interpreted(form, denominator, margin, reduction, backend) -> None:
    check_options((backend,), form=form, denominator=denominator, margin=margin, reduction=reduction)


def check_converged(backends: tuple[str, ...], n: int, dtype, denominator, form, contrasts) -> None:
    """Softmax part and positive part cancel: where a gradient that is rounded too early goes wrong."""
    problem = loss_problem(
        n=n,
        views=2,
        d=64,
        kind="converged",
        contrasts=contrasts,
        symmetric=contrasts is not None,
        pattern=None,
        temperature=0.05,
        denominator=denominator,
        form=form,
        dtype=dtype,
        contrast_dtype=dtype,
    )
    check_loss(problem.arguments(), problem.leaves, backends)


CONTRASTS = [None, "paired"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "denominator"), [*itertools.product(FORMS, DENOMINATORS), ("pairs", "all")])
@pytest.mark.parametrize("contrasts", CONTRASTS)
def test_converged_rows(dtype, denominator, form, contrasts) -> None:
    check_converged(QUICK, 127, dtype, denominator, form, contrasts)


@pytest.mark.parametrize("backend", INTERPRETED, indirect=True)
@pairs(dtype=DTYPES[1:], denominator=DENOMINATORS, form=FORMS, contrasts=CONTRASTS)
def test_converged_rows_interpreted(dtype, denominator, form, contrasts, backend) -> None:
    check_converged((backend,), 33, dtype, denominator, form, contrasts)


@pairs(
    temperature=[0.01, 0.005],
    kind=["random", "converged"],
    contrasts=CONTRASTS,
    dtype=[torch.float32, torch.bfloat16],
)
def test_low_temperature(temperature, kind, contrasts, dtype) -> None:
    problem = loss_problem(
        n=33, d=16, kind=kind, contrasts=contrasts, temperature=temperature, dtype=dtype, contrast_dtype=dtype
    )
    check_loss(problem.arguments(), problem.leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["outside", "inside"])
def test_logits_of_ten_thousand(dtype, form) -> None:
    arguments = loss_problem(n=33, d=16, form=form).arguments()
    unit = nn.functional.normalize(arguments["embeddings"].double(), dim=-1)
    arguments |= {"embeddings": (unit * 100).to(dtype), "normalize": False, "temperature": 1.0}
    check_loss(arguments, ("embeddings",))


def test_memory_is_split_into_blocks(monkeypatch) -> None:
    monkeypatch.setattr(rows_arithmetic, "CPU_BLOCK", 1)
    monkeypatch.setattr(rows_arithmetic, "FEWEST_ROWS", 3)
    problem = loss_problem(n=20, contrasts="paired", symmetric=True, ids=True, bias=True, positives=True)
    check_loss(problem.arguments(), problem.leaves, backends=("chunked",))
    problem = loss_problem(n=20, views=3, denominator="negatives")
    check_loss(problem.arguments(), problem.leaves, backends=("chunked",))


# Values computed by hand


def test_two_views_of_two_samples_by_hand(backend) -> None:
    z = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [0.0, 1.0]]])
    # Cosines: 1 with the other view, 0 with the others.
    expected = torch.tensor([2.0, 0.0, 0.0]).logsumexp(0) - 2.0
    torch.testing.assert_close(library_loss(z, temperature=0.5), expected)
    torch.testing.assert_close(library_loss(z, torch.tensor([0, 1]), temperature=0.5), expected)
    decoupled = torch.tensor([0.0, 0.0]).logsumexp(0) - 2.0
    torch.testing.assert_close(library_loss(z, temperature=0.5, denominator="negatives"), decoupled)
    # One cluster: positives 1, 0, 0.
    everything = torch.tensor([2.0, 0.0, 0.0])
    one = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(library_loss(z, one, temperature=0.5), everything.logsumexp(0) - 2 / 3)
    torch.testing.assert_close(library_loss(z, one, temperature=0.5, form="inside"), torch.tensor(3.0).log())
    margin = torch.tensor([1.0, 0.0, 0.0]).logsumexp(0) - 1.0
    torch.testing.assert_close(library_loss(z, temperature=0.5, margin=0.5), margin)


def test_cross_view_form_is_symmetric_cross_entropy(backend) -> None:
    g = generator(0)
    x, y = torch.randn(10, 4, generator=g), torch.randn(10, 4, generator=g)
    s = nn.functional.normalize(x, dim=1) @ nn.functional.normalize(y, dim=1).T / 0.1
    target = torch.arange(10)
    expected = (nn.functional.cross_entropy(s, target) + nn.functional.cross_entropy(s.T, target)) / 2
    torch.testing.assert_close(library_loss(x, contrasts=y, symmetric=True), expected)
    torch.testing.assert_close(library_loss(x, contrasts=y), nn.functional.cross_entropy(s, target))


# Which pairs are positive


def test_views_are_flattened_sample_major(backend) -> None:
    z = torch.randn(5, 3, 4, generator=generator(0))
    clusters = torch.tensor([0, 1, 0, 2, 2])
    flat = terms(z.reshape(15, 4), clusters.repeat_interleave(3))
    torch.testing.assert_close(terms(z, clusters), flat.reshape(5, 3))
    assert terms(z).shape == (5, 3)
    assert terms(z[:, 0], clusters).shape == (5,)
    torch.testing.assert_close(terms(z), terms(z, torch.arange(5)))


def test_negative_cluster_is_positive_with_its_own_other_views_only(backend) -> None:
    z = torch.randn(4, 2, 3, generator=generator(0))
    torch.testing.assert_close(terms(z, torch.tensor([-1, -1, -7, 5])), terms(z))
    torch.testing.assert_close(terms(z, torch.tensor([-1, 3, 3, -1])), terms(z, torch.tensor([8, 3, 3, 9])))
    assert torch.equal(terms(z[:, 0], torch.tensor([-1, -1, 4, 4]))[:2], torch.zeros(2))


def test_negative_cluster_in_two_sets(backend) -> None:
    g = generator(0)
    x, y = torch.randn(4, 3, generator=g), torch.randn(6, 3, generator=g)
    clusters = torch.tensor([-1, -1, 4, 4])
    # With contrast clusters, contrasts without a cluster match nothing.
    loss = terms(x, clusters, contrasts=y, contrast_clusters=torch.tensor([-1, -1, 4, 5, -2, 4]))
    assert torch.equal(loss[:2], torch.zeros(2))
    assert (loss[2:] > 0).all()
    # Without contrast clusters, contrast i is anchor i's positive, and extra contrasts are negatives.
    loss = terms(x, clusters, contrasts=y)
    torch.testing.assert_close(
        loss, terms(x, torch.tensor([8, 9, 4, 4]), contrasts=y, contrast_clusters=torch.tensor([8, 9, 4, 4, -1, -1]))
    )
    assert (loss > 0).all()


def test_contrast_clusters_without_clusters_name_samples(backend) -> None:
    g = generator(0)
    x, y = torch.randn(3, 2, 4, generator=g), torch.randn(5, 4, generator=g)
    owners = torch.tensor([2, -1, 0, 0, 7])
    loss = terms(x, contrasts=y, contrast_clusters=owners)
    torch.testing.assert_close(loss, terms(x, torch.arange(3), contrasts=y, contrast_clusters=owners))
    assert torch.equal(loss[1], torch.zeros(2))


def test_list_of_contrasts_is_their_concatenation(backend) -> None:
    g = generator(0)
    x = torch.randn(4, 3, generator=g)
    parts = [torch.randn(k, 3, generator=g, requires_grad=True) for k in (4, 1, 3)]
    whole = torch.cat([p.detach() for p in parts]).requires_grad_()
    owners = torch.tensor([0, 1, 2, 3, 0, 1, -1, 9])
    for options in ({}, {"contrast_clusters": owners}):
        listed = library_loss(x, contrasts=parts, **options)
        joined = library_loss(x, contrasts=whole, **options)
        torch.testing.assert_close(listed, joined)
        listed_gradients = torch.autograd.grad(listed, parts)
        (joined_gradient,) = torch.autograd.grad(joined, whole)
        torch.testing.assert_close(torch.cat(listed_gradients), joined_gradient)


def test_gradients_flow_into_contrasts_only_where_required(backend) -> None:
    g = generator(0)
    x = torch.randn(4, 3, generator=g, requires_grad=True)
    live = torch.randn(4, 3, generator=g, requires_grad=True)
    queue = torch.randn(5, 3, generator=g)
    library_loss(x, contrasts=[live, queue]).backward()
    assert live.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0
    assert queue.grad is None


def test_equal_ids_are_no_pair(backend) -> None:
    g = generator(0)
    x, y = torch.randn(3, 4, generator=g), torch.randn(6, 4, generator=g)
    ids = torch.tensor([10, 11, -1])
    contrast_ids = torch.tensor([-1, -1, -1, 10, 11, -1])
    got = terms(x, contrasts=y, ids=ids, contrast_ids=contrast_ids)
    for i, columns in enumerate(([0, 1, 2, 4, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5])):
        own = columns.index(i)
        owner = torch.full((len(columns),), -1)
        owner[own] = 0
        expected = terms(x[i : i + 1], contrasts=y[columns], contrast_clusters=owner)
        torch.testing.assert_close(got[i], expected[0])


def test_a_sample_is_its_own_cluster_in_two_sets_too(backend) -> None:
    """Contrast i has the sample of anchor row i, so other views' contrasts are positives, with or without clusters."""
    z, y = torch.randn(4, 2, 3, generator=generator(0)), torch.randn(9, 3, generator=generator(1))
    expected = library_loss(z, torch.arange(4), contrasts=y)
    assert torch.equal(library_loss(z, contrasts=y), expected)
    assert torch.equal(library_loss(z, torch.tensor([-1, -9, -1, -2]), contrasts=y), expected)


def test_one_positive_of_a_sample_serves_all_its_views(backend) -> None:
    z, p = torch.randn(4, 3, 5, generator=generator(0)), torch.randn(4, 5, generator=generator(1))
    repeated = p[:, None].repeat(1, 3, 1)
    p.requires_grad_(), repeated.requires_grad_()
    short, long = library_loss(z, positives=p), library_loss(z, positives=repeated)
    assert torch.equal(short, long)
    (one,), (each,) = torch.autograd.grad(short, p), torch.autograd.grad(long, repeated)
    torch.testing.assert_close(one, each.sum(1))


def test_the_inside_form_does_not_cancel_on_converged_rows(backend) -> None:
    """Loss and gradient keep float32's digits where a difference of log-sums would lose half of them."""
    g = generator(0)
    z = torch.randn(64, 1, 32, generator=g) + 0.01 * torch.randn(64, 2, 32, generator=g)
    leaves = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, truth = (library_loss(leaf, temperature=0.05, form="inside") for leaf in leaves)
    assert truth.item() < 1e-2
    assert abs(loss.item() / truth.item() - 1) < 3e-6
    got, expected = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, leaves[0]), (truth, leaves[1])))
    assert (got - expected).norm() < 3e-6 * expected.norm()


@pytest.mark.parametrize(("n", "m", "noise"), [(256, 16384, 0.05), (512, 2048, 0.02)])
def test_temperature_of_queries_that_have_found_their_keys(n, m, noise) -> None:
    """Its gradient is the difference between the sweep's sum and the keys'; cancellation excuses no error."""
    g = generator(2)
    query, other, queue = (torch.randn(k, 32, generator=g) for k in (n, n, m))
    arguments = {
        "embeddings": query,
        "positives": query + noise * other,
        "contrasts": queue,
        "contrast_clusters": torch.full((m,), -1),
        "temperature": torch.tensor(0.05),
    }

    def formula(how: Evaluation) -> Tensor:
        x, y, p = (t.to(how.dtype) for t in (query, queue, arguments["positives"]))
        temperature = arguments["temperature"].to(how.dtype).requires_grad_()
        own = similarities(x, p, 1 / temperature, True, True, how).diagonal()[:, None]
        logits = torch.cat([own, similarities(x, y, 1 / temperature, True, True, how)], 1)
        return torch.autograd.grad((logits.logsumexp(1) - own[:, 0]).mean(), temperature)[0]

    eager = [formula(how) for how in eager_evaluations()]
    for backend in (name for name in BACKENDS if name in ("reference", "chunked", "cpu")):
        with running(backend):
            _, gradients = differentiate(library_loss, arguments, ("temperature",), objective)
        check(backend, gradients["temperature"], formula(TRUTH), eager)


def test_positives_are_nobody_elses_contrast(backend) -> None:
    g = generator(0)
    x, p, y = (torch.randn(k, 3, generator=g) for k in (4, 4, 5))
    no_cluster = torch.full((5,), -1)
    unit = [nn.functional.normalize(t, dim=1) for t in (x, p, y)]
    positive = (unit[0] * unit[1]).sum(1, keepdim=True) / 0.1
    logits = torch.cat([positive, unit[0] @ unit[2].T / 0.1], 1)
    expected = logits.logsumexp(1) - positive[:, 0]
    torch.testing.assert_close(terms(x, positives=p, contrasts=y, contrast_clusters=no_cluster), expected)
    # In self-contrast the other anchors are the negatives.
    others = (unit[0] @ unit[0].T / 0.1).fill_diagonal_(-torch.inf)
    expected = torch.cat([positive, others], 1).logsumexp(1) - positive[:, 0]
    torch.testing.assert_close(terms(x, positives=p), expected)


@pytest.mark.parametrize("form", ["outside", "inside"])
def test_positives_and_no_contrasts(form, backend) -> None:
    """An empty queue: the positive is the only contrast. Over all the loss is 0; over negatives there is no term."""
    x = torch.randn(4, 3, generator=generator(0), requires_grad=True)
    empty = {"contrasts": torch.empty(0, 3), "contrast_clusters": torch.empty(0, dtype=torch.int64)}
    for denominator in ("all", "negatives"):
        loss = library_loss(x, positives=x.detach() + 1, form=form, denominator=denominator, **empty)
        torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-5)
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(gradient, torch.zeros(4, 3), rtol=0, atol=1e-5)


# Gradients


@pairs(backend=QUICK, normalize=[False, True], form=FORMS, denominator=DENOMINATORS)  # float64: Triton has none
def test_gradcheck(normalize, form, denominator, backend) -> None:
    """Finite differences, in all differentiable arguments at once."""
    g = generator(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    x, y, p, bias = leaf(4, 2, 3), leaf(10, 3), leaf(4, 2, 3), leaf(10)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    weights = (torch.rand(4, generator=g, dtype=torch.float64) + 0.1).requires_grad_()
    options = {"normalize": normalize, "form": form, "denominator": denominator, "margin": 0.1}
    clusters = torch.tensor([0, 1, 1, -1])

    def two_sets(x, y, p, bias, temperature, weights):
        return library_loss(
            x,
            clusters,
            contrasts=y,
            positives=p,
            contrast_bias=bias,
            temperature=temperature,
            weights=weights,
            symmetric=True,
            ids=torch.tensor([0, 1, 2, 3]),
            contrast_ids=torch.tensor([-1, 1, 0, -1, -1, -1, 3, -1, 2, -1]),
            **options,
        )

    def one_set(x, temperature, weights):
        return library_loss(x, clusters, temperature=temperature, weights=weights, reduction="none", **options)

    assert torch.autograd.gradcheck(two_sets, (x, y, p, bias, temperature, weights))
    assert torch.autograd.gradcheck(one_set, (x, temperature, weights))


def test_unreduced_terms_take_any_gradient(backend) -> None:
    """Expanded, strided and random incoming gradients."""
    z = torch.randn(6, 2, 3, generator=generator(0), requires_grad=True)
    loss = terms(z)
    (summed,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
    (written_out,) = torch.autograd.grad(loss, z, torch.ones(6, 2), retain_graph=True)
    (expanded,) = torch.autograd.grad(loss, z, torch.ones(()).expand(6, 2), retain_graph=True)
    assert torch.equal(summed, written_out)
    assert torch.equal(summed, expanded)
    cotangent = torch.randn(2, 6, generator=generator(1)).T
    (strided,) = torch.autograd.grad(loss, z, cotangent, retain_graph=True)
    (contiguous,) = torch.autograd.grad(loss, z, cotangent.contiguous())
    assert torch.equal(strided, contiguous)


def test_views_that_are_not_contiguous(backend) -> None:
    z = torch.randn(2, 6, 3, generator=generator(0)).transpose(0, 1).requires_grad_()
    plain = z.detach().contiguous().requires_grad_()
    got, expected = library_loss(z), library_loss(plain)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(expected, plain))
    doubled = torch.randn(6, 3, generator=generator(0))
    torch.testing.assert_close(
        library_loss(doubled[:, None].expand(6, 2, 3)), library_loss(doubled[:, None].repeat(1, 2, 1))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros(dtype, backend) -> None:
    g = generator(0)
    x, y, p = (torch.randn(5, 3, generator=g).to(dtype) for _ in range(3))
    x[1] = y[1] = y[2] = p[1] = p[3] = 0
    leaves = {name: t.requires_grad_() for name, t in (("embeddings", x), ("contrasts", y), ("positives", p))}
    loss = library_loss(**leaves, symmetric=True)
    assert loss.isfinite()
    loss.backward()
    for name, leaf in leaves.items():
        zero = (leaf == 0).all(1)
        assert leaf.grad.isfinite().all(), name
        assert torch.equal(leaf.grad[zero], torch.zeros_like(leaf[zero])), name
        assert (leaf.grad[~zero] != 0).any(), name
    check_loss({name: t.detach() for name, t in leaves.items()} | {"symmetric": True}, tuple(leaves), (backend,))


def test_bit_identical_from_run_to_run(backend) -> None:
    g = generator(0)
    n = 50 if backend == "triton" else 300
    groups = torch.arange(n).repeat_interleave(2)
    z = rows("converged", groups, 32, g, unit=True).float().reshape(n, 2, 32)

    def run():
        x, t = z.clone().requires_grad_(), torch.tensor(0.05, requires_grad=True)
        loss = library_loss(x, temperature=t)
        return loss, *torch.autograd.grad(loss, (x, t))

    first = run()
    for _ in range(2):
        for got, expected in zip(run(), first, strict=True):
            assert torch.equal(got, expected)
