"""The records that backends receive and return, and a problem as the arguments of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..backends.rows import accumulation_dtype
from .fields import ALL, NEGATIVES, POSITIVES, TABLE, log_sums


class Rows(NamedTuple):
    """One set of rows and the data of each row. Clusters and ids are int64; -1 equals nothing, not even itself."""

    values: Tensor  # [N, D]
    clusters: Tensor | None = None  # [N]; None in both sets: there are no positives
    ids: Tensor | None = None  # [N]; a pair of equal ids is inadmissible
    bias: Tensor | None = None  # [N], added to the logits where these rows are contrasts; -inf leaves a row out
    assignments: Tensor | None = None  # [N, C], >= 0, in place of clusters: the pair i, j has weight <r_i, r_j>
    tags: Tensor | None = None  # [N, W] int64, 64 W bits: rows that share a bit are positives, as rows of one cluster
    samples: Tensor | None = None  # [N]; a pair of equal samples stays admissible although its ids are equal
    groups: Tensor | None = None  # [N]; a pair of different groups is inadmissible; none is -1
    # [N, G]; a pair that is no positive is inadmissible if its guide rows' cosine exceeds the anchor's threshold
    guide: Tensor | None = None
    thresholds: Tensor | None = None  # [N], where the rows are anchors
    normalize: bool = False  # cosine similarity: rows enter the logits with norm 1


@dataclass(eq=False)
class Problem:
    """One sweep over the logits ``s_ij = logit_scale * a_i * c_j * <x_i, y_j> + bias_j``, S scales at once."""

    anchors: Rows  # N
    contrasts: Rows | None  # M; None: self-contrast, the anchors are the contrasts, without the diagonal
    positives: Tensor | None  # [N, D]: one more positive of each anchor; a contrast of that anchor only
    logit_scale: Tensor  # [S]; before it reaches an operator also []
    want: Sequence[str]  # of FIELDS, in that order; with assignments lse_all and sum_pos
    both: bool = False  # also compute the statistics of each contrast over the anchors
    # The backward needs only the anchors' gradient, so the forward may save it a second sweep.
    anchors_only: bool = False
    observe: bool = False  # also return `Side.observed`
    partial: bool = False  # the caller adds to the gradients of rows, so they stay in `dtype`
    hard_negatives: Tensor | None = None  # [N, H, D]: more negatives of each anchor; contrasts of that anchor only

    @property
    def others(self) -> Rows:
        """The rows that are contrasts; in self-contrast the anchors."""
        return self.anchors if self.contrasts is None else self.contrasts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, sums and statistics: float64 if a set of rows is float64, else float32."""
        contrasts = None if self.contrasts is None else self.contrasts.values
        return accumulation_dtype(self.anchors.values, contrasts, self.positives, self.hard_negatives)

    @property
    def unrounded(self) -> bool:
        """Whether gradients of rows stay in `dtype`, because more is added to them."""
        return self.partial or self.positives is not None or self.hard_negatives is not None

    @property
    def guided(self) -> bool:
        """Whether a guide decides about pairs: admissible pairs then differ between the two directions."""
        return self.anchors.guide is not None

    @property
    def ruled(self) -> bool:
        """Whether tags, samples, groups, a guide, or ids in self-contrast decide about pairs."""
        own, ids = self.anchors, self.contrasts is None and self.anchors.ids is not None
        return ids or not (own.tags is own.samples is own.groups is own.guide is None)

    @property
    def family(self) -> str:
        """The family of operators, for `ops.backends.choose`."""
        return "pair_rules" if self.ruled else "contrastive_stats"

    @property
    def device(self) -> torch.device:
        return self.anchors.values.device

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(S, N, M)"""
        n = self.anchors.values.shape[0]
        return self.logit_scale.shape[0], n, n if self.contrasts is None else self.contrasts.values.shape[0]

    @property
    def left_out(self) -> Tensor | None:
        """Bool [M]: the contrasts that a bias of -inf leaves out. None without a bias and, on the CPU, without any."""
        if (bias := self.others.bias) is None:
            return None
        left_out = bias == -torch.inf
        return left_out if self.device.type != "cpu" or bool(left_out.any()) else None  # must not wait for a GPU

    @property
    def log_sums(self) -> tuple[str, ...]:
        """The wanted fields that are log-sum-exps."""
        return log_sums(self.want)


class Travels(NamedTuple):
    """Data of `Rows` that a contrast takes along to other processes, besides its values."""

    field: str  # of `Rows`: [N] or [N, W], of any dtype
    argument: str  # its name in messages


TRAVELLING = (
    Travels("clusters", "clusters"),
    Travels("ids", "ids"),
    Travels("bias", "contrast_bias"),
    Travels("tags", "tags"),
    Travels("samples", "kept pairs"),
    Travels("groups", "groups"),
    Travels("guide", "guide"),
    Travels("thresholds", "thresholds of contrasts"),
)


def travelling(rows: Rows) -> dict[str, Tensor]:
    """By field the data that the rows take along, where they have it."""
    found = {field: getattr(rows, field) for field, _ in TRAVELLING}
    return {field: values for field, values in found.items() if values is not None}


# Problems as arguments of an operator.

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", Sequence[str]: "str[]"}
OF_ROWS = len(Rows._fields) - 1  # number of tensors of a set of rows; the last field of `Rows` is a flag


def _arguments() -> dict[str, str]:
    """The name and schema type of each value that `flatten` returns; tensors come first."""
    found = {}
    for side in ("anchor", "contrast"):
        for name, kind in get_type_hints(Rows).items():
            found[f"{side}_{name}"] = "Tensor?" if side == "contrast" and kind is Tensor else _SCHEMA[kind]
    others = ("anchors", "contrasts", "partial")
    found |= {name: _SCHEMA[kind] for name, kind in get_type_hints(Problem).items() if name not in others}
    return dict(sorted(found.items(), key=lambda item: "Tensor" not in item[1]))  # sorted is stable


ARGUMENTS = _arguments()
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in ARGUMENTS.items())
TENSORS = sum("Tensor" in kind for kind in ARGUMENTS.values())
PLACES = {name: k for k, name in enumerate(ARGUMENTS)}


def flatten_rows(rows: Rows | None) -> tuple[Any, ...]:
    """The tensors of a set of rows, or as many None."""
    if rows is None:
        return (None,) * OF_ROWS
    *tensors, _ = rows  # torch 2.6 cannot compile a slice here
    return tuple(tensors)


def unflatten_rows(tensors: Sequence[Any], normalize: bool) -> Rows | None:
    """The inverse of `flatten_rows`."""
    return None if tensors[0] is None else Rows(*tensors, normalize)  # type: ignore[call-arg]


def flatten(p: Problem) -> tuple[Any, ...]:
    """The problem as a tuple in the order of `ARGUMENTS`."""
    anchors, contrasts = p.anchors, p.contrasts
    return (
        *flatten_rows(anchors),
        *flatten_rows(contrasts),
        p.positives,
        p.logit_scale,
        p.hard_negatives,
        anchors.normalize,
        contrasts is not None and contrasts.normalize,
        p.want,
        p.both,
        p.anchors_only,
        p.observe,
    )


def unflatten(arguments: Sequence[Any]) -> Problem:
    """The inverse of `flatten`, which drops `partial`."""
    k = OF_ROWS
    positives, logit_scale, hard_negatives, normalize, normalize_contrasts, *rest = arguments[2 * k :]
    anchors = Rows(*arguments[:k], normalize)  # type: ignore[call-arg]
    contrasts = unflatten_rows(arguments[k : 2 * k], normalize_contrasts)
    want, both, anchors_only, observe = rest
    return Problem(
        anchors, contrasts, positives, logit_scale, want, both, anchors_only, observe, hard_negatives=hard_negatives
    )


class Side(NamedTuple):
    """Statistics of one side: each anchor over the contrasts, or each contrast over the anchors."""

    fields: Tensor  # [W, S, N]: the wanted fields
    # [2, N]: number of positives and of negatives; with assignments sum of weights and number of admissible contrasts
    counts: Tensor
    # [2, L, S, N]: for each wanted log-sum-exp a shift and the sum of exp(s_ij - shift). The backward needs both:
    # exp(s_ij - lse) would have a rounding error in proportion to the logits, exp(s_ij - shift) / sum does not.
    parts: Tensor
    observed: Tensor | None = None  # [10, S, N], see `observed`; None unless `Problem.observe`


def new_side(p: Problem, size: int) -> Side:
    """An uninitialised side of `size` rows."""
    s, new = p.sizes[0], p.logit_scale.new_empty
    return Side(new(len(p.want), s, size), new(2, size), new(2, len(p.log_sums), s, size))


def empty_side(p: Problem) -> Side:
    """A side of no rows: the contrasts' without `both`."""
    return new_side(p, 0)


