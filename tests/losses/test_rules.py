"""Rules about pairs (tags, duplicates, groups, guides, hard negatives), alone and combined, against dense masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl import ClusterInfoNCE
from fastcl.guide import Guide
from tests.support.backends import QUICK, running
from tests.support.pair_rules import RuledCall, dense_loss
from tests.support.strategies import generator
from tests.support.tolerances import check

RULES = ("tags", "clusters", "ids", "groups", "guide", "hard_negatives", "contrast_bias", "weights", "positives")
OPTIONS = ("inside", "negatives", "margin", "symmetric", "inner products", "sum", "none", "smoothing")


@pytest.fixture(params=QUICK)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All backends with the rules but `triton`, whose interpreter is slow: see ops/contrastive/test_triton_rules.py."""
    with running(request.param) as name:
        yield name


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
        own_threshold = "positives" in chosen or (seed % 3 == 0 and m == rows)
        given = torch.rand(rows, generator=g, dtype=torch.float64) if own_threshold else None
        a["guide"] = Guide(own, of_contrasts, margin=seed % 5 / 10, rule=rule, threshold=given)
    if "hard_negatives" in chosen:
        a["hard_negatives"] = (base[:, None] + randn(n, h, d)).float().double()
        if views > 1 and seed % 2:
            a["hard_negatives"] = randn(n, views, h, d).float().double()
    if "positives" in chosen:
        a["positives"] = (base + 0.5 * randn(n, d)).float().double()
        if views > 1 and seed % 2:
            a["positives"] = randn(n, views, d).float().double()
    thresholds_both_ways = m == rows or a.get("guide") is None or a["guide"].threshold is None
    symmetric = "symmetric" in options and not alone and thresholds_both_ways
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
    filtered = {"ids", "groups", "guide"} & chosen  # label smoothing does not go with these
    if "smoothing" in options and not (filtered or {"inside", "negatives", "margin"} & options):
        chosen_options["label_smoothing"] = 0.2
    if "sum" in options or ("none" in options and symmetric and m != rows):
        chosen_options["reduction"] = "sum"
    elif "none" in options:
        chosen_options["reduction"] = "none"
    return RuledCall(z if views > 1 else z[:, 0], a, chosen_options)


def weighed(loss: Tensor) -> Tensor:
    """A scalar of the terms of reduction "none", each with a weight of its own; other losses as they are."""
    return (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)).sum() if loss.dim() else loss


def fused(call: RuledCall) -> tuple[Tensor, dict[str, Tensor]]:
    options = dict(call.options)
    loss = weighed(ClusterInfoNCE(options.pop("temperature"), **options)(call.embeddings, **call.arguments))
    return loss, gradients(loss, call)


def dense(call: RuledCall) -> tuple[Tensor, dict[str, Tensor]]:
    loss = weighed(dense_loss(call))
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
    if "reduction" in call.options:  # sums over the rows
        size = size * call.embeddings[..., 0].numel()
    check("loss", got, expected, [eager[0]], magnitude=size)
    for name, truth in truths.items():
        magnitude = torch.full_like(truth, size.item() / truth.numel() ** 0.5)
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


def plain_rows(n: int = 9, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed))


