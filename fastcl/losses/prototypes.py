"""Losses on assignments to prototypes: SwAV, MSN and PMSN, their targets from `sinkhorn` with any prior."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    SMALLEST,
    check_count,
    check_device,
    check_flag,
    check_option,
    check_rows,
    finite_number,
    plain_number,
)
from ..distributed import Property, World, check_group, dtype_name, tell_others
from ..ops.backends.rows import accumulation_dtype, unit
from ..ops.products import product
from ..ops.prototypes.records import Wanted
from ..sinkhorn import BLOCK, column_potential, power_law_prior, sinkhorn, uniform_prior
from . import small_prototypes
from .gathered import has_gradient
from .modules import GroupModule, shown_number
from .options import refuses_renamed
from .priors import GivenPrior, Prior, global_share, process_group
from .prototype_cross_entropy import crossed, dtype_of, inverse_temperatures

KL = ("mean_prior", "prior_mean")
LARGEST_PRIOR_WEIGHT = 1e30  # products of the weight with derivatives stay in float32's range


class SwAVLoss(GroupModule):
    r"""Swapped prediction: each crop predicts the assignments of the other high-resolution crops.

    With S^c ``[B, K]`` the scores of crop c against the prototypes, and Q^h the Sinkhorn assignments of high-resolution
    crop h (without gradient),

    .. math:: \frac{1}{H (C - 1)} \sum_{h \le H} \sum_{c \ne h} \frac{1}{B} \sum_i
              - \sum_k Q^h_{ik} \log \mathrm{softmax}_k (S^c_i / \text{temperature})

    for H high-resolution crops among C.

    Args:
        temperature: temperature of the predictions.
        epsilon, n_iters: passed to `sinkhorn`. With ``n_iters=0`` each row's assignments are softmax(S / epsilon), so
            the prior, the queue and other processes' rows do not influence them.
        prior: masses of the prototypes: None (uniform), ``[K]``, or a function that is called with K.
        gather: compute assignments over the rows of all processes of the default group; no effect without a group. Each
            process returns W times its share, so that after DDP's averaging the gradient is that of the whole batch.
        group: the process group of ``gather``; None: the default group.

    Shapes of ``forward(high_resolution, low_resolution=(), queue_scores=None)``:

    - high_resolution: list of H >= 1 scores ``[B, K]`` (cosine similarities with the prototypes). Both lists together
      need at least two crops.
    - low_resolution: list of scores ``[B, K]`` of crops that predict but are not targets.
    - queue_scores: None, or scores ``[M, K]`` of stored features for each high-resolution crop. These rows take part
      in the crop's assignment problem, and their assignments are dropped.

    Returns a scalar: float32, float64 for float64 scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments" (2020).
    """

    @refuses_renamed
    def __init__(
        self,
        temperature: float = 0.1,
        *,
        epsilon: float = 0.05,
        n_iters: int = 3,
        prior: Prior | None = None,
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = plain_number("temperature", temperature)
        self.epsilon = plain_number("epsilon", epsilon)
        self.n_iters = check_count("n_iters", n_iters, least=0)
        self.prior = GivenPrior(prior)
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group

    def forward(
        self,
        high_resolution: Sequence[Tensor],
        low_resolution: Sequence[Tensor] = (),
        queue_scores: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if queue_scores is None and self.gather is False and self.prior.given == "none":
            loss = small_prototypes.swav(high_resolution, low_resolution, self.temperature, self.epsilon, self.n_iters)
            if loss is not None:
                return loss
        world = World.of(self.gather, self.group)
        try:
            high, low, stored = _crops(high_resolution, low_resolution, queue_scores)
            if world is not None:
                self.prior(high[0].shape[1], high[0].device)  # an invalid prior raises here, before any collective
        except Exception as error:
            tell_others(self.gather, error, high_resolution, group=self.group)
            raise
        crops = [*high, *low]
        rows = [high[0].shape[0]]
        if world is not None:
            rows = self._agreed(world, high, low, stored)
        potentials = None
        if not self.n_iters:
            self.prior(high[0].shape[1], high[0].device)  # checked although unused
        else:
            found = [self._potential(crop, rest) for crop, rest in zip(high, stored, strict=True)]
            dtype = dtype_of(*crops)
            potentials = torch.stack([potential.to(dtype) for potential in found])[:, None]
        scales = inverse_temperatures(self.temperature, self.epsilon, high[0].device)
        share = 1 / (len(high) * (len(crops) - 1))
        pairs = [0.0 if c == h else share for c in range(len(crops)) for h in range(len(high))]
        values: Tensor = crossed(crops, high, potentials, scales, pairs).values
        return values.sum() / max(high[0].shape[0], 1) * global_share(world, rows)

    def _agreed(
        self, world: World, high: list[Tensor], low: list[Tensor], stored: Sequence[Tensor | None]
    ) -> list[int]:
        """Each process's number of rows; raises if the calls differ."""
        dtypes = [None if one is None else dtype_name(one.dtype) for one in (*high, *low, *stored)]
        alike: dict[str, Property] = {
            "high-resolution crops": len(high),
            "low-resolution crops": len(low),
            "prototypes": high[0].shape[1],
            "dtypes (their hash)": zlib.crc32(repr(dtypes).encode()),
            "queue_scores given": any(one is not None for one in stored),
            "temperature": self.temperature,
            "epsilon": self.epsilon,
            "n_iters": self.n_iters,
            "prior given": self.prior.given,
        }
        return world.agree("SwAVLoss", {"rows": len(high[0])}, alike, high[0].device)[0]

    def _potential(self, scores: Tensor, queue_scores: Tensor | None) -> Tensor:
        """The column potential [K] of a crop's assignment problem."""
        return column_potential(
            [scores] if queue_scores is None else [scores, queue_scores],
            epsilon=self.epsilon,
            prior=self.prior(scores.shape[1], scores.device),
            n_iters=self.n_iters,
            group=process_group(self),
        )

    def extra_repr(self) -> str:
        numbers = (("temperature", self.temperature), ("epsilon", self.epsilon), ("n_iters", self.n_iters))
        return ", ".join(shown_number(name, value) for name, value in numbers)

    def assignments(self, scores: Tensor, queue_scores: Tensor | None = None) -> Tensor:
        """Sinkhorn assignments ``[B, K]`` of scores ``[B, K]``, solved together with the queue's rows. No gradient.

        float32, float64 for float64 scores.
        """
        check_rows("scores", scores)
        rows = _wide(scores.detach())
        if queue_scores is not None:
            check_rows("queue_scores", queue_scores, like=scores)
        prior = self.prior(rows.shape[1], rows.device)
        if self.n_iters == 0:
            return (rows / self.epsilon).softmax(1)
        if queue_scores is not None:
            wider = torch.promote_types(rows.dtype, queue_scores.dtype)
            rows = torch.cat([rows.to(wider), queue_scores.detach().to(wider)])
        result = sinkhorn(rows, epsilon=self.epsilon, prior=prior, n_iters=self.n_iters, group=process_group(self))
        return result.assignments[: scores.shape[0]]


