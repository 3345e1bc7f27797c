"""Who may meet whom: tags, duplicates, groups, guides and hard negatives, alone and together, against dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcl import ClusterInfoNCE
from fastcl.guide import Guide
from tests.support.backends import QUICK, running
from tests.support.pair_rules import RuledCall, dense_loss
from tests.support.strategies import generator
from tests.support.tolerances import check

RULES = ("tags", "clusters", "ids", "groups", "guide", "hard_negatives", "contrast_bias", "weights")
OPTIONS = ("inside", "negatives", "margin", "symmetric", "inner products")


@st.composite
def calls(draw: st.DrawFn, most: int = 40) -> RuledCall:
    """A call with some of the rules and options."""
    chosen = draw(st.sets(st.sampled_from(RULES), min_size=1))
    options = draw(st.sets(st.sampled_from(OPTIONS), max_size=2))
    form = draw(st.sampled_from(("alone", "views", "two sets", "own clusters of contrasts")))
    n, d, h = draw(st.integers(2, most)), draw(st.sampled_from((2, 3, 8, 17))), draw(st.integers(0, 3))
    extra, words = draw(st.integers(0, 5)), draw(st.sampled_from((1, 5, 64, 70, 130)))
    return ruled_call(chosen, options, form, n, d, h, extra, words, draw(st.integers(0, 2**20)), draw(st.booleans()))


def ruled_call(
    chosen: set[str], options: set[str], form: str, n: int, d: int, h: int, extra: int, tags: int, seed: int,
    converged: bool,
) -> RuledCall:  # fmt: skip
    g = generator(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def numbers(most: int, count: int) -> Tensor:
        return torch.randint(-1, most, (count,), generator=g)

    views = 2 if form == "views" else 1
    rows, alone = n * views, form in ("alone", "views")
    m = rows if alone else rows + extra
    base = randn(n, d)
    z = (base[:, None] + (0.2 if converged else 2) * randn(n, views, d)).float().double()
    a: dict[str, Any] = {}
    if not alone:
        noise = 0.2 if converged else 2
        a["contrasts"] = (torch.cat((base, randn(extra, d))) + noise * randn(m, d)).float().double()
    own_clusters = form == "own clusters of contrasts"
    if "tags" in chosen:
        a["clusters"] = torch.rand(n, tags, generator=g) < 1.5 / tags
        if own_clusters:
            a["contrast_clusters"] = torch.rand(m, tags, generator=g) < 1.5 / tags
    elif "clusters" in chosen or form == "alone":
        a["clusters"] = numbers(n // 2 + 1, n)
        if own_clusters:
            a["contrast_clusters"] = numbers(n // 2 + 1, m)
    elif own_clusters:
        a["contrast_clusters"] = numbers(n, m)
    if "ids" in chosen:
        a["ids"] = numbers(n // 2 + 1, n)
        if not alone and own_clusters:
            a["contrast_ids"] = numbers(n // 2 + 1, m)
        elif not alone:
            a["keep_pairs"] = True
    if "groups" in chosen:
        a["groups"] = numbers(3, n)
        if not alone and (extra or own_clusters):
            a["contrast_groups"] = numbers(3, m)
    if "guide" in chosen:
        of_contrasts = None if alone else randn(m, 3).float()
        own = randn(n, views, 3).float() if seed % 2 and views > 1 else randn(n, 3).float()
        rule = ("absolute", "relative")[seed % 2]
        given = torch.rand(rows, generator=g, dtype=torch.float64) if seed % 3 == 0 and m == rows else None
        a["guide"] = Guide(own, of_contrasts, margin=seed % 5 / 10, rule=rule, threshold=given)
    if "hard_negatives" in chosen:
        a["hard_negatives"] = (base[:, None] + randn(n, h, d)).float().double()
        if views > 1 and seed % 2:
            a["hard_negatives"] = randn(n, views, h, d).float().double()
    symmetric = "symmetric" in options and not alone
    if "contrast_bias" in chosen and not (symmetric and "guide" in chosen):
        bias = randn(m)
        a["contrast_bias"] = torch.where(torch.rand(m, generator=g) < 0.2, -torch.inf, bias).float().double()
    if "weights" in chosen:
        a["weights"] = torch.rand(n, generator=g, dtype=torch.float64).float().double()
    chosen_options: dict[str, Any] = {"temperature": 0.25, "symmetric": symmetric}
    if "inside" in options:
        chosen_options["form"] = "inside"
    if "negatives" in options:
        chosen_options["denominator"] = "negatives"
    if "margin" in options:
        chosen_options["margin"] = 0.2
    if "inner products" in options:
        chosen_options |= {"normalize": False, "temperature": 4.0}
    return RuledCall(z if views > 1 else z[:, 0], a, chosen_options)


def fused(call: RuledCall) -> tuple[Tensor, dict[str, Tensor]]:
    options = dict(call.options)
    loss = ClusterInfoNCE(options.pop("temperature"), **options)(call.embeddings, **call.arguments)
    return loss, gradients(loss, call)


def dense(call: RuledCall) -> tuple[Tensor, dict[str, Tensor]]:
    loss = dense_loss(call)
    return loss, gradients(loss, call)


def gradients(loss: Tensor, call: RuledCall) -> dict[str, Tensor]:
    rows = {name: tensor for name, tensor in call.rows().items() if name != "weights"}
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in rows.items()}
    found = torch.autograd.grad(loss, list(rows.values()), allow_unused=True)
    pairs = zip(rows.items(), found, strict=True)
    return {name: torch.zeros_like(t) if gradient is None else gradient for (name, t), gradient in pairs}


@pytest.mark.parametrize("variant", QUICK)
@settings(max_examples=60)
@given(call=calls())
def test_the_loss_is_that_of_dense_masks(variant: str, call: RuledCall) -> None:
    with running(variant):
        agrees(call)


def agrees(call: RuledCall) -> None:
    """Raises AssertionError unless loss and gradients are those of dense masks, in float64 and float32."""
    expected, truths = dense(call.to(torch.float64))
    got, found = fused(call.to(torch.float64))
    assert got.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-11)
    for name, truth in truths.items():
        assert torch.allclose(found[name], truth, rtol=1e-9, atol=1e-10), name
    eager = dense(call.to(torch.float32))
    got, found = fused(call.to(torch.float32))
    size = torch.tensor(4 / call.options["temperature"])
    check("loss", got, expected, [eager[0]], magnitude=size)
    for name, truth in truths.items():
        magnitude = torch.full_like(truth, 4 / call.options["temperature"] / truth.numel() ** 0.5)
        check(name, found[name], truth, [eager[1][name]], magnitude=magnitude)


COMBINATIONS = {
    "tags": {"tags"},
    "tags and groups": {"tags", "groups"},
    "groups": {"clusters", "groups"},
    "guide": {"clusters", "guide"},
    "duplicates": {"ids", "groups"},
    "all": {"tags", "ids", "groups", "guide", "hard_negatives", "contrast_bias"},
}


@pytest.mark.parametrize("variant", [name for name in QUICK if name != "reference"])
@pytest.mark.parametrize("form", ["alone", "views", "two sets"])
@pytest.mark.parametrize("chosen", COMBINATIONS)
def test_many_tiles(variant: str, form: str, chosen: str) -> None:
    """Several blocks of rows and, with two threads, several turns."""
    n = 210 if form == "views" else 420
    call = ruled_call(COMBINATIONS[chosen], {"symmetric"}, form, n, 17, 2, 37, 70, 5, True)
    with running(variant):
        agrees(call)