def test_statistics_are_those_of_the_masks(backend: str) -> None:
    z, y = plain_rows().double(), plain_rows(7, seed=1).double()
    tags, others = torch.rand(9, 5) < 0.3, torch.rand(7, 5) < 0.3
    groups, other_groups = torch.arange(9) % 3 - 1, torch.arange(7) % 3 - 1
    guide = fastcl.Guide(plain_rows(9, 3, 2), plain_rows(7, 3, 3), threshold=torch.full((9,), 0.4))
    stats = fastcl.contrastive_stats(
        z, y, tags, others, anchor_groups=groups, contrast_groups=other_groups, guide=guide,
        want=("lse_all", "lse_neg", "sum_pos", "max_neg", "entropy"),
    )  # fmt: skip
    positive = (tags[:, None] & others).any(-1)
    admissible = (groups[:, None] == other_groups) & (groups >= 0)[:, None]
    positive &= admissible
    cosines = torch.nn.functional.cosine_similarity(plain_rows(9, 3, 2)[:, None], plain_rows(7, 3, 3)[None], dim=-1)
    admissible &= positive | (cosines <= 0.4)
    logits = (z @ y.T).masked_fill(~admissible, -torch.inf)
    torch.testing.assert_close(stats.lse_all, logits.logsumexp(1))
    torch.testing.assert_close(stats.lse_neg, logits.masked_fill(positive, -torch.inf).logsumexp(1))
    torch.testing.assert_close(stats.num_neg, (admissible & ~positive).sum(1).double())
    torch.testing.assert_close(stats.sum_pos, torch.where(positive, logits, 0).sum(1))
    torch.testing.assert_close(stats.max_neg, logits.masked_fill(positive, -torch.inf).amax(1))


