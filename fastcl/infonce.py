"""InfoNCE over clusters: the formulas, `ClusterInfoNCE`, and the losses of other libraries as presets of it.

Nothing here visits a logit: every loss is a formula of a `kernels.stats.Sweep`'s statistics, O(N) numbers.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from .distributed import tell_others
from .formula import InfoNCE, LossResult, Weighted, check_options, inverse_temperature, reduced_loss, scalar
from .kernels.checks import (
    check_flag,
    check_ids,
    check_option,
    check_rows,
    finite_number,
    positive_number,
)
from .memory import MemoryQueue
from .modules import shown_temperature
from .posing import Contrasts, pose, pose_assigned
from .summary import LossStats

FORMS = ("outside", "inside")
DENOMINATORS = ("all", "negatives")
CLIP_OUTPUTS = ("contrastive_loss", "stats")


@overload
def cluster_infonce(
    embeddings: Tensor, clusters: Tensor | None = None, *, temperature: float | Tensor = 0.1, form: str = "outside",
    denominator: str = "all", margin: float = 0.0, symmetric: bool = False, normalize: bool = True,
    reduction: str = "mean", gather: bool | str = False, positives: Tensor | None = None,
    contrasts: Contrasts | None = None, contrast_clusters: Tensor | None = None, ids: Tensor | None = None,
    contrast_ids: Tensor | None = None, contrast_bias: Tensor | None = None, weights: Tensor | None = None,
    assignments: Tensor | None = None, contrast_assignments: Tensor | None = None, return_stats: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def cluster_infonce(
    embeddings: Tensor, clusters: Tensor | None = None, *, temperature: float | Tensor = 0.1, form: str = "outside",
    denominator: str = "all", margin: float = 0.0, symmetric: bool = False, normalize: bool = True,
    reduction: str = "mean", gather: bool | str = False, positives: Tensor | None = None,
    contrasts: Contrasts | None = None, contrast_clusters: Tensor | None = None, ids: Tensor | None = None,
    contrast_ids: Tensor | None = None, contrast_bias: Tensor | None = None, weights: Tensor | None = None,
    assignments: Tensor | None = None, contrast_assignments: Tensor | None = None, return_stats: bool,
) -> LossResult: ...  # fmt: skip
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
    assignments: Tensor | None = None,
    contrast_assignments: Tensor | None = None,
    return_stats: bool = False,
) -> LossResult:
    """The stateless form of :class:`ClusterInfoNCE`; formulas, shapes, dtypes, errors and sources are described there.

    The mean over anchors i of ``logsumexp_{j in A_i}(s_ij) - mean_{j in P_i}(s_ij)`` at the defaults, with logits
    s_ij = <x_i, y_j> / (|x_i| |y_j| temperature), contrasts A_i and positives P_i. Options as in the constructor there,
    tensors as in ``forward`` there; a scalar, or ``[N]`` / ``[N, V]`` with ``reduction="none"``. With
    ``return_stats=True`` a pair of that and a :class:`LossStats`.
    """
    try:
        temperature = positive_number("temperature", temperature)
        formula: InfoNCE | Weighted = _check_formula(form, denominator, margin)
        options = check_options(symmetric, normalize, reduction, gather)
        if assignments is not None or contrast_assignments is not None:
            _check_replaced(clusters=clusters, contrast_clusters=contrast_clusters, positives=positives)
            if return_stats:
                raise ValueError(
                    "return_stats: expected False with assignments, which make no set of positives, got True"
                )
            _check_soft_formula(form=(form, "outside"), denominator=(denominator, "all"), margin=(margin, 0.0))
            if gather == "ring":
                raise ValueError("gather: expected False or True with assignments, got 'ring'")
            formula = Weighted()
            posed = pose_assigned(
                embeddings, assignments, contrasts, contrast_assignments, ids, contrast_ids, contrast_bias
            )
        else:
            posed = pose(
                embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias,
                normalize,
            )  # fmt: skip
        scale = inverse_temperature(temperature, posed)
    except Exception as error:
        tell_others(gather, error, embeddings)
        raise
    return reduced_loss(posed, scale, formula, options, contrast_bias, weights, return_stats)


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
        gather: True or ``"ring"``: contrast against the rows of all processes of the default group of
            `torch.distributed`; without one a no-op. Each process returns its share of the loss of the whole batch,
            times their number: the mean over processes is that loss (docs/distributed.md).

    Shapes of ``forward(embeddings, clusters=None, *, positives=None, contrasts=None, contrast_clusters=None, ids=None,
    contrast_ids=None, contrast_bias=None, weights=None, temperature=None, assignments=None,
    contrast_assignments=None, return_stats=False)``:

    - embeddings: ``[N, D]``, or ``[N, V, D]`` for V views of N samples. float64, float32, bfloat16, float16.
    - clusters: ``[N]`` integers. Negative: no cluster, positive only with its own other views. None: each sample is a
      cluster of its own (self-contrast then needs two views).
    - positives: as embeddings, or ``[N, D]`` for all views of a sample; one more positive of each anchor that is nobody
      else's contrast (MoCo's momentum key).
    - contrasts: None for self-contrast; or ``[M, D]``, a :class:`MemoryQueue`, a :class:`MemoryBank`, or a list of
      such, concatenated. Gradients flow into tensors that require them. Stored rows are taken as they are, whatever
      ``normalize`` says, and bring clusters and ids of their own: a queue that stores clusters requires ``clusters``;
      one that does not holds negatives only and requires ``positives``, if no tensor is beside it.
    - contrast_clusters: ``[M]`` integers, M without stored rows; with ``clusters=None``, the index of the sample that
      a contrast belongs to, negative: none. None: contrast i of the tensors belongs with anchor row i (M >= rows) and
      shares its cluster, further contrasts are negatives.
    - ids, contrast_ids: ``[N]`` and ``[M]`` integers, M without stored rows; equal ones make a pair inadmissible (a
      stale copy of oneself).
    - contrast_bias: ``[M]`` floating, finite, added to the logits (``[N * V]`` in self-contrast).
    - weights: ``[N]`` floating >= 0 on the anchors' terms; the mean becomes the weighted mean. The reverse direction
      of ``symmetric`` is not weighted.
    - temperature: overrides the module's for this call.
    - assignments: ``[N, C]`` floating, finite, >= 0, in place of ``clusters``: soft ones, such as Sinkhorn's; of views
      also ``[N, V, C]``, each view its own. Contrast j is then a positive of weight :math:`w_{ij} = \langle r_i, r_j
      \rangle`, another view of the sample too, and the anchor's loss is :math:`\log \sum_{j \in A_i} e^{s_{ij}} -
      \sum_{j \in A_i} w_{ij} s_{ij} / \sum_{j \in A_i} w_{ij}`. It counts if its weights sum to at least 1e-30
      (float64 rows: 1e-200) where rows' largest assignments lie around 1, as they are scaled first. Differentiable in
      the assignments. Only ``form="outside"`` over all contrasts, without margin and ``positives``; contrasts are
      tensors.
    - contrast_assignments: ``[M, C]``; None: contrast i has those of anchor row i (M >= rows), further ones zeros.
    - return_stats: True returns ``(loss, stats)``, stats a :class:`LossStats` (top-1 accuracy, mean similarities and
      entropy, all detached) out of the same sweep. The loss and its gradient are the same to the bit. Not with
      assignments, nor with ``gather`` over several processes.

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
        formula = _check_formula(form, denominator, margin)
        check_options(symmetric, normalize, reduction, gather)
        self.temperature = positive_number(
            "temperature", temperature
        )  # nn.Module registers it where it is an nn.Parameter
        self.form = form
        self.denominator = denominator
        self.margin = formula.margin
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
        assignments: Tensor | None = None,
        contrast_assignments: Tensor | None = None,
        return_stats: bool = False,
    ) -> LossResult:
        """The loss; shapes and errors are in the class's description."""
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
            assignments=assignments,
            contrast_assignments=contrast_assignments,
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value in (
                ("form", self.form),
                ("denominator", self.denominator),
                ("margin", self.margin),
                ("symmetric", self.symmetric),
                ("normalize", self.normalize),
                ("reduction", self.reduction),
                *([("gather", self.gather)] if self.gather is not False else []),
            )
        )
        return shown_temperature(self.temperature) + options


