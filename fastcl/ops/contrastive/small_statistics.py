"""Log-sum-exps of small calls on a CPU, and gradients of rows from those of the fields: two calls of the engine.

For `at_once`, without operator, records and checks. The results are those of backend ``cpu``, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native
from ..small import described
from .fields import LOG_SUMS, SWEPT

_NAMES = SWEPT[: len(LOG_SUMS)]  # log-sums come first


class LogSums:
    """Log-sum-exps of the logits of rows. `fields` [F, S, N] has those of `want`, in the order of `fields.SWEPT`.

    anchors, contrasts: [N, D], and [M, D] or None for self-contrast. clusters, contrast_clusters: int64, contiguous and
    at least -1, which means none; or both None. scales: [S] in the dtype of sums. normalize: of both sets.
    """

    def __init__(
        self,
        anchors: Tensor,
        contrasts: Tensor | None,
        clusters: Tensor | None,
        contrast_clusters: Tensor | None,
        scales: Tensor,
        normalize: bool,
        want: Sequence[str],
    ) -> None:
        n, s, f = anchors.shape[0], len(scales), len(want)
        self.alive = anchors, contrasts, clusters, contrast_clusters, scales  # the problem has their addresses
        self.problem = described(anchors, contrasts, clusters, contrast_clusters, scales, normalize, False, False)
        # Fields, their shifts and their sums [3, F, S, N]; what the backward needs [3, S, N]; counts [2, N].
        self.memory = torch.empty((3 * f + 3) * s * n + 2 * n, dtype=scales.dtype, device="cpu")
        self.fields = self.memory[: f * s * n].view(f, s, n)
        start, number = self.memory.data_ptr(), self.memory.itemsize
        block = s * n * number
        self.places = [want.index(name) if name in want else None for name in _NAMES]
        rest, counts = start + 3 * f * block, start + (3 * f + 3) * block
        self.others = (
            *self._addresses(start + f * block, block), *self._addresses(start + 2 * f * block, block),
            counts, counts + n * number, rest, rest + block, rest + 2 * block, 0, 0,
        )  # fmt: skip
        statistics = *self._addresses(start, block), 0, *self.others
        call = native.native_module().forward(native.engine()[0], self.problem, statistics, None, (0, 0))
        native.run(call)

    def _addresses(self, start: int, block: int) -> list[int]:
        """Of each log-sum in a stack of the wanted ones; 0 for others."""
        return [0 if place is None else start + place * block for place in self.places]

    def gradients(self, of_fields: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Of anchors and contrasts where needed. of_fields: those of `fields`, of its shape, contiguous."""
        found = [
            torch.empty(rows.shape, dtype=of_fields.dtype, device="cpu") if need and rows is not None else None
            for rows, need in zip(self.alive[:2], needs, strict=True)
        ]
        statistics = *self._addresses(of_fields.data_ptr(), of_fields[0].nbytes), 0, *self.others
        outputs = 0, 0, True, *map(native.address, found), 0, 0
        call = native.native_module().backward(native.engine()[0], self.problem, statistics, None, outputs)
        native.run(call)
        return found