@pytest.mark.parametrize("chosen", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast_and_monitoring(backend: str, dtype: torch.dtype, chosen: str) -> None:
    """Rows in half precision are multiplied as they are; return_stats changes nothing to the bit."""
    call = ruled_call(COMBINATIONS[chosen], set(), "views", 12, 8, 2, 0, 5, 3, False)
    halves = call.to(dtype)
    wide = RuledCall(halves.embeddings.double(), {k: as_double(v) for k, v in halves.arguments.items()}, call.options)
    got, found = fused(halves)
    assert got.item() == pytest.approx(dense_loss(wide).item(), rel=2e-5, abs=1e-6)
    assert found["embeddings"].dtype == dtype
    options = dict(call.options)
    loss = ClusterInfoNCE(options.pop("temperature"), **options)
    single = call.to(torch.float32)
    expected = loss(single.embeddings, **single.arguments)
    with torch.autocast("cpu", dtype):
        again, stats = loss(single.embeddings, **single.arguments, return_stats=True)
    assert again.item() == expected.item()
    assert all(torch.isfinite(value) for value in (stats.positive_similarity, stats.entropy))


def as_double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_nothing_and_numbers_that_are_none(backend: str) -> None:
    loss, tags = ClusterInfoNCE(0.3), torch.ones(4, 3, dtype=torch.bool)
    z = plain_rows(4)
    assert loss(z[:0], tags[:0]).item() == 0
    assert loss(z, tags[:, :0], groups=torch.zeros(4, dtype=torch.int64)).item() == 0  # no tag, no positive
    assert loss(z, tags, hard_negatives=z.new_zeros(4, 0, 4)).item() == loss(z, tags).item()
    assert loss(z, contrasts=z[:0], contrast_clusters=tags[:0], clusters=tags).item() == 0
    broken = z.clone()
    broken[1, 2] = torch.nan
    assert loss(broken, tags).isnan()
    assert loss(z, tags, hard_negatives=broken[:, None]).isnan()
    groups = torch.tensor([0, 1, 0, 0])  # the broken row meets no other
    assert loss(broken, tags, groups=groups).isfinite()


def test_rules_compile_whole() -> None:
    call = ruled_call(COMBINATIONS["all"], set(), "views", 6, 8, 2, 0, 5, 3, False).to(torch.float32)
    loss = ClusterInfoNCE(0.25)
    expected = loss(call.embeddings, **call.arguments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = compiled(call.embeddings, **call.arguments)
    torch.testing.assert_close(got, expected)
    both = [torch.autograd.grad(value, call.embeddings, retain_graph=True)[0] for value in (got, expected)]
    torch.testing.assert_close(*both)


def test_a_group_is_a_loss_of_its_own(backend: str) -> None:
    z, labels = plain_rows(20).double(), torch.arange(20) % 4
    groups = torch.tensor([5, 2] * 10)
    loss = ClusterInfoNCE(0.3, reduction="none")
    got = loss(z, labels, groups=groups)
    for group in (2, 5):
        torch.testing.assert_close(got[groups == group], loss(z[groups == group], labels[groups == group]))


def test_duplicates_stay_with_their_own_views(backend: str) -> None:
    z = plain_rows(6).double()[:, None] + 0.1 * torch.randn(6, 2, 4, generator=generator(4), dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, -1, -1, 2])
    loss = ClusterInfoNCE(0.3, reduction="none")
    got = loss(z, ids=ids)
    alone = loss(z[1:])  # without the first sample, the second one's duplicate
    torch.testing.assert_close(got[1], alone[0])
    torch.testing.assert_close(got[3:], loss(z)[3:])


MISTAKES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("contrast_clusters: expected a bool tensor", {"contrasts": 1, "clusters": "tags", "contrast_clusters": "ids"}, {}),
    (
        r"contrast_clusters: expected shape \[9, 5\]",
        {"contrasts": 1, "clusters": "tags", "contrast_clusters": "few"},
        {},
    ),
    ("groups: expected a tensor", {"contrasts": 1, "contrast_groups": "ids"}, {}),
    ("contrast_groups: expected None for self", {"clusters": "ids", "groups": "ids", "contrast_groups": "ids"}, {}),
    ("keep_pairs: expected False for self", {"clusters": "ids", "ids": "ids", "keep_pairs": True}, {}),
    ("ids: expected a tensor with keep_pairs", {"contrasts": 1, "keep_pairs": True}, {}),
    ("keep_pairs: expected True or False|keep_pairs: expected a bool", {"contrasts": 1, "keep_pairs": 2}, {}),
    ("guide: expected a Guide", {"clusters": "ids", "guide": 3}, {}),
    ("guide.contrast_embeddings: expected a tensor", {"contrasts": 1, "guide": "alone"}, {}),
    ("guide.contrast_embeddings: expected None", {"clusters": "ids", "guide": "two"}, {}),
    ("guide.threshold: expected a tensor with positives", {"clusters": "ids", "guide": "alone", "positives": 1}, {}),
    ("symmetric: expected False for self", {"clusters": "ids", "guide": "alone"}, {"symmetric": True}),
    (r"hard_negatives: expected shape \[9, H, 4\]", {"clusters": "ids", "hard_negatives": 1}, {}),
    ("form: expected 'outside' or 'inside' with tags", {"clusters": "tags"}, {"form": "pairs"}),
    ("label_smoothing: expected 0 with groups", {"clusters": "ids", "groups": "ids"}, {"label_smoothing": 0.1}),
    ("groups: expected None with assignments", {"assignments": 1, "groups": "ids"}, {}),
    ("groups: expected None with a queue", {"clusters": "ids", "contrasts": "queue", "groups": "ids"}, {}),
    ("guide: expected None with a queue", {"clusters": "ids", "contrasts": "queue", "guide": "two"}, {}),
    (
        "contrast_bias: expected None with guide",
        {"contrasts": 1, "contrast_bias": 1, "guide": "two"},
        {"symmetric": True},
    ),
]


@pytest.mark.parametrize(("message", "given", "options"), MISTAKES, ids=[message[:40] for message, *_ in MISTAKES])
def test_mistakes_are_named(message: str, given: dict[str, Any], options: dict[str, Any]) -> None:
    z, tags = plain_rows(), torch.rand(9, 5) < 0.5
    queue = fastcl.MemoryQueue(3, 4, clusters=True)
    queue.enqueue(plain_rows(3), torch.arange(3))
    known = {
        "tags": tags, "few": tags[:, :2], "ids": torch.arange(9) % 3, "queue": queue,
        "alone": fastcl.Guide(z), "two": fastcl.Guide(z, z),
    }  # fmt: skip
    numbers = {"contrast_bias": torch.zeros(9), "assignments": torch.rand(9, 2)}
    arguments = {
        name: numbers.get(name, z) if value == 1 and value is not True else known.get(value, value)
        for name, value in given.items()
    }
    with pytest.raises((ValueError, TypeError), match=message):
        ClusterInfoNCE(0.3, **options)(z, **arguments)
