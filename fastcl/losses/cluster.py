"""Cluster InfoNCE, the loss that the others are cases of."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, overload

from torch import Tensor, nn

from ..checks import check_flag, positive_number
from ..distributed import tell_others
from .batch import Batch, Contrasts, Tensors, assigned_batch, batch
from .formulas import InfoNCE, Weighted, infonce
from .modules import shown_temperature
from .options import LossOptions, OptionKeywords, options_of, parse_options, shown_options, takes_options
from .reduce import LossResult, inverse_temperature, reduced_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def cluster_infonce(
    embeddings: Tensor, clusters: Tensor | None = None, *, temperature: float | Tensor = 0.1,
    positives: Tensor | None = None, contrasts: Contrasts | None = None, contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None, contrast_ids: Tensor | None = None, contrast_bias: Tensor | None = None,
    weights: Tensor | None = None, assignments: Tensor | None = None, contrast_assignments: Tensor | None = None,
    return_stats: Literal[False] = False, **options: Unpack[OptionKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def cluster_infonce(
    embeddings: Tensor, clusters: Tensor | None = None, *, temperature: float | Tensor = 0.1,
    positives: Tensor | None = None, contrasts: Contrasts | None = None, contrast_clusters: Tensor | None = None,
    ids: Tensor | None = None, contrast_ids: Tensor | None = None, contrast_bias: Tensor | None = None,
    weights: Tensor | None = None, assignments: Tensor | None = None, contrast_assignments: Tensor | None = None,
    return_stats: bool, **options: Unpack[OptionKeywords],
) -> LossResult: ...  # fmt: skip
@takes_options()
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
    return_stats: bool = False,
    **options: Unpack[OptionKeywords],
) -> LossResult:
    """The stateless form of :class:`ClusterInfoNCE`; formulas, shapes, dtypes, errors and sources are described there.

    The mean over anchors i of ``logsumexp_{j in A_i}(s_ij) - mean_{j in P_i}(s_ij)`` at the defaults, with logits
    s_ij = <x_i, y_j> / (|x_i| |y_j| temperature), contrasts A_i and positives P_i. Options are those of the constructor
    there, tensors those of ``forward`` there; a scalar, or ``[N]`` / ``[N, V]`` with ``reduction="none"``. With
    ``return_stats=True`` a pair of that and a :class:`LossStats`.
    """
    given = Tensors(
        embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias, assignments,
        contrast_assignments,
    )  # fmt: skip
    try:
        parsed = parse_options("cluster_infonce", options)
    except Exception as error:
        tell_others(options.get("gather", False), error, embeddings)
        raise
    return loss_of(given, parsed, temperature, weights, return_stats)


def loss_of(
    given: Tensors,
    options: LossOptions,
    temperature: float | Tensor,
    weights: Tensor | None = None,
    return_stats: bool = False,
) -> LossResult:
    """`cluster_infonce` of its tensors and its options, which are checked here."""
    try:
        temperature = positive_number("temperature", temperature)
        options = options.checked()
        formula: InfoNCE | Weighted
        if given.assignments is None and given.contrast_assignments is None:
            formula = infonce(options)
            rows = batch(given, options.normalize)
        else:
            formula, rows = Weighted(), _assigned(given, options, return_stats)
        scale = inverse_temperature(temperature, rows)
    except Exception as error:
        tell_others(options.gather, error, given.embeddings)
        raise
    return reduced_loss(rows, scale, formula, options, weights, return_stats)


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
        label_smoothing: a in [0, 1): :math:`(1 - a)` times the loss plus :math:`a (\log \sum_{j \in A_i} e^{s_{ij}} -
            \operatorname{mean}_{j \in A_i} s_{ij})`. With one positive that is ``torch.nn.functional.cross_entropy``'s
            option. Only with ``form="outside"``, ``denominator="all"`` and no margin; not with assignments.
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
    - contrast_bias: ``[M]`` floating, added to the logits (``[N * V]`` in self-contrast). -inf leaves a contrast out
      (padding): it is in no set and no count, a positive neither, in both directions, whatever its row holds.
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

    gather: bool | str

    # Which options the constructor takes, and the values of others: a preset has its own.
    _takes: ClassVar[tuple[str, ...]] = LossOptions._fields
    _fixed: ClassVar[OptionKeywords] = {}

    @takes_options()
    def __init__(self, temperature: float | Tensor = 0.1, **options: Unpack[OptionKeywords]) -> None:
        super().__init__()
        parsed = parse_options(type(self).__name__, options, self._takes, self._fixed).checked()
        # nn.Module registers it where it is an nn.Parameter.
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
        return_stats: bool = False,
    ) -> LossResult:
        """The loss; shapes and errors are in the class's description."""
        given = Tensors(
            embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids, contrast_bias,
            assignments, contrast_assignments,
        )  # fmt: skip
        temperature = self.temperature if temperature is None else temperature
        return loss_of(given, options_of(self), temperature, weights, return_stats)

    def extra_repr(self) -> str:
        return shown_temperature(self.temperature) + shown_options(self)


# Assignments.


def _assigned(given: Tensors, options: LossOptions, return_stats: bool) -> Batch:
    """The batch of a call with assignments; ValueError for what they replace or do not go with."""
    for name in ("clusters", "contrast_clusters", "positives"):
        if getattr(given, name) is not None:
            raise ValueError(f"{name}: expected None with assignments, got a value")
    check_flag("return_stats", return_stats)
    if return_stats:
        raise ValueError("return_stats: expected False with assignments, got True")
    defaults = LossOptions()
    for name in ("form", "denominator", "margin", "label_smoothing"):
        value, expected = getattr(options, name), getattr(defaults, name)
        if value != expected:
            raise ValueError(f"{name}: expected {expected!r} with assignments, got {value!r}")
    if options.gather == "ring":
        raise ValueError("gather: expected False or True with assignments, got 'ring'")
    return assigned_batch(given, options.normalize)
