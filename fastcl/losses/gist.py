"""GISTEmbed's loss: in-batch negatives from both sides, without those that a guide model finds too similar."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_flag, check_option, check_rows, finite_number, positive_number
from ..distributed import Property, World, tell_others
from ..guide import RULES, Guide, paired_cosines, with_guide
from ..ops.backends.rows import accumulation_dtype
from ..ops.contrastive.records import Problem, Rows
from ..ops.library import uncompiled
from ..swept import ContrastiveStats, statistics
from .batch import Batch
from .formulas import log1p_exp
from .gathered import gathered_statistics
from .modules import GroupModule, shown_temperature
from .options import LossOptions
from .reduce import inverse_temperature


class GISTEmbedLoss(GroupModule):
    r"""Guided in-sample selection of training negatives (Solatorio 2024), as in sentence-transformers.

    For pairs (a_i, p_i), mined negatives n_k and temperature T the loss is the mean of

    .. math:: \log \Big( \sum_{x \in A_i} e^{s(x) / T} \Big) - s(a_i, p_i) / T

    s is the cosine. A_i holds the pairs of a_i with every p_j, of a_i with every other a_j, of p_i with every other
    p_j, and of a_i with every n_k, without those whose guide cosine exceeds the threshold of row i: the guide cosine g
    of (a_i, p_i) less the margin. The pair (a_i, p_i) itself always stays. No matrix of cosines is stored.

    Args:
        temperature: number, tensor or ``nn.Parameter``, which is learned.
        margin, rule: of the threshold, as in :class:`Guide`: ``g - margin`` or, ``"relative"``, ``g - margin * |g|``.
            sentence-transformers calls the rule ``margin_strategy``.
        contrast_anchors, contrast_positives: whether A_i has the pairs of two anchors, and of two positives.
        gather: True or ``"ring"``: A_i has the rows of all processes of ``group`` (None: the default group of
            `torch.distributed`), with their guide rows; without processes it has no effect. Each process returns its
            share of the loss of the whole batch, times the number of processes: the mean over processes is that loss
            (docs/distributed.md).
        group: the process group of ``gather``. Copies and pickles leave it behind.

    Shapes of ``forward(anchors, positives, guide_anchors, guide_positives, negatives=None, guide_negatives=None)``:
    ``[N, D]``, ``[N, D]``, ``[N, G]``, ``[N, G]``, ``[K, D]``, ``[K, G]``. Rows of the guide have no gradient.
    Several columns of negatives, one tensor each, are concatenated: ``torch.cat(columns)``.

    Returns:
        A scalar, float32 or float64. 0 for no pairs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    gather: bool | str = False  # also of modules that were saved before they had it

    def __init__(
        self,
        temperature: float | Tensor = 0.01,
        *,
        margin: float = 0.0,
        rule: str = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather: bool | str = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = positive_number("temperature", temperature)
        margin = finite_number("margin", margin)
        if margin < 0:
            raise ValueError(f"margin: expected a number of at least 0, got {margin}")
        check_option("rule", rule, RULES)
        check_flag("contrast_anchors", contrast_anchors)
        check_flag("contrast_positives", contrast_positives)
        self.margin, self.rule = margin, rule
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives
        options = LossOptions(gather=gather, group=group).checked()
        self.gather, self.group = options.gather, options.group

    def forward(
        self,
        anchors: Tensor,
        positives: Tensor,
        guide_anchors: Tensor,
        guide_positives: Tensor,
        negatives: Tensor | None = None,
        guide_negatives: Tensor | None = None,
    ) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return gist_embed_loss(
            anchors, positives, guide_anchors, guide_positives, negatives, guide_negatives,
            temperature=self.temperature, margin=self.margin, rule=self.rule, contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives, gather=self.gather, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        sides = f"contrast_anchors={self.contrast_anchors}, contrast_positives={self.contrast_positives}"
        shown = f"{shown_temperature(self.temperature)}, margin={self.margin}, rule={self.rule!r}, {sides}"
        over = {"gather": self.gather, "group": self.group}
        return shown + "".join(f", {name}={value!r}" for name, value in over.items() if value)


def gist_embed_loss(
    anchors: Tensor,
    positives: Tensor,
    guide_anchors: Tensor,
    guide_positives: Tensor,
    negatives: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.01,
    margin: float = 0.0,
    rule: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    gather: bool | str = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`GISTEmbedLoss`, which describes formula, shapes and errors."""
    try:
        temperature = positive_number("temperature", temperature)
        options = LossOptions(gather=gather, group=group).checked()
        _check_rows(anchors, positives, guide_anchors, guide_positives, negatives, guide_negatives)
        dtype = accumulation_dtype(anchors, positives, negatives)
        threshold = paired_cosines(guide_anchors.detach(), guide_positives.detach(), dtype)
        places = torch.arange(len(anchors), device=anchors.device)

        def posed(
            rows: Tensor, guide_rows: Tensor, others: Tensor | None, guide_others: Tensor | None, paired: bool = False
        ) -> _Sweep:
            clusters = places if paired else None
            own, other = Rows(rows, clusters, normalize=True), None
            if others is not None:
                other = Rows(others, clusters, normalize=True)
            guide = Guide(guide_rows, guide_others, margin=margin, rule=rule, threshold=threshold)
            own, other = with_guide(guide, own, other, (len(rows),), False, False)
            parts = () if others is None else ((len(others), False),)
            batch = Batch(own, other, None, (len(rows),), 1, by_sample=paired, aligned=paired, parts=parts)
            want = ("lse_neg", "sum_pos") if paired else ("lse_all",)
            return _Sweep(Problem(own, other, None, inverse_temperature(temperature, batch), want), batch)

        sweeps = [posed(anchors, guide_anchors, positives, guide_positives, paired=True)]
        if contrast_anchors:
            sweeps.append(posed(anchors, guide_anchors, None, None))
        if contrast_positives:
            sweeps.append(posed(positives, guide_positives, None, None))
        if negatives is not None:
            sweeps.append(posed(anchors, guide_anchors, negatives, guide_negatives))
    except Exception as error:
        tell_others(gather, error, anchors, group=group)
        raise
    world = World.of(options.gather, options.group)
    if world is None:
        terms = _terms([statistics(sweep.problem)[0] for sweep in sweeps])
        return terms.mean() if len(terms) else terms.sum()
    alike: dict[str, Property] = {
        "margin": float(margin), "rule": rule, "contrast_anchors": contrast_anchors,
        "contrast_positives": contrast_positives, "negatives given": negatives is not None,
    }  # fmt: skip
    share: Tensor = _of_all(world, options.gather, sweeps, alike)
    return share


class _Sweep(NamedTuple):
    problem: Problem
    rows: Batch


@uncompiled  # processes could compile different graphs, with collectives that do not match
def _of_all(world: World, gather: bool | str, sweeps: list[_Sweep], alike: dict[str, Property]) -> Tensor:
    """This process's share of the mean over all processes' pairs, times the number of processes."""
    found = []
    for k, (problem, rows) in enumerate(sweeps):
        same = {**alike, "sweep": k}
        found.append(gathered_statistics(world, gather, problem, rows, False, "GISTEmbedLoss", same)[0])
    terms = _terms(found)
    # A term that is NaN or infinite makes the mean NaN in all processes.
    count = world.total(len(terms) + (terms.detach().double() * 0).sum())
    return terms.sum() / count.clamp(min=1).to(terms.dtype) * world.size


def _terms(sweeps: list[ContrastiveStats]) -> Tensor:
    """The loss of each pair [N], from the statistics of its sweeps, of which the first has its positive."""
    pairs, *others = sweeps
    assert pairs.lse_neg is not None
    assert pairs.sum_pos is not None
    log_sum = pairs.lse_neg
    for found in others:
        assert found.lse_all is not None
        log_sum = _logaddexp(log_sum, found.lse_all)
    # One positive: log(1 + neg / pos), which does not cancel. 0 * sum_pos shows a positive that is not finite.
    return log1p_exp(log_sum - pairs.sum_pos) + pairs.sum_pos.detach() * 0


def _check_rows(
    anchors: Tensor,
    positives: Tensor,
    guide_anchors: Tensor,
    guide_positives: Tensor,
    negatives: Tensor | None,
    guide_negatives: Tensor | None,
) -> None:
    check_rows("anchors", anchors)
    check_rows("positives", positives, like=anchors)
    if len(positives) != len(anchors):
        raise ValueError(f"positives: expected {len(anchors)} rows, one for each anchor, got {len(positives)}")
    check_rows("guide_anchors", guide_anchors)
    for name, rows, guide, like in (
        ("guide_anchors", anchors, guide_anchors, None),
        ("guide_positives", positives, guide_positives, guide_anchors),
    ):
        check_rows(name, guide, like=like)
        if len(guide) != len(rows):
            raise ValueError(f"{name}: expected {len(rows)} rows, got {len(guide)}")
    if (negatives is None) != (guide_negatives is None):
        given, absent = (
            ("negatives", "guide_negatives") if guide_negatives is None else ("guide_negatives", "negatives")
        )
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    if negatives is not None and guide_negatives is not None:
        check_rows("negatives", negatives, like=anchors)
        check_rows("guide_negatives", guide_negatives, like=guide_anchors)
        if len(guide_negatives) != len(negatives):
            raise ValueError(f"guide_negatives: expected {len(negatives)} rows, got {len(guide_negatives)}")


def _logaddexp(left: Tensor, right: Tensor) -> Tensor:
    """log(exp(left) + exp(right)), whose gradients at -inf are 0 and not NaN."""
    nothing = (left == -torch.inf) & (right == -torch.inf)
    total = torch.logaddexp(left.masked_fill(nothing, 0), right.masked_fill(nothing, 0))
    return total.masked_fill(nothing, -torch.inf)
