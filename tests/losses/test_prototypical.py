"""ProtoNCELoss against its plain float64 formula, and against the paper's code."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastcl
from fastcl.functional import cluster_infonce, proto_nce_loss
from tests.support import plain_losses as plain
from tests.support.backends import VARIANTS
from tests.support.pairs import pairs
from tests.support.strategies import DTYPES, KINDS, generator

K = 11


def problem(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two rows have no cluster. Concentrations from 0.05 to 0.5."""
    rows = plain.class_rows(kind, dtype, classes=K)
    clusters = rows["labels"].clone()
    clusters[[3, 7]] = torch.tensor([-1, -5])
    concentrations = (0.05 + 0.45 * torch.rand(K, generator=generator(2), dtype=torch.float64)).to(dtype)
    return {
        "embeddings": rows["embeddings"],
        "clusters": clusters,
        "prototypes": rows["prototypes"],
        "concentrations": concentrations,
    }


LEAVES = ("embeddings", "prototypes", "concentrations")


@pairs(kind=KINDS, dtype=DTYPES, backend=VARIANTS, negatives=[None, (), (10, 2, 9)], reduction=["mean", "sum", "none"])
def test_is_its_formula(kind, dtype, backend, negatives, reduction) -> None:
    chosen = None if negatives is None else torch.tensor(negatives, dtype=torch.int64)
    arguments = {**problem(kind, dtype), "negatives": chosen, "reduction": reduction}
    plain.judge(plain.proto_nce, proto_nce_loss, arguments, LEAVES)


def test_is_what_its_authors_released() -> None:
    """github.com/salesforce/PCL, for a batch in which every prototype occurs once; their draw excludes the batch's."""
    rows = problem("random", torch.float64)
    q, prototypes, density = normalize(rows["embeddings"][:4], dim=1), normalize(rows["prototypes"], dim=1), LEAVES[2]
    density, positives, negatives = rows[density], torch.tensor([4, 0, 7, 2]), torch.tensor([1, 9, 5])
    selected = torch.cat([prototypes[positives], prototypes[negatives]])
    logits = q @ selected.T / density[torch.cat([positives, negatives])]
    expected = cross_entropy(logits, torch.arange(4))
    got = fastcl.ProtoNCELoss(3)(q, positives, prototypes, density, negatives=negatives)
    torch.testing.assert_close(got, expected)


