"""Sigmoid losses: every pair is a binary decision of its own. SigLIP's, and the same over clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag, check_rows, finite_scalar, positive_number, scalar_tensor
from ..distributed import Property, World, tell_others
from ..ops import small
from ..ops.backends.choose import chooses_cpu
from ..ops.backends.rows import accumulation_dtype
from ..ops.contrastive.records import Rows
from ..ops.library import intercepted, uncompiled
from ..ops.pairs.op import pair_total
from ..ops.pairs.records import Pairs
from ..ops.pairs.small import total_of
from ..swept import statistics
from .batch import Batch, Contrasts, Tensors, batch
from .gathered import gathered_statistics, has_gradient
from .gathered_pairs import Maps
from .modules import GroupModule, shown_number, shown_temperature
from .options import LossOptions, refuses_renamed
from .pair_sums import Swept, share_of_all, swept
from .reduce import LossResult, inverse_temperature, opened, posed, scalar, summary_of
from .small import rows_on_cpu

MAPS = Maps("softplus")


def sigmoid_loss(
    embeddings: Tensor,
    clusters: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    positives: Tensor | None = None,
    contrasts: Contrasts | None = None,
    contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool | str = False,
    group: Any = None,
    return_stats: bool = False,
) -> LossResult:
    """The stateless form of :class:`SigmoidLoss`, which describes formula, shapes, dtypes and errors.

    The mean over anchors i of the sum over contrasts j of ``log(1 + exp(-z_ij s_ij))``, with logits s_ij = <x_i, y_j> /
    (|x_i| |y_j| temperature) + bias, and z_ij = 1 for positives, -1 for negatives. The result is a scalar, or ``[N]`` /
    ``[N, V]`` with ``reduction="none"``; ``return_stats=True`` returns ``(loss, stats)``, stats a :class:`LossStats`.
    """
    given = Tensors(
        embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias
    )  # fmt: skip
    try:
        options = LossOptions(normalize=normalize, reduction=reduction, gather=gather, group=group).checked()
        loss = _small(given, options, temperature, bias) if weights is None else None
        if loss is not None and return_stats is False:
            return loss
        temperature = positive_number("temperature", temperature)
        bias = finite_scalar("bias", bias)
        rows = batch(given, options.normalize)
        scale = inverse_temperature(temperature, rows)
        offset = scalar("bias", bias, rows)
    except Exception as error:
        tell_others(gather, error, embeddings, group=group)
        raise
    return _reduced(rows, scale, offset, options, weights, return_stats, "SigmoidLoss", loss)


class SigmoidLoss(GroupModule):
    r"""SigLIP's sigmoid loss over clusters: several positives, one set or two, queues and banks.

    .. math::
        s_{ij} = \langle \hat x_i, \hat y_j \rangle / \text{temperature} + \text{bias}, \qquad
        l_i = \sum_{j \in P_i} \log(1 + e^{-s_{ij}}) + \sum_{j \in N_i} \log(1 + e^{s_{ij}})

    A_i are the admissible contrasts of anchor i, P_i those in its cluster and N_i the others. With two sets whose row i
    belongs with row i it is SigLIP's loss, of unit rows. The gradient comes out of the sweep that computes the loss;
    memory is O((N + M) D).

    Args:
        temperature: number, tensor or ``nn.Parameter``, as in :class:`ClusterInfoNCE`.
        bias: finite number, tensor of one element or ``nn.Parameter``, added to every logit. A parameter is registered
            and learned.
        normalize: True for cosine similarity, False for inner products of the rows as given.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the anchors that have an admissible contrast, with or
            without positives. If none has, the loss and its gradient are 0.
        gather: True or ``"ring"``: contrast against the rows of all processes of ``group`` (None: the default group of
            `torch.distributed`); without processes it has no effect. Each process returns its share of the loss of the
            whole batch, times the number of processes: the mean over processes is that loss (docs/distributed.md).
        group: the process group of ``gather``. Copies and pickles leave it behind.

    Shapes of ``forward(embeddings, clusters=None, *, positives=None, contrasts=None, contrast_clusters=None, ids=None,
    contrast_ids=None, contrast_bias=None, weights=None, temperature=None, bias=None, return_stats=False)`` are those of
    :class:`ClusterInfoNCE`; ``bias`` replaces the module's in this call. ``return_stats`` takes a sweep of its own, and
    the entropy is that of a softmax of the logits. There are no assignments, and one direction only: the loss of two
    sets is a sum over all pairs.

    Returns:
        A scalar, or ``[N]`` / ``[N, V]`` with ``reduction="none"``. float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Zhai et al. 2023 (SigLIP).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        bias: float | Tensor = -10.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        options = LossOptions(normalize=normalize, reduction=reduction, gather=gather, group=group).checked()
        # nn.Module registers an nn.Parameter.
        self.temperature = positive_number("temperature", temperature)
        self.bias = finite_scalar("bias", bias)
        self.normalize, self.reduction, self.gather = options.normalize, options.reduction, options.gather
        self.group = options.group

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
        bias: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> LossResult:
        """The loss. The class describes shapes and errors."""
        return sigmoid_loss(
            embeddings, clusters, temperature=self.temperature if temperature is None else temperature,
            bias=self.bias if bias is None else bias, positives=positives, contrasts=contrasts,
            contrast_clusters=contrast_clusters, ids=ids, contrast_ids=contrast_ids, contrast_bias=contrast_bias,
            weights=weights, normalize=self.normalize, reduction=self.reduction, gather=self.gather,
            group=self.group, return_stats=return_stats,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = {"gather": self.gather, "group": self.group}
        gather = "".join(f", {name}={value!r}" for name, value in shown.items() if value)
        return (
            f"{shown_temperature(self.temperature)}, {shown_number('bias', self.bias)}, normalize={self.normalize!r}, "
            f"reduction={self.reduction!r}{gather}"
        )


class SigLipLoss(GroupModule):
    r"""SigLIP's loss (Zhai et al. 2023), called as open_clip's: ``SigLipLoss()(image, text, logit_scale, logit_bias)``.

    .. math::
        -\frac{1}{N} \sum_{i, j} \log \sigma\big(z_{ij} (\text{logit\_scale} \langle x_i, y_j \rangle
        + \text{logit\_bias})\big), \qquad z_{ii} = 1, \; z_{ij} = -1

    Features are ``[N, D]`` and are not normalised here: open_clip's models do that. ``logit_scale`` is 1 / temperature
    (open_clip passes ``logit_scale.exp()``) and ``logit_bias`` a number or a tensor of one element, or None for 0.
    ``output_dict=True`` returns ``{"contrastive_loss": loss}``, as open_clip's training loop expects. Dtypes and errors
    are those of :class:`ClusterInfoNCE`. With ``gather`` (True or ``"ring"``) the texts of all processes are contrasts,
    as in open_clip; each process returns its share times the number of processes, so the mean over processes is the
    loss of the whole batch.
    """

    @refuses_renamed
    def __init__(self, *, gather: bool | str = False, group: Any = None) -> None:
        super().__init__()
        options = LossOptions(gather=gather, group=group).checked()
        self.gather, self.group = options.gather, options.group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if not torch.compiler.is_compiling() and self.gather is False and self.group is None:
            loss = _small_siglip(image_features, text_features, logit_scale, logit_bias)
            if loss is not None and type(output_dict) is bool:
                return {"contrastive_loss": loss} if output_dict else loss
        try:
            check_flag("output_dict", output_dict)
            logit_scale = positive_number("logit_scale", logit_scale)
            logit_bias = finite_scalar("logit_bias", 0.0 if logit_bias is None else logit_bias)
            check_rows("image_features", image_features)
            check_rows("text_features", text_features, like=image_features)
            if text_features.shape[0] != image_features.shape[0]:
                expected = f"{image_features.shape[0]} rows, as in image_features"
                raise ValueError(f"text_features: expected {expected}, got {text_features.shape[0]}")
            rows = (
                None
                if World.of(self.gather, self.group) is None
                else batch(Tensors(image_features, contrasts=text_features), False)
            )
            dtype, device = accumulation_dtype(image_features, text_features), image_features.device
            scale = scalar_tensor("logit_scale", logit_scale, device, dtype)
            offset = scalar_tensor("logit_bias", logit_bias, device, dtype)
        except Exception as error:
            tell_others(self.gather, error, image_features, group=self.group)
            raise
        if rows is None:
            loss = _siglip(image_features, text_features, scale, offset)
        else:
            options = LossOptions(normalize=False, gather=self.gather, group=self.group)
            found = _reduced(rows, scale, offset, options, None, False, "SigLip")
            assert isinstance(found, Tensor)
            loss = found
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        shown = {"gather": self.gather, "group": self.group}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value)


