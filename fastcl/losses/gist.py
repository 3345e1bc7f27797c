"""GISTEmbed's loss: in-batch negatives from both sides, without those that a guide model finds too similar."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_flag, check_option, check_rows, finite_number, positive_number
from ..guide import RULES, Guide, paired_cosines
from ..ops.backends.rows import accumulation_dtype
from ..statistics import contrastive_stats
from ..swept import ContrastiveStats
from .formulas import log1p_exp
from .modules import shown_temperature


class GISTEmbedLoss(nn.Module):
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

    Shapes of ``forward(anchors, positives, guide_anchors, guide_positives, negatives=None, guide_negatives=None)``:
    ``[N, D]``, ``[N, D]``, ``[N, G]``, ``[N, G]``, ``[K, D]``, ``[K, G]``. Rows of the guide have no gradient.
    Several columns of negatives, one tensor each, are concatenated: ``torch.cat(columns)``.

    Returns:
        A scalar, float32 or float64. 0 for no pairs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. ``gather`` is not supported: use
            ``ClusterInfoNCE`` with ``guide`` and ``gather``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.01,
        *,
        margin: float = 0.0,
        rule: str = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
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
            contrast_positives=self.contrast_positives,
        )  # fmt: skip

    def extra_repr(self) -> str:
        sides = f"contrast_anchors={self.contrast_anchors}, contrast_positives={self.contrast_positives}"
        return f"{shown_temperature(self.temperature)}, margin={self.margin}, rule={self.rule!r}, {sides}"


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
) -> Tensor:
    """The stateless form of :class:`GISTEmbedLoss`, which describes formula, shapes and errors."""
    temperature = positive_number("temperature", temperature)
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
    dtype = accumulation_dtype(anchors, positives, negatives)
    scale = 1 / temperature
    threshold = paired_cosines(guide_anchors.detach(), guide_positives.detach(), dtype)
    places = torch.arange(len(anchors), device=anchors.device)

    def swept(rows: Tensor, guide_rows: Tensor, others: Tensor | None, guide_others: Tensor | None) -> ContrastiveStats:
        paired = others is positives
        guide = Guide(guide_rows, guide_others, margin=margin, rule=rule, threshold=threshold)
        return contrastive_stats(
            rows, others, places if paired else None, places if paired else None, logit_scale=scale, guide=guide,
            normalize_anchors=True, normalize_contrasts=others is not None,
            want=("lse_neg", "sum_pos") if paired else ("lse_all",),
        )  # fmt: skip

    pairs = swept(anchors, guide_anchors, positives, guide_positives)
    found = [pairs.lse_neg]
    if contrast_anchors:
        found.append(swept(anchors, guide_anchors, None, None).lse_all)
    if contrast_positives:
        found.append(swept(positives, guide_positives, None, None).lse_all)
    if negatives is not None:
        found.append(swept(anchors, guide_anchors, negatives, guide_negatives).lse_all)
    parts = [part for part in found if part is not None]
    log_sum = parts[0]
    for part in parts[1:]:
        log_sum = _logaddexp(log_sum, part)
    assert pairs.sum_pos is not None
    # One positive: log(1 + neg / pos), which does not cancel. 0 * sum_pos shows a positive that is not finite.
    terms = log1p_exp(log_sum - pairs.sum_pos) + pairs.sum_pos.detach() * 0
    return terms.mean() if len(terms) else terms.sum()


def _logaddexp(left: Tensor, right: Tensor) -> Tensor:
    """log(exp(left) + exp(right)), whose gradients at -inf are 0 and not NaN."""
    nothing = (left == -torch.inf) & (right == -torch.inf)
    total = torch.logaddexp(left.masked_fill(nothing, 0), right.masked_fill(nothing, 0))
    return total.masked_fill(nothing, -torch.inf)