# Presets.


class _TwoViewLoss(ClusterInfoNCE):
    def forward(self, z0: Tensor, z1: Tensor, *, return_stats: bool = False) -> LossResult:  # type: ignore[override]
        try:
            check_rows("z0", z0)
            check_rows("z1", z1, like=z0)
            if z1.shape != z0.shape:
                raise ValueError(f"z1: expected shape {list(z0.shape)}, as z0, got {list(z1.shape)}")
        except Exception as error:
            tell_others(self.gather, error, z0)
            raise
        return super().forward(torch.stack((z0, z1), dim=1), return_stats=return_stats)


class NTXentLoss(_TwoViewLoss):
    """SimCLR's loss of two views (Chen et al. 2020): ``NTXentLoss(temperature=0.5)(z0, z1)``, both ``[N, D]``.

    The mean over all 2 N rows of ``logsumexp_j(s_ij) - s_ip``, p the row's other view, j over all rows but i. Dtypes,
    result and errors are those of :class:`ClusterInfoNCE`; with ``reduction="none"`` the result is ``[N, 2]``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        margin: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
    ) -> None:
        super().__init__(temperature, margin=margin, normalize=normalize, reduction=reduction, gather=gather)


class DCLLoss(_TwoViewLoss):
    """The decoupled loss of two views (Yeh et al. 2022): ``DCLLoss(temperature=0.1)(z0, z1)``, both ``[N, D]``.

    As :class:`NTXentLoss`, but the log-sum-exp runs over the negatives alone.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        margin: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
    ) -> None:
        super().__init__(
            temperature,
            denominator="negatives",
            margin=margin,
            normalize=normalize,
            reduction=reduction,
            gather=gather,
        )