def _small(given: Tensors, options: LossOptions, temperature: Any, bias: Any) -> Tensor | None:
    """The mean or sum of a valid small call on a CPU, by `total_of`; None for other calls, which are then checked."""
    if torch.compiler.is_compiling() or options.reduction == "none" or options.gather is not False:
        return None
    rows = rows_on_cpu(given, options, temperature, bias)
    if rows is None:
        return None
    embeddings = given.embeddings
    count = embeddings.numel() // embeddings.shape[-1]
    if count == 1 and given.contrasts is None:  # it has no contrast, and does not count
        return None
    return total_of(
        embeddings, *rows, temperature, bias, inverted=True,
        normalize=options.normalize, kind=MAPS.kind, weight=1 / count if options.reduction == "mean" else 1.0,
    )  # fmt: skip


def _small_siglip(image: Any, text: Any, logit_scale: Any, logit_bias: Any) -> Tensor | None:
    """`SigLipLoss` of a valid small call on a CPU, by `total_of`; None for other calls, which are then checked."""
    logit_bias = 0.0 if logit_bias is None else logit_bias
    if not (small.are_rows(image, text) and chooses_cpu()):
        return None
    if not (small.is_number(logit_scale) and small.is_number(logit_bias)):
        return None
    if image.shape != text.shape or image.dim() != 2:
        return None
    learned = [value for value in (logit_scale, logit_bias) if isinstance(value, Tensor)]
    if intercepted(image, text, *learned):
        return None
    if not (small.in_range(logit_scale, positive=True) and small.in_range(logit_bias, positive=False)):
        return None
    n = image.shape[0]
    own = small.places(n, 1, n)
    return total_of(
        image, text, own, own, logit_scale, logit_bias, inverted=False, normalize=False, kind=MAPS.kind, weight=1 / n
    )


