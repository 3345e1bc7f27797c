"""Losses that correct for negatives of the anchor's own class and give hard negatives more weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import finite_number, positive_number, values_visible
from ..distributed import tell_others
from .batch import Contrasts, Tensors, batch
from .formulas import Debiased
from .modules import GroupModule, shown_temperature
from .options import LossOptions
from .reduce import LossResult, inverse_temperature, reduced_loss

# Beyond these, logits times beta and logits times 1 + beta differ only by rounding.
LARGEST_BETA = {torch.float32: 2.0**22, torch.float64: 2.0**51}


class HardNegativeLoss(GroupModule):
    r"""Contrastive loss with debiased, hard negatives (Robinson et al. 2021), in the log domain.

    The logits are :math:`s_{ij} = \langle \hat x_i, \hat y_j \rangle / t`; anchor i has positives P_i and N negatives
    N_i. Each negative has a weight in proportion to :math:`e^{\beta s_{ij}}`, and a share :math:`\tau^+` of the
    negatives is assumed to be of the anchor's class:

    .. math::
        N_g = \max\left( \frac{N}{1 - \tau^+} \left(
            \frac{\sum_{j \in N_i} e^{(1 + \beta) s_{ij}}}{\sum_{j \in N_i} e^{\beta s_{ij}}}
            - \tau^+ \operatorname{mean}_{j \in P_i} e^{s_{ij}} \right), N e^{-1/t} \right), \qquad
        l_i = \log\Big( \sum_{j \in P_i} e^{s_{ij}} + N_g \Big) - \operatorname{mean}_{j \in P_i} s_{ij}

    With one positive this is the paper's loss. With :math:`\beta = 0` it is :class:`DebiasedLoss`; with
    :math:`\tau^+ = 0` as well it is :class:`ClusterInfoNCE`. Nothing overflows at any temperature.

    Args:
        temperature: t > 0, number, tensor or ``nn.Parameter``, as in :class:`ClusterInfoNCE`.
        tau_plus: :math:`\tau^+`, the probability of a class, in [0, 1).
        beta: concentration on hard negatives, from 0 to 2^22 (float64 rows: 2^51).
        normalize: cosine similarity. Without it the floor is still :math:`N e^{-1/t}`, which is that of unit rows.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the anchors that have a positive.
        gather: True or ``"ring"``: contrast against the rows of all processes of a group of
            `torch.distributed`; without a group it has no effect. Each process returns its share of the loss of the
            whole batch, times the number of processes: the mean over processes is that loss (docs/distributed.md).
        group: the process group of ``gather``; None: the default group.

    Shapes of ``forward(embeddings, clusters=None, *, positives=None, contrasts=None, contrast_clusters=None, ids=None,
    contrast_ids=None, weights=None, temperature=None, return_stats=False)``, dtypes, result and errors are those of
    :class:`ClusterInfoNCE`. ``tau_plus`` or ``beta`` out of range: ``ValueError``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        tau_plus, beta = finite_number("tau_plus", tau_plus), finite_number("beta", beta)
        if not 0 <= tau_plus < 1:
            raise ValueError(f"tau_plus: expected a number of at least 0 and below 1, got {tau_plus}")
        if beta < 0:
            raise ValueError(f"beta: expected a number of at least 0, got {beta}")
        LossOptions(normalize=normalize, reduction=reduction, gather=gather, group=group).checked()
        self.temperature = positive_number("temperature", temperature)  # nn.Module registers an nn.Parameter
        self.tau_plus = tau_plus
        self.beta = beta
        self.normalize = normalize
        self.reduction = reduction
        self.gather, self.group = gather, group

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
        weights: Tensor | None = None,
        temperature: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> LossResult:
        """The loss. The class describes shapes and errors."""
        try:
            options = LossOptions(
                normalize=self.normalize, reduction=self.reduction, gather=self.gather, group=self.group
            ).checked()
            temperature = positive_number("temperature", self.temperature if temperature is None else temperature)
            given = Tensors(embeddings, clusters, positives, contrasts, contrast_clusters, ids, contrast_ids)
            rows = batch(given, options.normalize)
            scale = inverse_temperature(temperature, rows)
            if self.beta:
                _check_beta(self.beta, temperature, scale)
        except Exception as error:
            tell_others(self.gather, error, embeddings, group=self.group)
            raise
        formula = Debiased(self.tau_plus, self.beta)
        return reduced_loss(rows, scale, formula, options, weights, return_stats)

    def extra_repr(self) -> str:
        options = f"tau_plus={self.tau_plus:g}, beta={self.beta:g}, normalize={self.normalize!r}"
        return f"{shown_temperature(self.temperature)}, {options}, reduction={self.reduction!r}"


def _check_beta(beta: float, temperature: float | Tensor, scale: Tensor) -> None:
    """Raises ValueError unless logits times 1 + beta and times beta differ in the dtype of `scale`, 1 / temperature."""
    most = LARGEST_BETA[scale.dtype]
    if not isinstance(temperature, Tensor) or values_visible(temperature):
        number = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
        most = min(most, torch.finfo(scale.dtype).max * number - 1)
    if beta > most:
        raise ValueError(f"beta: expected at most {most:g} for {scale.dtype} and this temperature, got {beta:g}")


class DebiasedLoss(HardNegativeLoss):
    r"""The debiased contrastive loss (Chuang et al. 2020): :class:`HardNegativeLoss` without hard negatives.

    .. math::
        N_g = \max\left( \frac{1}{1 - \tau^+} \Big( \sum_{j \in N_i} e^{s_{ij}}
            - N \tau^+ \operatorname{mean}_{j \in P_i} e^{s_{ij}} \Big), N e^{-1/t} \right)

    Arguments, shapes, dtypes and errors are those of :class:`HardNegativeLoss` with ``beta=0``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        tau_plus: float = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
        group: Any = None,
    ) -> None:
        super().__init__(
            temperature, tau_plus, 0.0, normalize=normalize, reduction=reduction, gather=gather, group=group
        )
