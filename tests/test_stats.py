"""contrastive_stats against its formula: values and gradients, on every backend."""

import math
from typing import Any

import pytest
import torch
from conftest import VARIANTS, running
from hypothesis import given, settings
from oracle import CONSTANT_NORMS, TRUTH, contrastive_stats, differentiate, eager_evaluations
from strategies import DTYPES, FIELDS, INTEGERS, PATTERNS, StatsProblem, cluster_ids, generator, rows, stats_problems
from tolerances import accumulation_dtype, check
from torch import Tensor

import fastcl
from fastcl.kernels import chunked


def as_dict(stats: fastcl.ContrastiveStats) -> dict[str, Tensor]:
    """In the oracle's form; fields that were not wanted are left out."""
    fields = {}
    for prefix, side in (("", stats), ("reverse.", stats.reverse)):
        if side is not None:
            named = {name: getattr(side, name) for name in (*FIELDS, "num_pos", "num_neg")}
            fields |= {prefix + name: value for name, value in named.items() if value is not None}
    return fields


def library_stats(**arguments: Any) -> dict[str, Tensor]:
    return as_dict(fastcl.contrastive_stats(**arguments))


def objective(fields: dict[str, Tensor]) -> Tensor:
    """A fixed random combination of all fields, those of empty sets left out."""
    total = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(sorted(fields)):
        if "num" not in name:
            field = fields[name]
            weight = torch.randn(field.shape, generator=generator(k), dtype=torch.float64).to(field.dtype)
            total = total + (torch.where(field.isfinite(), field, 0) * weight).sum()
    return total


def check_stats(arguments: dict[str, Any], leaves: tuple[str, ...], backends: tuple[str, ...] = VARIANTS) -> None:
    """Values and gradients of every backend against the float64 formula, by the error rule."""
    dtypes = [arguments[name].dtype for name in ("anchors", "contrasts") if arguments.get(name) is not None]
    accumulation = accumulation_dtype(*dtypes)
    product = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)

    def evaluate(how):
        return differentiate(contrastive_stats, arguments, leaves, objective, how.dtype, how=how)

    truth, true_gradients = evaluate(TRUTH)
    _, cancelling = evaluate(CONSTANT_NORMS)
    draws = [evaluate(how) for how in eager_evaluations(accumulation)]
    for backend in backends:
        if backend == "triton" and accumulation == torch.float64:
            continue  # is chunked, as `test_backends_agree_in_float64` sees
        with running(backend):
            got, gradients = differentiate(library_stats, arguments, leaves, objective)
        assert set(got) == set(truth)
        for name, value in truth.items():
            assert got[name].dtype == accumulation
            if "num" in name:
                assert torch.equal(got[name].double(), value), f"{backend} {name}"
            else:
                check(f"{backend} {name}", got[name], value, [d[name] for d, _ in draws], accumulation=accumulation)
        for name, value in true_gradients.items():
            assert gradients[name].dtype == arguments[name].dtype
            check(
                f"{backend} gradient of {name}",
                gradients[name],
                value,
                [g[name] for _, g in draws],
                accumulation=accumulation,
                half_rows=product if name in ("anchors", "contrasts") else None,
                magnitude=cancelling[name],
            )


QUICK = tuple(name for name in VARIANTS if name != "triton")  # which runs in an interpreter here


@settings(max_examples=100)
@given(stats_problems())
def test_matches_the_formula(problem: StatsProblem) -> None:
    check_stats(problem.arguments(), problem.leaves, backends=QUICK)


@pytest.mark.skipif("triton" not in VARIANTS, reason="Triton is not interpreted here")
@settings(max_examples=40)
@given(stats_problems().filter(lambda p: torch.float64 not in (p.dtype, p.contrast_dtype)))
def test_triton_matches_the_formula(problem: StatsProblem) -> None:
    check_stats(problem.arguments(), problem.leaves, backends=("triton",))