def _siglip(image: Tensor, text: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The loss without other processes, in few operators: each weighs as much as a sweep of a small batch."""
    n = image.shape[0]
    places = torch.arange(n, device=image.device)
    p = Pairs(Rows(image, places), Rows(text, places), scale, offset, "softplus")
    loss, *_ = pair_total(p, scale.new_full((2, n), 1 / max(n, 1)))
    return loss.to(torch.float64 if image.dtype == torch.float64 else torch.float32)


def _reduced(
    rows: Batch,
    scale: Tensor,
    offset: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    return_stats: bool,
    call: str,
    loss: Tensor | None = None,
) -> LossResult:
    """loss: where it is known. It has the same bits with `return_stats` and without."""
    world, rows, weights, unit = opened(rows, options, weights, return_stats)
    if world is not None:
        share: LossResult = _of_all(world, rows, scale, offset, options, weights, unit, call, return_stats)
        return share
    loss = _loss(Swept(rows), scale, offset, options.reduction, weights) if loss is None else loss
    if not return_stats:
        return loss
    problem = posed(rows, scale, (), options, observe=True)
    with torch.no_grad():
        _, observed = statistics(problem)
    assert observed is not None
    return loss, summary_of(problem, observed, rows, scale, options)


def _loss(rows: Swept, scale: Tensor, offset: Tensor, reduction: str, weights: Tensor | None) -> Tensor:
    batch = rows.rows
    if reduction == "none":
        terms = rows.sums(scale, offset, MAPS).values.sum(0).to(batch.dtype())
        return (terms if weights is None else terms * weights).reshape(batch.shape)
    total, counted = _total(rows, scale, offset, weights)
    if reduction == "sum":
        return total
    return total / _mass(counted, weights)


def _total(rows: Swept, scale: Tensor, offset: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weighted sum of the anchors' losses, and which anchors have an admissible contrast."""
    n = rows.rows.anchors.values.shape[0]
    of_rows = scale.new_ones(n) if weights is None else weights.to(scale.dtype)
    total, sums = rows.total(scale, offset, MAPS, of_rows.expand(2, n))
    return total.to(rows.rows.dtype()), sums.counts.sum(0) > 0


def _mass(counted: Tensor, weights: Tensor | None) -> Tensor:
    """What the mean divides by; 1 in place of 0."""
    if weights is None:
        return counted.sum().clamp(min=1)
    mass = (counted * weights).sum()
    return torch.where(mass == 0, 1, mass)


@uncompiled  # processes could compile different graphs, with collectives that do not match
def _of_all(
    world: World,
    rows: Batch,
    scale: Tensor,
    offset: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    unit: float | Tensor | None,
    call: str,
    return_stats: bool,
) -> LossResult:
    """This process's share of the loss over all processes' rows, times the number of processes.

    With reduction "none", the unscaled terms of the process's own rows. unit: what the weights were divided by.
    """
    alike: dict[str, Property] = {
        "reduction": options.reduction,
        "weights given": weights is not None,
        "weights with a gradient": has_gradient(weights),
        "bias with a gradient": has_gradient(offset),
        "return_stats": return_stats,
    }
    found = swept(world, options.gather, rows, scale, offset, call, alike)
    if options.reduction == "none":
        share = _loss(found, scale, offset, "none", weights)
    else:
        total, counted = _total(found, scale, offset, weights)
        mass = (counted.double() if weights is None else counted * weights.double()).sum()
        share = share_of_all(world, [total], [mass], unit, options.reduction, rows.dtype())
    if not return_stats:
        return share
    problem = posed(rows, scale, (), options, observe=True)
    with torch.no_grad():
        _, observed = gathered_statistics(world, options.gather, problem, rows, False, "statistics", {})
    assert observed is not None
    return share, summary_of(problem, observed, rows, scale, options, world)
