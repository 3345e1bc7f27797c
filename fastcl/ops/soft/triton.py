"""Backend ``triton`` of the statistics over soft assignments: prepares and launches the kernels of `triton_kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.triton_launch import INTERPRETED, architecture, on_device, precision_of
from ..backends.triton_tiles import Tile, padded, tile
from ..contrastive import chunked
from ..contrastive.records import Gradients, Needs, Problem, Side, Statistics, empty_side
from ..contrastive.triton.gradient import finish
from ..contrastive.triton.rows import KEPT, Arranged, Launch, arrange

# Gradients of logits are scaled to stay below this. Times norms below 2 they stay in float16's range, up to 2^16.
LARGEST = 2.0**13
FINITE = torch.finfo(torch.float32).max


def forward(p: Problem) -> Statistics:
    _, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.forward(p)
    with on_device(p.device):
        call = _Call(p)
        anchors = call.statistics(False)
        contrasts = call.statistics(True) if p.both else empty_side(p)
    return Statistics(anchors, contrasts, call.a, call.c, p.logit_scale.new_empty(0))


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """The gradients, from those of the anchors' fields [2, 1, N] and, with `both`, of the contrasts' [2, 1, M]."""
    _, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    with on_device(p.device):
        call = _Call(p)
        folded = p.contrasts is None and call.arranged.biased  # self-contrast with a bias runs as two sets
        sides: list[Tensor | None] = [_side(saved.anchors, grad), None]
        bound = _bound(saved.anchors, grad)
        if p.both:
            sides[1] = _side(saved.contrasts, grad_contrasts)
            bound = bound + _bound(saved.contrasts, grad_contrasts)
        if call.arranged.self_contrast:
            sides[1], bound = sides[0], 2 * bound
        lift = torch.exp2((LARGEST / bound.clamp(1e-30, 1e30)).log2().floor()).reshape(1)
        for side in {id(side): side for side in sides if side is not None}.values():
            side[1:] = (side[1:] * lift).clamp_(-FINITE, FINITE)  # finite, so that 0 times it is 0
        factor = p.logit_scale / lift
        rows = columns = scale = bias = None
        if needs.anchors or needs.logit_scale:
            gradient, products, _ = call.gradient(False, sides[0], sides[1], needs.logit_scale, False)
            if products is not None:
                scale = products.double().sum().reshape(1) / lift / (2 if call.arranged.self_contrast else 1)
            rows = gradient
        of_contrasts = needs.contrasts and p.contrasts is not None
        if of_contrasts or (folded and needs.anchors) or (needs.bias and call.arranged.biased):
            columns, _, sums = call.gradient(True, sides[1], sides[0], False, needs.bias)
            bias = None if sums is None else sums / lift
        if rows is not None and needs.anchors:
            if folded and columns is not None:
                rows = rows + columns
            norms = saved.anchor_inverse_norms if p.anchors.normalize else None
            rows = finish(p, p.anchors.values, call.arranged.anchors, rows, factor, norms)
        if columns is not None and p.contrasts is not None and needs.contrasts:
            norms = saved.contrast_inverse_norms if p.contrasts.normalize else None
            columns = finish(p, p.contrasts.values, call.arranged.contrasts, columns, factor, norms)
    return Gradients(rows, None if p.contrasts is None else columns, scale, bias)


def _side(side: Side, grad: Tensor) -> Tensor:
    """The argument SIDE of `soft_gradient_kernel`, [3, n]."""
    base, total = side.parts[:, 0, 0]
    lse, sum_pos = grad[:, 0]
    return torch.stack((base, torch.where(total == 0, 0, lse / total), sum_pos))


def _bound(side: Side, grad: Tensor) -> Tensor:
    """A bound of the side's part of the logits' gradient: a softmax is at most 1, a weight at most the row's sum."""
    lse, sum_pos = grad[:, 0].abs()
    bound: Tensor = (lse + torch.where(sum_pos == 0, 0, sum_pos * side.counts[0])).amax()
    return bound


