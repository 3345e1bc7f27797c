"""InfoNCE over clusters: the formulas, `ClusterInfoNCE`, and the losses of other libraries as presets of it.

Nothing here visits a logit: every loss is a formula of `kernels.ops.sweep`'s statistics, O(N) numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.checks import check_flag, check_ids, check_number, check_option, check_rows, check_vector, values_visible
from .kernels.ops import ContrastiveStats, sweep
from .kernels.problem import accumulation_dtype

FORMS = ("outside", "inside")
DENOMINATORS = ("all", "negatives")
REDUCTIONS = ("mean", "sum", "none")

Contrasts = Tensor | Sequence[Tensor]


def cluster_infonce(
    embeddings: Tensor,
    clusters: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    form: str = "outside",
    denominator: str = "all",
    margin: float = 0.0,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool | str = False,
    positives: Tensor | None = None,
    contrasts: Contrasts | None = None,
    contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The stateless form of :class:`ClusterInfoNCE`, which documents the arguments."""
    check_number("temperature", temperature, positive=True)
    _check_options(form, denominator, margin, symmetric, normalize, reduction, gather)
    problem = _pose(embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias)
    scale = _logit_scale(temperature, problem)
    options = _Options(form, denominator, margin, symmetric, normalize, reduction)
    return _loss(problem, scale, options, contrast_bias, weights)