class SupConLoss(ClusterInfoNCE):
    """Supervised contrastive loss (Khosla et al. 2020): ``SupConLoss(temperature=0.07)(features, labels)``.

    The mean over anchors i that have a positive of ``logsumexp_{j != i}(s_ij) - mean_{j in P_i}(s_ij)`` (L_out; L_in
    with ``form="inside"``). Features are ``[N, V, D]`` or ``[N, D]``, labels ``[N]`` integers or None (SimCLR). There
    is no ``base_temperature``. Dtypes, result and errors are those of :class:`ClusterInfoNCE`.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        form: str = "outside",
        margin: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
    ) -> None:
        super().__init__(temperature, form=form, margin=margin, normalize=normalize, reduction=reduction, gather=gather)

    def forward(  # type: ignore[override]
        self, features: Tensor, labels: Tensor | None = None, *, return_stats: bool = False
    ) -> LossResult:
        try:
            check_rows("features", features, dims=(2, 3))
            if labels is not None:
                check_ids("labels", labels, features.shape[0], features.device)
            elif features.dim() == 2 or features.shape[1] == 1:
                got = list(features.shape)
                raise ValueError(f"labels: expected labels for features of a single view {got}, got None")
        except Exception as error:
            tell_others(self.gather, error, features)
            raise
        return super().forward(features, labels, return_stats=return_stats)


class ClipLoss(nn.Module):
    """CLIP's loss (Radford et al. 2021): ``ClipLoss()(image_features, text_features, logit_scale)``.

    Features are ``[N, D]`` and taken as they come, as open_clip's are normalised by the model; ``logit_scale`` is
    1 / temperature (open_clip passes ``logit_scale.exp()``), a number or a tensor of one element. The loss is the mean
    of the cross-entropies of the rows and of the columns of ``logit_scale * image @ text.T`` against the diagonal;
    with ``output_dict=True`` it comes as ``{"contrastive_loss": loss}``, as open_clip's training loop asks for it. With
    ``return_stats=True`` a :class:`LossStats` comes too: ``(loss, stats)``, or as ``"stats"`` of the dictionary.
    ``logit_bias`` is not looked at: one number added to every logit cancels in both softmaxes. Dtypes and errors are
    those of :class:`ClusterInfoNCE`, and so is ``gather``.
    """

    def __init__(self, *, gather: bool | str = False) -> None:
        super().__init__()
        check_options(True, False, "mean", gather)
        self.gather = gather

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        return_stats: bool = False,
    ) -> LossResult | dict[str, Tensor | LossStats]:
        try:
            check_flag("output_dict", output_dict)
            logit_scale = positive_number("logit_scale", logit_scale)
            check_rows("image_features", image_features)
            check_rows("text_features", text_features, like=image_features)
            if len(text_features) != len(image_features):
                expected = f"{len(image_features)} rows, as in image_features"
                raise ValueError(f"text_features: expected {expected}, got {len(text_features)}")
            posed = pose(image_features, None, None, text_features, None, None, None, None)
            formula, options = InfoNCE("outside", "all", 0.0), check_options(True, False, "mean", self.gather)
            scale = scalar("logit_scale", logit_scale, posed)
        except Exception as error:
            tell_others(self.gather, error, image_features)
            raise
        found = reduced_loss(posed, scale, formula, options, return_stats=return_stats)
        if not output_dict:
            return found
        return {"contrastive_loss": found} if isinstance(found, Tensor) else dict(zip(CLIP_OUTPUTS, found, strict=True))


class MoCoLoss(ClusterInfoNCE):
    """MoCo's loss (He et al. 2020): ``MoCoLoss(temperature=0.07)(query, key, queue)``.

    The mean of ``log(exp(s_i) + sum_k exp(s_ik)) - s_i``, s_i the logit of query i with its key and s_ik with row k of
    the queue. Queries and keys are ``[N, D]``; the queue is a :class:`MemoryQueue` without clusters, its rows taken as
    stored, or a tensor ``[K, D]`` (all negatives; K may be 0). Dtypes, result and errors are those of
    :class:`ClusterInfoNCE`. With ``gather`` only the mean is taken over all processes: queues are each process's own,
    and a tensor, which would be gathered, is a ``ValueError``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        margin: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
    ) -> None:
        super().__init__(temperature, margin=margin, normalize=normalize, reduction=reduction, gather=gather)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, queue: Tensor | MemoryQueue, *, return_stats: bool = False
    ) -> LossResult:
        try:
            check_rows("query", query)
            check_rows("key", key, like=query)
            if key.shape != query.shape:
                raise ValueError(f"key: expected shape {list(query.shape)}, as query, got {list(key.shape)}")
            if isinstance(queue, MemoryQueue):
                if queue.cluster_ids is not None:
                    raise ValueError("queue: expected one without clusters, as all of its rows are negatives")
            elif not isinstance(queue, Tensor):
                kind = type(queue).__name__
                raise TypeError(f"queue: expected a tensor or a MemoryQueue without clusters, got {kind}")
            elif self.gather is not False:
                raise ValueError(f"queue: expected a MemoryQueue with gather={self.gather!r}, got a tensor")
            check_rows("queue", queue.rows if isinstance(queue, MemoryQueue) else queue, like=query)
        except Exception as error:
            tell_others(self.gather, error, query)
            raise
        if isinstance(queue, MemoryQueue):
            return super().forward(query, positives=key, contrasts=queue, return_stats=return_stats)
        nobody = torch.full((len(queue),), -1, dtype=torch.int64, device=queue.device)
        return super().forward(
            query, positives=key, contrasts=queue, contrast_clusters=nobody, return_stats=return_stats
        )


# Options.


def _check_formula(form: str, denominator: str, margin: float) -> InfoNCE:
    check_option("form", form, FORMS)
    check_option("denominator", denominator, DENOMINATORS)
    margin = finite_number("margin", margin)
    if margin < 0:
        raise ValueError(f"margin: expected a number of at least 0, got {margin}")
    return InfoNCE(form, denominator, margin)


def _check_replaced(**arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with assignments, got a value")


def _check_soft_formula(**options: tuple[object, object]) -> None:
    for name, (value, expected) in options.items():
        if value != expected:
            raise ValueError(f"{name}: expected {expected!r} with assignments, got {value!r}")
