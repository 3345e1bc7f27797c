"""The prototype losses from features and prototypes: scores exist for a block of rows at a time.

A block's scores are the product of its features with all prototypes, its losses and gradient those of the backend's
kernels, the gradient in place of the scores. Where the weights of the rows are known before (`prototype_total`), loss
and gradient come from one product of each side: 8 N K D operations, the same as with stored scores. Else
(`prototype_rows`) the backward forms the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.choose import choose_backend
from ..library import LIBRARY, register, without_autocast
from .op import BACKENDS
from .records import Crops, Incoming, Wanted

# [crops, N, D] features, [K, D] prototypes
_SCHEMA = (
    "Tensor students, Tensor student_prototypes, Tensor teachers, Tensor teacher_prototypes, Tensor? potentials, "
    "Tensor scales, float[] pairs, str backend"
)
_LENGTH = 8
LIBRARY.define(f"prototype_rows_fwd({_SCHEMA}) -> (Tensor values, Tensor kept)")
LIBRARY.define(
    f"prototype_rows_bwd({_SCHEMA}, Tensor kept, Tensor grad, bool[] needs) -> (Tensor students, Tensor prototypes)"
)
LIBRARY.define(
    f"prototype_total_fwd({_SCHEMA}, Tensor weights, bool[] needs) -> "
    "(Tensor total, Tensor values, Tensor grad_students, Tensor grad_prototypes)"
)
LIBRARY.define(
    "prototype_total_bwd(Tensor grad, Tensor values, Tensor grad_students, Tensor grad_prototypes, Tensor students, "
    "Tensor student_prototypes, bool[] needs) -> (Tensor students, Tensor prototypes, Tensor weights)"
)
_ops = torch.ops.fastcl

CPU_SCORES, GPU_SCORES = 1 << 22, 1 << 27  # numbers in a block's scores; more only if the prototypes have more
FEWEST, MOST = 16, 256  # rows in a block: fewer make slow products


def block_rows(crops: int, n: int, prototypes: Tensor) -> int:
    """Rows of a block. Its scores of all crops take about the memory of two matrices of prototypes [K, D]."""
    k = max(len(prototypes), 1)
    numbers = max(CPU_SCORES if prototypes.device.type == "cpu" else GPU_SCORES, 2 * prototypes.numel())
    return max(1, min(n, max(FEWEST, min(MOST, numbers // (max(crops, 1) * k)))))


def wide(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.detach().to(dtype).resolve_neg()


def accumulation(students: Tensor, prototypes: Tensor, teachers: Tensor, others: Tensor) -> torch.dtype:
    found = {x.dtype for x in (students, prototypes, teachers, others)}
    return torch.float64 if torch.float64 in found else torch.float32


class _Blocks:
    """Walks over blocks of rows, whose scores of all crops it forms in one buffer."""

    def __init__(self, *args: Any) -> None:
        self.students, of_students, self.teachers, of_teachers, self.potentials, self.scales, self.pairs, name = args
        self.backend = BACKENDS[name]
        self.dtype = accumulation(self.students, of_students, self.teachers, of_teachers)
        self.prototypes = wide(of_students, self.dtype)
        self.others = self.prototypes if of_teachers is of_students else wide(of_teachers, self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Crops, Tensor, Tensor]]:
        """Rows, their problem, the students' features [crops * rows, D] and their scores [crops * rows, K]."""
        (s, n, _), t, k = self.students.shape, len(self.teachers), len(self.prototypes)
        step = block_rows(s + t, n, self.prototypes)
        memory = torch.empty((s + t) * step * k, dtype=self.dtype, device=self.students.device)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            count = rows.stop - start
            own = memory[: s * count * k].view(s * count, k)
            other = memory[s * count * k : (s + t) * count * k].view(t * count, k)
            features = wide(self.students[:, rows], self.dtype).reshape(s * count, -1)
            torch.mm(features, self.prototypes.T, out=own)
            torch.mm(wide(self.teachers[:, rows], self.dtype).reshape(t * count, -1), self.others.T, out=other)
            crops = [*own.view(s, count, k)], [*other.view(t, count, k)]
            yield rows, Crops(*crops, self.potentials, self.scales, tuple(self.pairs), first=start), features, own

    def gradients(self, needs: Any) -> tuple[Tensor, Tensor]:
        """Zeros for the gradients of the students' features and of their prototypes; empty if not needed."""
        of_features = self.students.new_zeros(self.students.shape if needs[0] else (0,), dtype=self.dtype)
        of_prototypes = self.prototypes.new_zeros(self.prototypes.shape if needs[1] else (0,))
        return of_features, of_prototypes

    def add(self, found: tuple[Tensor, Tensor], needs: Any, rows: slice, features: Tensor, slopes: Tensor) -> None:
        """slopes: the gradient of the block's scores."""
        if needs[0]:
            part = torch.mm(slopes, self.prototypes)
            found[0][:, rows] = part.view(len(self.students), -1, part.shape[1])
        if needs[1]:
            found[1].addmm_(slopes.T, features)


