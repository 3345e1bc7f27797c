"""Suite ``prototypes``: cross-entropies against prototypes, of stored scores and of features, with their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from benchmarks import memory, side_by_side
from benchmarks.providers import _DEVICE_OF_BACKEND, LINEAR_CROSS_ENTROPY, _why_not
from benchmarks.side_by_side import Contestant, Row
from fastcl.ops.backends.choose import AVAILABLE, computes

SUITE, PAGE = "prototypes", "prototypes.md"
EAGER, COMPILED, STORED = "eager", "torch.compile", "stored scores"
CUT, HARD = "cut-cross-entropy", ", hard targets"
STUDENT, TEACHER, ITERATIONS = 0.1, 0.04, 3
KINDS = ("stored scores", "features", "potentials")
ERROR_ROWS = 256
NOTE = (
    "float32. Stored scores: loss and gradient of the student's scores, with a given potential. Features: loss and "
    "gradients of the student's features and prototypes; the others multiply first and store the scores. Potentials: "
    f"the column potential of Sinkhorn after {ITERATIONS} iterations, without gradients. Hard targets: the "
    "cross-entropy of the student alone, with the teacher's largest score as the class: 6 N K D operations in place of "
    f"8. Errors are those of a call with the first {ERROR_ROWS} rows. Extra memory: the peak above the inputs in a "
    "process of its own, results and gradients included."
)


@dataclass(frozen=True)
class Case:
    """kind: of KINDS, of n rows and k prototypes of dimension d.

    alone: the scores that eager stores exceed the machine's memory. A limited process shows that; only fastcl is timed.
    """

    kind: str
    n: int
    k: int
    d: int = 0
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.n} x {self.k}{f' x {self.d}' if self.d else ''}"

    def arguments(self, device: torch.device) -> tuple[Tensor, ...]:
        """Scores of student and teacher, or features and prototypes of both; then the potential."""
        g = torch.Generator(device).manual_seed(0)

        def rows(size: int, d: int) -> Tensor:
            return F.normalize(torch.randn(size, d, generator=g, device=device), dim=1)

        potential = 0.05 * torch.randn(self.k, generator=g, device=device)
        if self.kind == "stored scores":
            scores = [torch.randn(self.n, self.k, generator=g, device=device).mul_(0.2) for _ in range(2)]
            return scores[0].requires_grad_(), scores[1], potential
        x, w, y, v = rows(self.n, self.d), rows(self.k, self.d), rows(self.n, self.d), rows(self.k, self.d)
        if self.kind == "features":
            x.requires_grad_()
            w.requires_grad_()
        return x, w, y, v, potential


LARGEST = Case("features", 6144, 262144, 64, alone=True)
CASES = (
    Case("stored scores", 4096, 16384),
    Case("features", 2048, 65536, 256),
    Case("potentials", 2048, 65536, 256),
    LARGEST,
)
QUICK = (Case("stored scores", 1024, 2048), Case("features", 512, 4096, 64), Case("potentials", 512, 4096, 64))

Loss = Callable[..., Tensor]  # of a case's arguments


def cross_entropy(student: Tensor, teacher: Tensor, potential: Tensor) -> Tensor:
    """The mean, as a competent user writes it."""
    goals = ((teacher + potential) / TEACHER).softmax(1)
    return -(goals * (student / STUDENT).log_softmax(1)).sum(1).mean()


def multiplied(x: Tensor, w: Tensor, y: Tensor, v: Tensor, potential: Tensor) -> Tensor:
    return cross_entropy(x @ w.T, y @ v.T, potential)


def sinkhorn_stored(x: Tensor, w: Tensor, y: Tensor, v: Tensor, potential: Tensor) -> Tensor:
    """Sinkhorn's column potential in the log domain."""
    m = y @ v.T / TEACHER
    n, k = m.shape
    rows = m.new_zeros(n)
    for _ in range(ITERATIONS):
        columns = -math.log(k) - (m + rows[:, None]).logsumexp(0)
        rows = -math.log(n) - (m + columns).logsumexp(1)
    return columns * TEACHER


def hard_targets(x: Tensor, w: Tensor, y: Tensor, v: Tensor, potential: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T / STUDENT, _classes(y, v))


_FOUND: dict[tuple[int, ...], Tensor] = {}


def _classes(y: Tensor, v: Tensor) -> Tensor:
    """The prototype with the teacher's largest score: computed once, as the target is given."""
    key = y.data_ptr(), v.data_ptr(), len(y)
    if key not in _FOUND:
        _FOUND[key] = fastcl.topk_similarity(y.detach(), v.detach(), 1)[1][:, 0]
    return _FOUND[key]


