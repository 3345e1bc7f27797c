"""Cluster InfoNCE, the general loss. SupCon, NT-Xent, CLIP, MoCo and the decoupled loss are cases of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, overload

import torch
from torch import Tensor

from ..checks import check_flag, positive_number
from ..distributed import tell_others
from ..guide import Guide
from .batch import Batch, Contrasts, Tensors, assigned_batch, batch
from .formulas import InfoNCE, Weighted, infonce
from .modules import GroupModule, shown_temperature
from .options import LossOptions, OptionKeywords, options_of, parse_options, shown_options, takes_options
from .pair_form import pair_form_loss
from .reduce import LossResult, inverse_temperature, reduced_loss
from .rules import RULES, check_rules, has_rules, ruled, with_thresholds
from .small import mean_on_cpu, small_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def cluster_infonce(
    embeddings: Tensor, clusters: Tensor | None = None, *, temperature: float | Tensor = 0.1,
    positives: Tensor | None = None, contrasts: Contrasts | None = None, contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None, contrast_ids: Tensor | None = None, contrast_bias: Tensor | None = None,
    weights: Tensor | None = None, assignments: Tensor | None = None, contrast_assignments: Tensor | None = None,
    groups: Tensor | None = None, contrast_groups: Tensor | None = None, guide: Guide | None = None,
    hard_negatives: Tensor | None = None, keep_pairs: bool = False,
    return_stats: Literal[False] = False, **options: Unpack[OptionKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def cluster_infonce(
    embeddings: Tensor, clusters: Tensor | None = None, *, temperature: float | Tensor = 0.1,
    positives: Tensor | None = None, contrasts: Contrasts | None = None, contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None, contrast_ids: Tensor | None = None, contrast_bias: Tensor | None = None,
    weights: Tensor | None = None, assignments: Tensor | None = None, contrast_assignments: Tensor | None = None,
    groups: Tensor | None = None, contrast_groups: Tensor | None = None, guide: Guide | None = None,
    hard_negatives: Tensor | None = None, keep_pairs: bool = False,
    return_stats: bool, **options: Unpack[OptionKeywords],
) -> LossResult: ...  # fmt: skip
@takes_options(OptionKeywords)
def cluster_infonce(
    embeddings: Tensor,
    clusters: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    positives: Tensor | None = None,
    contrasts: Contrasts | None = None,
    contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    weights: Tensor | None = None,
    assignments: Tensor | None = None,
    contrast_assignments: Tensor | None = None,
    groups: Tensor | None = None,
    contrast_groups: Tensor | None = None,
    guide: Guide | None = None,
    hard_negatives: Tensor | None = None,
    keep_pairs: bool = False,
    return_stats: bool = False,
    **options: Unpack[OptionKeywords],
) -> LossResult:
    """The stateless form of :class:`ClusterInfoNCE`, which describes formulas, shapes, dtypes, errors and sources.

    By default the loss is the mean over anchors i of ``logsumexp_{j in A_i}(s_ij) - mean_{j in P_i}(s_ij)``, with
    logits s_ij = <x_i, y_j> / (|x_i| |y_j| temperature), contrasts A_i and positives P_i. It takes the options of the
    class's constructor and the tensors of its ``forward``. The result is a scalar, or ``[N]`` / ``[N, V]`` with
    ``reduction="none"``; ``return_stats=True`` returns ``(loss, stats)``, stats a :class:`LossStats`.
    """
    given = Tensors(
        embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias, assignments,
        contrast_assignments, groups, contrast_groups, guide, hard_negatives, keep_pairs,
    )  # fmt: skip
    try:
        parsed = parse_options("cluster_infonce", options)
    except Exception as error:
        tell_others(options.get("gather", False), error, embeddings, group=options.get("group"))
        raise
    return loss_of(given, parsed, temperature, weights, return_stats)


def loss_of(
    given: Tensors,
    options: LossOptions,
    temperature: float | Tensor,
    weights: Tensor | None = None,
    return_stats: bool = False,
) -> LossResult:
    """`cluster_infonce` from its tensors and options, which this function checks."""
    try:
        options = options.checked()
        # Over pairs, and with contrasts of each anchor's own, the loss has the same bits with statistics: these have a
        # sweep of their own.
        apart = options.form == "pairs" or given.positives is not None or given.hard_negatives is not None
        quick = mean_on_cpu(given, options, temperature, True, weights, not apart and return_stats)
        if quick is not None and return_stats is False:
            return quick
        temperature = positive_number("temperature", temperature)
        if weights is None and return_stats is False:
            loss = small_mean(given, options, temperature, "temperature")
            if loss is not None:
                return loss
        formula: InfoNCE | Weighted
        if given.assignments is None and given.contrast_assignments is None:
            formula = infonce(options)
            rows = batch(given, options.normalize, ruled=True)
            if has_rules(given):
                check_rules(given, options)
                rows = ruled(given, rows, options)
        else:
            formula, rows = Weighted(), _assigned(given, options, return_stats)
        scale = inverse_temperature(temperature, rows)
    except Exception as error:
        tell_others(options.gather, error, given.embeddings, group=options.group)
        raise
    rows = with_thresholds(given.guide, rows, options)
    if quick is not None:
        with torch.no_grad():
            found = _evaluated(rows, scale, formula, options, weights, return_stats)
        assert isinstance(found, tuple)
        return quick, found[1]
    return _evaluated(rows, scale, formula, options, weights, return_stats)


def _evaluated(
    rows: Batch,
    scale: Tensor,
    formula: InfoNCE | Weighted,
    options: LossOptions,
    weights: Tensor | None,
    return_stats: bool,
) -> LossResult:
    if options.form == "pairs":
        return pair_form_loss(rows, scale, options, weights, return_stats)
    return reduced_loss(rows, scale, formula, options, weights, return_stats)


class ClusterInfoNCE(GroupModule):
    r"""Cluster-masked InfoNCE: the other rows of an anchor's cluster are its positives, all other rows its negatives.

    The logits are :math:`s_{ij} = \langle \hat x_i, \hat y_j \rangle / \text{temperature}`, minus
    ``margin / temperature`` for positives. A_i are the admissible contrasts of anchor i, P_i those in its cluster and
    N_i the others. The loss of an anchor is

    ============= =========================================================================================
    form          loss of anchor i (``denominator="negatives"`` sums over N_i in place of A_i)
    ============= =========================================================================================
    ``"outside"`` :math:`\log \sum_{j \in A_i} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i} s_{ij}`
    ``"inside"``  :math:`\log \sum_{j \in A_i} e^{s_{ij}} - \log \frac{1}{|P_i|} \sum_{j \in P_i} e^{s_{ij}}`
    ============= =========================================================================================

    ``ClusterInfoNCE()(z)`` of views ``[N, V, D]`` is SimCLR, ``(z, labels)`` is SupCon, ``(z, cluster_ids)`` is
    Cl-InfoNCE, ``(image, contrasts=text)`` with ``symmetric=True`` is CLIP. Logits are never stored: memory is
    O((N + M) D), so memory for the embeddings is the only limit on the batch.

    Args:
        temperature: number, tensor or ``nn.Parameter``. A parameter is registered and learned; it is not clamped.
        form: ``"outside"`` (SupCon's L_out), ``"inside"`` (L_in), or ``"pairs"``: the mean over all pairs of an anchor
            i and a positive p of :math:`\log(1 + \sum_{j \in N_i} e^{s_{ij} - s_{ip}})`, with "sum" their sum, with
            "none" each anchor's mean; weights multiply an anchor's pairs. Not with ``denominator="negatives"``.
        denominator: ``"all"``, or ``"negatives"`` for the decoupled loss.
        margin: cosine margin >= 0, subtracted from every positive's similarity in all terms (NT-Xent-AM).
        label_smoothing: a in [0, 1): :math:`(1 - a)` times the loss plus :math:`a (\log \sum_{j \in A_i} e^{s_{ij}} -
            \operatorname{mean}_{j \in A_i} s_{ij})`. With one positive this is the option of
            ``torch.nn.functional.cross_entropy``. Only with ``form="outside"``, ``denominator="all"`` and no margin;
            not with assignments.
        symmetric: with two sets, the mean of the anchors' loss and of the contrasts' loss over the anchors.
        normalize: True for cosine similarity, False for inner products of the rows as given.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the anchors that count: those with a positive and a
            non-empty denominator. If none counts, the loss and its gradient are 0.
        gather: True or ``"ring"``: contrast against the rows of all processes of a group of `torch.distributed`;
            without a group it has no effect. Each process returns its share of the loss of the whole batch, times the
            number of processes: the mean over processes is that loss (docs/distributed.md).
        group: the process group of ``gather``; None: the default group. Copies and pickles leave it behind.

    Shapes of ``forward(embeddings, clusters=None, *, positives=None, contrasts=None, contrast_clusters=None, ids=None,
    contrast_ids=None, contrast_bias=None, weights=None, temperature=None, assignments=None,
    contrast_assignments=None, groups=None, contrast_groups=None, guide=None, hard_negatives=None, keep_pairs=False,
    return_stats=False)``:

    - embeddings: ``[N, D]``, or ``[N, V, D]`` for V views of N samples. float64, float32, bfloat16, float16.
    - clusters: ``[N]`` integers. A negative number means no cluster: only the sample's other views are positives. None:
      each sample is its own cluster (self-contrast then needs two views). Or bool ``[N, T]``, tags: a positive shares
      at least one; a row without any has no cluster.
    - positives: shaped as embeddings, or ``[N, D]`` for all views of a sample. Each anchor has its row as one more
      positive; it is no contrast of other anchors (MoCo's momentum key).
    - contrasts: None for self-contrast; or ``[M, D]``, a :class:`MemoryQueue`, a :class:`MemoryBank`, or a list of
      these, concatenated. Gradients flow into tensors that require them. Stored rows are never normalised, whatever
      ``normalize`` says, and bring their own clusters and ids. A queue that stores clusters or tags requires
      ``clusters`` of that kind. The rows of one that stores neither are all negatives; unless tensors are in the list,
      it requires ``positives``.
    - contrast_clusters: ``[M]`` integers, or bool ``[M, T]``, for the rows of tensors only. With ``clusters=None`` they
      are indices of samples; a negative number means no sample. None: contrast i of the tensors has the cluster of
      anchor row i (M >= rows); extra contrasts are negatives.
    - ids, contrast_ids: ``[N]`` and, for the rows of tensors only, ``[M]`` integers. A pair of equal ids is
      inadmissible (an old copy of the sample itself). In self-contrast ``ids`` alone: rows of different samples with
      equal ids do not meet (duplicates).
    - keep_pairs: with two sets and no contrast_clusters, contrast i stays admissible for anchor row i although their
      ids are equal. contrast_ids=None then means the anchors' ids.
    - groups, contrast_groups: ``[N]`` and ``[M]`` integers. Only pairs of one group are admissible; a negative number
      is a group of the sample's own. contrast_groups=None: contrast i has the group of anchor row i (M = rows). Not
      with queues or banks.
    - guide: a :class:`Guide`: pairs that it finds too similar and that are no positives are inadmissible. Not with
      queues or banks.
    - hard_negatives: ``[N, H, D]``, for views also ``[N, V, H, D]``: more negatives of each anchor, contrasts of that
      anchor only, in the anchors' direction. Gradients flow.
    - contrast_bias: ``[M]`` floating (``[N * V]`` in self-contrast), added to the logits. -inf leaves a contrast out,
      for instance padding: it is in no set and no count of either direction, and the values of its row are ignored.
    - weights: ``[N]`` floating >= 0, multiply the anchors' terms; the mean becomes the weighted mean. The reverse
      direction of ``symmetric`` has no weights.
    - temperature: replaces the module's temperature in this call.
    - assignments: ``[N, C]`` floating, finite, >= 0, in place of ``clusters``: soft clusters, such as Sinkhorn's. For
      views also ``[N, V, C]``, a row for each view. Every contrast j, other views included, is then a positive of
      weight :math:`w_{ij} = \langle r_i, r_j \rangle`, and the anchor's loss is :math:`\log \sum_{j \in A_i} e^{s_{ij}}
      - \sum_{j \in A_i} w_{ij} s_{ij} / \sum_{j \in A_i} w_{ij}`. An anchor counts if its weights, after assignments
      are scaled to rows with a largest number around 1, sum to at least 1e-30 (float64 rows: 1e-200). The loss is
      differentiable in the assignments. Only with ``form="outside"``, ``denominator="all"``, no margin and no
      ``positives``; contrasts must be tensors.
    - contrast_assignments: ``[M, C]``. None: contrast i has those of anchor row i (M >= rows); extra contrasts have
      zeros.
    - return_stats: True returns ``(loss, stats)``, stats a :class:`LossStats` (top-1 accuracy, mean similarities and
      entropy, all detached) from the same sweep. Loss and gradient stay the same to the bit. With ``gather`` they
      are those of all processes' anchors. Not with assignments.

    Returns:
        A scalar, or ``[N]`` / ``[N, V]`` with ``reduction="none"``: 0 for anchors that do not count; with
        ``symmetric`` the mean of row i's two terms, which needs as many contrasts as anchor rows. float32, or float64
        for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Sources: Oord et al. 2018 (InfoNCE), Khosla et al. 2020 (SupCon: both forms), Tsai et al. 2022 (Cl-InfoNCE),
    Yeh et al. 2022 (decoupled).
    """

    form: str
    denominator: str
    margin: float
    label_smoothing: float = 0.0  # also of modules that were saved before they had it
    symmetric: bool
    normalize: bool
    reduction: str
    gather: bool | str

    # The options that the constructor takes, and fixed values of others. Presets override both.
    _takes: ClassVar[tuple[str, ...]] = LossOptions._fields
    _fixed: ClassVar[OptionKeywords] = {}

    @takes_options(OptionKeywords)
    def __init__(self, temperature: float | Tensor = 0.1, **options: Unpack[OptionKeywords]) -> None:
        super().__init__()
        parsed = parse_options(type(self).__name__, options, self._takes, self._fixed).checked()
        # nn.Module registers an nn.Parameter.
        self.temperature = positive_number("temperature", temperature)
        for name in LossOptions._fields:
            setattr(self, name, getattr(parsed, name))

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
        groups: Tensor | None = None,
        contrast_groups: Tensor | None = None,
        guide: Guide | None = None,
        hard_negatives: Tensor | None = None,
        keep_pairs: bool = False,
        return_stats: bool = False,
    ) -> LossResult:
        """The loss. The class describes shapes and errors."""
        given = Tensors(
            embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias,
            assignments, contrast_assignments, groups, contrast_groups, guide, hard_negatives, keep_pairs,
        )  # fmt: skip
        temperature = self.temperature if temperature is None else temperature
        return loss_of(given, options_of(self), temperature, weights, return_stats)

    def extra_repr(self) -> str:
        return shown_temperature(self.temperature) + shown_options(self)


# Assignments.


def _assigned(given: Tensors, options: LossOptions, return_stats: bool) -> Batch:
    """The batch of a call with assignments. ValueError for arguments and options that assignments do not support."""
    for name in ("clusters", "contrast_clusters", "positives", *RULES):
        value = getattr(given, name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected None with assignments, got a value")
    check_flag("return_stats", return_stats)
    if return_stats:
        raise ValueError("return_stats: expected False with assignments, got True")
    defaults = LossOptions()
    for name in LossOptions._fields:  # torch 2.6 cannot compile _asdict
        value, expected = getattr(options, name), getattr(defaults, name)
        if name not in ("symmetric", "normalize", "reduction", "gather", "group") and value != expected:
            raise ValueError(f"{name}: expected {expected!r} with assignments, got {value!r}")
    return assigned_batch(given, options.normalize)