def simple_problem(n: int = 9, m: int | None = 14, d: int = 6, seed: int = 0, **changes: Any) -> StatsProblem:
    defaults: dict[str, Any] = {
        "kind": "random",
        "pattern": "random",
        "dtype": torch.float32,
        "contrast_dtype": torch.float32,
        "normalize_anchors": True,
        "normalize_contrasts": True,
        "bias": m is not None,
        "ids": m is not None,
        "both": m is not None,
        "want": FIELDS,
        "scales": (5.0,),
        "scale_tensor": True,
    }
    return StatsProblem(n=n, m=m, d=d, seed=seed, **(defaults | changes))


@pytest.mark.parametrize("m", [None, 75])
@pytest.mark.parametrize("scales", [(5.0,), (1.0, 20.0)])
@pytest.mark.parametrize("rows_in_a_block", [1, 2, 7])
@pytest.mark.parametrize("offset", [0, -500, 500])
def test_blocks_smaller_than_the_problem(m, scales, rows_in_a_block, offset, monkeypatch) -> None:
    """Also where exp of a logit under- or overflows, after blocks in which a set has no member yet."""
    problem = simple_problem(n=71, m=m, d=5, scales=scales, bias=True)
    monkeypatch.setattr(chunked, "CPU_BLOCK", 1)
    monkeypatch.setattr(chunked, "FEWEST_ROWS", rows_in_a_block)
    arguments = problem.arguments()
    arguments["contrast_bias"] = arguments["contrast_bias"] + offset
    check_stats(arguments, problem.leaves, backends=("chunked",))


@pytest.mark.parametrize("backend", VARIANTS)
def test_more_rows_than_fit_in_one_block(backend) -> None:
    n, m = (200, 300) if backend == "triton" else (1100, 2300)  # interpreted, its blocks have 64 rows
    problem = simple_problem(n=n, m=m, d=7, scales=(20.0,), kind="converged")
    check_stats(problem.arguments(), problem.leaves, backends=(backend,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 130])
def test_logits_of_ten_thousand(dtype, m) -> None:
    """Unnormalised rows: exponents overflow unless the largest is taken off."""
    problem = simple_problem(n=129, m=m, d=16, dtype=dtype, contrast_dtype=dtype, bias=False)
    arguments = problem.arguments() | {"normalize_anchors": False, "normalize_contrasts": False, "logit_scale": 1.0}
    for name in ("anchors", "contrasts"):
        if name in arguments:
            unit = torch.nn.functional.normalize(arguments[name].double(), dim=1)
            arguments[name] = (unit * 100).to(dtype)
    leaves = tuple(name for name in problem.leaves if name != "logit_scale")
    check_stats(arguments, leaves)


@pytest.mark.parametrize("temperature", [0.01, 0.005])
@pytest.mark.parametrize("kind", ["random", "converged"])
@pytest.mark.parametrize("m", [None, 130])
def test_low_temperature(temperature, kind, m) -> None:
    problem = simple_problem(n=129, m=m, d=16, kind=kind, pattern="pairs", scales=(1 / temperature,))
    check_stats(problem.arguments(), problem.leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 150.0])
def test_contrasts_without_gradient(dtype, positives, ids, scale) -> None:
    """As in a queue: the anchors' gradient may then come out of the forward. 150: exponents leave float32's range."""
    problem = simple_problem(n=71, m=333, d=37, dtype=dtype, contrast_dtype=dtype, bias=False, both=False, ids=ids)
    arguments = problem.arguments() | {"logit_scale": scale}
    if not positives:  # though there are clusters
        arguments |= {
            "anchor_clusters": torch.zeros(71, dtype=torch.int64),
            "contrast_clusters": torch.ones(333).long(),
        }
    check_stats(arguments, ("anchors",))


@pytest.mark.parametrize("magnitude", [1e6, 1e9, 1e12, 1e18])
def test_logits_of_any_size(magnitude, backend) -> None:
    """Float32 can no longer tell such logits apart by less than an exponent's range: the largest takes all."""
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
    """Equal logits of every fraction: what is left of the log-sum is the exponential's own error."""
    anchors = torch.linspace(-0.7, 0.7, 389)[:, None]
    lse = fastcl.contrastive_stats(anchors, torch.ones(96, 1), want=("lse_all",)).lse_all
    expected = anchors.double().squeeze(1) + math.log(96)
    assert (lse.double() - expected).abs().max() < 7e-7


