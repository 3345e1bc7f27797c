"""`cached_step` and `CachedStep` against a plain step, in one process and in several (gloo)."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import fastcl
from fastcl import CachedStep, cached_step
from tests.support.distributed_cached import (
    F64,
    MODES,
    Remembering,
    Towers,
    data,
    everything,
    gradients_of,
    plain,
    state_of,
    stepped,
)
from tests.support.distributed_cases import spread

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Encoder(nn.Module):
    """With dropout; from a tensor, a dictionary or a list of samples."""

    def __init__(self, dtype: torch.dtype = F64, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 4)).to(dtype)
        self.sizes: list[int] = []

    def forward(self, given: Any) -> Tensor:
        if isinstance(given, dict):
            rows = given["x"] * given["factor"]
        else:
            rows = torch.stack(given) if isinstance(given, list) else given
        self.sizes.append(len(rows))
        return self.layers(rows)


def rows(n: int = 11, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)


def learned(*modules: nn.Module) -> dict[str, Tensor | None]:
    return {f"{k}.{name}": p.grad for k, module in enumerate(modules) for name, p in module.named_parameters()}


def same(left: dict[str, Tensor | None], right: dict[str, Tensor | None], **close: float) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value is not None, name
        torch.testing.assert_close(
            value, right[name], **(close or CLOSE), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["tensor", "dictionary", "list"])
@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_gradients_are_those_of_the_plain_step(kind: str, size: int) -> None:
    x, labels = rows(), torch.arange(11) % 4
    given = {"tensor": x, "dictionary": {"x": x, "factor": 2.0}, "list": list(x)}[kind]
    loss, encoder = fastcl.SupConLoss(nn.Parameter(torch.tensor(0.2, dtype=F64))), Encoder()
    expected = loss(encoder(given), labels)
    expected.backward()
    gradients = learned(encoder, loss)
    for module in (encoder, loss):
        module.zero_grad()
    encoder.sizes.clear()
    found = cached_step(encoder, given, lambda z: loss(z, labels), chunk_size=size)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())
    same(learned(encoder, loss), gradients)
    chunks = [len(part) for part in x.split(size)]
    assert encoder.sizes == chunks * 2
    form = CachedStep(encoder, loss, chunk_size=size)
    form.zero_grad()
    form(given, labels).backward()
    same(learned(encoder, loss), gradients)


def test_several_encoders_share_one_criterion() -> None:
    """Also one encoder for two inputs, chunk sizes for each, accumulation, and inputs that have a gradient."""
    x, y = rows(6).requires_grad_(), rows(8).requires_grad_()
    one, two = Encoder(), Encoder()
    for encoders in ((one, two), (one, one)):
        modules = tuple(dict.fromkeys(encoders))

        def criterion(a: Tensor, b: Tensor) -> tuple[Tensor, str]:
            return fastcl.ClusterInfoNCE(symmetric=True)(a, contrasts=b), "more"

        for module in modules:
            module.zero_grad()
        x.grad = y.grad = None
        for _ in range(2):
            criterion(encoders[0](x), encoders[1](y))[0].backward()
        gradients = learned(*modules) | {"x": x.grad, "y": y.grad}
        for way in ("function", "module"):
            for module in modules:
                module.zero_grad()
            x.grad = y.grad = None
            encode = encoders if encoders[0] is not encoders[1] else one
            for _ in range(2):
                if way == "function":
                    _, more = cached_step(encode, (x, y), criterion, chunk_size=(2, 3))
                else:
                    value, more = CachedStep(encode, criterion, chunk_size=[2, 3])((x, y))
                    value.backward()
                assert more == "more"
            same(learned(*modules) | {"x": x.grad, "y": y.grad}, gradients)


def test_dropout_repeats() -> None:
    """With one chunk the plain step draws the same numbers; with several the embeddings of both passes are equal."""
    x, loss = rows(12), fastcl.SupConLoss()
    labels = torch.arange(12) % 3
    encoder = Encoder(dropout=0.5)
    torch.manual_seed(1)
    loss(encoder(x), labels).backward()
    after, gradients = torch.rand(1), learned(encoder)
    seen: list[Tensor] = []
    encoder.layers[2].register_forward_hook(lambda *given: seen.append(given[2].detach()))
    for size in (12, 5):
        for way in ("function", "module"):
            seen.clear()
            encoder.zero_grad()
            torch.manual_seed(1)
            if way == "function":
                cached_step(encoder, x, lambda z: loss(z, labels), chunk_size=size)
            else:
                CachedStep(encoder, loss, chunk_size=size)(x, labels).backward()
            half = len(seen) // 2
            assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
            assert not torch.equal(seen[0], seen[1][: len(seen[0])]) or size == 12
            if size == 12:
                same(learned(encoder), gradients)
                assert torch.equal(torch.rand(1), after)  # the generator went on once


@pytest.mark.parametrize("way", ["function", "module"])
def test_autocast_and_a_scaler(way: str) -> None:
    """Casts of weights are not kept without a graph; gradients are scaled once."""
    x, labels = rows(9, torch.float32), torch.arange(9) % 3
    loss, encoder = fastcl.SupConLoss(nn.Parameter(torch.tensor(0.2))), Encoder(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(x)
        assert z.dtype == torch.bfloat16
        expected = loss(z, labels)
    scaler.scale(expected).backward()
    gradients = learned(encoder, loss)
    for module in (encoder, loss):
        module.zero_grad()
    if way == "function":
        with torch.autocast("cpu", torch.bfloat16):
            cached_step(encoder, x, lambda z: loss(z, labels), chunk_size=4, scaler=scaler)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = CachedStep(encoder, loss, chunk_size=4)(x, labels)
        scaler.scale(found).backward()
    for name, value in learned(encoder, loss).items():
        expected_gradient = gradients[name]
        assert value is not None
        assert expected_gradient is not None
        assert (value - expected_gradient).norm() <= 2**-7 * expected_gradient.norm(), name


def test_frozen_encoders_run_once_and_empty_batches_work() -> None:
    frozen, encoder = Encoder().requires_grad_(False), Encoder()
    loss = fastcl.ClusterInfoNCE()
    cached_step((encoder, frozen), (rows(6), rows(6)), lambda a, b: loss(a, contrasts=b), chunk_size=2)
    assert len(encoder.sizes) == 6
    assert len(frozen.sizes) == 3
    assert all(p.grad is None for p in frozen.parameters())
    assert cached_step(encoder, rows(0), lambda z: loss(z, torch.arange(0)), chunk_size=3) == 0
    with torch.no_grad():
        assert not CachedStep(encoder, loss, chunk_size=3)(rows(6), torch.arange(6) // 2).requires_grad


def test_batch_normalisation_sees_chunks_twice() -> None:
    """In training mode. In evaluation mode the gradients are those of the plain step."""
    x, labels, loss = rows(8), torch.arange(8) // 2, fastcl.SupConLoss()
    norm = nn.BatchNorm1d(5, dtype=F64)
    encoder = nn.Sequential(norm, Encoder())
    cached_step(encoder, x, lambda z: loss(z, labels), chunk_size=4)
    assert norm.num_batches_tracked == 4
    gradients = []
    for size in (8, 4):
        encoder.zero_grad()
        cached_step(encoder.eval(), x, lambda z: loss(z, labels), chunk_size=size)
        gradients.append(learned(encoder))
    same(*gradients)


def test_second_derivatives_raise() -> None:
    encoder = Encoder()
    value = CachedStep(encoder, fastcl.SupConLoss(), chunk_size=3)(rows(6), torch.arange(6) // 2)
    (gradient, *_) = torch.autograd.grad(value, list(encoder.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size: expected an integer"),
        ({"chunk_size": (2, 3)}, ValueError, "chunk_size: expected 1 numbers"),
        ({"inputs": 3}, TypeError, "inputs: expected a tensor"),
        ({"inputs": (rows(), 3)}, TypeError, r"inputs\[1\]: expected a tensor"),
        ({"inputs": ()}, ValueError, "inputs: expected a tensor"),
        ({"inputs": {"a": 3}}, ValueError, "inputs: expected tensors and lists of one length"),
        ({"inputs": {"a": rows(3), "b": [1]}}, ValueError, "inputs: expected tensors and lists of one length"),
        ({"encode": 3}, TypeError, "encode: expected a module or function"),
        ({"encode": (Encoder(), Encoder())}, ValueError, "inputs: expected a tuple of 2"),
        ({"encode": lambda x: [x]}, TypeError, "encode: expected to return a tensor, got list"),
        ({"encode": lambda x: x[:1]}, ValueError, "encode: expected to return 4 rows for 4 samples"),
        ({"criterion": lambda z: z}, ValueError, "criterion: expected to return a scalar"),
        ({"criterion": lambda z: 3}, TypeError, "criterion: expected to return a loss"),
        ({"criterion": lambda z: torch.zeros(())}, ValueError, "criterion: expected a loss that depends on"),
        ({"scaler": 3}, TypeError, "scaler: expected a GradScaler"),
        ({"sync": 3}, TypeError, "sync: expected"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"encode": Encoder(), "inputs": rows(), "criterion": lambda z: z.sum(), "chunk_size": 4} | change
    with pytest.raises(error, match=text):
        cached_step(given.pop("encode"), given.pop("inputs"), given.pop("criterion"), **given)


def test_errors_of_the_module() -> None:
    for encode, error in ((3, TypeError), ((), ValueError), ((Encoder(), print), TypeError)):
        with pytest.raises(error, match="encode: expected"):
            CachedStep(encode, print, chunk_size=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="criterion: expected"):
        CachedStep(Encoder(), 3, chunk_size=2)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients to be enabled"):
        cached_step(Encoder(), rows(), print, chunk_size=2)
    assert repr(CachedStep(Encoder(), nn.Identity(), chunk_size=2)).startswith("CachedStep(\n  chunk_size=2")


# Several processes.


@cache
def found(world: int) -> list[dict[str, Any]]:
    results, errors = spread(everything, world)
    assert not errors, errors[min(errors)][1]
    return results


needs_processes = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


@needs_processes
@pytest.mark.parametrize("where", ["inside", "beside", "own"])
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_wrapped_gradients_are_those_of_one_process(where: str, unused: bool, mode: Any) -> None:
    """The learned temperature's too, wherever it is: it is averaged exactly once."""
    expected = gradients_of(plain(Towers(False), data()))
    for results in found(2):
        same(results["wrapped"][where, unused, mode], expected)


@needs_processes
def test_accumulated_gradients_are_synchronised_once() -> None:
    model = Towers(False)
    for _ in range(2):
        plain(model, data())
    for results in found(2):
        for gradients in results["accumulated"].values():
            same(gradients, gradients_of(model))
        assert results["reductions"] == {
            "plain": results["reductions"]["plain"],
            "cached": results["reductions"]["plain"],
        }


@needs_processes
def test_sharded_gradients_are_those_of_one_process() -> None:
    expected = gradients_of(plain(Towers(False), data()))
    for results in found(2):
        same(
            results["sharded"],
            {name: value.reshape(results["sharded"][name].shape) for name, value in expected.items()},
        )


@needs_processes
def test_the_module_form_leaves_wrapping_to_others() -> None:
    for results in found(2):
        assert "encode: expected modules without DDP and FSDP" in results["refused"]


@needs_processes
def test_sharded_modules_with_memories_and_a_learned_temperature() -> None:
    """Their training is that of one process, and a checkpoint restores all of it."""
    expected = state_of(stepped(Remembering(), None))
    for results in (part["remembering"] for part in found(2)):
        for state in (results["state"], results["loaded"]):
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert results["lengths"] == (8, 12)
        assert results["losses"][0] == results["losses"][1]
