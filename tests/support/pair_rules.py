"""ClusterInfoNCE with rules about pairs, written with dense masks: the oracle of tests/losses/test_rules.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcl.guide import Guide


@dataclass
class RuledCall:
    """A call of `ClusterInfoNCE`: rows and keyword arguments."""

    embeddings: Tensor  # [N, D] or [N, V, D]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> RuledCall:
        """The same numbers in another dtype; rows become leaves that require gradients."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype).requires_grad_()
            return value

        embeddings = self.embeddings.detach().to(dtype).requires_grad_()
        return RuledCall(embeddings, {k: moved(v) for k, v in self.arguments.items()}, self.options)

    def rows(self) -> dict[str, Tensor]:
        """The tensors that require gradients."""
        named = {"embeddings": self.embeddings, **self.arguments}
        return {k: v for k, v in named.items() if isinstance(v, Tensor) and v.requires_grad and v.numel()}


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def dense_loss(call: RuledCall) -> Tensor:
    """The loss. All masks are [R, M]."""
    a, options = dict(call.arguments), call.options
    z = call.embeddings
    views = z.shape[1] if z.dim() == 3 else 1
    x = z.flatten(0, -2)
    rows = len(x)
    sample = torch.arange(rows) // views
    y, alone = (x, True) if a.get("contrasts") is None else (a["contrasts"], False)
    m = len(y)
    place = torch.arange(m)

    def rowwise(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.repeat_interleave(views, 0)

    def of_contrasts(own: Tensor, given: Tensor | None, extra: Any) -> Tensor:
        if alone:
            return own
        if given is not None:
            return given
        filler = torch.full((max(m - rows, 0), *own.shape[1:]), extra, dtype=own.dtype)
        return torch.cat((own, filler))[:m]

    admissible = torch.ones(rows, m, dtype=torch.bool)
    if alone:
        admissible &= ~torch.eye(rows, dtype=torch.bool)
    paired = (torch.arange(rows)[:, None] == place) if not alone else sample[:, None] == sample
    # positives
    clusters = a.get("clusters")
    if clusters is None:
        own_sample = of_contrasts(sample, a.get("contrast_clusters"), -1)
        positive = (sample[:, None] == own_sample) & (own_sample >= 0)
    elif clusters.dtype == torch.bool:
        tags = rowwise(clusters)
        other = of_contrasts(tags, a.get("contrast_clusters"), False)
        positive = (tags[:, None] & other[None]).any(-1)
        if a.get("contrast_clusters") is None:
            same = of_contrasts(sample, None, -1)
            positive |= (sample[:, None] == same) & (same >= 0)
    else:
        own = rowwise(clusters)
        own = torch.where(own < 0, -2 - sample, own)
        other = of_contrasts(own, a.get("contrast_clusters"), -1)
        positive = (own[:, None] == other) & (other != -1)
    # admissible pairs
    ids = rowwise(a.get("ids"))
    if ids is not None:
        default = ids if alone or a.get("keep_pairs") else None
        other = of_contrasts(ids, a.get("contrast_ids"), -1) if default is not None else a["contrast_ids"]
        equal = (ids[:, None] == other) & (ids >= 0)[:, None]
        admissible &= ~equal | (paired if alone or a.get("keep_pairs") else False)
    groups = rowwise(a.get("groups"))
    if groups is not None:
        own = torch.where(groups < 0, -2 - sample, groups)
        other = of_contrasts(own, a.get("contrast_groups"), -1)
        if a.get("contrast_groups") is not None:
            private = torch.cat((-2 - sample, torch.full((max(m - rows, 0),), -1)))[:m]
            other = torch.where(other < 0, private, other)
        admissible &= own[:, None] == other
    if a.get("contrast_bias") is not None:
        admissible &= a["contrast_bias"] != -torch.inf
    positive &= admissible
    guide: Guide | None = a.get("guide")
    cosines = None
    if guide is not None:
        g = guide.embeddings.double()
        g = unit(rowwise(g) if g.dim() == 2 else g.flatten(0, 1))
        h = g if alone else unit(guide.contrast_embeddings.double())
        cosines = g @ h.T

    scale = 1 / options["temperature"]
    normalize = options.get("normalize", True)
    if normalize:
        x, y = unit(x), unit(y)
    bias = a.get("contrast_bias")
    logits = scale * (x @ y.T) + (0 if bias is None else bias)
    own = own_contrasts(a, x, views, scale, normalize)

    def one_way(
        logits: Tensor, admissible: Tensor, positive: Tensor, cosines: Tensor | None, own: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The terms of all rows, 0 where one does not count, and which count."""
        if cosines is not None and guide is not None:
            given = guide.threshold
            least = torch.where(positive, cosines, torch.inf).amin(-1) if given is None else given.double()
            margin = guide.margin if guide.rule == "absolute" else guide.margin * least.abs()
            beyond = cosines > torch.where(least.isinf(), least, least - margin)[:, None]
            admissible = admissible & (positive | ~beyond)
        if own is not None:
            logits, positive = torch.cat((logits, own[0]), -1), torch.cat((positive, own[1]), -1)
            admissible = torch.cat((admissible, torch.ones_like(own[1])), -1)
        number = positive.sum(-1)
        shifted = logits - scale * options.get("margin", 0.0) * positive.to(logits.dtype)
        used = admissible & ~positive if options.get("denominator") == "negatives" else admissible
        counted = (number > 0) & used.any(-1)
        lse = torch.where(used, shifted, -torch.inf)[counted].logsumexp(-1)
        inner, chosen = shifted[counted], positive[counted]
        if options.get("form") == "inside":
            rest = torch.where(chosen, inner, -torch.inf).logsumexp(-1) - number[counted].to(logits.dtype).log()
        else:
            rest = torch.where(chosen, inner, 0).sum(-1) / number[counted]
        smoothing = options.get("label_smoothing", 0.0)
        every = admissible[counted]
        rest = (1 - smoothing) * rest + smoothing * torch.where(every, inner, 0).sum(-1) / every.sum(-1)
        return torch.zeros_like(logits[:, 0]).index_put((counted.nonzero()[:, 0],), lse - rest), counted

    def reduced(terms: Tensor, counted: Tensor, weights: Tensor | None) -> Tensor:
        of_rows = counted.to(terms.dtype) if weights is None else rowwise(weights).detach() * counted
        terms = terms if weights is None else terms * of_rows
        if options.get("reduction") == "none":
            return terms.view(z.shape[:-1])
        if options.get("reduction") == "sum":
            return terms.sum()
        total = of_rows.sum()
        return terms.sum() / (total if total > 0 else 1)

    loss = reduced(*one_way(logits, admissible, positive, cosines, own), a.get("weights"))
    if options.get("symmetric"):
        back = one_way(logits.T, admissible.T, positive.T, None if cosines is None else cosines.T, None)
        loss = (loss + reduced(*back, None)) / 2
    return loss


def own_contrasts(
    a: dict[str, Any], x: Tensor, views: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor] | None:
    """Logits [R, E] of the contrasts of one anchor alone, hard negatives and positives, and which are positives."""
    kinds = []
    for name in ("hard_negatives", "positives"):
        rows = a.get(name)
        if rows is None:
            continue
        by_view = views > 1 and rows.dim() == (4 if name == "hard_negatives" else 3)
        rows = rows.flatten(0, 1) if by_view else rows.repeat_interleave(views, 0)
        rows = rows if name == "hard_negatives" else rows[:, None]
        logits = scale * torch.einsum("nd,nhd->nh", x, unit(rows) if normalize else rows)
        kinds.append((logits, torch.full_like(logits, name == "positives", dtype=torch.bool)))
    if not kinds:
        return None
    logits, positive = (torch.cat(parts, -1) for parts in zip(*kinds, strict=True))
    return logits, positive
