"""`prototype_cross_entropy`, on which the losses with prototypes rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_device,
    check_floating,
    check_option,
    check_rows,
    check_vector,
    few,
    positive_number,
    shown,
    values_visible,
)
from ..ops.library import without_autocast
from ..ops.prototypes.features import prototype_features
from ..ops.prototypes.op import prototype_scores
from ..ops.prototypes.records import Crops, Wanted
from .reduce import at_unit

REDUCTIONS = ("mean", "sum", "none")
Pair = tuple[Tensor, Tensor]
Side = Tensor | Pair | Sequence[Tensor] | Sequence[Pair]


def prototype_cross_entropy(
    student: Side,
    teacher: Side,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    potential: Tensor | Sequence[Tensor] | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of a student's predictions with a teacher's assignments to K prototypes.

    For scores s of the student and t of the teacher, and a potential g, row i has

    .. math:: l_i = - \sum_k q_{ik} \log \mathrm{softmax}_k (s_i / T_s), \qquad
              q_i = \mathrm{softmax} ((t_i + g) / T_t)

    A score s of -inf contributes 0 where q is 0; where it is not, the loss is infinite. The teacher gets no gradient.
    Forward and backward each read the scores once; the only other N x K matrix is the student's gradient. From features
    no N x K matrix exists: scores are formed for a block of rows at a time.

    Args:
        student: scores ``[N, K]``; or a tuple (features ``[N, D]``, prototypes ``[K, D]``), whose scores are their
            inner products; or a list of either, one for each crop. All tuples of a list have the same prototypes.
            float64, float32, bfloat16 or float16.
        teacher: likewise; scores if the student is scores, tuples if the student is. Its features may have another
            dimension.
        student_temperature, teacher_temperature: a positive number, or a tensor of one element without gradient.
        potential: ``[K]``, in the units of the scores, -inf for a prototype without mass: the column potential of
            `sinkhorn` or `sinkhorn_potentials` at epsilon = teacher_temperature, or minus DINO's centre. Or ``[P, K]``:
            row i has that of position i % P. A list has one for each teacher's crop. No gradient.
        weights: ``[N]`` non-negative weights of the rows.
        reduction: ``"mean"`` (weighted), ``"sum"`` or ``"none"``.

    With lists the loss is the mean over the pairs of each student's crop with each teacher's crop, except pairs with
    the same place in both lists.

    Returns a scalar, or ``[N]`` with ``reduction="none"``: float32, float64 if any scores or rows are. The mean of no
    rows is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers" (2021), and "Unsupervised
    learning of visual features by contrasting cluster assignments" (2020).
    """
    check_option("reduction", reduction, REDUCTIONS)
    students, of_students, teachers, of_teachers, pairs = sides(student, teacher)
    n, k = _shape(students[0], of_students)
    dtype = dtype_of(*students, of_students, *teachers, of_teachers)
    scales = inverse_temperatures(student_temperature, teacher_temperature, students[0].device)
    potentials = _potentials(potential, len(teachers), n, k, dtype, students[0].device)
    if weights is not None:
        check_vector("weights", weights, n, students[0].device)
        weights, _ = at_unit(weights, dtype, reduction)
    share = 1 / sum(pairs)
    factors = [pair * share for pair in pairs]
    if of_students is not None and of_teachers is not None:
        rows = None
        if reduction != "none":
            rows = torch.ones(n, dtype=dtype, device=students[0].device) if weights is None else weights
            if reduction == "mean":
                rows = rows / _total(rows, weights)
        with without_autocast(students[0].device):
            own, goals = torch.stack(students), torch.stack(teachers)
        found = prototype_features(own, of_students, goals, of_teachers, potentials, scales, factors, rows)
        return found if weights is None or reduction != "none" else found * weights
    values: Tensor = crossed(students, teachers, potentials, scales, factors).values
    if weights is not None:
        values = values * weights
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / _total(values, weights)


class Sides(NamedTuple):
    """Student and teacher as tensors."""

    students: list[Tensor]  # scores, or features
    of_students: Tensor | None  # the prototypes of features
    teachers: list[Tensor]
    of_teachers: Tensor | None
    pairs: list[float]  # whether each student's crop meets each teacher's


def sides(student: Any, teacher: Any) -> Sides:
    """The arguments of `prototype_cross_entropy`, checked."""
    students, of_students = _side("student", student)
    teachers, of_teachers = _side("teacher", teacher)
    if (of_students is None) != (of_teachers is None):
        kinds = ["scores" if x is None else "features and prototypes" for x in (of_students, of_teachers)]
        raise ValueError(f"teacher: expected {kinds[0]} as for the student, got {kinds[1]}")
    n, k = _shape(students[0], of_students)
    for name, crops, prototypes in (("student", students, of_students), ("teacher", teachers, of_teachers)):
        for number, crop in enumerate(crops):
            if _shape(crop, prototypes) != (n, k):
                place = f"{name}[{number}]" if len(crops) > 1 else name
                raise ValueError(f"{place}: expected {n} rows and {k} prototypes, got {list(_shape(crop, prototypes))}")
            check_device(name, crop, students[0].device)
        if prototypes is not None:
            check_device(name, prototypes, students[0].device)
    listed = isinstance(student, list), isinstance(teacher, list)
    pairs = [
        0.0 if listed[0] and listed[1] and a == b else 1.0 for b in range(len(students)) for a in range(len(teachers))
    ]
    if not any(pairs):
        raise ValueError("student: expected a crop beside the teacher's, got one crop of each in the same place")
    return Sides(students, of_students, teachers, of_teachers, pairs)