def _torch_linear(x: Tensor, w: Tensor, y: Tensor, v: Tensor, potential: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    found: Tensor = F.linear_cross_entropy(x / STUDENT, w, _classes(y, v), options=options)
    return found


def _cut(x: Tensor, w: Tensor, y: Tensor, v: Tensor, potential: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    found: Tensor = linear_cross_entropy(x / STUDENT, w, _classes(y, v), filter_eps=None)
    return found


def _ours(backend: str, kind: str, *given: Tensor) -> Tensor:
    with fastcl.use_backend(backend):
        if kind == "potentials":
            found = fastcl.sinkhorn_potentials(given[2], given[3], epsilon=TEACHER, n_iters=ITERATIONS)
            return found.col_potential
        pair: Any = (given[0], given[1]) if kind == "stored scores" else (given[:2], given[2:4])
        return fastcl.prototype_cross_entropy(
            *pair, potential=given[-1], student_temperature=STUDENT, teacher_temperature=TEACHER
        )


def _ours_stored(backend: str, *given: Tensor) -> Tensor:
    """The potentials."""
    with fastcl.use_backend(backend):
        return fastcl.sinkhorn(given[2] @ given[3].T, epsilon=TEACHER, n_iters=ITERATIONS).col_potential


def losses(case: Case, device: torch.device) -> tuple[dict[str, tuple[Loss, Loss]], dict[str, str]]:
    """By provider its loss and the plain formula of it; and those that are missing."""
    usable = [
        name
        for name in AVAILABLE
        if name != "reference"
        and _DEVICE_OF_BACKEND.get(name, device.type) == device.type
        and computes(name, torch.float32, "prototypes")
    ]
    best = "cpu" if "cpu" in usable else usable[-1]
    plains: dict[str, Loss] = {"stored scores": cross_entropy, "features": multiplied, "potentials": sinkhorn_stored}
    plain = plains[case.kind]
    chosen = usable if case.kind == "stored scores" else [best]
    found: dict[str, tuple[Loss, Loss]] = {
        f"fastcl {name}": (partial(_ours, name, case.kind), plain) for name in chosen
    }
    if case.alone:
        return found, {}
    if case.kind == "potentials":
        found[f"fastcl {best}, {STORED}"] = partial(_ours_stored, best), plain
    found |= {EAGER: (plain, plain), COMPILED: (torch.compile(plain, dynamic=False), plain)}
    missing = {}
    if case.kind == "features":
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            found[LINEAR_CROSS_ENTROPY + HARD] = _torch_linear, hard_targets
        else:
            missing[LINEAR_CROSS_ENTROPY + HARD] = f"torch {torch.__version__} has none in chunks"
        reason = "needs a GPU" if device.type == "cpu" else _why_not("cut_cross_entropy")
        if reason is None:
            found[CUT + HARD] = _cut, hard_targets
        else:
            missing[CUT + HARD] = reason
    return found, missing


def _step(loss: Loss, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    value, leaves = loss(*given), [x for x in given if x.requires_grad]
    return value.detach(), *(torch.autograd.grad(value, leaves) if leaves else ())


def _first(case: Case, given: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of a call with the first rows."""
    of_rows = (0, 1) if case.kind == "stored scores" else (0, 2)
    return tuple(
        (x.detach()[:ERROR_ROWS] if place in of_rows else x.detach()).to(dtype).requires_grad_(x.requires_grad)
        for place, x in enumerate(given)
    )


def _peak(case: Case, name: str) -> memory.Peak:
    """Of one provider's step, on a CPU."""
    device = torch.device("cpu")
    given = case.arguments(device)
    loss = multiplied if case.alone and name == EAGER else losses(case, device)[0][name][0]
    return memory.peak_of(lambda: _step(loss, given), ())


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per provider. effort: options of `measure.alternate`."""
    torch.compiler.reset()
    _FOUND.clear()
    given = case.arguments(device)
    found, missing = losses(case, device)

    def error(loss: Loss, truth: Loss) -> float:
        few, wide = (_first(case, given, dtype) for dtype in (torch.float32, torch.float64))
        pairs = zip(_step(loss, few), _step(truth, wide), strict=True)
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)

    contestants = {
        name: Contestant(
            partial(_step, loss, given), partial(error, loss, truth), "fastcl" if "fastcl" in name else "torch"
        )
        for name, (loss, truth) in found.items()
    }
    if case.alone:
        effort = {"rounds": (1, 1), "seconds": 0.0}
    rows = side_by_side.measure(SUITE, case.name, contestants, missing, device, 1e-4, **effort)
    if device.type != "cpu":
        return rows
    given = ()  # frees the memory for the processes
    _FOUND.clear()
    contestants.clear()
    if case.alone:
        left_out = {"status": "not timed", "reason": "it would fill the memory of the machine"}
        rows.append({"suite": SUITE, "case": case.name, "provider": EAGER, **left_out})
    for row in rows:
        if row["status"] in ("ok", "not timed"):
            _weigh(row, case)
    return rows


def _weigh(row: Row, case: Case) -> None:
    """Adds the memory to a provider's row."""
    try:
        row["extra_bytes"] = memory.apart(partial(_peak, case, row["provider"]), torch.get_num_threads()).extra
    except memory.TooLargeError as problem:
        row |= {"status": "too large", "reason": f"more memory than the machine has ({problem})"[:200]}


def run(folder: Path, device: torch.device, quick: bool, circumstances: str, only: str = "") -> list[Row]:
    """Measures the suite and writes its rows and page into `folder`."""
    cases = QUICK if quick else CASES
    return side_by_side.run(
        cases, only, measure, device, quick, folder, SUITE, "Prototypes at scale", circumstances, NOTE
    )
