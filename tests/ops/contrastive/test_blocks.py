"""Statistics merged from blocks of contrasts, on every backend, as if other processes had sent the blocks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import contrastive_stats
from fastcl.ops.contrastive.blocks import BlockStats, Call
from fastcl.ops.contrastive.fields import FIELDS
from fastcl.ops.contrastive.records import Problem, Rows, flatten, flatten_rows
from tests.support.backends import VARIANTS, running
from tests.support.emulated import emulating
from tests.support.pairs import pairs
from tests.support.strategies import generator, rows


class Cut:
    """One process that owns all contrasts and visits them in pieces."""

    def __init__(self, total: int, pieces: int) -> None:
        self.total, self.own = total, slice(0, total)
        cuts = [total * k // pieces for k in range(pieces + 1)]
        self.places = [slice(*pair) for pair in pairwise(cuts)]

    def walk(self, rows: Tensor, alone: bool, visit: Any) -> None:
        for place in [self.own] if alone else self.places:
            visit(place, None if alone else rows[place])

    def walk_back(self, kept: None, rows: Tensor, alone: bool, visit: Any, dtype: torch.dtype | None) -> Tensor | None:
        home = None if dtype is None else torch.full_like(rows, torch.nan, dtype=dtype)
        for place in [self.own] if alone else self.places:
            found = visit(place, None if alone else rows[place])
            if home is not None:
                home[place] = 0 if found is None else found
        return home

    def spread(self, values: Tensor) -> Tensor:
        return values

    def spread_rows(self, values: list[Tensor]) -> list[Tensor]:
        return values

    def collect(self, values: Tensor) -> Tensor:
        return values[None]

    def summed(self, values: Tensor) -> Tensor:
        return values


def problem(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = generator(4)
    groups = torch.cat([torch.arange(23) // 2, torch.arange(31) // 2])
    both = rows("converged" if kind == "converged" else "random", groups, 24, g, unit=kind == "far apart")
    if kind == "far apart":  # logits are small in some blocks and large in others
        both[:6] *= 40
        both[23:30] *= 40
    x, y = both[:23].to(dtype), both[23:].to(dtype)
    clusters = {"anchor_clusters": groups[:23], "contrast_clusters": groups[23:]}
    ids = {
        "anchor_ids": torch.randint(-1, 5, (23,), generator=g),
        "contrast_ids": torch.randint(-1, 5, (31,), generator=g),
    }
    return {"anchors": x, "contrasts": y, **clusters, **ids, "contrast_bias": torch.randn(31, generator=g)}


def check(variant: str, kind: str, dtype: torch.dtype, both: bool, scales: list[float]) -> None:
    """Compares with one sweep of the same backend, in units of the largest number."""
    p = problem(kind, dtype)
    normalize = kind != "far apart"
    scale = torch.tensor(scales)
    inputs = [p[name].clone().requires_grad_() for name in ("anchors", "contrasts", "contrast_bias")]
    inputs.append(scale.requires_grad_())
    others = [p[name] for name in ("anchor_clusters", "contrast_clusters", "anchor_ids", "contrast_ids")]
    with running(variant) as backend:
        stats = contrastive_stats(
            inputs[0], inputs[1], *others[:2], logit_scale=inputs[3], normalize_anchors=normalize,
            normalize_contrasts=normalize, contrast_bias=inputs[2], anchor_ids=others[2], contrast_ids=others[3],
            want=FIELDS, both=both,
        )  # fmt: skip
        sides = [stats, stats.reverse] if both else [stats]
        expected = [getattr(side, name) for side in sides for name in (*FIELDS, "num_pos", "num_neg")]
        call = Call(
            exchange=Cut(31, 4), backend=backend, exact=False, one_scale=False, contrasts_need=True, bias_needs=True
        )  # fmt: skip
        own = Rows(inputs[0], others[0], others[2], normalize=normalize)
        travelling = Rows(inputs[1], others[1], others[3], inputs[2], normalize=normalize)
        whole = Problem(own, travelling, None, inputs[3], FIELDS, both)
        found = BlockStats.apply(call, *flatten(whole), *flatten_rows(None))
        gradients = []
        for values in (found, expected):
            masked = [value.masked_fill(~value.isfinite(), 0) for value in values]
            factors = [torch.rand(value.shape, generator=generator(k)) for k, value in enumerate(masked)]
            total = sum((value * factor).sum() for value, factor in zip(masked, factors, strict=True))
            gradients.append(torch.autograd.grad(total, inputs))
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5 * value[value.isfinite()].abs().max().item())
    rounding = {torch.bfloat16: 2.0**-7}.get(dtype, 3e-5)
    for got, value in zip(*gradients, strict=True):
        assert (got.double() - value.double()).norm() <= rounding * value.double().norm()


@pairs(
    variant=VARIANTS,
    kind=["random", "converged", "far apart"],
    dtype=[torch.float32, torch.bfloat16],
    both=[False, True],
)
def test_blocks_are_merged_into_what_one_sweep_finds(variant, kind, dtype, both) -> None:
    check(variant, kind, dtype, both, [20.0] if kind == "converged" else [1.0, 3.0])


@pytest.mark.parametrize("kind", ["converged", "far apart"])
@pytest.mark.parametrize("both", [False, True])
def test_also_by_the_emulated_kernels_of_cuda(kind: str, both: bool) -> None:
    with emulating():
        check("cuda", kind, torch.bfloat16 if both else torch.float32, both, [20.0 if kind == "converged" else 1.0])