@pytest.mark.parametrize("size", [20.0, 80.0])
def test_small_logits_beside_large_ones(size, backend) -> None:
    """What serves rows of large log-sums must not round the exponents of a row whose log-sum is near zero."""
    anchors = torch.tensor([[0.7], [size]])
    contrasts = 0.5 + torch.rand(37, 1, generator=generator(5)) / 2
    probabilities = torch.softmax((0.7 * contrasts.double()).squeeze(1), 0)
    contrasts.requires_grad_()
    (got,) = torch.autograd.grad(fastcl.contrastive_stats(anchors, contrasts).lse_all[0], contrasts)
    error = got.squeeze(1).double() / (anchors[0].double() * probabilities) - 1
    assert error.abs().max() < 5e-7


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800000])
@pytest.mark.parametrize("side", ["anchors", "contrasts"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_not_hidden(bits, side, dtype, backend) -> None:
    """A NaN of any bits, and an infinity, in one normalised row: as a contrast it reaches every anchor."""
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
    """An anchor all of whose contrasts are inadmissible, and whose own positive lies far away."""
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


# What is computed


@pytest.mark.parametrize("want", [(), *[(name,) for name in FIELDS], FIELDS, tuple(reversed(FIELDS)), list(FIELDS[:2])])
def test_only_wanted_fields(want, backend) -> None:
    arguments = simple_problem().arguments() | {"want": want}
    stats = fastcl.contrastive_stats(**arguments)
    for side in (stats, stats.reverse):
        for name in FIELDS:
            assert (getattr(side, name) is not None) == (name in want)
    full = fastcl.contrastive_stats(**(arguments | {"want": FIELDS}))
    for name, value in as_dict(stats).items():
        torch.testing.assert_close(value, as_dict(full)[name], rtol=1e-6, atol=1e-6)


def test_default_want() -> None:
    x = torch.randn(5, 3, generator=generator(0))
    stats = fastcl.contrastive_stats(x, anchor_clusters=torch.tensor([0, 0, 1, 1, 1]))
    assert isinstance(stats, fastcl.ContrastiveStats)
    assert stats.lse_all is not None
    assert stats.sum_pos is not None
    assert stats.lse_pos is None
    assert stats.lse_neg is None
    assert stats.reverse is None


def test_by_hand(backend) -> None:
    """Three anchors and two contrasts whose inner products one can read off."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    stats = fastcl.contrastive_stats(x, y, torch.tensor([7, 7, -1]), torch.tensor([7, 8]), want=FIELDS, both=True)
    expected = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    torch.testing.assert_close(stats.lse_all, expected.logsumexp(1))
    torch.testing.assert_close(stats.lse_pos, torch.tensor([1.0, 0.0, -torch.inf]))
    torch.testing.assert_close(stats.lse_neg, torch.tensor([0.0, 2.0, expected[2].logsumexp(0)]))
    torch.testing.assert_close(stats.sum_pos, torch.tensor([1.0, 0.0, 0.0]))
    assert stats.num_pos.tolist() == [1, 1, 0]
    assert stats.num_neg.tolist() == [1, 1, 2]
    assert stats.valid.tolist() == [True, True, False]
    torch.testing.assert_close(stats.reverse.lse_pos, torch.tensor([expected[:2, 0].logsumexp(0), -torch.inf]))
    assert stats.reverse.num_pos.tolist() == [2, 0]
    assert stats.reverse.valid.tolist() == [True, False]


@pytest.mark.parametrize(
    ("want", "expected"),
    [
        ((), [True, True, True]),
        (("lse_all",), [True, True, True]),
        (("lse_pos",), [True, True, False]),
        (("sum_pos",), [True, True, False]),
        (("lse_neg",), [False, True, True]),
        (("lse_neg", "sum_pos"), [False, True, False]),
    ],
)
def test_valid(want, expected, backend) -> None:
    """Row 0 has positives only, row 1 both, row 2 negatives only."""
    y = torch.ones(2, 2)
    ids = {"anchor_ids": torch.tensor([4, 5, 5]), "contrast_ids": torch.tensor([-1, 4])}
    stats = fastcl.contrastive_stats(
        torch.ones(3, 2), y, torch.tensor([1, 1, 3]), torch.tensor([1, 2]), want=want, **ids
    )
    assert stats.valid.dtype == torch.bool
    assert stats.valid.tolist() == expected


def test_nothing_admissible(backend) -> None:
    """A single row has no contrast at all in self-contrast, and none in an empty queue."""
    x = torch.ones(1, 3, requires_grad=True)
    for contrasts in (None, torch.ones(0, 3)):
        clusters = {} if contrasts is None else {"contrast_clusters": torch.zeros(0, dtype=torch.int64)}
        stats = fastcl.contrastive_stats(
            x, contrasts, anchor_clusters=torch.zeros(1, dtype=torch.int64), want=FIELDS, **clusters
        )
        assert stats.lse_all.tolist() == stats.lse_pos.tolist() == stats.lse_neg.tolist() == [-torch.inf]
        assert stats.sum_pos.tolist() == stats.num_pos.tolist() == stats.num_neg.tolist() == [0]
        assert stats.valid.tolist() == [False]
        (gradient,) = torch.autograd.grad(stats.lse_all.sum() + stats.sum_pos.sum(), x)
        assert torch.equal(gradient, torch.zeros(1, 3))


def test_without_clusters_nothing_is_positive(backend) -> None:
    x = torch.randn(6, 4, generator=generator(0))
    stats = fastcl.contrastive_stats(x, want=FIELDS)
    assert stats.num_pos.tolist() == [0] * 6
    assert stats.num_neg.tolist() == [5] * 6
    assert torch.equal(stats.lse_neg, stats.lse_all)
    stats = fastcl.contrastive_stats(x, x[:4], want=FIELDS)
    assert stats.num_pos.tolist() == [0] * 6
    assert stats.num_neg.tolist() == [4] * 6


def test_one_scale_and_several_agree(backend) -> None:
    arguments = simple_problem().arguments()
    several = library_stats(**(arguments | {"logit_scale": torch.tensor([0.5, 5.0, 30.0])}))
    for k, scale in enumerate((0.5, 5.0, 30.0)):
        one = library_stats(**(arguments | {"logit_scale": scale}))
        for name, value in one.items():
            assert value.dim() == 1
            if "num" in name:
                assert torch.equal(several[name], value)
            else:
                assert several[name].shape == (3, *value.shape)
                torch.testing.assert_close(several[name][k], value, rtol=1e-5, atol=1e-5)
    single = library_stats(**(arguments | {"logit_scale": torch.tensor([0.5])}))
    assert single["lse_all"].shape == (1, 9)


def test_counts_carry_no_gradient(backend) -> None:
    arguments = simple_problem().arguments()
    arguments["anchors"].requires_grad_()
    stats = fastcl.contrastive_stats(**arguments)
    assert stats.lse_all.requires_grad
    assert not stats.num_pos.requires_grad
    assert not stats.num_neg.requires_grad
    assert not stats.valid.requires_grad


@pytest.mark.parametrize("leaf", ["anchors", "contrasts", "contrast_bias", "logit_scale"])
def test_gradient_in_one_argument_alone(leaf) -> None:
    check_stats(simple_problem().arguments(), (leaf,))


@pytest.mark.parametrize("leaf", ["anchors", "contrast_bias", "logit_scale"])
def test_gradient_in_one_argument_alone_self_contrast(leaf) -> None:
    check_stats(simple_problem(m=None, bias=True).arguments(), (leaf,))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("side", ["", "reverse."])
def test_gradient_of_one_field_alone(field, side, backend) -> None:
    """The other fields are wanted but not used: their incoming gradient is absent, not zero."""
    problem = simple_problem(dtype=torch.float64, contrast_dtype=torch.float64)
    leaves = problem.leaves

    def alone(fields):
        return objective({side + field: fields[side + field]})

    _, got = differentiate(library_stats, problem.arguments(), leaves, alone)
    _, truth = differentiate(contrastive_stats, problem.arguments(), leaves, alone, torch.float64, how=TRUTH)
    for name in leaves:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-10, atol=1e-12)


# Invariances


@pytest.mark.parametrize("pattern", PATTERNS)
def test_order_of_rows_does_not_matter(pattern, backend) -> None:
    problem = simple_problem(n=40, m=33, pattern=pattern, dtype=torch.float64, contrast_dtype=torch.float64)
    arguments = problem.arguments()
    a, c = torch.randperm(40, generator=generator(1)), torch.randperm(33, generator=generator(2))
    permuted = {
        name: value[a] if name.startswith("anchor") else value[c] if name.startswith("contrast") else value
        for name, value in arguments.items()
    }
    first, second = library_stats(**arguments), library_stats(**permuted)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value[c if "reverse" in name else a], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_of_clusters_do_not_matter(pattern, backend) -> None:
    """Any injective renaming; negative ids may take any other negative value."""
    problem = simple_problem(n=40, m=33, pattern=pattern)
    arguments = problem.arguments()
    names = torch.randperm(2**20, generator=generator(3)) * 2**40

    def rename(clusters: Tensor) -> Tensor:
        return torch.where(clusters < 0, torch.arange(len(clusters)) - 2**62, names[clusters.clamp(min=0)])

    renamed = arguments | {name: rename(arguments[name]) for name in ("anchor_clusters", "contrast_clusters")}
    first, second = library_stats(**arguments), library_stats(**renamed)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


# Ids


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("other", [torch.uint8, torch.int64])
def test_integer_dtypes(dtype, other, backend) -> None:
    g = generator(0)
    x, y = torch.randn(8, 3, generator=g), torch.randn(9, 3, generator=g)
    a, c = torch.randint(0, 3, (8,), generator=g), torch.randint(0, 3, (9,), generator=g)
    ids = {"anchor_ids": a, "contrast_ids": torch.randint(0, 3, (9,), generator=g)}
    expected = library_stats(anchors=x, contrasts=y, anchor_clusters=a, contrast_clusters=c, want=FIELDS, **ids)
    got = library_stats(
        anchors=x,
        contrasts=y,
        anchor_clusters=a.to(dtype),
        contrast_clusters=c.to(other),
        want=FIELDS,
        anchor_ids=a.to(other),
        contrast_ids=ids["contrast_ids"].to(dtype),
    )
    for name, value in expected.items():
        assert torch.equal(got[name], value)


def test_ids_are_compared_as_numbers(backend) -> None:
    """255 of uint8 is not -1 of int8, and 2^32 + 1 is not 1."""
    x = torch.ones(2, 3)
    big = torch.tensor([255, 1], dtype=torch.uint8)
    small = torch.tensor([-1, 1], dtype=torch.int8)
    stats = fastcl.contrastive_stats(x, x, big, small)
    assert stats.num_pos.tolist() == [0, 1]
    stats = fastcl.contrastive_stats(torch.ones(4, 3), anchor_clusters=torch.tensor([1, 2**32 + 1, 2**33 + 1, 1]))
    assert stats.num_pos.tolist() == [1, 0, 0, 1]


def test_negative_clusters_match_nothing(backend) -> None:
    clusters = torch.tensor([-1, -1, -2, 4, 4])
    x = torch.randn(5, 3, generator=generator(0))
    stats = fastcl.contrastive_stats(x, anchor_clusters=clusters)
    assert stats.num_pos.tolist() == [0, 0, 0, 1, 1]
    assert stats.num_neg.tolist() == [4, 4, 4, 3, 3]
    stats = fastcl.contrastive_stats(x, x, clusters, clusters, both=True)
    assert stats.num_pos.tolist() == [0, 0, 0, 2, 2]
    assert stats.reverse.num_pos.tolist() == [0, 0, 0, 2, 2]


def test_equal_ids_are_inadmissible(backend) -> None:
    x = torch.randn(3, 4, generator=generator(0))
    y = torch.randn(4, 4, generator=generator(1))
    ids = {"anchor_ids": torch.tensor([5, -1, 6]), "contrast_ids": torch.tensor([5, -1, 5, 7])}
    stats = fastcl.contrastive_stats(x, y, both=True, want=FIELDS, **ids)
    s = x @ y.T
    torch.testing.assert_close(stats.lse_all[0], s[0, [1, 3]].logsumexp(0))
    torch.testing.assert_close(stats.lse_all[1:], s[1:].logsumexp(1))
    assert stats.num_neg.tolist() == [2, 4, 4]
    assert stats.reverse.num_neg.tolist() == [2, 3, 2, 3]


# Rows of every kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 6])
def test_rows_of_zeros(dtype, m, backend) -> None:
    """Similarity 0 and gradient 0, not NaN."""
    arguments = simple_problem(n=5, m=m, d=4, dtype=dtype, contrast_dtype=dtype, bias=False, ids=False).arguments()
    arguments["anchors"][2] = 0
    leaves = ["anchors"]
    if m is not None:
        arguments["contrasts"][[0, 3]] = 0
        leaves.append("contrasts")
    arguments["logit_scale"] = 20.0
    check_stats(arguments, tuple(leaves), backends=(backend,))
    _, gradients = differentiate(library_stats, arguments, leaves, objective)
    assert torch.equal(gradients["anchors"][2], torch.zeros(4, dtype=dtype))
    if m is not None:
        assert torch.equal(gradients["contrasts"][[0, 3]], torch.zeros(2, 4, dtype=dtype))


def test_all_rows_zero(backend) -> None:
    x = torch.zeros(5, 3, requires_grad=True)
    stats = fastcl.contrastive_stats(x, normalize_anchors=True)
    torch.testing.assert_close(stats.lse_all, torch.full((5,), 4.0).log())
    (gradient,) = torch.autograd.grad(stats.lse_all.sum(), x)
    assert torch.equal(gradient, torch.zeros(5, 3))


@pytest.mark.parametrize("size", [1e-15, 1e-13, 1e-8, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_of_rows(size, dtype, backend) -> None:
    """It does not matter to cosines, until norms come below 1e-12, which is divided by instead."""
    problem = simple_problem(n=12, m=None, bias=False, dtype=dtype, contrast_dtype=dtype)
    arguments = problem.arguments()
    arguments["anchors"] = arguments["anchors"] * size
    check_stats(arguments, problem.leaves, backends=(backend,))


def strided(x: Tensor, how: str) -> Tensor:
    """The values of x in other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if how == "every other":
        wide = x.new_full((x.shape[0] * 2, *x.shape[1:]), float("nan") if x.is_floating_point() else -9)
        wide[::2] = x
        return wide[::2]
    if how == "columns":
        wide = x.new_full((*x.shape, 3), float("nan") if x.is_floating_point() else -9)
        wide[..., 1] = x
        return wide[..., 1]
    wide = x.new_full((x.numel() + 3,), float("nan") if x.is_floating_point() else -9)
    wide[3:] = x.flatten()
    return wide[3:].view(x.shape)


@pytest.mark.parametrize("how", ["transposed", "every other", "columns", "offset"])
@pytest.mark.parametrize("m", [None, 14])
def test_strides(how, m, backend) -> None:
    problem = simple_problem(m=m, bias=True)
    arguments = problem.arguments()
    other = {
        name: strided(value, how) if isinstance(value, Tensor) and value.dim() > 0 else value
        for name, value in arguments.items()
    }
    expected, expected_gradients = differentiate(library_stats, arguments, problem.leaves, objective)
    got, gradients = differentiate(library_stats, other, problem.leaves, objective)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-5)


def test_expanded_rows(backend) -> None:
    """All rows in the same memory; the gradient still has a place for each."""
    row = torch.randn(1, 4, generator=generator(0))
    expected = differentiate(library_stats, {"anchors": row.repeat(6, 1)}, ["anchors"], objective)
    got = differentiate(library_stats, {"anchors": row.expand(6, 4)}, ["anchors"], objective)
    torch.testing.assert_close(got, expected)


def test_non_leaf_inputs(backend) -> None:
    w = torch.randn(4, 6, generator=generator(0), dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 4, generator=generator(1), dtype=torch.float64)

    def loss(stats):
        x_w = (x @ w).relu()
        return objective(stats(anchors=x_w, anchor_clusters=torch.arange(7) // 3, normalize_anchors=True))

    got = torch.autograd.grad(loss(library_stats), w)
    expected = torch.autograd.grad(loss(lambda **a: contrastive_stats(want=("lse_all", "sum_pos"), **a)), w)
    torch.testing.assert_close(got, expected)


def test_expanded_gradients(backend) -> None:
    """sum() sends one number in the place of all N."""
    problem = simple_problem(n=20, m=23)

    def expanded(fields):
        return sum(field.sum() for name, field in fields.items() if name.endswith("lse_all"))

    def written_out(fields):
        return sum((field * torch.ones(len(field))).sum() for name, field in fields.items() if name.endswith("lse_all"))

    arguments = problem.arguments() | {"want": ("lse_all",)}
    _, got = differentiate(library_stats, arguments, problem.leaves, expanded)
    _, expected = differentiate(library_stats, arguments, problem.leaves, written_out)
    for name in problem.leaves:
        assert torch.equal(got[name], expected[name])
        assert got[name].abs().sum() > 0


# Masked rows


@pytest.mark.parametrize("m", [None, 11])
@pytest.mark.parametrize("normalize", [False, True])
def test_formulas_that_are_nan_where_masked(m, normalize, backend) -> None:
    """NaN that comes back to the fields of empty sets leaves the gradient finite and right."""
    problem = simple_problem(
        n=12,
        m=m,
        pattern="negatives",
        dtype=torch.float64,
        contrast_dtype=torch.float64,
        normalize_anchors=normalize,
        normalize_contrasts=normalize,
    )
    arguments = problem.arguments()

    def rows_of(side):
        num_pos = side["num_pos"]
        # 0 / 0 sends NaN to sum_pos, the root of a product of infinities sends it to lse_pos.
        return side["lse_all"] + side["lse_neg"] - side["sum_pos"] / num_pos + (side["lse_pos"] ** 2 + 1).sqrt()

    def masked(fields):
        total = 0
        for prefix in ("", "reverse.") if m else ("",):
            side = {name: fields[prefix + name] for name in (*FIELDS, "num_pos", "num_neg")}
            valid = (side["num_pos"] > 0) & (side["num_neg"] > 0)
            assert 0 < valid.sum() < len(valid)
            total = total + torch.where(valid, rows_of(side), 0).sum()
        return total

    def selected(fields):
        total = 0
        for prefix in ("", "reverse.") if m else ("",):
            valid = (fields[prefix + "num_pos"] > 0) & (fields[prefix + "num_neg"] > 0)
            side = {name: fields[prefix + name][valid] for name in (*FIELDS, "num_pos", "num_neg")}
            total = total + rows_of(side).sum()
        return total

    _, got = differentiate(library_stats, arguments, problem.leaves, masked)
    _, truth = differentiate(contrastive_stats, arguments, problem.leaves, selected, torch.float64, how=TRUTH)
    for name in problem.leaves:
        assert got[name].isfinite().all()
        torch.testing.assert_close(got[name], truth[name], rtol=1e-10, atol=1e-12)


def test_nan_gradients_of_counting_rows_are_passed_on(backend) -> None:
    """Only empty sets are excused: a NaN that is the user's own must show."""
    x = torch.randn(4, 3, generator=generator(0), requires_grad=True)
    stats = fastcl.contrastive_stats(x, anchor_clusters=torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad((stats.lse_all * torch.tensor([torch.nan, 0, 0, 0])).sum(), x)
    assert gradient.isnan().any()


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
    clusters = cluster_ids("random", 150 if backend == "triton" else 700, g)
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
    """Nothing is left of a gradient once it is projected off a row of one dimension."""
    x = torch.randn(40, 1, generator=generator(0)).requires_grad_()
    s = fastcl.contrastive_stats(x, logit_scale=20.0, normalize_anchors=True, want=("lse_all",))
    s.lse_all.sum().backward()
    assert (x.grad * x.detach()).abs().max().item() < 1e-5
