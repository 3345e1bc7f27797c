"""Backend `triton` with rules about pairs (tags, groups, a guide, duplicates), against the float64 reference.

The problems go to the operator as they are, so that both directions, several scales and the observed statistics of
each rule are compared. tests/losses/test_rules.py compares the loss with dense masks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcl.ops.backends import triton_launch, triton_tiles
from fastcl.ops.contrastive import op
from fastcl.ops.contrastive.records import Needs, Problem, Rows
from fastcl.ops.contrastive.triton import rows as triton_rows
from tests.losses.test_rules import COMBINATIONS, agrees, calls, ruled_call
from tests.support.backends import needs_interpreter, running
from tests.support.strategies import FIELDS, generator

pytestmark = needs_interpreter

RULES = ("clusters", "tags", "groups", "ids", "samples", "guide", "bias")
SWEPT = tuple(name for name in FIELDS if name != "sum_all")  # with it rows are swept in float32
RESOLUTION = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the rows


def problem(
    chosen: tuple[str, ...] = RULES,
    n: int = 70,
    m: int | None = 75,
    d: int = 17,
    dtype: torch.dtype = torch.float32,
    words: int = 2,
    seed: int = 0,
    converged: bool = False,
    scales: tuple[float, ...] = (4.0,),
    **changes: Any,
) -> Problem:
    """m: None for self-contrast. Every third group has rows of one set only; some rows have none."""
    g = generator(seed)
    base = torch.randn(9, d, generator=g)

    def side(count: int, own: bool) -> Rows:
        def numbers(most: int, least: int = -1) -> Tensor:
            return torch.randint(least, most, (count,), generator=g)

        labels = numbers(9, 0)
        noise = torch.randn(count, d, generator=g)
        values = (base[labels] + 0.1 * noise if converged else noise).to(dtype)
        data: dict[str, Tensor] = {}
        if "clusters" in chosen:
            data["clusters"] = torch.where(numbers(4, 0) == 0, -1, labels)
        if "tags" in chosen:
            places = torch.tensor([0, 5, 31, 40, 63])[torch.randint(0, 5, (count, words), generator=g)]
            data["tags"] = (torch.rand(count, words, generator=g) < 0.3).long() << places
        if "groups" in chosen:
            groups = numbers(6)
            data["groups"] = torch.where(groups % 3 == 2, groups + 10 * own, groups)
        if "ids" in chosen:
            data["ids"] = numbers(12)
        if "ids" in chosen and "samples" in chosen:
            data["samples"] = numbers(count // 2)
        if "guide" in chosen:
            guide = torch.randn(count, 40, generator=g)
            data["guide"] = guide.to(torch.bfloat16 if seed % 2 else torch.float32)
            if own:
                data["thresholds"] = torch.rand(count, generator=g) * 0.4 - 0.1
        if "bias" in chosen and (not own or m is None):
            bias = torch.randn(count, generator=g)
            data["bias"] = torch.where(torch.rand(count, generator=g) < 0.1, -torch.inf, bias)
        return Rows(values, normalize=True, **data)

    anchors, contrasts = side(n, True), None if m is None else side(m, False)
    both = m is not None and "guide" not in chosen
    defaults = {"both": both, "observe": True, "partial": True}
    return Problem(anchors, contrasts, None, torch.tensor(scales), SWEPT, **(defaults | changes))


def in_float64(p: Problem) -> Problem:
    def wide(rows: Rows | None) -> Rows | None:
        return rows and rows._replace(
            values=rows.values.double(),
            bias=None if rows.bias is None else rows.bias.double(),
            thresholds=None if rows.thresholds is None else rows.thresholds.double(),
        )

    anchors = wide(p.anchors)
    assert anchors is not None
    return replace(p, anchors=anchors, contrasts=wide(p.contrasts), logit_scale=p.logit_scale.double())


def computed(p: Problem, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics of both sides, and gradients of a fixed random combination of the fields."""
    swept = op.BACKENDS[backend]
    found = op.statistics(p, swept)
    sides = {"": found.anchors} | ({"reverse ": found.contrasts} if p.both else {})
    values = {}
    for prefix, side in sides.items():
        values |= {prefix + name: field for name, field in zip(p.want, side.fields, strict=True)}
        values[prefix + "counts"] = side.counts
        if side.observed is not None:
            values[prefix + "observed"] = side.observed
    grads = []
    for k, side in enumerate((found.anchors, found.contrasts)):
        weights = torch.randn(side.fields.shape, generator=generator(k), dtype=torch.float64)
        grads.append(weights.to(p.dtype))
    needs = Needs(True, p.contrasts is not None, True, p.others.bias is not None)
    gradients = op.gradients(p, swept, found, *grads, needs)
    return values, {name: one for name, one in gradients._asdict().items() if one is not None}