def test_with_one_concentration_is_cluster_infonce(backend) -> None:
    rows = problem("random", torch.float64)
    got = fastcl.ProtoNCELoss()(
        *[rows[name] for name in ("embeddings", "clusters", "prototypes")], torch.full((K,), 0.2)
    )
    expected = cluster_infonce(
        rows["embeddings"], rows["clusters"], contrasts=rows["prototypes"], contrast_clusters=torch.arange(K),
        temperature=0.2,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # 0.2 in float32


@pytest.mark.parametrize("count", [0, 1, 3, 4, 40])
def test_draws_others_than_the_batch_has(count: int) -> None:
    """Without replacement: the loss is that of `count` of the others, and over many draws each occurs as often."""
    rows = problem("random", torch.float64)
    present = rows["clusters"][rows["clusters"] >= 0].unique()
    others = torch.tensor([k for k in range(K) if k not in present])
    assert len(others) == 4
    found: dict[float, Tensor] = {}
    for chosen in torch.combinations(others, min(count, len(others))) if count else [others[:0]]:
        found[round(plain.proto_nce(**rows, negatives=chosen).item(), 9)] = chosen
    loss, g, seen = fastcl.ProtoNCELoss(count), generator(0), torch.zeros(K)
    for _ in range(200):
        value = round(loss(**rows, generator=g).item(), 9)
        assert value in found
        seen[found[value]] += 1
    share = seen[others] / (200 * min(count, len(others)) / len(others)) if count else torch.ones(4)
    assert ((share > 0.5) & (share < 1.5)).all()


def test_repeats_with_a_generator_and_without_one_draws_anew() -> None:
    rows, loss = problem("random", torch.float64), fastcl.ProtoNCELoss(2)
    assert torch.equal(loss(**rows, generator=generator(3)), loss(**rows, generator=generator(3)))
    torch.manual_seed(0)
    assert len({loss(**rows).item() for _ in range(20)}) > 3


def test_prototypes_that_take_no_part_may_be_anything() -> None:
    rows = problem("random", torch.float32)
    rows["prototypes"][10] = torch.nan
    assert fastcl.ProtoNCELoss()(**rows).isnan()
    loss = fastcl.ProtoNCELoss(1)(**rows, negatives=torch.tensor([9]))
    torch.testing.assert_close(loss.double(), plain.proto_nce(**rows, negatives=torch.tensor([9])), rtol=1e-5, atol=0)


def test_no_row_has_a_cluster() -> None:
    rows = problem("random", torch.float32)
    x = rows["embeddings"].requires_grad_()
    loss = fastcl.ProtoNCELoss(2)(**{**rows, "clusters": torch.full((17,), -1)})
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def test_repr() -> None:
    assert repr(fastcl.ProtoNCELoss(5, reduction="sum")) == "ProtoNCELoss(num_negatives=5, reduction='sum')"


rows = problem("random", torch.float32)
x, c, p, phi = rows.values()
WRONG = {
    "num_negatives": (lambda: fastcl.ProtoNCELoss(-1), "num_negatives: expected at least 0, got -1"),
    "num_negatives float": (lambda: fastcl.ProtoNCELoss(1.5), "num_negatives: expected an integer, got 1.5"),
    "reduction": (lambda: fastcl.ProtoNCELoss(reduction="max"), "reduction: expected one of .*, got 'max'"),
    "clusters": (
        lambda: proto_nce_loss(x, c + 8, p, phi),
        "clusters: expected numbers below 11, or negative .*, got 1",
    ),
    "clusters None": (lambda: proto_nce_loss(x, None, p, phi), "clusters: expected a tensor, got NoneType"),
    "clusters soft": (lambda: proto_nce_loss(x, x, p, phi), "clusters: expected integers, got torch.float32"),
    "prototypes": (lambda: proto_nce_loss(x, c, p[:, :2], phi), "prototypes: expected rows of dimension 9"),
    "few": (lambda: proto_nce_loss(x, c, p, phi[:3]), r"concentrations: expected shape \[11\], got \[3\]"),
    "zero": (lambda: proto_nce_loss(x, c, p, phi * 0), "concentrations: expected positive numbers .*, got 0.0"),
    "negative": (lambda: proto_nce_loss(x, c, p, -phi), "concentrations: expected positive numbers .*, got -0"),
    "nan": (lambda: proto_nce_loss(x, c, p, phi * math.nan), "concentrations: expected positive .*, got nan"),
    "inf": (lambda: proto_nce_loss(x, c, p, phi * math.inf), "concentrations: expected positive .*, got inf"),
    "integers": (lambda: proto_nce_loss(x, c, p, phi.long()), "concentrations: expected float64, float32"),
    "negatives": (
        lambda: proto_nce_loss(x, c, p, phi, negatives=c),
        "negatives: expected numbers from 0 to 10, got -5",
    ),
    "negatives each": (
        lambda: proto_nce_loss(x, c, p, phi, negatives=c.abs()[:, None]),
        r"negatives: expected shape \[r\], got \[17, 1\]",
    ),
    "negatives list": (lambda: proto_nce_loss(x, c, p, phi, negatives=[1]), "negatives: expected a tensor, got list"),
    "generator": (lambda: proto_nce_loss(x, c, p, phi, generator=3), "generator: expected a torch.Generator, got int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("option", ["gather", "return_stats", "temperature"])
def test_options_that_it_does_not_have_are_refused_by_name(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        fastcl.ProtoNCELoss(**{option: True})
    with pytest.raises(TypeError, match=option):
        fastcl.ProtoNCELoss()(x, c, p, phi, **{option: True})