class ClusterInfoNCE(nn.Module):
    r"""Cluster-masked InfoNCE: every other row of the anchor's cluster is its positive, every row its contrast.

    With logits :math:`s_{ij} = \langle \hat x_i, \hat y_j \rangle / \text{temperature}` (less ``margin / temperature``
    for positives), A_i the admissible contrasts of anchor i, P_i those in its cluster and N_i the others, the loss of
    an anchor is

    ============= =========================================================================================
    form          loss of anchor i (``denominator="negatives"`` sums over N_i where A_i stands)
    ============= =========================================================================================
    ``"outside"`` :math:`\log \sum_{j \in A_i} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i} s_{ij}`
    ``"inside"``  :math:`\log \sum_{j \in A_i} e^{s_{ij}} - \log \frac{1}{|P_i|} \sum_{j \in P_i} e^{s_{ij}}`
    ============= =========================================================================================

    ``ClusterInfoNCE()(z)`` of views ``[N, V, D]`` is SimCLR, ``(z, labels)`` is SupCon, ``(z, cluster_ids)`` is
    Cl-InfoNCE, ``(image, contrasts=text)`` with ``symmetric=True`` is CLIP. Logits are never stored: memory is
    O((N + M) D), so the batch may be as large as its embeddings allow.

    Args:
        temperature: number, tensor or ``nn.Parameter``; a parameter is registered and learned, unclamped.
        form: ``"outside"`` (SupCon's L_out) or ``"inside"`` (L_in).
        denominator: ``"all"``, or ``"negatives"`` for the decoupled loss.
        margin: cosine margin >= 0 taken off every positive, wherever it occurs (NT-Xent-AM).
        symmetric: two sets: the mean of the loss of the anchors and that of the contrasts over the anchors.
        normalize: cosine similarity; False takes the inner products of the rows as they come.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the anchors that count: those with a positive and a
            denominator that is not empty. If none counts the loss is 0 and so is its gradient.
        gather: only False: contrasting against the rows of other processes is not part of this version.

    Shapes of ``forward(embeddings, clusters=None, *, positives=None, contrasts=None, contrast_clusters=None, ids=None,
    contrast_ids=None, contrast_bias=None, weights=None, temperature=None)``:

    - embeddings: ``[N, D]``, or ``[N, V, D]`` for V views of N samples. float64, float32, bfloat16, float16.
    - clusters: ``[N]`` integers. Negative: no cluster, positive only with its own other views. None: each sample is a
      cluster of its own (self-contrast then needs two views).
    - positives: as embeddings; one more positive of each anchor that is nobody else's contrast (MoCo's momentum key).
    - contrasts: None for self-contrast; or ``[M, D]``, or a list of such, concatenated. Gradients flow where required.
    - contrast_clusters: ``[M]`` integers; with ``clusters=None``, the index of the sample that a contrast belongs to,
      negative: none. None: contrast i belongs with anchor row i (M >= rows), further contrasts are negatives.
    - ids, contrast_ids: ``[N]`` and ``[M]`` integers; equal ones make a pair inadmissible (a stale copy of oneself).
    - contrast_bias: ``[M]`` floating, added to the logits (``[N * V]`` in self-contrast).
    - weights: ``[N]`` floating >= 0 on the anchors' terms; the mean becomes the weighted mean. The reverse direction
      of ``symmetric`` is not weighted.
    - temperature: overrides the module's for this call.

    Returns:
        A scalar, or ``[N]`` / ``[N, V]`` with ``reduction="none"`` (0 where an anchor does not count; with
        ``symmetric``, the mean of row i's two terms, which needs M = N rows). float32; float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: Oord et al. 2018 (InfoNCE), Khosla et al. 2020 (SupCon: both forms), Tsai et al. 2022 (Cl-InfoNCE),
    Yeh et al. 2022 (decoupled).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: str = "outside",
        denominator: str = "all",
        margin: float = 0.0,
        symmetric: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, positive=True)
        _check_options(form, denominator, margin, symmetric, normalize, reduction, gather)
        self.temperature = temperature  # nn.Module registers it where it is an nn.Parameter
        self.form = form
        self.denominator = denominator
        self.margin = margin
        self.symmetric = symmetric
        self.normalize = normalize
        self.reduction = reduction
        self.gather = gather

    def forward(
        self,
        embeddings: Tensor,
        clusters: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        contrasts: Contrasts | None = None,
        contrast_clusters: Tensor | None = None,
        ids: Tensor | None = None,
        contrast_ids: Tensor | None = None,
        contrast_bias: Tensor | None = None,
        weights: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        return cluster_infonce(
            embeddings,
            clusters,
            temperature=self.temperature if temperature is None else temperature,
            form=self.form,
            denominator=self.denominator,
            margin=self.margin,
            symmetric=self.symmetric,
            normalize=self.normalize,
            reduction=self.reduction,
            gather=self.gather,
            positives=positives,
            contrasts=contrasts,
            contrast_clusters=contrast_clusters,
            ids=ids,
            contrast_ids=contrast_ids,
            contrast_bias=contrast_bias,
            weights=weights,
        )

    def extra_repr(self) -> str:
        learned = isinstance(self.temperature, nn.Parameter)
        shown = float(self.temperature.detach()) if isinstance(self.temperature, Tensor) else self.temperature
        options = "".join(
            f", {name}={value!r}"
            for name, value in (
                ("form", self.form),
                ("denominator", self.denominator),
                ("margin", self.margin),
                ("symmetric", self.symmetric),
                ("normalize", self.normalize),
                ("reduction", self.reduction),
            )
        )
        return f"temperature={shown:g}{' (learned)' if learned else ''}{options}"


# ---- presets ----


class NTXentLoss(ClusterInfoNCE):
    """SimCLR's loss of two views (Chen et al. 2020): ``NTXentLoss(temperature=0.5)(z0, z1)``, both ``[N, D]``.

    The mean over all 2 N rows of ``logsumexp_j(s_ij) - s_ip``, p the row's other view, j over all rows but i.
    """

    def __init__(self, temperature: float | Tensor = 0.5, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(_views(z0, z1))


class DCLLoss(NTXentLoss):
    """The decoupled loss of two views (Yeh et al. 2022): ``DCLLoss(temperature=0.1)(z0, z1)``, both ``[N, D]``.

    As :class:`NTXentLoss`, but the log-sum-exp runs over the negatives alone.
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(temperature, denominator="negatives", **options)


