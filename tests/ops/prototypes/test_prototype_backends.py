"""The backends of the prototype losses against the plain formula in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastcl.ops.prototypes import chunked, op
from fastcl.ops.prototypes.records import Crops, Incoming, Values, Wanted, flatten
from tests.support.backends import QUICK, needs_interpreter, running
from tests.support.strategies import generator

SIZES = [
    (3, 1, 2, 1, 0),
    (7, 5, 1, 1, 0),
    (9, 300, 3, 2, 1),
    (6, 1027, 2, 2, 3),
    (5, 2500, 2, 1, 1),
]  # N, K, students, teachers, P
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def problem(dtype: torch.dtype, n: int, k: int, students: int, teachers: int, positions: int) -> Crops:
    g = generator(n + k)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    own = [random(n, k).to(dtype) for _ in range(students)]
    if students > 1:
        own[1] = own[1].T.contiguous().T
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    potentials = random(teachers, positions, k).to(sums) if positions else None
    if potentials is not None:
        potentials[:, :, 1] = -torch.inf
        for student in own:
            student[0, 1] = -torch.inf  # contributes nothing: no teacher has mass there
    pairs = [0.0 if a == b and students > 1 else 0.3 + a for b in range(students) for a in range(teachers)]
    scales = torch.tensor([1 / 0.1, 1 / 0.04], dtype=torch.float64)
    return Crops(own, [random(n, k).to(dtype) for _ in range(teachers)], potentials, scales, tuple(pairs))


def plain(p: Crops, incoming: Incoming) -> tuple[list[Tensor], list[Tensor]]:
    """Values, entropies and column sums by autograd in float64, and the students' gradients."""
    own = [x.double().requires_grad_() for x in p.students]
    n, k = p.sizes
    values, entropies, columns = torch.zeros(n).double(), torch.zeros(n).double(), torch.zeros(k).double()
    for b, x in enumerate(own):
        softmax = (x * p.scales[0]).softmax(1)
        logs = torch.where(x == -torch.inf, 0, (x * p.scales[0]).log_softmax(1))
        for a, t in enumerate(p.teachers):
            goals = t.double()
            if p.potentials is not None:
                goals = goals + p.potentials[a].double()[torch.arange(n) % p.potentials.shape[1]]
            values = values - p.pair(b, a) * ((goals * p.scales[1]).softmax(1) * logs).sum(1)
        entropies = entropies - (softmax * logs).sum(1)
        columns = columns + softmax.sum(0)
    total = torch.zeros(()).double()
    for found, weight in zip((values, entropies, columns), incoming, strict=True):
        if weight is not None:
            total = total + (found * weight.double()).sum()
    return [values, entropies, columns], list(torch.autograd.grad(total, own))


def check(backend: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    p = problem(dtype, *sizes)
    n, k = p.sizes
    module, g = op.BACKENDS[backend], generator(1)
    every = Incoming(*(torch.randn(size, generator=g).to(p.dtype) for size in (n, n, k)))
    for incoming in (every, Incoming(every.values, None, None), Incoming(None, None, every.column_sums)):
        found = module.forward(p, Wanted(True, True))
        outputs = [torch.full((n, k), torch.nan, dtype=dtype) for _ in p.students]
        module.backward(p, found.kept, incoming, outputs)
        expected, gradients = plain(p, incoming)
        for one, other in zip(found[:3], expected, strict=True):
            assert one.dtype == p.dtype
            assert (one - other).norm() <= ROUNDING[p.dtype] * other.norm()
        for one, other in zip(outputs, gradients, strict=True):
            assert (one - other).norm() <= max(ROUNDING[dtype], ROUNDING[p.dtype]) * other.norm()
        again = module.forward(p, Wanted(True, True))
        assert all(torch.equal(one, other) for one, other in zip(found[:3], again[:3], strict=True))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("variant", QUICK)
def test_values_and_gradients(variant: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    with running(variant) as backend:
        check(backend, dtype, sizes)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(dtype: torch.dtype) -> None:
    check("triton", dtype, (4, 200, 3, 2, 2))


def test_unwanted_values_are_empty() -> None:
    p = problem(torch.float32, 4, 6, 1, 1, 0)
    for variant in QUICK:
        with running(variant) as backend:
            found: Values = op.BACKENDS[backend].forward(p, Wanted())
        assert found.entropies.shape == found.column_sums.shape == (0,)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("variant", QUICK)
def test_teachers_rows_at_places(variant: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the teachers in another order and number, in blocks of two rows."""
    monkeypatch.setattr(chunked, "CPU_BLOCK", 300)
    full, g = problem(torch.float32, 9, 41, 2, 2, positions), generator(2)
    places = torch.randint(9, (7,), generator=g)
    potentials = full.potentials[:, torch.arange(9) % positions][:, places]
    own = [x[:7] for x in full.students]
    for x in own:
        x[:, 1] = -torch.inf
    chosen = Crops(own, full.teachers, full.potentials, full.scales, full.pairs, places)
    plainly = Crops(own, [x[places] for x in full.teachers], potentials, full.scales, full.pairs)
    with running(variant):
        found = []
        for p in (chosen, plainly):
            p.students[:] = [x.clone().requires_grad_() for x in own]
            values = op.prototype_scores(p, Wanted()).values
            found.append((values, *torch.autograd.grad(values[1:].sum(), p.students)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("places", [None, torch.tensor([2, 0, 2])])
def test_the_operator(places: Tensor | None) -> None:
    p = replace(problem(torch.float32, 3, 20, 2, 2, 1), places=places)
    students = [x.clone().contiguous().requires_grad_() for x in p.students]
    arguments = (students, *flatten(p)[1:], [True, True], "chunked")
    torch.library.opcheck(op.scores_fwd.default, arguments)
