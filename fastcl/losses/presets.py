"""Presets of `ClusterInfoNCE` for well-known losses, called as in the usual libraries."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_flag, check_ids, check_rows, positive_number
from ..distributed import tell_others
from ..memory import MemoryQueue
from .batch import Tensors, batch
from .cluster import ClusterInfoNCE
from .formulas import infonce
from .modules import GroupModule
from .options import (
    DecoupledKeywords,
    LossOptions,
    OptionKeywords,
    PresetKeywords,
    SupConKeywords,
    option_names,
    refuses_renamed,
    takes_options,
)
from .reduce import LossResult, reduced_loss, scalar
from .small import mean_on_cpu, same_shape, small_mean
from .summary import LossStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _TwoViewLoss(ClusterInfoNCE):
    def forward(self, z0: Tensor, z1: Tensor, *, return_stats: bool = False) -> LossResult:  # type: ignore[override]
        try:
            check_rows("z0", z0)
            check_rows("z1", z1, like=z0)
            if z1.shape != z0.shape:
                raise ValueError(f"z1: expected shape {list(z0.shape)}, as z0, got {list(z1.shape)}")
        except Exception as error:
            tell_others(self.gather, error, z0, group=self.group)
            raise
        return super().forward(torch.stack((z0, z1), dim=1), return_stats=return_stats)


class NTXentLoss(_TwoViewLoss):
    """SimCLR's loss of two views (Chen et al. 2020): ``NTXentLoss(temperature=0.5)(z0, z1)``, both ``[N, D]``.

    The mean over all 2 N rows i of ``logsumexp_{j != i}(s_ij) - s_ip``, where p is the other view of row i. Dtypes,
    result and errors are those of :class:`ClusterInfoNCE`; with ``reduction="none"`` the result is ``[N, 2]``.
    """

    _takes = option_names(PresetKeywords)

    @takes_options(PresetKeywords)
    def __init__(self, temperature: float | Tensor = 0.5, **options: Unpack[PresetKeywords]) -> None:
        super().__init__(temperature, **options)


class DCLLoss(_TwoViewLoss):
    """The decoupled loss of two views (Yeh et al. 2022): ``DCLLoss(temperature=0.1)(z0, z1)``, both ``[N, D]``.

    As :class:`NTXentLoss`, but the log-sum-exp runs over the negatives alone.
    """

    _fixed: ClassVar[OptionKeywords] = {"denominator": "negatives"}
    _takes = option_names(DecoupledKeywords)

    @takes_options(DecoupledKeywords)
    def __init__(self, temperature: float | Tensor = 0.1, **options: Unpack[DecoupledKeywords]) -> None:
        super().__init__(temperature, **options)


class SupConLoss(ClusterInfoNCE):
    """Supervised contrastive loss (Khosla et al. 2020): ``SupConLoss(temperature=0.07)(features, labels)``.

    The mean over anchors i that have a positive of ``logsumexp_{j != i}(s_ij) - mean_{j in P_i}(s_ij)`` (L_out; L_in
    with ``form="inside"``). Features are ``[N, V, D]`` or ``[N, D]``, labels ``[N]`` integers or None (SimCLR). There
    is no ``base_temperature``. Dtypes, result and errors are those of :class:`ClusterInfoNCE`.
    """

    _takes = option_names(SupConKeywords)

    @takes_options(SupConKeywords)
    def __init__(self, temperature: float | Tensor = 0.07, **options: Unpack[SupConKeywords]) -> None:
        super().__init__(temperature, **options)

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
            tell_others(self.gather, error, features, group=self.group)
            raise
        return super().forward(features, labels, return_stats=return_stats)


class ClipLoss(GroupModule):
    """CLIP's loss (Radford et al. 2021): ``ClipLoss()(image_features, text_features, logit_scale)``.

    Features are ``[N, D]`` and are not normalised here: open_clip's models do that. ``logit_scale`` is 1 / temperature
    (open_clip passes ``logit_scale.exp()``), a number or a tensor of one element. The loss is the mean of the
    cross-entropies of the rows and of the columns of ``logit_scale * image @ text.T`` against the diagonal.

    ``output_dict=True`` returns ``{"contrastive_loss": loss}``, as open_clip's training loop expects.
    ``return_stats=True`` returns ``(loss, stats)``, stats a :class:`LossStats`, and with the dictionary ``(dictionary,
    stats)``, so that a training loop may sum the dictionary's values. With several processes pass ``gather``.
    ``logit_bias``, which open_clip's SigLIP models return, is ignored: one number added to every logit cancels in both
    softmaxes. The loss is CLIP's; SigLIP's is :class:`SigLipLoss`. Each module warns of it once (not under
    ``torch.compile``). Dtypes, errors, ``label_smoothing`` and ``gather`` are those of :class:`ClusterInfoNCE`.
    """

    _warned = False
    label_smoothing: float = 0.0

    @refuses_renamed
    def __init__(self, *, label_smoothing: float = 0.0, gather: bool | str = False, group: Any = None) -> None:
        super().__init__()
        options = LossOptions(label_smoothing=label_smoothing, gather=gather, group=group).checked()
        self.label_smoothing, self.gather, self.group = options.label_smoothing, options.gather, options.group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        return_stats: bool = False,
    ) -> LossResult | dict[str, Tensor] | tuple[dict[str, Tensor], LossStats]:
        try:
            options = LossOptions(
                label_smoothing=self.label_smoothing, symmetric=True, normalize=False, gather=self.gather,
                group=self.group,
            ).checked()  # fmt: skip
            given = Tensors(image_features, contrasts=text_features)
            if logit_bias is None and type(output_dict) is bool and same_shape(image_features, text_features):
                quick = mean_on_cpu(given, options, logit_scale, False, return_stats=return_stats)
                if quick is not None:
                    return {"contrastive_loss": quick} if output_dict else quick
            check_flag("output_dict", output_dict)
            logit_scale = positive_number("logit_scale", logit_scale)
            check_rows("image_features", image_features)
            check_rows("text_features", text_features, like=image_features)
            if text_features.shape[0] != image_features.shape[0]:
                expected = f"{image_features.shape[0]} rows, as in image_features"
                raise ValueError(f"text_features: expected {expected}, got {text_features.shape[0]}")
            found: LossResult | None
            found = None if return_stats is not False else small_mean(given, options, logit_scale, "logit_scale")
            if found is None:
                rows = batch(given, options.normalize)
                scale = scalar("logit_scale", logit_scale, rows)
        except Exception as error:
            tell_others(self.gather, error, image_features, group=self.group)
            raise
        if logit_bias is not None and not torch.compiler.is_compiling() and not self._warned:
            self._warned = True
            warnings.warn(
                "logit_bias: expected None; its value is ignored, as one number added to every logit cancels in both "
                "softmaxes. This is CLIP's softmax loss; SigLIP's sigmoid loss is fastcl.SigLipLoss.",
                stacklevel=4,  # the line that called the module
            )
        if found is None:
            found = reduced_loss(rows, scale, infonce(options), options, return_stats=return_stats)
        if not output_dict:
            return found
        if isinstance(found, Tensor):
            return {"contrastive_loss": found}
        loss, stats = found
        return {"contrastive_loss": loss}, stats

    def extra_repr(self) -> str:
        shown = {"label_smoothing": self.label_smoothing, "gather": self.gather, "group": self.group}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value)


class MoCoLoss(ClusterInfoNCE):
    """MoCo's loss (He et al. 2020): ``MoCoLoss(temperature=0.07)(query, key, queue)``.

    The mean of ``log(exp(s_i) + sum_k exp(s_ik)) - s_i``, where s_i is the logit of query i with its key and s_ik its
    logit with row k of the queue. Queries and keys are ``[N, D]``. The queue is a :class:`MemoryQueue` without
    clusters, whose rows are taken as stored, or a tensor ``[K, D]``; all of its rows are negatives, and K may be 0.
    Dtypes, result and errors are those of :class:`ClusterInfoNCE`. With ``gather`` each process keeps its own queue and
    only the mean is over all processes; a tensor as queue is then a ``ValueError``, as it would be gathered.
    """

    _takes = option_names(PresetKeywords)

    @takes_options(PresetKeywords)
    def __init__(self, temperature: float | Tensor = 0.07, **options: Unpack[PresetKeywords]) -> None:
        super().__init__(temperature, **options)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, queue: Tensor | MemoryQueue, *, return_stats: bool = False
    ) -> LossResult:
        try:
            check_rows("query", query)
            check_rows("key", key, like=query)
            if key.shape != query.shape:
                raise ValueError(f"key: expected shape {list(query.shape)}, as query, got {list(key.shape)}")
            if isinstance(queue, MemoryQueue):
                for kind, stored in (("clusters", queue.cluster_ids), ("tags", queue.tag_words)):
                    if stored is not None:
                        raise ValueError(f"queue: expected one without {kind}, got a MemoryQueue that stores {kind}")
            elif not isinstance(queue, Tensor):
                kind = type(queue).__name__
                raise TypeError(f"queue: expected a tensor or a MemoryQueue without clusters, got {kind}")
            elif self.gather is not False:
                raise ValueError(f"queue: expected a MemoryQueue with gather={self.gather!r}, got a tensor")
            check_rows("queue", queue.rows if isinstance(queue, MemoryQueue) else queue, like=query)
        except Exception as error:
            tell_others(self.gather, error, query, group=self.group)
            raise
        if isinstance(queue, MemoryQueue):
            return super().forward(query, positives=key, contrasts=queue, return_stats=return_stats)
        no_cluster = torch.full((queue.shape[0],), -1, dtype=torch.int64, device=queue.device)
        return super().forward(
            query, positives=key, contrasts=queue, contrast_clusters=no_cluster, return_stats=return_stats
        )