class Statistics(NamedTuple):
    """What a backend's forward returns."""

    anchors: Side
    contrasts: Side  # of size 0 unless Problem.both
    anchor_inverse_norms: Tensor  # [N], or [0] if the rows are not normalised
    contrast_inverse_norms: Tensor  # [M], or [0]
    saved: Tensor  # [R]: anything else that the backend's backward needs; R is `Backend.saved_size`


class Gradients(NamedTuple):
    """What a backend's backward returns; unneeded gradients may be None.

    Gradients of rows are in `Problem.dtype` and include the derivative of the normalisation.
    """

    anchors: Tensor | None  # [N, D]
    contrasts: Tensor | None  # [M, D]
    logit_scale: Tensor | None  # [S], in `Problem.dtype` or float64
    bias: Tensor | None  # [M]
    positives: Tensor | None = None  # [N, D]
    anchor_assignments: Tensor | None = None  # [N, C]
    contrast_assignments: Tensor | None = None  # [M, C]
    hard_negatives: Tensor | None = None  # [N, H, D]


class Needs(NamedTuple):
    """Which of `Gradients` are needed."""

    anchors: bool = False
    contrasts: bool = False
    logit_scale: bool = False
    bias: bool = False
    positives: bool = False
    anchor_assignments: bool = False
    contrast_assignments: bool = False
    hard_negatives: bool = False


