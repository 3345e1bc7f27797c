"""The decoupled loss of two views with weights on its positives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_rows, plain_number, positive_number
from ..swept import ContrastiveStats
from .batch import Tensors, batch
from .modules import shown_temperature
from .options import LossOptions, refuses_renamed
from .reduce import LossResult, inverse_temperature, reduced_loss


def dclw_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float = 0.5,
    reduction: str = "mean",
    return_stats: bool = False,
) -> LossResult:
    """The stateless form of :class:`DCLWLoss`, which describes formula, shapes and errors."""
    formula = WeightedDecoupled(plain_number("sigma", sigma))
    temperature = positive_number("temperature", temperature)
    options = LossOptions(reduction=reduction).checked()
    check_rows("z0", z0)
    check_rows("z1", z1, like=z0)
    if z1.shape != z0.shape:
        raise ValueError(f"z1: expected shape {list(z0.shape)}, as z0, got {list(z1.shape)}")
    rows = batch(Tensors(torch.stack((z0, z1), dim=1)), options.normalize)
    return reduced_loss(rows, inverse_temperature(temperature, rows), formula, options, return_stats=return_stats)


class DCLWLoss(nn.Module):
    r"""The weighted decoupled loss of two views (Yeh et al. 2022): ``DCLWLoss(temperature=0.1, sigma=0.5)(z0, z1)``.

    Of each of the 2 N rows i, with p its other view and c_i their cosine,

    .. math:: l_i = \log \sum_{j \in N_i} e^{s_{ij}} - w_i s_{ip}, \qquad
              w_i = 2 - \frac{e^{c_i / \sigma}}{\operatorname{mean}_k e^{c_k / \sigma}}

    The weights, negatives of a von Mises-Fisher density, have no gradient: pairs that agree already pull less than the
    others. Without weights it is :class:`DCLLoss`. The call is lightly's.

    Args:
        temperature: number, tensor or ``nn.Parameter``, as in :class:`ClusterInfoNCE`.
        sigma: > 0; the larger, the more equal the weights.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the rows that have a negative.

    Shapes of ``forward(z0, z1, *, return_stats=False)``: ``[N, D]`` both; float64, float32, bfloat16 or float16.
    ``return_stats`` is that of :class:`ClusterInfoNCE`.

    Returns:
        A scalar, or ``[N, 2]`` with ``reduction="none"``. float32, or float64 for float64 rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    @refuses_renamed
    def __init__(self, temperature: float | Tensor = 0.1, sigma: float = 0.5, *, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = positive_number("temperature", temperature)  # nn.Module registers an nn.Parameter
        self.sigma = plain_number("sigma", sigma)
        self.reduction = LossOptions(reduction=reduction).checked().reduction

    def forward(self, z0: Tensor, z1: Tensor, *, return_stats: bool = False) -> LossResult:
        """The loss. The class describes shapes and errors."""
        options = {"temperature": self.temperature, "sigma": self.sigma, "reduction": self.reduction}
        return dclw_loss(z0, z1, **options, return_stats=return_stats)

    def extra_repr(self) -> str:
        return f"{shown_temperature(self.temperature)}, sigma={self.sigma:g}, reduction={self.reduction!r}"


class WeightedDecoupled(NamedTuple):
    """The formula, of rows whose two views follow each other."""

    sigma: float

    def wanted(self) -> tuple[str, ...]:
        return "lse_neg", "sum_pos"

    def mean_of_differences(self) -> bool:
        return False

    def exact(self) -> bool:
        return False

    def scales(self, scale: Tensor) -> Tensor:
        return scale

    def terms(self, stats: ContrastiveStats, scale: Tensor) -> tuple[Tensor, Tensor]:
        assert stats.lse_neg is not None
        assert stats.sum_pos is not None
        cosines = (stats.sum_pos / scale).detach().view(-1, 2)
        weights = 2 - cosines.shape[0] * (cosines / self.sigma).softmax(0)
        return stats.lse_neg - weights.flatten() * stats.sum_pos, stats.num_neg > 0