def with_constant_norms(p: Problem) -> Problem:
    """The same logits, of rows that are not normalised: their gradients are not projected, so nothing cancels."""

    def unit(rows: Rows | None) -> Rows | None:
        values = None if rows is None else rows.values / rows.values.norm(dim=1, keepdim=True)
        return rows and rows._replace(values=values, normalize=False)

    anchors = unit(p.anchors)
    assert anchors is not None
    return replace(p, anchors=anchors, contrasts=unit(p.contrasts))


def agrees_with_reference(p: Problem) -> dict[str, Tensor]:
    """Compares values and gradients of `triton` with float64; returns the true values.

    Logits are at most 9 and a bias of 4. Gradients of rows have the resolution of the rows' dtype, others float32's.
    """
    wide = in_float64(p)
    truth, true_gradients = computed(wide, "reference")
    _, cancelling = computed(with_constant_norms(wide), "reference")
    got, gradients = computed(p, "triton")
    for name, value in truth.items():
        if "counts" in name:
            assert torch.equal(got[name].double(), value), name
        else:
            torch.testing.assert_close(
                got[name].double(), value, rtol=1e-5, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert set(gradients) == set(true_gradients)
    assert all(gradients[name].dtype == torch.float32 for name in {"anchors", "contrasts"} & set(gradients))
    for name, value in true_gradients.items():
        size = max(value.norm(), cancelling[name].norm(), torch.tensor(1.0))
        if name == "logit_scale":  # a sum over all rows, whose terms cancel
            size = max(size, cancelling["anchors"].norm() / p.logit_scale.abs().amin())
        resolution = RESOLUTION[p.anchors.values.dtype if name in ("anchors", "contrasts") else torch.float32]
        error = (gradients[name].double() - value).norm() / size
        assert error < 2 * resolution, f"{name}: {error:.2e}"
    return truth


# Each rule alone; a guide and samples need another one beside them. N rows, and M contrasts or None for self-contrast.
CASES = [
    (("tags",), 40, 70),
    (("groups",), 70, None),
    (("ids",), 40, None),
    (("clusters", "guide"), 40, 30),
    (("ids", "samples"), 70, 30),
    (("tags", "groups", "guide"), 40, None),
    (RULES, 40, None),
    (RULES, 30, 70),
]


@pytest.mark.parametrize(("chosen", "n", "m"), CASES)
def test_each_rule_is_that_of_the_reference(chosen: tuple[str, ...], n: int, m: int | None) -> None:
    truth = agrees_with_reference(problem(chosen, n, m, observe=chosen == RULES))
    positives, negatives = truth["counts"]
    whole = n - 1 if m is None else m
    assert (positives + negatives < whole).any() or chosen == ("tags",)  # the rule leaves out pairs
    assert positives.any() == any(rule in chosen for rule in ("clusters", "tags"))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    chosen = tuple(draw(st.sets(st.sampled_from(RULES), min_size=1)))
    scales = draw(st.sampled_from(((4.0,), (4.0, -9.0))))
    return problem(
        chosen, draw(st.integers(1, 40)), draw(st.none() | st.integers(1, 66)), draw(st.sampled_from((1, 8, 17))),
        draw(st.sampled_from(list(RESOLUTION))), draw(st.integers(1, 3)), draw(st.integers(0, 2**20)),
        draw(st.booleans()), scales,
    )  # fmt: skip


@settings(max_examples=2)
@given(p=problems())
def test_combinations_are_those_of_the_reference(p: Problem) -> None:
    if p.ruled:
        agrees_with_reference(p)


@pytest.mark.parametrize(("dtype", "m"), [(torch.bfloat16, None), (torch.float16, 66)])
def test_converged_rows_in_half_precision(dtype: torch.dtype, m: int | None) -> None:
    agrees_with_reference(problem(n=40, m=m, dtype=dtype, converged=True, words=3, seed=1, observe=False))


@pytest.mark.parametrize("changes", [{}, {"hard_negatives": torch.zeros(5, 0, 17)}])
def test_gradients_that_are_added_to_are_not_rounded(changes: dict[str, Any]) -> None:
    """Two directions with a guide are two sweeps, and hard negatives add to the anchors' gradient."""
    chosen, both = (("tags",), False) if changes else (("clusters", "guide"), True)
    p = problem(chosen, 5, 6, dtype=torch.bfloat16, both=both, observe=False, partial=False, **changes)
    assert p.contrasts is not None
    if both:
        p = replace(p, contrasts=p.contrasts._replace(thresholds=torch.zeros(6)))
    agrees_with_reference(p)


def test_long_rows_and_guides() -> None:
    """Rows and guide rows that are streamed along their numbers."""
    p = problem(("clusters", "groups", "guide"), 20, 40, 130, observe=False)
    guide = torch.randn(20, 130, generator=generator(3)), torch.randn(40, 130, generator=generator(4))
    assert p.contrasts is not None
    agrees_with_reference(
        replace(p, anchors=p.anchors._replace(guide=guide[0]), contrasts=p.contrasts._replace(guide=guide[1]))
    )


@settings(max_examples=2)
@given(call=calls(12))
def test_losses_are_those_of_dense_masks(call: Any) -> None:
    with running("triton"):
        agrees(call)


def test_all_rules_in_a_loss() -> None:
    with running("triton"):
        agrees(ruled_call(COMBINATIONS["all"], set(), "views", 20, 17, 2, 5, 70, 5, True))


def test_nan_is_treated_as_by_the_reference() -> None:
    """A row of NaN makes its logits NaN. A guide row of NaN filters nothing, and neither does a threshold of NaN."""
    p = problem(("clusters", "guide"), 40, 30, observe=False)
    assert p.contrasts is not None
    values, guide, thresholds, other = (
        rows.clone()
        for rows in (p.anchors.values, p.anchors.guide, p.anchors.thresholds, p.contrasts.guide)
        if rows is not None
    )
    values[3] = guide[5] = thresholds[7] = other[9] = torch.nan
    anchors = p.anchors._replace(values=values, guide=guide, thresholds=thresholds)
    p = replace(p, anchors=anchors, contrasts=p.contrasts._replace(guide=other))
    truth, expected = computed(in_float64(p), "reference")
    got, gradients = computed(p, "triton")
    assert truth["lse_all"].isnan().sum() == 1
    assert truth["counts"][:, [5, 7]].sum(0).tolist() == [30, 30]
    for found, others in ((got, truth), (gradients, expected)):
        for name, value in others.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_rows_of_no_group_and_of_none_shared() -> None:
    """Their sets are empty: fields of nothing, and no gradient."""
    p = problem(("clusters", "groups"), 20, 30, both=False, observe=False)
    assert p.contrasts is not None
    alone = replace(
        p,
        anchors=p.anchors._replace(groups=torch.full((20,), -1)),
        contrasts=p.contrasts._replace(groups=torch.arange(30) % 3 - 1),
    )
    values, gradients = computed(alone, "triton")
    assert values["counts"].eq(0).all()
    assert values["lse_all"].eq(-torch.inf).all()
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The kernel launches from now on: name, grid."""
    seen: list[tuple[str, Any]] = []
    launch = triton_launch.launch

    def watched(name: str, shape: Any, grid: Any, given: dict[str, Any]) -> None:
        seen.append((name, grid))
        launch(name, shape, grid, given)

    monkeypatch.setattr(triton_launch, "launch", watched)
    return seen


def test_tiles_outside_of_a_group_are_not_visited(monkeypatch) -> None:
    kernel = triton_launch.kernel_named("ruled_statistics_kernel").fn
    tile = kernel.__globals__["ruled_tile"]
    visited: list[int] = []

    def counting(*arguments: Any, **named: Any) -> Any:
        visited.append(1)
        return tile(*arguments, **named)

    monkeypatch.setitem(kernel.__globals__, "ruled_tile", counting)
    p = problem(("groups",), 192, None)
    computed(replace(p, anchors=p.anchors._replace(groups=torch.arange(192) % 3)), "triton")
    assert len(visited) == 3 * 3  # of 9 tiles of 64 x 64, by the forward, the backward and the observed statistics


def test_parts_of_the_columns_are_joined(monkeypatch) -> None:
    """With few rows several programs share a row block's columns."""
    monkeypatch.setattr(triton_rows, "FEWEST_TILES", 1)
    monkeypatch.setattr(triton_rows, "programs", lambda device: 16)
    seen = launched(monkeypatch)
    agrees_with_reference(problem(("tags", "groups", "guide"), 20, 130, observe=False))
    parts = [grid[-1] for name, grid in seen if name in ("ruled_statistics_kernel", "ruled_gradient_kernel")]
    assert parts == [3, 3, 1]  # 130 contrasts are three blocks; the gradient of the contrasts has one block of columns


def test_one_sweep_serves_both_sides_without_a_guide_and_bias(monkeypatch) -> None:
    seen = launched(monkeypatch)
    for chosen, sweeps in ((("tags", "ids"), 1), (("clusters", "guide"), 2)):
        p = problem(chosen, 5, None, observe=False)
        seen.clear()
        computed(p, "triton")
        assert [name for name, _ in seen].count("ruled_gradient_kernel") == sweeps


def test_problems_without_rules_keep_their_kernels(monkeypatch) -> None:
    seen = launched(monkeypatch)
    computed(problem(("clusters",), 5, None), "triton")
    assert not [name for name, _ in seen if name.startswith("ruled")]
    assert {"statistics_kernel", "gradient_kernel", "observation_kernel"} <= {name for name, _ in seen}


def test_precision_of_products_does_not_move_the_threshold() -> None:
    """PyTorch's precision for float32 products rounds logits, but which pairs count stays."""
    p = problem(("clusters", "guide"), 20, 40, observe=False)
    before = torch.get_float32_matmul_precision()
    exact = op.statistics(p, op.BACKENDS["triton"]).anchors
    try:
        torch.set_float32_matmul_precision("high")
        rough = op.statistics(p, op.BACKENDS["triton"]).anchors
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact.counts, rough.counts)
    assert not torch.equal(exact.fields, rough.fields)


def test_forward_and_backward_round_logits_alike() -> None:
    """They split D alike, and both have the rows that wgmma and tcgen05 take, or neither."""
    for architecture in triton_tiles.ARCHITECTURES:
        for dtype, tf32, split in (
            (torch.bfloat16, False, False), (torch.float32, True, False), (torch.float32, False, True),
        ):  # fmt: skip
            for d in (32, 64, 128, 256, 512):
                tiles = [
                    triton_tiles.tile(kind, architecture, dtype, d, tf32=tf32, split=split)
                    for kind in triton_tiles.RULED
                ]
                kinds = {(tile.block_k, architecture > 80 and tile.block_m >= 64) for tile in tiles}
                assert len(kinds) == 1, (architecture, dtype, d)