def _rows_forward(*args: Any) -> tuple[Tensor, Tensor]:
    blocks = _Blocks(*args)
    values, kept = _rows_fake(*args)
    with without_autocast(values.device), torch.no_grad():
        for rows, p, _, _ in blocks:
            found = blocks.backend.forward(p, Wanted())
            values[rows], kept[:, :, rows] = found.values, found.kept
    return values, kept


def _rows_fake(*args: Any) -> tuple[Tensor, Tensor]:
    students, teachers = args[0], args[2]
    dtype, n = accumulation(*args[:4]), students.shape[1]
    new = students.new_empty
    return new(n, dtype=dtype), new(len(students) + len(teachers), 2, n, dtype=dtype)


def _rows_backward(*args: Any) -> tuple[Tensor, Tensor]:
    blocks, (kept, grad, needs) = _Blocks(*args[:_LENGTH]), args[_LENGTH:]
    found = blocks.gradients(needs)
    with without_autocast(grad.device), torch.no_grad():
        for rows, p, features, scores in blocks:
            incoming = Incoming(grad[rows].contiguous(), None, None)
            blocks.backend.backward(p, kept[:, :, rows].contiguous(), incoming, p.students)
            blocks.add(found, needs, rows, features, scores)
    return _cast(found, args[0], args[1])


def _cast(found: Any, students: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    return found[0].to(students.dtype), found[1].to(prototypes.dtype)


def _rows_backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    needs = args[-1]
    students, prototypes = (x.new_empty(x.shape if need else 0) for x, need in zip(args[:2], needs, strict=True))
    return students, prototypes


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            values, kept = _ops.prototype_rows_fwd(*args)
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(*args[:6], kept)
        ctx.options = args[6:]
        return values, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        *tensors, kept = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        found = _ops.prototype_rows_bwd(*tensors, *ctx.options, kept, grad.contiguous(), needs)
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *[None] * (_LENGTH - 2)


register(
    "prototype_rows",
    _Rows,
    (_rows_forward, _rows_fake),
    (_rows_backward, _rows_backward_fake),
    "prototype_cross_entropy",
)


def _total_forward(*args: Any) -> tuple[Tensor, ...]:
    *problem, weights, needs = args
    blocks = _Blocks(*problem)
    values, _ = _rows_fake(*problem)
    found = blocks.gradients(needs)
    with without_autocast(values.device), torch.no_grad():
        for rows, p, features, scores in blocks:
            part = blocks.backend.forward(p, Wanted())
            values[rows] = part.values
            if any(needs):
                incoming = Incoming(weights[rows].contiguous(), None, None)
                blocks.backend.backward(p, part.kept, incoming, p.students)
                blocks.add(found, needs, rows, features, scores)
    total = (weights * values).sum(dtype=torch.float64).to(values.dtype)
    return total, values, *found


def _total_fake(*args: Any) -> tuple[Tensor, ...]:
    *problem, _, needs = args
    values, _ = _rows_fake(*problem)
    gradients = (
        x.new_empty(x.shape if need else (0,), dtype=values.dtype) for x, need in zip(args[:2], needs, strict=True)
    )
    return values.new_empty(()), values, *gradients


def _total_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, values, *gradients, students, prototypes, needs = args
    scaled = [
        (gradient * grad).to(x.dtype) if need else x.new_empty(0)
        for gradient, x, need in zip(gradients, (students, prototypes), needs[:2], strict=True)
    ]
    return *scaled, values * grad if needs[2] else values.new_empty(0)


def _total_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    values, needs = args[1], args[-1]
    return *_rows_backward_fake(*args[4:6], needs[:2]), values.new_empty(values.shape if needs[2] else 0)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _ops.prototype_total_fwd(*args)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[1:], *args[:2])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * (_LENGTH + 2)
        needs = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[_LENGTH]]
        students, prototypes, weights = (
            x if need else None
            for x, need in zip(_ops.prototype_total_bwd(grad, *ctx.saved_tensors, needs), needs, strict=True)
        )
        return students, prototypes, *[None] * (_LENGTH - 2), weights, None


register(
    "prototype_total",
    _Total,
    (_total_forward, _total_fake),
    (_total_backward, _total_backward_fake),
    "prototype_cross_entropy",
)


def prototype_features(
    students: Tensor,
    student_prototypes: Tensor,
    teachers: Tensor,
    teacher_prototypes: Tensor,
    potentials: Tensor | None,
    scales: Tensor,
    pairs: list[float],
    weights: Tensor | None,
) -> Tensor:
    """The values [N] of each sample, or with weights [N] the sum of weights times values; differentiable once.

    students, teachers: features [crops, N, D]; prototypes [K, D].
    """
    tensors = students, student_prototypes, teachers.detach(), teacher_prototypes.detach()
    backend = choose_backend(students.device, accumulation(*tensors), "prototypes")
    problem = *tensors, potentials, scales, pairs, backend
    if weights is None:
        values: Tensor = _ops.prototype_rows_fwd(*problem)[0]
        return values
    needs = [torch.is_grad_enabled() and x.requires_grad for x in tensors[:2]]
    total: Tensor = _ops.prototype_total_fwd(*problem, weights, needs)[0]
    return total