def _gradient_places(contrasts: bool) -> tuple[int, ...]:
    names = {name: name for name in Gradients._fields}
    names |= {"anchors": "anchor_values", "contrasts": "contrast_values"}
    names["bias"] = "contrast_bias" if contrasts else "anchor_bias"
    return tuple(PLACES[names[name]] for name in Gradients._fields)


_GRADIENT_PLACES = _gradient_places(False), _gradient_places(True)


def gradient_places(arguments: Sequence[Any]) -> tuple[int, ...]:
    """For each of `Gradients` the index in `ARGUMENTS` of the tensor that it belongs to."""
    return _GRADIENT_PLACES[arguments[OF_ROWS] is not None]


def pair_weights(left: Tensor, right: Tensor) -> Tensor:
    """The weights <r_i, r_j> [N, M] of assignments. Overflow gives the largest finite number: 0 times it is 0."""
    weights = left @ right.T
    return weights.clamp_(max=torch.finfo(weights.dtype).max)


def largest_bias(bias: Tensor) -> Tensor:
    """The largest |bias| over the contrasts that are not left out, [1]."""
    return bias.masked_fill(bias == -torch.inf, 0).abs().amax().reshape(1)


def largest_base(bases: Tensor, there: Tensor) -> Tensor:
    """The base [S, N] of the sum of B blocks: the largest of the blocks' bases [B, S, N], or 0 if all are empty.

    there: bool [B, N], False where a block is empty.
    """
    largest = bases.masked_fill(~there[:, None], -torch.inf).amax(0)
    return largest.masked_fill(largest == -torch.inf, 0)


def merge_bases(found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
    """Merges the bases [B, 3, S, N] of B blocks into [3, S, N]; the three sums are over all, negatives and positives.

    counts: [B, 2, N], of the blocks. sums: ignored.
    """
    positives, negatives = (counts > 0).unbind(1)
    there = (positives | negatives, negatives, positives)
    return torch.stack([largest_base(found[:, k], those) for k, those in enumerate(there)])


def over_sets(p: Problem, grad: Tensor, counts: Tensor) -> Tensor:
    """The gradients [W, S, N] of fields, 0 where the field's set is empty: the field is a constant there.

    A user's formula may divide by a count of 0 in a row that it masks out, so that the gradient there is NaN.
    """
    if grad.numel() == 0:
        return grad
    positives, negatives = counts
    admissible = positives + negatives if p.anchors.assignments is None else negatives
    sizes = {ALL: admissible, POSITIVES: positives, NEGATIVES: negatives}
    present = torch.stack([sizes[TABLE[name].over] > 0 for name in p.want])
    return torch.where(present[:, None], grad, 0)