class SupConLoss(ClusterInfoNCE):
    """Supervised contrastive loss (Khosla et al. 2020, L_out): ``SupConLoss(temperature=0.07)(features, labels)``.

    Features are ``[N, V, D]`` or ``[N, D]``, labels ``[N]`` or None (SimCLR). There is no ``base_temperature``, and
    the mean is over anchors that have a positive.
    """

    def __init__(self, temperature: float | Tensor = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(features, labels)


class ClipLoss(nn.Module):
    """CLIP's loss (Radford et al. 2021): ``ClipLoss()(image_features, text_features, logit_scale)``.

    Features are ``[N, D]`` and taken as they come, as open_clip's are normalised by the model; ``logit_scale`` is
    1 / temperature (open_clip passes ``logit_scale.exp()``), a number or a tensor of one element. The loss is the mean
    of the cross-entropies of the rows and of the columns of ``logit_scale * image @ text.T`` against the diagonal;
    with ``output_dict=True`` it comes as ``{"contrastive_loss": loss}``, as open_clip's training loop asks for it.
    """

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        check_number("logit_scale", logit_scale, positive=True)
        check_rows("image_features", image_features)
        check_rows("text_features", text_features, like=image_features)
        if len(text_features) != len(image_features):
            raise ValueError(
                f"text_features: expected {len(image_features)} rows, as in image_features, got {len(text_features)}"
            )
        problem = _pose(image_features, None, None, text_features, None, None, None, None)
        options = _Options("outside", "all", 0.0, True, False, "mean")
        loss = _loss(problem, _scalar(logit_scale, problem), options, None, None)
        return {"contrastive_loss": loss} if output_dict else loss


class MoCoLoss(ClusterInfoNCE):
    """MoCo's loss (He et al. 2020): ``MoCoLoss(temperature=0.07)(query, key, queue)``.

    Queries and their keys are ``[N, D]``, the queue ``[K, D]`` (its rows are keys, all negatives; K may be 0).
    """

    def __init__(self, temperature: float | Tensor = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:  # type: ignore[override]
        check_rows("query", query)
        check_rows("key", key, like=query)
        check_rows("queue", queue, like=query)
        nobody = torch.full((len(queue),), -1, dtype=torch.int64, device=queue.device)
        return super().forward(query, positives=key, contrasts=queue, contrast_clusters=nobody)


def _views(z0: Tensor, z1: Tensor) -> Tensor:
    """[N, 2, D]"""
    check_rows("z0", z0)
    check_rows("z1", z1, like=z0)
    if z1.shape != z0.shape:
        raise ValueError(f"z1: expected shape {list(z0.shape)}, as z0, got {list(z1.shape)}")
    return torch.stack((z0, z1), dim=1)


# ---- posing the problem ----


class _Options(NamedTuple):
    form: str
    denominator: str
    margin: float
    symmetric: bool
    normalize: bool
    reduction: str


class _Posed(NamedTuple):
    """The rows of a loss, flattened, and who is whose positive. Ids are int64, of which -1 alone equals nothing."""

    anchors: Tensor  # [R, D], R = N or N * V
    contrasts: Tensor | None  # [M, D]
    positives: Tensor | None  # [R, D]
    anchor_clusters: Tensor  # [R]
    contrast_clusters: Tensor | None  # [M]
    anchor_ids: Tensor | None  # [R]
    contrast_ids: Tensor | None  # [M]
    shape: tuple[int, ...]  # [N] or [N, V]
    dtype: torch.dtype  # of the loss


def _check_options(
    form: str, denominator: str, margin: float, symmetric: bool, normalize: bool, reduction: str, gather: bool | str
) -> None:
    check_option("form", form, FORMS)
    check_option("denominator", denominator, DENOMINATORS)
    if isinstance(margin, Tensor):
        raise TypeError("margin: expected a non-negative number, got Tensor")
    check_number("margin", margin, positive=False)
    check_flag("symmetric", symmetric)
    check_flag("normalize", normalize)
    check_option("reduction", reduction, REDUCTIONS)
    check_option("gather", gather, (False, True, "ring"))
    if gather is not False:
        raise ValueError(f"gather: expected False (gathering across processes is not in this version), got {gather!r}")


def _pose(
    embeddings: Tensor,
    clusters: Tensor | None,
    positives: Tensor | None,
    contrasts: Contrasts | None,
    contrast_clusters: Tensor | None,
    ids: Tensor | None,
    contrast_ids: Tensor | None,
    contrast_bias: Tensor | None,
) -> _Posed:
    check_rows("embeddings", embeddings, dims=(2, 3))
    shape, device = tuple(embeddings.shape[:-1]), embeddings.device
    n, views = shape[0], shape[1] if len(shape) == 2 else 1
    if views == 0:
        raise ValueError(f"embeddings: expected at least one view, got shape {list(embeddings.shape)}")
    anchors = embeddings.flatten(0, 1) if len(shape) == 2 else embeddings
    rows = n * views
    if clusters is not None:
        check_ids("clusters", clusters, n, device)
    if positives is not None:
        check_rows("positives", positives, dims=(2, 3), like=embeddings)
        if positives.shape != embeddings.shape:
            raise ValueError(f"positives: expected shape {list(embeddings.shape)}, got {list(positives.shape)}")
        positives = positives.flatten(0, 1) if len(shape) == 2 else positives
    others = _concatenate(contrasts, embeddings)
    m = rows if others is None else others.shape[0]
    if contrast_bias is not None:
        check_vector("contrast_bias", contrast_bias, m, device)
    if others is None:
        for name, value in (("contrast_clusters", contrast_clusters), ("ids", ids), ("contrast_ids", contrast_ids)):
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        if clusters is None and views < 2 and positives is None:
            raise ValueError(
                "clusters: expected cluster ids, embeddings of at least two views [N, V, D], or contrasts: "
                f"a single view {list(embeddings.shape)} has no positives"
            )
    elif contrast_clusters is not None:
        check_ids("contrast_clusters", contrast_clusters, m, device)
    elif m < rows:
        raise ValueError(
            f"contrasts: expected at least {rows} rows, one for each anchor row, or contrast_clusters; got {m} rows"
        )
    if (ids is None) != (contrast_ids is None):
        given, absent = ("ids", "contrast_ids") if contrast_ids is None else ("contrast_ids", "ids")
        raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
    if ids is not None and contrast_ids is not None:
        check_ids("ids", ids, n, device)
        check_ids("contrast_ids", contrast_ids, m, device)

    # Private clusters -2, -3, ... are unlike any of the user's, who says "no cluster" by a negative number.
    paired = others is not None and contrast_clusters is None
    index = torch.arange(rows if paired else n, device=device)
    own = index if paired else _per_row(index, views)
    if clusters is None:
        anchor_clusters = own
    else:
        wide = _per_row(clusters.to(torch.int64), views)
        anchor_clusters = torch.where(wide < 0, -2 - own, wide)
    other_clusters = None
    if contrast_clusters is not None:
        other_clusters = contrast_clusters.to(torch.int64).clamp(min=-1)
    elif paired:
        other_clusters = torch.cat((anchor_clusters, anchor_clusters.new_full((m - rows,), -1)))
    return _Posed(
        anchors,
        others,
        positives,
        anchor_clusters,
        other_clusters,
        None if ids is None else _per_row(ids.to(torch.int64).clamp(min=-1), views),
        None if contrast_ids is None else contrast_ids.to(torch.int64).clamp(min=-1),
        shape,
        torch.float64 if embeddings.dtype == torch.float64 else torch.float32,
    )


def _concatenate(contrasts: Contrasts | None, embeddings: Tensor) -> Tensor | None:
    if contrasts is None:
        return None
    if isinstance(contrasts, Tensor):
        check_rows("contrasts", contrasts, like=embeddings)
        return contrasts
    if not isinstance(contrasts, (list, tuple)) or not contrasts:
        raise TypeError(f"contrasts: expected a tensor or a non-empty list of tensors, got {type(contrasts).__name__}")
    for i, part in enumerate(contrasts):
        check_rows(f"contrasts[{i}]", part, like=embeddings)
    dtype = contrasts[0].dtype
    for part in contrasts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in contrasts])


