"""Self-distillation against prototypes: DINO, iBOT and CAPI, with Sinkhorn's assignments or a moving centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..checks import (
    check_count,
    check_device,
    check_flag,
    check_floating,
    check_indices,
    check_option,
    check_scores,
    check_tensor,
    finite_number,
    plain_number,
    values_visible,
)
from ..distributed import Property, World, check_group, dtype_name, tell_others
from ..sinkhorn import column_potential
from .modules import ExactModule, GroupModule, shown_number
from .priors import GivenPrior, Prior, global_share, process_group
from .prototype_cross_entropy import Pair, crossed, dtype_of, inverse_temperatures, prototype_cross_entropy, sides

CENTERINGS = ("sinkhorn", "mean")
Crop = Tensor | Pair


class _Distillation(ExactModule, GroupModule):
    """Temperatures, and what keeps the teacher's assignments apart."""

    center: Tensor

    def __init__(
        self,
        num_prototypes: int = 65536,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        centering: str = "mean",
        center_momentum: float = 0.9,
        n_iters: int = 3,
        prior: Prior | None = None,
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.num_prototypes = check_count("num_prototypes", num_prototypes)
        self.student_temperature = plain_number("student_temperature", student_temperature)
        self.teacher_temperature = plain_number("teacher_temperature", teacher_temperature)
        check_option("centering", centering, CENTERINGS)
        self.centering = centering
        self.center_momentum = finite_number("center_momentum", center_momentum)
        if not 0 <= self.center_momentum <= 1:
            raise ValueError(f"center_momentum: expected a number from 0 to 1, got {center_momentum}")
        self.n_iters = check_count("n_iters", n_iters)
        if centering == "mean" and prior is not None:
            raise ValueError('prior: expected None with centering="mean", got a prior')
        self.prior = GivenPrior(prior)
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group
        self.register_buffer("center", torch.zeros(self.num_prototypes) if centering == "mean" else None)

    def extra_repr(self) -> str:
        numbers = (
            ("student_temperature", self.student_temperature),
            ("teacher_temperature", self.teacher_temperature),
        )
        own = f"center_momentum={self.center_momentum:g}" if self.centering == "mean" else f"n_iters={self.n_iters}"
        shown = ", ".join(shown_number(name, value) for name, value in numbers)
        return f"{self.num_prototypes}, {shown}, centering={self.centering!r}, {own}"

    def _temperature(self, value: float | None) -> float:
        return self.teacher_temperature if value is None else plain_number("teacher_temperature", value)

    def _prior(self, student: Any, teacher: Any) -> Tensor | None:
        """The prior of Sinkhorn, after checks of the crops: what may raise comes before any collective."""
        found = sides(student, teacher)
        both = (
            ("student", student, found.students, found.of_students),
            ("teacher", teacher, found.teachers, found.of_teachers),
        )
        for side, given, crops, prototypes in both:
            for number, crop in enumerate(crops):
                name = f"{side}[{number}]" if isinstance(given, list) else side
                k = crop.shape[1] if prototypes is None else len(prototypes)
                if k != self.num_prototypes:
                    raise ValueError(f"{name}: expected {self.num_prototypes} prototypes, got {k}")
                if self.centering == "mean":
                    check_device(name, crop, self.center.device)
        return None if self.centering == "mean" else self.prior(self.num_prototypes, found.teachers[0].device)

    def _agreed(
        self,
        call: str,
        world: World,
        sizes: dict[str, int],
        crops: Sequence[Crop],
        temperature: float,
        **more: Property,
    ) -> list[list[int]]:
        """The sizes of every process; raises if the calls differ."""
        first = crops[0][0] if isinstance(crops[0], tuple) else crops[0]
        alike: dict[str, Property] = {
            "teacher's crops": len(crops),
            "teacher's dtype": dtype_name(first.dtype),
            "prototypes": self.num_prototypes,
            "student_temperature": self.student_temperature,
            "teacher_temperature": temperature,
            "centering": self.centering,
            "n_iters": self.n_iters,
            "center_momentum": self.center_momentum,
            "prior given": self.prior.given,
            "training": self.training,
            **more,
        }
        return world.agree(call, sizes, alike, first.device)

    def _potential(
        self, crops: Sequence[Crop], rows_of_all: int, temperature: float, prior: Tensor | None
    ) -> Tensor | None:
        """The column potential [K] of the teacher's crops together; None if no process has rows."""
        if self.centering == "mean":
            return -self.center
        if not rows_of_all:
            return None
        return column_potential(
            [_rows(crop) for crop in crops],
            crops[0][1].detach() if isinstance(crops[0], tuple) else None,
            epsilon=temperature,
            prior=prior,
            n_iters=self.n_iters,
            group=process_group(self),
        )

    @torch.no_grad()
    def _update(self, crops: Sequence[Crop]) -> None:
        """Moves the centre towards the mean score of all crops and processes, where the mean is finite.

        One overflow must not make the centre NaN for good, nor a prototype that is masked with -inf.
        """
        if self.centering != "mean" or not self.training:
            return
        total = torch.zeros(self.num_prototypes + 1, dtype=torch.float64, device=self.center.device)
        for crop in crops:
            rows = _rows(crop)
            mean = rows.sum(0, dtype=torch.float64)
            total[:-1] += crop[1].detach().double() @ mean if isinstance(crop, tuple) else mean
            total[-1] += len(rows)
        world = World.of(self.gather, self.group)
        if world is not None:
            dist.all_reduce(total, group=world.group)
        mean = (total[:-1] / total[-1]).to(self.center.dtype)  # NaN without rows
        self.center = torch.where(mean.isfinite(), self.center.lerp(mean, 1 - self.center_momentum), self.center)


def _rows(crop: Crop) -> Tensor:
    return (crop[0] if isinstance(crop, tuple) else crop).detach()


class DINOLoss(_Distillation):
    r"""Each student's crop predicts the teacher's assignments of the other crops.

    With scores of the student S^c and of the teacher T^h, and p, q their softmaxes at the two temperatures,

    .. math:: \frac{1}{\#} \sum_h \sum_{c \ne h} \frac{1}{B} \sum_i - \sum_k q^h_{ik} \log p^c_{ik}

    as `prototype_cross_entropy` with lists. The teacher's potential comes from Sinkhorn over the rows of all its crops,
    at epsilon = teacher temperature and with any prior (DINOv2, DINOv3), or is minus a moving mean (DINO).

    Args:
        num_prototypes: K.
        student_temperature, teacher_temperature: of the softmaxes. ``forward`` takes another teacher's temperature.
        centering: ``"mean"`` or ``"sinkhorn"``.
        center_momentum: momentum of the mean. The buffer ``center`` is moved after each forward in training mode.
        n_iters, prior: of Sinkhorn. The prior: None (uniform), ``[K]``, or a function that is called with K.
        gather: assignments, and the mean, over the rows of all processes of a group; no effect without one. Each
            process returns W times its share, so that after DDP's averaging the gradient is that of the whole batch.
        group: a process group for ``gather``; None: the default one.

    Shapes of ``forward(student, teacher, *, teacher_temperature=None)``: lists of crops, each scores ``[B, K]`` or a
    tuple (features ``[B, D]``, prototypes ``[K, D]``), from which no B x K matrix is formed. The first crops of the
    student are the teacher's. The teacher gets no gradient.

    Returns a scalar: float32, float64 if any scores are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers" (2021); Oquab et al., "DINOv2:
    learning robust visual features without supervision" (2023).
    """

    def forward(
        self, student: Sequence[Crop], teacher: Sequence[Crop], *, teacher_temperature: float | None = None
    ) -> Tensor:
        world = World.of(self.gather, self.group)
        try:
            for name, crops in (("student", student), ("teacher", teacher)):
                if isinstance(crops, (Tensor, tuple)) or not isinstance(crops, Sequence):
                    raise TypeError(f"{name}: expected a list of crops, got {type(crops).__name__}")
            prior = self._prior(list(student), list(teacher))
            temperature = self._temperature(teacher_temperature)
        except Exception as error:
            tell_others(self.gather, error, student, group=self.group)
            raise
        rows = [len(_rows(student[0]))]
        if world is not None:
            rows = self._agreed("DINOLoss", world, {"rows": rows[0]}, teacher, temperature)[0]
        loss = prototype_cross_entropy(
            list(student),  # type: ignore[arg-type]
            list(teacher),  # type: ignore[arg-type]
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
            potential=self._potential(teacher, sum(rows), temperature, prior),
        )
        self._update(teacher)
        return loss * global_share(world, rows)


class IBOTLoss(_Distillation):
    r"""The student predicts the teacher's assignments of masked patches.

    .. math:: \frac{1}{B} \sum_b \frac{1}{|M_b|} \sum_{i \in M_b} - \sum_k q_{ik} \log p_{ik}

    for the masked patches M_b of image b, with p and q as in `DINOLoss`; images without a masked patch count in B.

    Args: those of `DINOLoss`.

    Shapes of ``forward(student, teacher, mask, *, teacher_temperature=None)``:

    - student, teacher: scores ``[M, K]`` of the masked patches in the order of the mask, or tuples (features
      ``[M, D]``, prototypes ``[K, D]``).
    - mask: bool ``[B, ...]`` with M places True: which patches of each image are masked.

    Returns a scalar: float32, float64 if any scores are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer" (2022).
    """

    def forward(
        self, student: Crop, teacher: Crop, mask: Tensor, *, teacher_temperature: float | None = None
    ) -> Tensor:
        world = World.of(self.gather, self.group)
        try:
            for name, crop in (("student", student), ("teacher", teacher)):
                if isinstance(crop, list):
                    raise TypeError(f"{name}: expected scores or a tuple (features, prototypes), got list")
            prior = self._prior(student, teacher)
            check_tensor("mask", mask)
            if mask.dtype != torch.bool or mask.dim() < 2:
                raise TypeError(f"mask: expected a bool tensor [B, ...], got {mask.dtype} of shape {list(mask.shape)}")
            check_device("mask", mask, _rows(student).device)
            flat = mask.flatten(1)
            counts, patches = flat.sum(1), len(_rows(student))
            if values_visible(mask) and int(counts.sum()) != patches:
                raise ValueError(f"mask: expected {patches} masked patches, got {int(counts.sum())}")
            weights = (1 / counts.clamp(min=1).double()).repeat_interleave(counts, output_size=patches)
            temperature = self._temperature(teacher_temperature)
        except Exception as error:
            tell_others(self.gather, error, student, group=self.group)
            raise
        images, all_patches = [len(mask)], [patches]
        if world is not None:
            sizes = {"images": len(mask), "masked patches": patches}
            images, all_patches = self._agreed("IBOTLoss", world, sizes, [teacher], temperature)
        loss = prototype_cross_entropy(
            student,
            teacher,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
            potential=self._potential([teacher], sum(all_patches), temperature, prior),
            weights=weights,
            reduction="sum",
        )
        self._update([teacher])
        return loss / max(len(mask), 1) * global_share(world, images)


class CapiLoss(_Distillation):
    r"""The student predicts the teacher's clusters of patches, balanced at each position.

    The teacher's assignments q come from Sinkhorn over the batch, for each position apart, at epsilon = teacher
    temperature. The loss is the mean cross-entropy over images and positions. With the teacher's own scores as the
    student it trains the prototypes of the online clustering.

    Args:
        num_prototypes: K.
        student_temperature, teacher_temperature, n_iters, prior, gather: as for `DINOLoss`.

    Shapes of ``forward(student, teacher, index=None)``:

    - student: scores ``[B, P', K]`` of the predicted patches.
    - teacher: scores ``[B, P, K]`` of all patches. A bias of the prototypes is part of the scores. No gradient.
    - index: integers ``[B, P']``: the places of the predicted patches among the P; None: all, in order.

    Returns a scalar: float32, float64 if any scores are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Darcet et al., "Cluster and predict latent patches for improved masked image modeling" (2025).
    """

    def __init__(
        self,
        num_prototypes: int = 16384,
        *,
        student_temperature: float = 0.12,
        teacher_temperature: float = 0.06,
        n_iters: int = 3,
        prior: Prior | None = None,
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__(
            num_prototypes,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            centering="sinkhorn",
            n_iters=n_iters,
            prior=prior,
            gather=gather,
            group=group,
        )

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor | None = None) -> Tensor:
        world, k = World.of(self.gather, self.group), self.num_prototypes
        try:
            for name, scores in (("student", student), ("teacher", teacher)):
                check_scores(name, scores)
                if scores.dim() != 3 or scores.shape[2] != k:
                    raise ValueError(f"{name}: expected shape [B, P, {k}], got {list(scores.shape)}")
                check_device(name, scores, student.device)
            expected = list(student.shape[:2])
            if index is not None:
                check_indices("index", index, teacher.shape[1], student.device)
                if list(index.shape) != expected:
                    raise ValueError(f"index: expected shape {expected}, got {list(index.shape)}")
            if len(teacher) != len(student) or (index is None and list(teacher.shape[:2]) != expected):
                raise ValueError(f"teacher: expected shape {[*expected, k]}, got {list(teacher.shape)}")
            prior = self.prior(k, teacher.device)
        except Exception as error:
            tell_others(self.gather, error, student, group=self.group)
            raise
        patches = [student.shape[0] * student.shape[1]]
        if world is not None:
            sizes = {"patches": patches[0]}
            temperature, positions = self.teacher_temperature, teacher.shape[1]
            patches = self._agreed("CapiLoss", world, sizes, [teacher], temperature, positions=positions)[0]
        potential: Tensor | None = None
        if teacher.numel() or world is not None:
            potential = column_potential(
                [teacher.transpose(0, 1)],
                epsilon=self.teacher_temperature,
                prior=prior,
                n_iters=self.n_iters,
                group=process_group(self),
            )
        if not student.numel():
            return student.sum(dtype=dtype_of(student, teacher))
        goals = teacher.detach().reshape(-1, k)
        potentials = None if potential is None else potential.to(dtype_of(student, teacher))[None]
        places = None
        if index is not None:
            images = torch.arange(len(index), device=index.device)[:, None]
            places = (images * teacher.shape[1] + index).flatten()
        scales = inverse_temperatures(self.student_temperature, self.teacher_temperature, student.device)
        found = crossed([student.reshape(-1, k)], [goals], potentials, scales, [1.0], places=places).values
        loss: Tensor = found.sum() / max(len(found), 1)
        return loss * global_share(world, patches)


def dino_loss(
    student: Sequence[Crop],
    teacher: Sequence[Crop],
    *,
    center: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    n_iters: int = 3,
    prior: Prior | None = None,
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`DINOLoss`, which describes formula, shapes and errors.

    center: ``[K]``, taken off the teacher's scores and not moved. None: Sinkhorn's assignments.
    """
    crop = next((crops[0] for crops in (teacher, student) if isinstance(crops, Sequence) and crops), None)
    loss = _stateless(
        DINOLoss, crop, gather, group, center,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature, n_iters=n_iters, prior=prior,
    )  # fmt: skip
    found: Tensor = loss(student, teacher)
    return found


def ibot_loss(
    student: Crop,
    teacher: Crop,
    mask: Tensor,
    *,
    center: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    n_iters: int = 3,
    prior: Prior | None = None,
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`IBOTLoss`, which describes formula, shapes and errors.

    center: as for `dino_loss`.
    """
    loss = _stateless(
        IBOTLoss, teacher, gather, group, center,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature, n_iters=n_iters, prior=prior,
    )  # fmt: skip
    found: Tensor = loss(student, teacher, mask)
    return found


def capi_loss(
    student: Tensor,
    teacher: Tensor,
    index: Tensor | None = None,
    *,
    student_temperature: float = 0.12,
    teacher_temperature: float = 0.06,
    n_iters: int = 3,
    prior: Prior | None = None,
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`CapiLoss`, which describes formula, shapes and errors."""
    loss = _stateless(
        CapiLoss, teacher, gather, group,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature, n_iters=n_iters, prior=prior,
    )  # fmt: skip
    found: Tensor = loss(student, teacher, index)
    return found


def _stateless(
    kind: type[_Distillation], crop: Any, gather: bool, group: Any, center: Tensor | None = None, **options: Any
) -> Any:
    """A loss that is not in training, so that it does not move the centre."""
    if center is not None:
        options["centering"] = "mean"
    elif kind is not CapiLoss:
        options["centering"] = "sinkhorn"
    try:
        loss = kind(_count(crop), gather=gather, group=group, **options)
        if center is not None:
            check_floating("center", center)
            if center.shape != (loss.num_prototypes,):
                raise ValueError(f"center: expected shape [{loss.num_prototypes}], got {list(center.shape)}")
            loss.center = center.detach()
    except Exception as error:
        tell_others(gather, error, crop, group=group)
        raise
    return loss.eval()


def _count(crop: Any) -> int:
    """The number of prototypes of a crop; 1 for what the loss refuses."""
    if isinstance(crop, tuple) and len(crop) == 2 and isinstance(crop[1], Tensor):
        return max(len(crop[1]), 1) if crop[1].dim() else 1
    return max(crop.shape[-1], 1) if isinstance(crop, Tensor) and crop.dim() else 1