def _total(values: Tensor, weights: Tensor | None) -> Tensor | int:
    if weights is None:
        return max(len(values), 1)
    total: Tensor = weights.sum()
    return torch.where(total > 0, total, 1)


def crossed(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    potentials: Tensor | None,
    scales: Tensor,
    pairs: Sequence[float],
    wanted: Wanted = Wanted(),  # noqa: B008 (immutable)
    places: Tensor | None = None,
) -> Any:
    """`Values` of stored scores; pairs: the factor of each student's crop with each teacher's. places: see `Crops`."""
    detached = [scores.detach() for scores in teachers]
    return prototype_scores(Crops(list(students), detached, potentials, scales, tuple(pairs), places), wanted)


def dtype_of(*tensors: Tensor | None) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def inverse_temperatures(student: float | Tensor, teacher: float | Tensor, device: torch.device) -> Tensor:
    """[2] float64, of checked temperatures."""
    found = []
    for name, value in (("student_temperature", student), ("teacher_temperature", teacher)):
        value = positive_number(name, value)
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(f"{name}: expected a temperature without gradient, got one that requires it")
            if value.device.type != "cpu":
                check_device(name, value, device)
            found.append(value.to(device, torch.float64).reshape(()))
        else:
            found.append(torch.full((), value, dtype=torch.float64, device=device))
    return torch.stack(found).reciprocal()


def _side(name: str, value: Any) -> tuple[list[Tensor], Tensor | None]:
    """The scores or features of each crop, and the prototypes of features."""
    crops = value if isinstance(value, list) else [value]
    if not crops:
        raise ValueError(f"{name}: expected at least one crop, got an empty list")
    rows: list[Tensor] = []
    prototypes: Tensor | None = None
    for number, crop in enumerate(crops):
        place = f"{name}[{number}]" if isinstance(value, list) else name
        if isinstance(crop, tuple):
            if len(crop) != 2:
                raise ValueError(f"{place}: expected (features, prototypes), got a tuple of {len(crop)}")
            check_rows(f"{place}[0]", crop[0])
            check_rows(f"{place}[1]", crop[1], like=crop[0])
            if len(crop[1]) == 0:
                raise ValueError(f"{place}[1]: expected at least one prototype, got shape {list(crop[1].shape)}")
            if number and crop[1] is not prototypes:
                raise ValueError(f"{place}[1]: expected the same prototypes in every crop, got other ones")
            if number and crop[0].dtype != rows[0].dtype:
                raise ValueError(f"{place}[0]: expected {rows[0].dtype} in every crop, got {crop[0].dtype}")
            prototypes = crop[1]
            rows.append(crop[0])
            continue
        if not isinstance(crop, Tensor):
            expected = "a tensor, a tuple (features, prototypes), or a list of these"
            raise TypeError(f"{place}: expected {expected}, got {shown(crop)}")
        check_rows(place, crop)
        if prototypes is not None:
            raise ValueError(f"{place}: expected a tuple (features, prototypes) in every crop, got scores")
        rows.append(crop)
    return rows, prototypes


def _shape(rows: Tensor, prototypes: Tensor | None) -> tuple[int, int]:
    return len(rows), rows.shape[1] if prototypes is None else len(prototypes)


def _potentials(value: Any, teachers: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[teachers, P, K] from the argument `potential`."""
    if value is None:
        return None
    given = list(value) if isinstance(value, (list, tuple)) else [value] * teachers
    if len(given) != teachers:
        raise ValueError(f"potential: expected one for each of {teachers} crops, got {len(given)}")
    for number, one in enumerate(given):
        name = f"potential[{number}]" if isinstance(value, (list, tuple)) else "potential"
        check_floating(name, one)
        if one.dim() not in (1, 2) or one.shape[-1] != k:
            raise ValueError(f"{name}: expected shape [{k}] or [P, {k}], got {list(one.shape)}")
        if one.dim() == 2 and (len(one) == 0 or n % len(one)):
            raise ValueError(f"{name}: expected positions that divide the {n} rows, got shape {list(one.shape)}")
        if one.shape != given[0].shape:
            raise ValueError(f"{name}: expected shape {list(given[0].shape)}, got {list(one.shape)}")
        check_device(name, one, device)
        if values_visible(one) and bool((one == torch.inf).any()):
            raise ValueError(f"{name}: expected finite numbers or -inf, got {few(one)}")
    return torch.stack([one.detach().to(dtype).reshape(-1, k) for one in given])
