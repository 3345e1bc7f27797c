"""Plain formulas of the sums over pairs, and random problems for them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.ops.backends.choose import choose_backend
from fastcl.ops.contrastive.records import Rows
from fastcl.ops.pair_maps import KINDS
from fastcl.ops.pairs.op import sweep
from fastcl.ops.pairs.records import Gradients, Needs, Pairs, Sums
from tests.support.strategies import generator
from tests.support.tolerances import accumulation_dtype, check

MARGINS = {"softplus": (0.0, 0.0), "hinge": (0.7, -0.2), "distance": (0.4, 1.3), "squared": (0.1, 1.4)}
TARGETS = Gradients._fields


class Found(NamedTuple):
    values: Tensor  # [2, N]
    active: Tensor
    counts: Tensor
    gradients: tuple[Tensor | None, ...]


def problem(
    n: int, m: int | None, d: int, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, near: float = 0.0,
    normalize: bool = True, ids: bool = False, bias: bool = False, offset: str = "none", clusters: int | None = 5,
    only_positives: bool = False,
) -> Pairs:  # fmt: skip
    """Random rows; with `near`, rows of one cluster differ by so much. m: None for self-contrast. offset: "none",
    "all" or "rows"."""
    g = generator(seed)
    sizes = (n,) if m is None else (n, m)
    centres = torch.randn(clusters or 1, d, generator=g)
    sides = []
    for side, size in enumerate(sizes):
        of_rows = torch.randint(-1, clusters, (size,), generator=g) if clusters else None
        values = torch.randn(size, d, generator=g)
        if near and of_rows is not None:
            values = torch.where(of_rows[:, None] >= 0, centres[of_rows.clamp(min=0)] + near * values, values)
        of_ids = torch.randint(-1, 4, (size,), generator=g) if ids else None
        of_bias = torch.randn(size, generator=g) if bias and side == 1 else None
        if of_bias is not None and size > 2:
            of_bias[1] = -torch.inf
        if of_bias is not None and KINDS[kind].of_distance:
            of_bias = of_bias.masked_fill(of_bias != -torch.inf, 0)
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        of_bias = None if of_bias is None else of_bias.to(sums)
        sides.append(Rows(values.to(dtype), of_rows, of_ids, of_bias, normalize=normalize))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    of_distance = KINDS[kind].of_distance
    scale = torch.tensor(1.0 if of_distance else 3.7, dtype=sums)
    shapes = {"none": None, "all": (), "rows": (n,)}
    shape = None if of_distance else shapes[offset]
    added = None if shape is None else torch.randn(shape, generator=g).to(sums)
    contrasts = None if m is None else sides[1]
    return Pairs(sides[0], contrasts, scale, added, kind, *MARGINS[kind], only_positives)


def plain(p: Pairs, weights: Tensor, dtype: torch.dtype) -> Found:
    """The formulas, differentiated by autograd. The total is that of the weights."""
    leaves = [
        None if value is None else value.detach().to(dtype).requires_grad_()
        for value in (p.anchors.values, p.contrasts and p.contrasts.values, p.logit_scale, p.offset, p.bias)
    ]
    x, y, scale, offset, bias = leaves
    assert x is not None
    assert scale is not None
    y = x if y is None else y
    left_out = torch.zeros(len(y), dtype=torch.bool) if bias is None else bias.detach() == -torch.inf
    y = torch.where(left_out[:, None], 0, y)
    x = torch.nn.functional.normalize(x, eps=1e-12) if p.anchors.normalize else x
    y = torch.nn.functional.normalize(y, eps=1e-12) if p.others.normalize else y
    if p.of_distance:
        squares = (x[:, None] - y).square().sum(-1)
        t = torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())
    else:
        t = scale * (x @ y.T)
        t = t if offset is None else t + offset.reshape(-1, 1)
        t = t if bias is None else t + torch.where(left_out, 0, bias)
    n, m = t.shape
    admissible = ~left_out.expand(n, m)
    if p.contrasts is None:
        admissible = admissible & ~torch.eye(n, dtype=torch.bool)
    for name in ("ids", "clusters"):
        left, right = getattr(p.anchors, name), getattr(p.others, name)
        equal = torch.zeros(n, m, dtype=torch.bool)
        if left is not None and right is not None:
            equal = (left[:, None] == right) & (left[:, None] != -1)
        if name == "ids" and p.contrasts is not None:
            admissible = admissible & ~equal
    sets = admissible & equal, admissible & ~equal & (not p.only_positives)
    values = []
    for k, (members, margin) in enumerate(zip(sets, p.margins, strict=True)):
        sign = 1 - 2 * (k == 0)  # of a positive the map falls with the logit
        if p.kind == "softplus":
            mapped = torch.logaddexp(torch.zeros_like(t), sign * t)
        else:
            mapped = torch.relu((t - margin) * (-sign if p.of_distance else sign))
        values.append(torch.where(members, mapped.square() / 2 if p.kind == "squared" else mapped, 0))
    total = sum((w[:, None] * value).sum() for w, value in zip(weights.to(dtype), values, strict=True))
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(total, wanted, allow_unused=True))  # type: ignore[arg-type]
    found = [None if leaf is None else next(gradients) for leaf in leaves]
    sums, active, counts = (
        torch.stack([part.sum(1) for part in parts])
        for parts in (values, sets if p.kind == "softplus" else [value.detach() != 0 for value in values], sets)
    )
    return Found(sums.detach(), active, counts, tuple(found))


def permuted(p: Pairs, seed: int) -> Pairs:
    """The same problem with its features in another order, which gives other roundings."""
    order = torch.randperm(p.anchors.values.shape[1], generator=generator(seed))
    contrasts = None if p.contrasts is None else p.contrasts._replace(values=p.contrasts.values[:, order])
    return replace(p, anchors=p.anchors._replace(values=p.anchors.values[:, order]), contrasts=contrasts)


def swept(p: Pairs, weights: Tensor, needs: Needs, backend: str | None = None) -> tuple[Sums, Gradients]:
    """The sweep by a backend; None: by the one that is chosen for the problem."""
    family = "pair_distances" if p.of_distance else "pair_sums"
    return sweep(p, backend or choose_backend(p.device, p.dtype, family), weights, needs)


def check_sweep(
    p: Pairs, weights: Tensor | None = None, names: Sequence[str] = TARGETS, backend: str | None = None
) -> None:
    """The sweep against the formulas in float64, by the error rule. backend: as in `swept`."""
    n, d = p.anchors.values.shape
    if weights is None:
        weights = torch.rand(2, n, generator=generator(11)) + 0.1
    weights = weights.to(p.dtype)
    truth = plain(p, weights, torch.float64)
    draws = [plain(p, weights, p.dtype)]
    inverse = []
    for seed in (1, 2):
        order = torch.randperm(d, generator=generator(seed))
        inverse.append(order.argsort())
        draws.append(plain(permuted(p, seed), weights, p.dtype))
    needs = Needs(True, p.contrasts is not None, not p.of_distance, p.offset is not None, p.bias is not None)
    sums, found = swept(p, weights, needs, backend)
    accumulation = accumulation_dtype(p.anchors.values.dtype, p.others.values.dtype)
    for k, name in enumerate(("values", "active", "counts")):
        if name == "values":
            check(name, sums[k], truth[k], [draw[k] for draw in draws], accumulation=accumulation)
        elif name == "counts" or not p.of_distance:
            assert sums[k].tolist() == truth[k].tolist(), name
    rows = p.anchors.values.dtype
    for name, got, right, *drawn in zip(
        TARGETS, found, truth.gradients, *(draw.gradients for draw in draws), strict=True
    ):
        if right is None or name not in names or (p.of_distance and name in ("logit_scale", "bias")):
            continue
        assert got is not None, name
        if name in ("anchors", "contrasts"):
            drawn = [drawn[0], *(draw[:, back] for draw, back in zip(drawn[1:], inverse, strict=True))]
        half = rows if name in ("anchors", "contrasts") and rows in (torch.bfloat16, torch.float16) else None
        check(f"gradient of {name}", got, right, drawn, accumulation=accumulation, half_rows=half)