class _Call:
    def __init__(self, p: Problem) -> None:
        self.p = p
        parts = KEPT.parts(p, p.logit_scale.new_zeros(KEPT.size(p)))
        self.arranged: Arranged
        self.arranged, self.a, self.c = arrange(p, parts)
        own, other = p.anchors.assignments, None if p.contrasts is None else p.contrasts.assignments
        assert own is not None
        dtype = own.dtype if other is None else torch.promote_types(own.dtype, other.dtype)
        dtype = torch.float32 if dtype == torch.float64 else dtype
        self.own = _widened(own, dtype)
        self.other = self.own if other is None else _widened(other, dtype)

    def _launch(self, exchanged: bool) -> tuple[Launch, dict[str, Any]]:
        at = self.arranged
        rows, columns = (at.contrasts, at.anchors) if exchanged else (at.anchors, at.contrasts)
        r, q = (self.other, self.own) if exchanged else (self.own, self.other)
        classes = r.shape[1]
        return Launch.of(at, rows, columns), {
            "R": r,
            "Q": q,
            "SCALE": self.p.logit_scale,
            "CLASSES": classes,
            "BLOCK_C": min(classes & -classes, assignment_width(r.dtype)),
            "ASSIGNMENT_PRECISION": precision_of(r.dtype),
        }

    def statistics(self, exchanged: bool) -> Side:
        launch, arguments = self._launch(exchanged)
        new = self.p.logit_scale.new_empty
        found = new(5, launch.size)
        shape = _tile("soft_forward", launch)
        launch.run("soft_statistics_kernel", shape, launch.row_blocks(shape), arguments | {"STATISTICS": found})
        base, total, sum_pos, num_pos, size = found
        lse = (base.double() * torch.tensor(2.0, dtype=torch.float64).log().item() + total.double().log()).to(
            base.dtype
        )
        return Side(
            torch.stack((lse, sum_pos))[:, None],
            torch.stack((num_pos, size)),
            torch.stack((base, total))[:, None, None],
        )

    def gradient(
        self, exchanged: bool, own: Tensor | None, other: Tensor | None, scaled: bool, summed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of the rows [n, padded D], before the factor scale / lift, and two sums over each row, [n].

        With `scaled` the sum of G times similarity, with `summed` the sum of G; G is the gradient of the logits.
        """
        launch, arguments = self._launch(exchanged)
        new = self.p.logit_scale.new_empty
        gradient = new(launch.rows.rows.shape)
        products = new(launch.size) if scaled else None
        sums = new(launch.size) if summed else None
        outputs = {"GRADIENT": gradient, "SIMILARITY_SUMS": products, "SUMS": sums, "SIDE": own, "OTHER": other}
        shape = _tile("soft_backward", launch)
        launch.run("soft_gradient_kernel", shape, launch.grid(shape), arguments | outputs)
        return gradient, products, sums


def assignment_width(dtype: torch.dtype) -> int:
    """The numbers of C in one step of the product that computes weights."""
    return 64 if dtype.itemsize == 2 else 32


def tile_for(kind: str, architecture: int, dtype: torch.dtype, d: int, tf32: bool, interpreted: bool = False) -> Tile:
    """`tile` with careful=True, as every tile is masked. The second product needs the registers of more warps."""
    shape = tile("running" if kind == "soft_forward" else "backward", architecture, dtype, d, True, tf32, interpreted)
    eight = dtype.itemsize == 2 or (d == 32 and not tf32)
    return shape._replace(warps=8) if eight and not interpreted else shape


def _tile(kind: str, launch: Launch) -> Tile:
    rows, tf32 = launch.rows.rows, launch.flags["PRECISION"] == "tf32"
    return tile_for(kind, architecture(rows.device), rows.dtype, rows.shape[1], tf32, INTERPRETED)


def _widened(assignments: Tensor, dtype: torch.dtype) -> Tensor:
    """The assignments, contiguous [n, padded C], with zeros after C."""
    n, c = assignments.shape
    width = padded(c, INTERPRETED)
    assignments = assignments.detach().resolve_neg().to(dtype)
    if width == c:
        return assignments.contiguous()
    result = assignments.new_zeros(n, width)
    result[:, :c] = assignments
    return result
