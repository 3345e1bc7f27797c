"""contrastive_stats: which fields are returned, over which sets, and invariances."""

import pytest
import torch
from torch import Tensor

import fastcl
from tests.support.backends import VARIANTS
from tests.support.oracle import TRUTH, contrastive_stats, differentiate
from tests.support.pairs import pairs
from tests.support.stats_checks import as_dict, check_stats, library_stats, objective, simple_problem
from tests.support.strategies import FIELDS, INTEGERS, PATTERNS, generator

# Fields and sets


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
    """Three anchors and two contrasts whose inner products are easy to compute."""
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
    """A single row has no contrast in self-contrast, and an empty queue has none."""
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
    """The other fields are wanted but not used: their incoming gradient is None, not zero."""
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
    """Any injective renaming changes nothing; negative ids may be any negative numbers."""
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


@pairs(dtype=INTEGERS, backend=VARIANTS, other=[torch.uint8, torch.int64])
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
