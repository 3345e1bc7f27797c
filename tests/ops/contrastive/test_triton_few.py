"""Triton kernels that replace PyTorch's operators for few rows: order, bounds, and the anchors' own positives."""

import pytest
import torch
from torch import Tensor

from fastcl.ops.contrastive import kept, own_contrasts
from fastcl.ops.contrastive.records import Needs, Problem, Rows, Side, Statistics, empty_side
from fastcl.ops.contrastive.triton import positives
from fastcl.ops.contrastive.triton import rows as triton_rows
from fastcl.ops.contrastive.triton import statistics as triton_statistics
from tests.support.backends import INTERPRETED
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")


@pytest.mark.parametrize(("n", "m"), [(1, 1), (13, None), (71, 5), (5, 71), (600, 530)])
def test_comparisons_give_the_order_of_sorts(n, m, monkeypatch) -> None:
    g = generator(n)

    def ids(size: int) -> Tensor:  # some have none, some clusters have one row, and names may be large
        found = torch.randint(-1, size // 2 + 2, (size,), generator=g)
        return torch.where(found > 0, found * (1 << 40), found)

    anchors, contrasts = ids(n), None if m is None else ids(m)

    def parts() -> dict[str, Tensor]:
        sizes = {"": n} if m is None else {"": n, "contrast_": m}
        found = {f"{prefix}clusters": torch.empty(size, dtype=torch.int32) for prefix, size in sizes.items()}
        found |= {f"{prefix}order": torch.empty(size, dtype=torch.int64) for prefix, size in sizes.items()}
        triton_rows.number_clusters(anchors, contrasts, found)
        return found

    compared = parts()
    monkeypatch.setattr(triton_rows, "MOST_COMPARED", 0)
    for name, values in parts().items():
        assert torch.equal(compared[name], values), name


def arranged(anchors: Rows, contrasts: Rows | None) -> tuple[Problem, triton_rows.Arranged]:
    p = Problem(anchors, contrasts, None, torch.ones(1), ("lse_all",))
    return p, triton_rows.arrange(p, triton_rows.KEPT.parts(p, torch.zeros(triton_rows.KEPT.size(p))))[0]


@pytest.mark.parametrize("most", [1 << 14, 8])
@pytest.mark.parametrize("normalized", [(False, False), (True, False), (False, True), (True, True)])
def test_bounds_of_logits(most, normalized, monkeypatch) -> None:
    monkeypatch.setattr(triton_statistics, "MOST_ROWS", most)
    g = generator(0)
    p, found = arranged(
        Rows(torch.randn(71, 21, generator=g), normalize=normalized[0]),
        Rows(5 * torch.randn(9, 21, generator=g), normalize=normalized[1]),
    )
    bound, expected = triton_statistics._longest(p, found.anchors, found.contrasts), kept.logit_bounds(p)[0]
    assert (bound is None) == (expected is None)
    if bound is not None:
        torch.testing.assert_close(bound, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_an_infinite_number_becomes_nan(bad) -> None:
    values = torch.randn(40, 21, generator=generator(0))
    values[7, 20] = bad
    p, found = arranged(Rows(values), None)
    stored = found.anchors.rows
    assert (
        stored[7, :21].isnan().all() if bad in (torch.inf, -torch.inf) else stored[7, 20].isnan()
    )  # NaN needs no company
    assert torch.equal(stored[8:, :21], values[8:])
    bound = triton_statistics._longest(p, found.anchors, found.contrasts)
    assert bound is not None
    assert bound.isnan().all()


WANTED = (("lse_all", "lse_neg", "sum_pos"), ("lse_neg", "sum_pos"), ("lse_all", "lse_pos"), ("sum_pos",))


@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_positives_are_those_of_the_formula(wanted, normalize, dtype) -> None:
    """Statistics and gradients as `own_contrasts` computes them in float64; rows of all sizes, an empty set, zeros."""
    n, d, g = 71, 21, generator(1)
    x, y = (torch.randn(n, 2 * d, generator=g)[:, ::2].to(dtype) for _ in range(2))
    if normalize:
        x[0], y[1], x[2], y[3], y[4] = 0, 0, x[2] * 1e-20, y[3] * 1e-20, y[4] * 1e20
    new = {"generator": g}
    logs = sum(name.startswith("lse") for name in wanted)
    parts = torch.stack((torch.randn(logs, 1, n, **new), torch.rand(logs, 1, n, **new) + 0.1))
    parts[:, :, :, 5] = 0  # an empty set, whose shift is anything
    fields = torch.randn(len(wanted), 1, n, **new)
    places = [k for k, name in enumerate(wanted) if name.startswith("lse")]
    fields[places] = parts[0] + parts[1].log()
    grad = torch.randn(len(wanted), 1, n, **new)
    swept = torch.randn(n, d, **new)

    def computed(dtype: torch.dtype, module) -> list[Tensor]:
        p = Problem(
            Rows(x.to(dtype), normalize=normalize),
            None,
            y.to(dtype),
            torch.full((1,), 3.0, dtype=torch.promote_types(dtype, torch.float32)),
            wanted,
        )
        norms = own_contrasts.inverse_norms(x.to(p.dtype)) if normalize else torch.empty(0, dtype=p.dtype)
        side = Side(fields.to(p.dtype), torch.arange(2.0 * n, dtype=p.dtype).view(2, n), parts.to(p.dtype))
        none = torch.empty(0, dtype=p.dtype)
        statistics = module.join(p, Statistics(side, empty_side(p), norms, none, none))
        needs = Needs(anchors=True, positives=True, logit_scale=True)
        sweep = positives.Gradients(swept.to(p.dtype), None, torch.ones(1, dtype=p.dtype), None)
        found = module.add_gradients(p, statistics, grad.to(p.dtype), needs, sweep)
        return [*statistics.anchors[:3], found.anchors, found.positives, found.logit_scale]

    p = Problem(Rows(x, normalize=normalize), None, y, torch.ones(1), wanted)
    assert positives.takes(p)
    names = ("fields", "counts", "parts", "anchors", "positives", "scale")
    results = zip(
        names, computed(dtype, positives), computed(dtype, own_contrasts), computed(torch.float64, own_contrasts),
        strict=True,
    )  # fmt: skip
    for name, got, plain, truth in results:
        there = truth.isfinite()
        assert torch.equal(got.isfinite(), there), name
        got, plain, truth = got.double()[there], plain.double()[there], truth.double()[there]
        assert float((got - truth).norm()) <= max(1.5 * float((plain - truth).norm()), 1e-5 * float(truth.norm())), name