def _per_row(values: Tensor, views: int) -> Tensor:
    """[N] -> [N * V], sample-major."""
    return values if views == 1 else values[:, None].expand(-1, views).reshape(-1)


def _scalar(value: float | Tensor, problem: _Posed) -> Tensor:
    """A number or tensor of one element as a tensor of no dimension, in the dtype of the logits."""
    dtype = accumulation_dtype(problem.anchors, problem.contrasts, problem.positives)
    if isinstance(value, Tensor):
        return value.to(problem.anchors.device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=problem.anchors.device)


def _logit_scale(temperature: float | Tensor, problem: _Posed) -> Tensor:
    if isinstance(temperature, Tensor):
        return 1 / _scalar(temperature, problem)
    return _scalar(1 / temperature, problem)


# ---- the formulas ----


def _loss(
    problem: _Posed, scale: Tensor, options: _Options, contrast_bias: Tensor | None, weights: Tensor | None
) -> Tensor:
    if options.symmetric and problem.contrasts is None:
        raise ValueError("symmetric: expected False for self-contrast (contrasts=None), got True")
    rows = problem.anchors.shape[0]
    others = rows if problem.contrasts is None else problem.contrasts.shape[0]
    if options.symmetric and options.reduction == "none" and others != rows:
        raise ValueError(
            f"reduction: expected 'mean' or 'sum' for symmetric with {rows} anchors and {others} contrasts, got 'none'"
        )
    if weights is not None:
        check_vector("weights", weights, problem.shape[0], problem.anchors.device)
        if values_visible(weights) and not bool((weights >= 0).all()):
            raise ValueError("weights: expected no negative or NaN value, got one")
        weights = _per_row(weights.to(problem.dtype), problem.shape[1] if len(problem.shape) == 2 else 1)
    stats = sweep(
        problem.anchors,
        problem.contrasts,
        problem.anchor_clusters,
        problem.contrast_clusters,
        scale,
        normalize_anchors=options.normalize,
        normalize_contrasts=options.normalize and problem.contrasts is not None,
        positives=problem.positives,
        contrast_bias=contrast_bias,
        anchor_ids=problem.anchor_ids,
        contrast_ids=problem.contrast_ids,
        want=_wanted(options),
        both=options.symmetric,
    )
    terms, counted = _terms(stats, scale, options)
    if stats.reverse is None:
        return _reduce(terms, counted, weights, options.reduction, problem)
    reverse = _reduce(*_terms(stats.reverse, scale, options), None, options.reduction, problem)
    return (_reduce(terms, counted, weights, options.reduction, problem) + reverse) / 2


