"""`GISTEmbedLoss` against sentence-transformers' formula, written with dense matrices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import GISTEmbedLoss
from fastcl.functional import gist_embed_loss
from tests.support.backends import QUICK, running
from tests.support.strategies import generator
from tests.support.tolerances import check

OPTIONS: list[dict[str, Any]] = [
    {},
    {"margin": 0.1},
    {"margin": 0.1, "rule": "relative", "temperature": 0.05},
    {"contrast_anchors": False},
    {"contrast_positives": False, "margin": 0.3},
]


@pytest.fixture(params=QUICK)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All backends with the rules but `triton`, whose interpreter is slow: see ops/contrastive/test_triton_rules.py."""
    with running(request.param) as name:
        yield name


def cosines(left: Tensor, right: Tensor) -> Tensor:
    return torch.nn.functional.normalize(left, dim=1) @ torch.nn.functional.normalize(right, dim=1).T


def dense(
    a: Tensor, p: Tensor, ga: Tensor, gp: Tensor, n: Tensor | None, gn: Tensor | None, *, temperature: float = 0.01,
    margin: float = 0.0, rule: str = "absolute", contrast_anchors: bool = True, contrast_positives: bool = True,
) -> Tensor:  # fmt: skip
    """`GISTEmbedLoss.forward` of sentence-transformers 6.2."""
    guided = cosines(ga, gp).diagonal()[:, None]
    threshold = guided - margin * (guided.abs() if rule == "relative" else 1)
    own = torch.eye(len(a), dtype=torch.bool)

    def filtered(left: Tensor, right: Tensor, g_left: Tensor, g_right: Tensor, kept: Tensor | bool) -> Tensor:
        mask = (cosines(g_left, g_right) > threshold) & ~torch.as_tensor(kept)
        return cosines(left, right).masked_fill(mask, -torch.inf)

    scores = [filtered(a, p, ga, gp, own)]
    if contrast_anchors:
        scores.append(filtered(a, a, ga, ga, False).masked_fill(own, -torch.inf))
    if contrast_positives:
        scores.append(filtered(p, p, gp, gp, False).masked_fill(own, -torch.inf))
    if n is not None and gn is not None:
        scores.append(filtered(a, n, ga, gn, False))
    return torch.nn.functional.cross_entropy(torch.cat(scores, 1) / temperature, torch.arange(len(a)))


def rows(n: int = 13, k: int = 7, d: int = 6, seed: int = 0) -> list[Tensor]:
    """Anchors, positives, their guide rows, negatives and theirs, as in training half done."""
    g = generator(seed)
    base, guide = torch.randn(n, d, generator=g), torch.randn(n, 4, generator=g)
    near = [base + 0.5 * torch.randn(n, d, generator=g) for _ in range(2)]
    guides = [guide + 0.7 * torch.randn(n, 4, generator=g) for _ in range(2)]
    return [*near, *guides, torch.randn(k, d, generator=g), torch.randn(k, 4, generator=g)]


def with_gradients(loss: Any, given: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = [part.to(dtype).requires_grad_(k in (0, 1, 4)) for k, part in enumerate(given)]
    found = loss(*leaves, **options)
    return [found.detach(), *torch.autograd.grad(found, [leaves[0], leaves[1], leaves[4]])]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_formula(backend: str, options: dict[str, Any]) -> None:
    given = rows()
    truth = with_gradients(dense, given, torch.float64, **options)
    exact = with_gradients(gist_embed_loss, given, torch.float64, **options)
    for got, expected in zip(exact, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    eager = with_gradients(dense, given, torch.float32, **options)
    names = ("loss", "anchors", "positives", "negatives")
    for name, got, expected, draw in zip(
        names, with_gradients(gist_embed_loss, given, torch.float32, **options), truth, eager, strict=True
    ):
        check(name, got, expected, [draw], magnitude=torch.full_like(expected, 100 / expected.numel() ** 0.5))


def test_rows_equal_to_the_positive_stay() -> None:
    """Their guide cosine equals the threshold, in whatever order a kernel adds."""
    a, p, ga, gp, n, gn = rows()
    p, gp = torch.cat((p[:1], p[:1], p[2:])), torch.cat((gp[:1], gp[:1], gp[2:]))
    got = gist_embed_loss(a, p, ga, gp, n, gn)
    assert got.item() == pytest.approx(dense(*(x.double() for x in (a, p, ga, gp, n, gn))).item(), rel=1e-5)


def test_no_pairs_no_negatives_and_nan(backend: str) -> None:
    a, p, ga, gp, n, gn = rows()
    assert gist_embed_loss(a[:0], p[:0], ga[:0], gp[:0]).item() == 0
    expected = gist_embed_loss(a, p, ga, gp)
    assert gist_embed_loss(a, p, ga, gp, n[:0], gn[:0]).item() == pytest.approx(expected.item(), rel=1e-6)
    for k in (0, 1, 4):
        broken = [x.clone() for x in (a, p, ga, gp, n, gn)]
        broken[k][2, 1] = torch.nan
        broken[2] = torch.ones_like(ga)  # nothing is filtered
        broken[3], broken[5] = torch.ones_like(gp), torch.ones_like(gn)
        assert gist_embed_loss(*broken).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    given = rows()
    halves = [x.to(dtype) for x in given]
    truth = dense(*(x.double() for x in halves))
    loss = GISTEmbedLoss(0.1)
    expected = dense(*(x.double() for x in halves), temperature=0.1)
    assert loss(*halves).item() == pytest.approx(expected.item(), rel=1e-5)
    assert truth.isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(*given).item() == pytest.approx(loss(*given).item(), rel=1e-6)


def test_the_module(capsys: Any) -> None:
    loss = GISTEmbedLoss(torch.nn.Parameter(torch.tensor(0.05)), margin=0.1, rule="relative")
    given = rows()
    expected = loss(*given)
    expected.backward()
    assert loss.temperature.grad is not None
    again = GISTEmbedLoss(torch.nn.Parameter(torch.tensor(1.0)), margin=0.1, rule="relative")
    again.load_state_dict(loss.state_dict())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), again):
        assert other(*given).item() == expected.item()
    assert "margin=0.1" in repr(loss)
    assert "relative" in repr(loss)


def test_it_compiles_whole() -> None:
    loss, given = GISTEmbedLoss(0.05, margin=0.1), rows()
    leaf = given[0].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = compiled(*given)
    got.backward()
    expected, gradient = loss(*given), leaf.grad
    leaf.grad = None
    expected.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, leaf.grad)


def test_mistakes_are_named() -> None:
    a, p, ga, gp, n, gn = rows()
    for message, call in (
        ("positives: expected 13 rows", lambda: gist_embed_loss(a, p[:3], ga, gp)),
        ("guide_positives: expected 13 rows", lambda: gist_embed_loss(a, p, ga, gp[:3])),
        ("guide_negatives: expected a tensor", lambda: gist_embed_loss(a, p, ga, gp, n)),
        ("negatives: expected a tensor", lambda: gist_embed_loss(a, p, ga, gp, None, gn)),
        ("guide_negatives: expected 7 rows", lambda: gist_embed_loss(a, p, ga, gp, n, gn[:2])),
        ("margin: expected a number of at least 0", lambda: GISTEmbedLoss(margin=-1)),
        ("rule: expected one of", lambda: fastcl.Guide(ga, rule="other")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
