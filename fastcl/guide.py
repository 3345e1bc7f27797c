"""Filters contrasts by the embeddings of another model, the guide: what it finds too similar is no negative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_option, check_rows, check_vector, finite_number, shown, values_visible
from .ops.backends.choose import choose_backend
from .ops.backends.rows import inverse_norms
from .ops.contrastive.observed import part
from .ops.contrastive.op import forward_op
from .ops.contrastive.records import Problem, Rows, flatten

RULES = ("absolute", "relative")

# Cosines this close to the threshold are not above it. A contrast whose guide row equals the positive's then stays,
# although another order of additions may round its cosine up.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}


class Guide:
    """Embeddings of a guide model, which decide whether a pair that is no positive is admissible (GISTEmbed).

    Contrast j is inadmissible for anchor i if their guide cosine is greater than the threshold of i, unless j is a
    positive of i. The threshold is the smallest guide cosine g of i with a positive, less the margin: ``g - margin``,
    or with ``rule="relative"`` ``g - margin * |g|``. Each row has its own threshold: in the reverse direction of a loss
    the contrast's counts. Cosines within 1e-6 of the threshold (1e-14 for float64 rows) are not above it.

    The guide's products are computed in tiles, beside those of the rows. There is no gradient.

    Args:
        embeddings: ``[N, G]``; for views also ``[N, V, G]``. Floating, finite; of any norm.
        contrast_embeddings: ``[M, G]``, one row for each contrast. None for self-contrast.
        margin: a number >= 0.
        rule: ``"absolute"`` or ``"relative"``.
        threshold: floating ``[N]`` (``[N * V]`` for views), in place of the positives' cosines; the margin is
            subtracted. In the reverse direction contrast i takes that of anchor row i.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for shapes when it is used.

    Source: Solatorio 2024, "GISTEmbed: Guided In-sample Selection of Training Negatives".
    """

    def __init__(
        self,
        embeddings: Tensor,
        contrast_embeddings: Tensor | None = None,
        *,
        margin: float = 0.0,
        rule: str = "absolute",
        threshold: Tensor | None = None,
    ) -> None:
        check_rows("guide.embeddings", embeddings, dims=(2, 3))
        if contrast_embeddings is not None:
            check_rows("guide.contrast_embeddings", contrast_embeddings, like=embeddings)
        margin = finite_number("margin", margin)
        if margin < 0:
            raise ValueError(f"margin: expected a number of at least 0, got {margin}")
        check_option("rule", rule, RULES)
        self.embeddings = embeddings
        self.contrast_embeddings = contrast_embeddings
        self.margin = margin
        self.rule = rule
        self.threshold = threshold

    def __repr__(self) -> str:
        others = "" if self.contrast_embeddings is None else f", {shown(self.contrast_embeddings)}"
        given = "" if self.threshold is None else f", threshold={shown(self.threshold)}"
        return f"Guide({shown(self.embeddings)}{others}, margin={self.margin}, rule={self.rule!r}{given})"

    def of_anchors(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The anchors' rows [R, G], views flattened. shape: [N] or [N, V]."""
        rows = self.embeddings
        expected = [list(shape)] if len(shape) == 1 else [list(shape), [shape[0]]]
        if list(rows.shape[:-1]) not in expected:
            known = " or ".join(str([*rest, "G"]).replace("'", "") for rest in expected)
            raise ValueError(f"guide.embeddings: expected shape {known}, got {list(rows.shape)}")
        self._check_values("guide.embeddings", rows, device)
        if len(shape) == 2 and rows.dim() == 2:
            rows = rows[:, None].expand(-1, shape[1], -1)
        return rows.flatten(0, -2).detach()

    def of_contrasts(self, count: int, device: torch.device) -> Tensor:
        """The contrasts' rows [M, G]."""
        rows = self.contrast_embeddings
        if rows is None:
            raise ValueError("guide.contrast_embeddings: expected a tensor, one row for each contrast, got None")
        if len(rows) != count:
            expected = f"[{count}, {self.embeddings.shape[-1]}]"
            raise ValueError(f"guide.contrast_embeddings: expected shape {expected}, got {list(rows.shape)}")
        self._check_values("guide.contrast_embeddings", rows, device)
        return rows.detach()

    def less_margin(self, cosines: Tensor) -> Tensor:
        """Thresholds from the positives' cosines [N]. A row without a positive, with cosine inf, keeps inf."""
        if self.rule == "absolute":
            return cosines - self.margin
        return torch.where(cosines.isinf(), cosines, cosines - self.margin * cosines.abs())

    def given(self, count: int, device: torch.device) -> Tensor | None:
        """The threshold that the user gave, [count]."""
        if self.threshold is None:
            return None
        check_vector("guide.threshold", self.threshold, count, device)
        return self.threshold.detach()

    def _check_values(self, name: str, rows: Tensor, device: torch.device) -> None:
        if rows.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {rows.device}")
        if values_visible(rows) and not bool(rows.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def check_guide(guide: Any) -> None:
    if not isinstance(guide, Guide):
        raise TypeError(f"guide: expected a Guide, got {shown(guide)}")


def paired_cosines(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The cosine [N] of row i of `left` and row i of `right`."""
    left, right = left.to(dtype), right.to(dtype)
    return (left * right).sum(1) * (inverse_norms(left) * inverse_norms(right))


def guide_problem(p: Problem) -> Problem:
    """The sweep over the guide's cosines, negated, whose largest logits of positives `smallest` reads.

    p: a problem whose rows have guides.
    """
    dtype = p.dtype

    def guided(rows: Rows) -> Rows:
        _, clusters, ids, bias, _, tags, samples, groups, guide, *_ = rows
        assert guide is not None
        out = None if bias is None else torch.zeros_like(bias, dtype=dtype).masked_fill(bias == -torch.inf, -torch.inf)
        return Rows(guide.to(dtype), clusters, ids, out, None, tags, samples, groups, normalize=True)

    others = None if p.contrasts is None else guided(p.contrasts)
    negated = torch.full((1,), -1, dtype=dtype, device=p.device)
    return Problem(guided(p.anchors), others, None, negated, [], p.both, observe=True)


def smallest(observed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """From what a sweep of `guide_problem` observes, the smallest cosine with a positive of each of n anchors, and of
    each contrast if the sweep has both directions; inf for rows without."""
    cosines = -part(observed, "max_pos")[0]
    return cosines[:n], cosines[n:]


@torch.no_grad()
def _positives_cosines(p: Problem) -> tuple[Tensor, Tensor]:
    problem = guide_problem(p)
    *_, observed = forward_op(*flatten(problem), choose_backend(p.device, p.dtype, problem.family))
    return smallest(observed, len(p.anchors.values))


def with_guide(
    guide: Guide,
    anchors: Rows,
    contrasts: Rows | None,
    shape: tuple[int, ...],
    both: bool,
    paired: bool,
    elsewhere: bool = False,
) -> tuple[Rows, Rows | None]:
    """The rows with the guide's rows and thresholds.

    shape: [N] or [N, V]. both: also thresholds of the contrasts, for the reverse direction. paired: contrast i is the
    one positive of anchor i; further contrasts are none. elsewhere: other processes have positives too, so thresholds
    that depend on more than pairs are left out.
    """
    device, n = anchors.values.device, len(anchors.values)
    own = guide.of_anchors(shape, device)
    m, other = n, own
    if contrasts is not None:
        m = len(contrasts.values)
        other = guide.of_contrasts(m, device)
    elif guide.contrast_embeddings is not None:
        raise ValueError("guide.contrast_embeddings: expected None for self-contrast (contrasts=None), got a value")
    others = None if contrasts is None else _guided(contrasts, other, None)
    problem = Problem(_guided(anchors, own, None), others, None, anchors.values.new_ones(1), (), both)
    dtype = problem.dtype
    cosines = guide.given(n, device)
    if cosines is not None:
        back = cosines
        if both and m != n:
            sizes = f"{n} anchor rows and {m} contrasts"
            raise ValueError(f"guide.threshold: expected None for both directions of {sizes}, got a value")
    elif paired:
        cosines = paired_cosines(own, other[:n], dtype)
        back = torch.cat((cosines, cosines.new_full((m - n,), torch.inf)))
    elif anchors.clusters is None and anchors.tags is None:
        raise ValueError("guide.threshold: expected a tensor, as there are no clusters and no tags, got None")
    elif elsewhere:
        return problem.anchors, problem.contrasts
    else:
        cosines, back = _positives_cosines(problem)
    anchors = _guided(anchors, own, thresholds(guide, cosines, dtype))
    if contrasts is None:
        return anchors, None
    return anchors, _guided(contrasts, other, thresholds(guide, back, dtype) if both else None)


def thresholds(guide: Guide, cosines: Tensor, dtype: torch.dtype) -> Tensor:
    """The thresholds of rows with these cosines with their positives."""
    return guide.less_margin(cosines.to(dtype)) + ROUNDING[dtype]


def _guided(rows: Rows, guide: Tensor, thresholds: Tensor | None) -> Rows:
    values, clusters, ids, bias, _, tags, samples, groups, *_, normalize = rows
    return Rows(values, clusters, ids, bias, None, tags, samples, groups, guide, thresholds, normalize)