def _wanted(options: _Options) -> tuple[str, ...]:
    """The statistics that `_terms` asks for."""
    positive = "sum_pos" if options.form == "outside" else "lse_pos"
    if options.denominator == "negatives":
        return "lse_neg", positive
    if options.form == "outside" and options.margin == 0:
        return "lse_all", positive
    return "lse_pos", "lse_neg", positive


def _terms(stats: ContrastiveStats, scale: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """The loss of each row and whether the row counts, both [R]."""
    counted = stats.num_pos > 0
    if options.denominator == "negatives":
        counted = counted & (stats.num_neg > 0)
    lse_all, lse_pos, lse_neg, sum_pos, num_pos = _harmless(stats, counted)
    shift = scale * options.margin
    lse_pos = lse_pos - shift
    mean_pos = sum_pos / num_pos - shift
    if options.form == "outside":
        if options.denominator == "negatives":
            return lse_neg - mean_pos, counted
        if options.margin == 0:
            return lse_all - mean_pos, counted
        return torch.logaddexp(lse_pos, lse_neg) - mean_pos, counted
    log_ratio = lse_neg - lse_pos
    if options.denominator == "all":
        # log(neg + pos) - log(pos) = log(1 + neg / pos) does not cancel as the positives come to dominate.
        log_ratio = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio))
    return log_ratio + num_pos.log(), counted


def _harmless(stats: ContrastiveStats, counted: Tensor) -> list[Tensor]:
    """lse_all, lse_pos, lse_neg, sum_pos, num_pos [R], harmless numbers in rows that do not count or are not wanted.

    Masking the result of a formula alone would let the NaN of its derivative through.
    """
    zero = stats.num_pos.new_zeros(())
    fields = (stats.lse_all, stats.lse_pos, stats.lse_neg, stats.sum_pos)
    return [
        *(zero if field is None else torch.where(counted, field, 0) for field in fields),
        torch.where(counted, stats.num_pos, 1),
    ]


def _reduce(terms: Tensor, counted: Tensor, weights: Tensor | None, reduction: str, problem: _Posed) -> Tensor:
    terms = torch.where(counted, terms, 0).to(problem.dtype)
    if weights is not None:
        terms = terms * weights
    if reduction == "none":
        return terms.reshape(problem.shape)
    if reduction == "sum":
        return terms.sum()
    total = (counted if weights is None else counted * weights).sum().to(problem.dtype)
    return terms.sum() / torch.where(total > 0, total, 1)
