"""contrastive_stats against its formula: values and gradients, on every backend."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings

import fastcl
from fastcl.ops.backends import rows as rows_arithmetic
from tests.support.backends import INTERPRETED, QUICK, VARIANTS, needs_interpreter, running
from tests.support.oracle import differentiate
from tests.support.pairs import pairs
from tests.support.stats_checks import check_stats, library_stats, objective, simple_problem
from tests.support.strategies import DTYPES, FIELDS, StatsProblem, cluster_ids, generator, rows, stats_problems


@settings(max_examples=100)
@given(stats_problems())
def test_matches_the_formula(problem: StatsProblem) -> None:
    check_stats(problem.arguments(), problem.leaves, backends=QUICK)


@needs_interpreter
@settings(max_examples=12)  # each takes seconds
@given(stats_problems(interpreted=True))
def test_triton_matches_the_formula(problem: StatsProblem) -> None:
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))


@pytest.mark.parametrize("m", [None, 75])
@pytest.mark.parametrize("scales", [(5.0,), (1.0, 20.0)])
@pytest.mark.parametrize("rows_in_a_block", [1, 2, 7])
@pytest.mark.parametrize("offset", [0, -500, 500])
def test_blocks_smaller_than_the_problem(m, scales, rows_in_a_block, offset, monkeypatch) -> None:
    """Also where exp of a logit under- or overflows, after blocks in which a set is still empty."""
    problem = simple_problem(n=71, m=m, d=5, scales=scales, bias=True)
    monkeypatch.setattr(rows_arithmetic, "CPU_BLOCK", 1)
    monkeypatch.setattr(rows_arithmetic, "FEWEST_ROWS", rows_in_a_block)
    arguments = problem.arguments()
    arguments["contrast_bias"] = arguments["contrast_bias"] + offset
    check_stats(arguments, problem.leaves, backends=("chunked",))


@pytest.mark.parametrize(
    ("backends", "n", "m"), [(QUICK, 1100, 2300), pytest.param(INTERPRETED, 131, 150, marks=needs_interpreter)]
)
def test_more_rows_than_fit_in_one_block(backends, n, m) -> None:
    """Triton's, interpreted, have 64."""
    problem = simple_problem(n=n, m=m, d=7, scales=(20.0,), kind="converged")
    check_stats(problem.arguments(), problem.leaves, backends=backends)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 66])
def test_logits_of_ten_thousand(dtype, m) -> None:
    """Unnormalised rows: exponents overflow unless the largest is taken off."""
    problem = simple_problem(n=65, m=m, d=16, dtype=dtype, contrast_dtype=dtype, bias=False)
    arguments = problem.arguments() | {"normalize_anchors": False, "normalize_contrasts": False, "logit_scale": 1.0}
    for name in ("anchors", "contrasts"):
        if name in arguments:
            unit = torch.nn.functional.normalize(arguments[name].double(), dim=1)
            arguments[name] = (unit * 100).to(dtype)
    leaves = tuple(name for name in problem.leaves if name != "logit_scale")
    check_stats(arguments, leaves)


@pytest.mark.parametrize("temperature", [0.01, 0.005])
@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("m", [None, 66])
def test_low_temperature(temperature, kind, m) -> None:
    problem = simple_problem(n=65, m=m, d=16, kind=kind, pattern="pairs", scales=(1 / temperature,))
    check_stats(problem.arguments(), problem.leaves)


@pairs(dtype=DTYPES, positives=[False, True], ids=[False, True], scale=[1.0, 10.0, 150.0])
def test_contrasts_without_gradient(dtype, positives, ids, scale) -> None:
    """As in a queue: the anchors' gradient may then come out of the forward. 150: exponents leave float32's range."""
    problem = simple_problem(n=71, m=140, d=37, dtype=dtype, contrast_dtype=dtype, bias=False, both=False, ids=ids)
    arguments = problem.arguments() | {"logit_scale": scale}
    if not positives:  # despite clusters
        arguments |= {
            "anchor_clusters": torch.zeros(71, dtype=torch.int64),
            "contrast_clusters": torch.ones(140).long(),
        }
    check_stats(arguments, ("anchors",))


@pytest.mark.parametrize("magnitude", [1e6, 1e9, 1e12, 1e18])
def test_logits_of_any_size(magnitude, backend) -> None:
    """In float32 such logits differ by more than an exponent's range: the largest has all the mass."""
    g = generator(0)
    x, y = torch.randn(64, 16, generator=g) / 4, torch.randn(30, 16, generator=g) / 4 * magnitude
    logits = x.double() @ y.double().T
    z = x.clone().requires_grad_()
    lse = fastcl.contrastive_stats(z, y, want=("lse_all",)).lse_all
    torch.testing.assert_close(lse.detach().double(), logits.amax(1), rtol=1e-5, atol=20.0)
    lse.sum().backward()
    margins = logits.topk(2, dim=1).values
    clear = margins[:, 0] - margins[:, 1] > 1e-4 * magnitude
    assert clear.sum() > 50
    torch.testing.assert_close(z.grad[clear], y[logits.argmax(1)][clear], rtol=1e-4, atol=1e-4 * magnitude)


def test_exponentials(backend) -> None:
    """Equal logits of every fraction: the error of the log-sum is that of the exponential."""
    anchors = torch.linspace(-0.7, 0.7, 389)[:, None]
    lse = fastcl.contrastive_stats(anchors, torch.ones(96, 1), want=("lse_all",)).lse_all
    expected = anchors.double().squeeze(1) + math.log(96)
    assert (lse.double() - expected).abs().max() < 7e-7