class MSNLoss(GroupModule):
    r"""Masked siamese networks: anchors predict sharpened assignments of their targets, and match a prior on average.

    With p = softmax(cosine similarity with the prototypes / temperature), and targets
    :math:`q \propto p^{1 / \text{sharpening}}` without gradient, refined by ``n_iters`` iterations of Sinkhorn on log q
    at epsilon 1 with the same prior,

    .. math:: \frac{1}{BV} \sum_i - \sum_k q_{ik} \log p_{ik} + \text{prior\_weight} \cdot
              \mathrm{KL}(\bar p \,\|\, \text{prior}), \qquad \bar p = \frac{1}{BV} \sum_i p_i

    With the uniform prior the second term is log K minus the entropy of the mean: MSN's mean entropy maximisation. With
    another prior it is PMSN's prior matching.

    Args:
        temperature: temperature of anchors and targets.
        sharpening: sharpening of the targets; smaller is sharper, 1 does not sharpen.
        n_iters: iterations of Sinkhorn on the targets; 0: no Sinkhorn.
        prior: masses for targets and regulariser: None (uniform), ``[K]``, or a function that is called with K.
        sinkhorn_prior: masses for the targets, if they differ from the regulariser's: `uniform_prior`, for instance.
            None: those of ``prior``.
        entropy_weight: weight, from 0 to 1e30, of the mean entropy of the anchors' predictions, which is added.
        prior_weight: weight of the KL term, from 0 to 1e30.
        kl: ``"mean_prior"`` as above, or ``"prior_mean"``: KL(prior || mean), which is infinite if a prototype has mass
            but mean prediction 0.
        gather: compute targets and mean over the rows of all processes of the default group; no effect without a
            group. Each process returns W times its share, so that after DDP's averaging the gradient is that of the
            whole batch.
        group: the process group of ``gather``; None: the default group.

    Shapes of ``forward(anchors, targets, prototypes)``:

    - anchors: ``[B * V, D]``: V views, all rows of a view before those of the next: row v * B + b belongs to target b.
    - targets: ``[B, D]``, without gradient.
    - prototypes: ``[K, D]``.

    Returns a scalar: float32, float64 for float64 anchors. Sinkhorn assigns nothing to a prototype without prior mass;
    in the KL its mass counts as 1e-12.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Assran et al., "Masked siamese networks for label-efficient learning" (2022), and "The hidden uniform
    cluster prior in self-supervised learning" (2023).
    """

    @refuses_renamed
    def __init__(
        self,
        temperature: float = 0.1,
        *,
        sharpening: float = 0.25,
        n_iters: int = 3,
        prior: Prior | None = None,
        prior_weight: float = 1.0,
        kl: str = "mean_prior",
        entropy_weight: float = 0.0,
        sinkhorn_prior: Prior | None = None,
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = plain_number("temperature", temperature)
        self.sharpening = plain_number("sharpening", sharpening)
        if self.temperature * self.sharpening < SMALLEST:
            least = SMALLEST / self.temperature
            raise ValueError(f"sharpening: expected at least {least:g} with this temperature, got {sharpening}")
        self.n_iters = check_count("n_iters", n_iters, least=0)
        self.prior = GivenPrior(prior)
        self.prior_weight = finite_number("prior_weight", prior_weight)
        if not 0 <= self.prior_weight <= LARGEST_PRIOR_WEIGHT:
            expected = f"a number >= 0 and at most {LARGEST_PRIOR_WEIGHT:g}"
            raise ValueError(f"prior_weight: expected {expected}, got {prior_weight}")
        check_option("kl", kl, KL)
        self.kl = kl
        self.entropy_weight = finite_number("entropy_weight", entropy_weight)
        if not 0 <= self.entropy_weight <= LARGEST_PRIOR_WEIGHT:
            expected = f"a number >= 0 and at most {LARGEST_PRIOR_WEIGHT:g}"
            raise ValueError(f"entropy_weight: expected {expected}, got {entropy_weight}")
        self.sinkhorn_prior = self.prior if sinkhorn_prior is None else GivenPrior(sinkhorn_prior, "sinkhorn_prior")
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group

    def forward(self, anchors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
        world = World.of(self.gather, self.group)
        try:
            check_rows("anchors", anchors)
            check_rows("targets", targets, like=anchors)
            check_rows("prototypes", prototypes, like=anchors)
            if len(prototypes) == 0:
                raise ValueError(f"prototypes: expected at least one, got shape {list(prototypes.shape)}")
            if world is not None:
                for prior in (self.prior, self.sinkhorn_prior):  # invalid ones raise here, before any collective
                    prior(len(prototypes), prototypes.device)
        except Exception as error:
            tell_others(self.gather, error, anchors, targets, prototypes, group=self.group)
            raise
        b, rows = targets.shape[0], anchors.shape[0]
        every_rows = [rows]
        if world is not None:
            every_rows = self._agreed(world, anchors, targets, prototypes)
        elif b == 0 or rows == 0 or rows % b:
            raise ValueError(f"anchors: expected a multiple of the {b} targets' rows, got shape {list(anchors.shape)}")
        centres = _centres(anchors, prototypes)
        views = unit(anchors.to(centres.dtype)).unflatten(0, (rows // b if b else 1, b)).unbind(0)
        predictions = [product(view, centres) for view in views]
        goals, potential = self._goals(targets, centres.detach().to(accumulation_dtype(targets, prototypes)))
        potentials = None if potential is None else potential.to(dtype_of(predictions[0], goals))[None, None]
        scales = inverse_temperatures(self.temperature, 1.0, anchors.device)
        wanted = Wanted(self.entropy_weight > 0, self.prior_weight > 0)
        found = crossed(predictions, [goals], potentials, scales, [1.0] * len(views), wanted)
        share = global_share(world, every_rows)
        loss: Tensor = found.values.sum() / max(rows, 1) * share
        if self.entropy_weight:
            loss = loss + self.entropy_weight * (found.entropies.sum() / max(rows, 1) * share)
        if self.prior_weight:
            loss = loss + self.prior_weight * self._divergence(_mean(found.column_sums, rows, share, world))
        return loss.to(centres.dtype)

    def extra_repr(self) -> str:
        numbers = (
            ("temperature", self.temperature),
            ("sharpening", self.sharpening),
            ("n_iters", self.n_iters),
            ("prior_weight", self.prior_weight),
            ("entropy_weight", self.entropy_weight),
        )
        return ", ".join(shown_number(name, value) for name, value in numbers) + f", kl={self.kl!r}"

    def _agreed(self, world: World, anchors: Tensor, targets: Tensor, prototypes: Tensor) -> list[int]:
        """Each process's number of anchors, 0 if it also has no targets; raises if the calls differ."""
        alike: dict[str, Property] = {
            "prototypes": len(prototypes),
            "dimension": prototypes.shape[1],
            "dtype of predictions": dtype_name(accumulation_dtype(anchors, prototypes)),
            "dtype of targets": dtype_name(accumulation_dtype(targets, prototypes)),
            "temperature": self.temperature,
            "sharpening": self.sharpening,
            "n_iters": self.n_iters,
            "prior given": self.prior.given,
            "prior_weight": float(self.prior_weight),
            "entropy_weight": float(self.entropy_weight),
            "prior of Sinkhorn given": self.sinkhorn_prior.given,
            "kl": self.kl,
            "anchors or prototypes with a gradient": has_gradient(anchors) or has_gradient(prototypes),
        }
        sizes = {"anchors": len(anchors), "targets": len(targets)}
        rows, of_targets = world.agree("MSNLoss", sizes, alike, anchors.device)
        views = {divmod(n, b) if b else (n, -1) for n, b in zip(rows, of_targets, strict=True)} - {(0, -1)}
        if len(views) > 1 or any(rest or not count for count, rest in views):
            raise ValueError(
                f"anchors: expected the same multiple of the targets' rows on all processes, got {rows} anchors and "
                f"{of_targets} targets, by rank"
            )
        return rows

    def assignments(self, targets: Tensor, prototypes: Tensor) -> Tensor:
        """Target assignments ``[B, K]`` of targets ``[B, D]`` to prototypes ``[K, D]``. No gradient."""
        check_rows("targets", targets)
        check_rows("prototypes", prototypes, like=targets)
        for name, rows in (("targets", targets), ("prototypes", prototypes)):
            if len(rows) == 0 and (rows is prototypes or process_group(self) is None):
                raise ValueError(f"{name}: expected at least one row, got shape {list(rows.shape)}")
        return self._assignments(targets, _centres(targets, prototypes.detach()))

    @torch.no_grad()
    def _assignments(self, targets: Tensor, centres: Tensor) -> Tensor:
        logs, potential = self._goals(targets, centres)
        return (logs if potential is None else logs + potential).softmax(1)

    @torch.no_grad()
    def _goals(self, targets: Tensor, centres: Tensor) -> tuple[Tensor, Tensor | None]:
        """log q, and Sinkhorn's column potential: the assignments are the softmax of their sum."""
        logits = _cosines(targets, centres).div_(self.temperature * self.sharpening)
        if self.n_iters == 0:
            return logits, None
        # Sinkhorn's rows start from log q, which is normalised, not from the logits.
        logs = _log_softmax_(logits)
        return logs, column_potential(
            [logs],
            epsilon=1.0,
            prior=self.sinkhorn_prior(len(centres), logits.device),
            n_iters=self.n_iters,
            group=process_group(self),
        )

    def _divergence(self, mean: Tensor) -> Tensor:
        prior = self.prior(len(mean), mean.device)
        prior = (uniform_prior(len(mean)).to(mean.device) if prior is None else prior).to(mean.dtype)
        prior = prior / prior.sum()
        if self.kl == "mean_prior":
            # The mean may underflow to 0, where the derivative of x log x is infinite.
            log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
            terms: Tensor = mean * log_mean - mean * prior.clamp(min=1e-12).log()
            return terms.sum()
        present = prior != 0
        safe = torch.where(present, mean, 1)
        return torch.where(present, torch.special.xlogy(prior, prior) - prior * safe.log(), 0).sum()


class PMSNLoss(MSNLoss):
    """`MSNLoss` with a power-law prior over the prototypes (exponent 0.25), or with another given prior.

    Source: Assran et al., "The hidden uniform cluster prior in self-supervised learning" (2023).
    """

    def __init__(self, temperature: float = 0.1, *, prior: Prior = power_law_prior, **options: Any) -> None:
        super().__init__(temperature, prior=prior, **options)


def _scores(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    for i, scores in enumerate(value):
        check_rows(f"{name}[{i}]", scores)
    return list(value)


def _crops(
    high_resolution: Sequence[Tensor], low_resolution: Sequence[Tensor], queue_scores: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | list[None]]:
    """The checked arguments of SwAV's `forward`."""
    high, low = _scores("high_resolution", high_resolution), _scores("low_resolution", low_resolution)
    if not high or len(high) + len(low) < 2:
        raise ValueError(
            "high_resolution: expected at least one crop, and with low_resolution at least two, "
            f"got {len(high)} and {len(low)}"
        )
    for name, group in (("high_resolution", high), ("low_resolution", low)):
        for i, crop in enumerate(group):
            if crop.shape != high[0].shape:
                expected = list(high[0].shape)
                raise ValueError(f"{name}[{i}]: expected shape {expected}, got {list(crop.shape)}")
            check_device(f"{name}[{i}]", crop, high[0].device)
    stored: list[Tensor] | list[None] = [None] * len(high)
    if queue_scores is not None:
        stored = _scores("queue_scores", queue_scores)
        if len(stored) != len(high):
            raise ValueError(f"queue_scores: expected scores for each of {len(high)} crops, got {len(stored)}")
        for i, scores in enumerate(stored):
            check_rows(f"queue_scores[{i}]", scores, like=high[i])
    return high, low, stored


def _wide(scores: Tensor) -> Tensor:
    return scores.to(accumulation_dtype(scores))


def _centres(rows: Tensor, prototypes: Tensor) -> Tensor:
    """The normalised prototypes [K, D], in the dtype of their products with `rows`."""
    return unit(prototypes.to(accumulation_dtype(rows, prototypes)))


def _log_softmax_(logits: Tensor) -> Tensor:
    """In place, in blocks of rows: another N x K matrix would be as large as the targets."""
    if torch.compiler.is_compiling():  # the number of rows may be dynamic, and that of blocks would fix it
        return logits.log_softmax(1)
    step = max(BLOCK // logits.shape[1], 1)
    for start in range(0, len(logits), step):
        part = logits[start : start + step]
        part.copy_(part.log_softmax(1))
    return logits


def _cosines(rows: Tensor, centres: Tensor) -> Tensor:
    """Cosine similarities [N, K] of rows [N, D] with `_centres` [K, D]."""
    return product(unit(rows.to(centres.dtype)), centres)


def _mean(column_sums: Tensor, rows: int, share: float, world: World | None) -> Tensor:
    """Mean prediction [K] of all processes' rows, differentiable.

    Each of the W processes returns the whole divergence, so all incoming gradients are equal. The backward sums them
    over processes, and DDP's mean of the resulting gradients is the gradient of the divergence.
    """
    own = column_sums / max(rows, 1) * share
    return own if world is None else world.total(own) / world.size
