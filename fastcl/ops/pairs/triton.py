"""Backend ``triton`` of the pair sums: prepares and launches the kernel of `triton_kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.triton_launch import INTERPRETED, architecture, on_device
from ..backends.triton_tiles import Tile, tile
from ..contrastive.records import Rows
from ..contrastive.triton.gradient import finish
from ..contrastive.triton.rows import KEPT, Arranged, Launch, SortedRows, arrange
from ..pair_maps import KINDS
from .records import Gradients, Needs, Pairs, Sums
from .sorted_rows import as_problem, in_order, is_symmetric, marked


def sweep(p: Pairs, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
    """The sums and, with weights [2, N], the needed gradients of ``sum(weights * values)``."""
    with on_device(p.device):
        return _Sweep(p).run(weights, needs)


class _Sweep:
    def __init__(self, p: Pairs) -> None:
        self.p = p
        self.problem = as_problem(p)
        self.arranged: Arranged
        parts = KEPT.parts(self.problem, p.logit_scale.new_zeros(KEPT.size(self.problem)))
        self.arranged, self.anchor_norms, self.contrast_norms = arrange(self.problem, parts)
        anchors, contrasts = self.arranged.anchors, self.arranged.contrasts
        self.anchor_shift = None if p.offset is None else in_order(p.offset.expand(p.sizes[0]), anchors.order)
        self.contrast_shift = None if p.bias is None else in_order(marked(p.bias), contrasts.order)
        self.symmetric = is_symmetric(p)
        squares = [_squares(rows) if p.of_distance else None for rows in (anchors, contrasts)]
        self.squares = dict(zip((id(anchors), id(contrasts)), squares, strict=True))

    def run(self, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
        p, (n, m), new = self.p, self.p.sizes, self.p.logit_scale.new_empty
        anchors, contrasts = self.arranged.anchors, self.arranged.contrasts
        sums = new(3, 2, n)
        if weights is None:
            self._launch(False, {"SUMS": sums})
            return Sums(*sums), Gradients()
        own = in_order(weights, anchors.order)
        dx = new(anchors.rows.shape) if needs.anchors else None
        of_logits = not p.of_distance
        similarity_sums = new(n) if needs.logit_scale and of_logits else None
        slope_sums = new(n) if needs.offset and p.offset is not None and of_logits else None
        outputs = {"SUMS": sums, "GRADIENT": dx, "SIMILARITY_SUMS": similarity_sums, "SLOPE_SUMS": slope_sums}
        both = own if self.symmetric else None
        self._launch(False, outputs | {"OWN_WEIGHTS": own, "OTHER_WEIGHTS": both})

        folded = p.contrasts is None and not self.symmetric and needs.anchors
        of_contrasts = needs.contrasts and p.contrasts is not None
        bias = new(m) if needs.bias and p.bias is not None and of_logits else None
        dy = new(contrasts.rows.shape) if of_contrasts or folded else None
        if dy is not None or bias is not None:
            self._launch(True, {"GRADIENT": dy, "SLOPE_SUMS": bias, "OTHER_WEIGHTS": own})
        if folded and dx is not None and dy is not None:
            dx, dy = dx + dy, None
        if p.of_distance and needs.bias and p.bias is not None:
            bias = torch.zeros_like(p.bias)  # of distances it only leaves contrasts out
        twice = 2 if self.symmetric else 1
        scale = None
        if needs.logit_scale:
            scale = new((), dtype=torch.float64).zero_()
            if similarity_sums is not None:
                scale = similarity_sums.sum(dtype=torch.float64) / twice
        offset = None
        if slope_sums is not None and p.offset is not None:
            offset = slope_sums.double() if p.offset.dim() else slope_sums.sum(dtype=torch.float64) / twice
        return Sums(*sums), Gradients(
            None if dx is None else self._finish(p.anchors, anchors, dx, self.anchor_norms),
            None if dy is None else self._finish(p.others, contrasts, dy, self.contrast_norms),
            scale, offset, bias,
        )  # fmt: skip

    def _launch(self, exchanged: bool, given: dict[str, Any]) -> None:
        """given: the outputs and the weights; the others are None. exchanged: the contrasts are the rows."""
        p, at = self.p, self.arranged
        sides = [(at.anchors, self.anchor_shift), (at.contrasts, self.contrast_shift)]
        (rows, row_shift), (columns, column_shift) = sides[::-1] if exchanged else sides
        launch = Launch.of(at, rows, columns)
        weighted = given.get("GRADIENT") is not None
        (_, width), tf32 = rows.rows.shape, launch.flags["PRECISION"] == "tf32"
        shape = tile_for(p.of_distance, weighted, architecture(p.device), rows.rows.dtype, width, tf32, INTERPRETED)
        arguments = dict.fromkeys(("OWN_WEIGHTS", "OTHER_WEIGHTS", "SUMS", "GRADIENT", "SIMILARITY_SUMS", "SLOPE_SUMS"))
        arguments |= given | {
            "SCALE": p.logit_scale,
            "ROW_SHIFT": row_shift,
            "COLUMN_SHIFT": column_shift,
            "ROW_SQUARES": self.squares[id(rows)],
            "COLUMN_SQUARES": self.squares[id(columns)],
            "POS_MARGIN": p.pos_margin,
            "NEG_MARGIN": p.neg_margin,
            "WIDTH": p.anchors.values.shape[1],
            "KIND": KINDS[p.kind].number,
            "ONLY_POSITIVES": p.only_positives,
        }
        launch.run("pair_kernel", shape, launch.grid(shape) if weighted else launch.row_blocks(shape), arguments)

    def _finish(self, source: Rows, rows: SortedRows, gradient: Tensor, norms: Tensor) -> Tensor:
        """The gradient in the caller's order and through the normalisation, in float32."""
        factor = torch.ones_like(self.p.logit_scale) if self.p.of_distance else self.p.logit_scale
        return finish(self.problem, source.values, rows, gradient, factor, norms if source.normalize else None)


def tile_for(
    distances: bool,
    weighted: bool,
    architecture: int,
    dtype: torch.dtype,
    d: int,
    tf32: bool,
    interpreted: bool = False,
) -> Tile:
    """The shape for maps of distances or of logits. weighted: the gradient of the rows is wanted."""
    shape = tile("backward" if weighted else "running", architecture, dtype, d, True, tf32, interpreted)
    if interpreted or not distances:
        return shape
    # Else the search for near pairs would spill.
    if dtype.itemsize > 2 and not weighted:
        return shape._replace(block_m=32)
    if dtype.itemsize > 2:
        return shape._replace(block_n=16) if architecture >= 90 and d > 32 else shape
    return shape._replace(block_d=64 if weighted and d > 128 else shape.block_d, warps=8)


def _squares(rows: SortedRows) -> Tensor:
    """The squared norms as the rows enter the product."""
    norms: Tensor = torch.linalg.vector_norm(rows.rows, dim=1, dtype=torch.float32)
    return (norms if rows.inverse_norms is None else norms * rows.inverse_norms).square_()