@pytest.mark.parametrize("size", [20.0, 80.0])
def test_small_logits_beside_large_ones(size, backend) -> None:
    """A shift for rows with large log-sums must not round the exponents of a row whose log-sum is near zero."""
    anchors = torch.tensor([[0.7], [size]])
    contrasts = 0.5 + torch.rand(37, 1, generator=generator(5)) / 2
    probabilities = torch.softmax((0.7 * contrasts.double()).squeeze(1), 0)
    contrasts.requires_grad_()
    (got,) = torch.autograd.grad(fastcl.contrastive_stats(anchors, contrasts).lse_all[0], contrasts)
    error = got.squeeze(1).double() / (anchors[0].double() * probabilities) - 1
    assert error.abs().max() < 5e-7


@pairs(
    bits_and_dtype=list(product([0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800000], DTYPES)),
    side=["anchors", "contrasts"],
    backend=VARIANTS,
)
def test_what_is_not_a_number_is_not_hidden(bits_and_dtype, side, backend) -> None:
    """A NaN of any bits, and an infinity, in one normalised row: as a contrast it reaches every anchor."""
    bits, dtype = bits_and_dtype
    bad = torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32).view(torch.float32)
    rows = {
        "anchors": torch.randn(20, 33, generator=generator(0)),
        "contrasts": torch.randn(41, 33, generator=generator(1)),
    }
    rows = {name: value.to(dtype) for name, value in rows.items()}
    rows[side][7, 3] = bad[0]
    lse = fastcl.contrastive_stats(**rows, normalize_anchors=True, normalize_contrasts=True, want=("lse_all",)).lse_all
    expected = torch.arange(20) == 7 if side == "anchors" else torch.ones(20, dtype=torch.bool)
    assert torch.equal(lse.isnan(), expected)


def test_extra_positive_without_contrasts(backend) -> None:
    """An anchor whose contrasts are all inadmissible, with its own positive far away."""
    x = torch.randn(4, 8, generator=generator(0), requires_grad=True)
    y = torch.randn(1, 8, generator=generator(1))
    loss = fastcl.functional.cluster_infonce(
        x,
        torch.arange(4),
        positives=-100 * x.detach(),
        contrasts=y,
        contrast_clusters=torch.tensor([-1]),
        ids=torch.tensor([5, 1, 2, 3]),
        contrast_ids=torch.tensor([5]),
        normalize=False,
        temperature=1.0,
    )
    loss.backward()
    assert x.grad.isfinite().all()
    assert (x.grad[0] == 0).all()


# Backends


def test_backends_agree_in_float64() -> None:
    problem = simple_problem(n=70, m=50, dtype=torch.float64, contrast_dtype=torch.float64, scales=(1.0, 20.0))
    results = []
    for name in VARIANTS:
        with running(name):
            results.append(differentiate(library_stats, problem.arguments(), problem.leaves, objective))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_from_run_to_run(dtype, backend) -> None:
    g = generator(0)
    clusters = cluster_ids("random", 70 if backend == "triton" else 700, g)
    arguments = {
        "anchors": rows("converged", clusters, 33, g, unit=True).to(dtype),
        "anchor_clusters": clusters,
        "normalize_anchors": True,
        "logit_scale": torch.tensor(20.0),
        "want": FIELDS,
    }
    runs = [differentiate(library_stats, arguments, ["anchors", "logit_scale"], objective) for _ in range(3)]
    for fields, gradients in runs[1:]:
        for got, expected in ((fields, runs[0][0]), (gradients, runs[0][1])):
            for name in expected:
                assert torch.equal(got[name], expected[name]), name


@pytest.mark.slow
def test_more_pairs_than_32_bits_count() -> None:
    n, m = 65_536, 32_800  # 2**31 + 2**21 pairs
    x, y = (torch.randn(size, 2, generator=generator(i)) for i, size in enumerate((n, m)))
    x.requires_grad_()
    s = fastcl.contrastive_stats(x, y, want=("lse_all",), normalize_anchors=True, logit_scale=3.0)
    s.lse_all.sum().backward()
    some = torch.tensor([0, 1, 40_000, n - 2, n - 1])
    few = x.detach()[some].double().requires_grad_()
    expected = (3.0 * torch.nn.functional.normalize(few, dim=1) @ y.double().T).logsumexp(1)
    expected.sum().backward()
    torch.testing.assert_close(s.lse_all[some].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad[some].double(), few.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(s.num_neg, torch.full((n,), float(m)))


def test_want_may_be_any_iterable(backend) -> None:
    s = fastcl.contrastive_stats(torch.ones(3, 2), want=(name for name in ("lse_all", "lse_neg")))
    assert s.lse_all is not None
    assert s.lse_neg is not None
    assert s.sum_pos is None


def test_one_dimensional_unit_rows_have_no_gradient(backend) -> None:
    """Nothing is left of a gradient after the projection off a row of one dimension."""
    x = torch.randn(40, 1, generator=generator(0)).requires_grad_()
    s = fastcl.contrastive_stats(x, logit_scale=20.0, normalize_anchors=True, want=("lse_all",))
    s.lse_all.sum().backward()
    assert (x.grad * x.detach()).abs().max().item() < 1e-5
