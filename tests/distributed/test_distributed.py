"""Losses of rows spread over processes (gloo), against the formula and against one process with all rows."""

import os
import time
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import fastcl
from fastcl.functional import cluster_infonce
from tests.support.distributed_calls import everything, penalised
from tests.support.distributed_cases import (
    MODES,
    SAMPLES,
    WHERE,
    Model,
    arguments_of,
    batches,
    infonce_problems,
    other_losses,
    places,
    spread,
    stats,
)
from tests.support.judging import judge
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
PROBLEMS = infonce_problems()
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@cache
def found(world: int) -> list[dict[str, Any]]:
    """The results of each of `world` processes, by subject."""
    results, errors = spread(everything, world)
    assert not errors, errors[min(errors)][1]
    return results


@pytest.fixture(params=[2, 4])
def world(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("name", PROBLEMS)
def test_is_the_formula(name: str, world: int) -> None:
    problem, _ = PROBLEMS[name]
    arguments = arguments_of(name, problem)
    merged = {}
    for mode in MODES:
        parts = [results["run_infonce"][f"{name}, {mode}"] for results in found(world)]
        unreduced = problem.reduction == "none"
        losses = [loss for loss, _ in parts]
        loss = torch.cat(losses) if unreduced else torch.stack(losses).mean(0)
        gradients: dict[str, Tensor] = {}
        for leaf in problem.leaves:
            every = [part[leaf] for _, part in parts]
            if leaf == "temperature":
                whole = torch.stack(every).sum(0)
            else:
                whole = torch.full_like(arguments[leaf], torch.nan)
                for rank, gradient in enumerate(every):
                    whole[places(problem, arguments, rank, world)[WHERE[leaf]]] = gradient
            gradients[leaf] = whole if unreduced else whole / world
        merged[str(mode)] = loss, gradients
    judge(arguments, problem.leaves, merged)


def test_both_ways_of_travelling_give_the_same_numbers(world: int) -> None:
    """Up to roundings of float64, as sums of blocks are merged and the two modes cut blocks differently."""
    for results in found(world):
        for name, (problem, _) in PROBLEMS.items():
            if problem.dtype == torch.float64:
                (loss, gradients), (other, others) = (results["run_infonce"][f"{name}, {mode}"] for mode in MODES)
                torch.testing.assert_close(loss, other, **CLOSE)
                for leaf, gradient in gradients.items():
                    torch.testing.assert_close(gradient, others[leaf], **CLOSE)


def test_other_losses_are_those_of_one_process(world: int) -> None:
    whole = other_losses(False, None, world)
    for mode in MODES:
        parts = [results["run_others"][mode] for results in found(world)]
        for name, (value, gradients) in whole.items():
            mean = torch.stack([part[name][0] for part in parts]).mean(0)
            torch.testing.assert_close(mean, value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
            for leaf, expected in gradients.items():
                every = [part[name][1][leaf] for part in parts]
                shared = leaf in ("prototypes", "temperature")
                got = (torch.stack(every).sum(0) if shared else torch.cat(every)) / world
                what = f"{name}, gradient of {leaf}"
                torch.testing.assert_close(got, expected, **CLOSE, msg=lambda text, what=what: f"{what}: {text}")


def test_a_group_has_its_own_loss() -> None:
    """Of four processes as a 2 x 2 mesh, two share each batch. Copies leave the group behind."""
    for results in (part["meshed"] for part in found(4)):
        assert results["copies"] == [None, None]
        assert results["kept"]
        assert "gather=True, group=<" in results["shown"]
        assert results["rows"].tolist() == [results["batch"]] * 3
    for batch in (0, 1):
        whole = other_losses(False, None, 2, seed=3 + batch)
        parts = sorted(
            (part["meshed"] for part in found(4) if part["meshed"]["batch"] == batch), key=lambda part: part["place"]
        )
        assert len(parts) == 2
        for mode in map(str, MODES):
            for name, (value, gradients) in whole.items():
                mean = torch.stack([part[mode][name][0] for part in parts]).mean(0)
                torch.testing.assert_close(mean, value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
                every = [part[mode][name][1]["z0"] for part in parts]
                torch.testing.assert_close(torch.cat(every) / 2, gradients["z0"], **CLOSE)


def test_statistics_are_those_of_one_process(world: int) -> None:
    whole = stats(False, None, world)
    for mode in MODES:
        parts = [results["observed"][mode] for results in found(world)]
        for name, expected in whole.items():
            for part in parts if name != "unreduced" else ():
                sides = (part[name], expected), (part[name].reverse, expected.reverse)
                for got, side in sides if expected.reverse is not None else sides[:1]:
                    for values in zip(got[:4], side[:4], strict=True):
                        torch.testing.assert_close(*values, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        every = [torch.cat(values) for values in zip(*(part["unreduced"][:4] for part in parts), strict=True)]
        torch.testing.assert_close(every, list(whole["unreduced"][:4]), **CLOSE)


def test_a_group_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group or None, got int"):
        fastcl.ClusterInfoNCE(gather=True, group=3)
    for loss in (fastcl.SwAVLoss, fastcl.MSNLoss, fastcl.SampledNCELoss):
        with pytest.raises(TypeError, match="group: expected"):
            loss(gather=True, group="data")
    with pytest.raises(TypeError, match="group: expected"):
        fastcl.distributed.gather_rows(torch.zeros(2), group=-100)


def test_wrapped_and_accumulated_gradients_are_those_of_one_process(world: int) -> None:
    """Also the temperature's gradient, which is averaged because the loss is inside the wrapped module."""
    model = Model(False)
    for left, right in batches():
        model(left, right).backward()
    for results in found(world):
        for gradients in results["accumulated"].values():
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, **CLOSE)


def test_factors_that_differ_between_processes(world: int) -> None:
    for results in found(world):
        assert len(results["unequal"]) == 4
        assert all(results["unequal"].values()), results["unequal"]


def test_queues_hold_the_same_rows_in_the_same_order(world: int) -> None:
    first, *others = [results["queues"] for results in found(world)]
    assert first["nothing"] == (0, 3)
    assert first["flags"].tolist() == [rank % 2 == 0 for rank in range(world)]
    assert not first["graph"]
    assert first["dtypes"]
    assert first["state"]["sample_ids"].unique().tolist() == [r for r, n in enumerate(SAMPLES[world]) if n]
    for other in others:
        for name, value in first["state"].items():
            assert torch.equal(other["state"][name], value), name


def test_calls_that_differ_raise_on_every_process(world: int) -> None:
    for results in found(world):
        said = results["disagreements"]
        assert f"{list(range(3, 3 + world))}" in said["dimension"]
        for name, error in said.items():
            assert name.split(":")[0] in error, name


def test_an_error_of_one_process_is_told_to_the_others(world: int) -> None:
    *others, last = [results["own_errors"] for results in found(world)]
    assert len(last) == 23
    for name, (kind, text) in last.items():
        assert "gather: expected the same call" not in text, name
        told = f"gather: expected the same call on all processes, got an error on rank {world - 1}: {kind}: {text}"
        for said in others:
            assert said[name] == ["ValueError", told], name


def test_broadcast_buffers_take_the_first_process_memory_along(world: int) -> None:
    """The first process's rows, their number and the next place are broadcast, and whether a bank has clusters."""
    first, *others = [results["memories"] for results in found(world)]
    assert first["lengths"] == (8, 6)
    assert first["clusters"] == [40, 41, 42, 43, 44, 45]
    assert first["loss"] > 0.1
    assert torch.equal(first["rows"][[5, 6, 7]], torch.eye(3))
    assert torch.equal(first["oldest first"], first["rows"])  # the place is 0 again
    assert all("temperature=DTensor (learned)" in text for text in first["shown"])
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value) if isinstance(value, Tensor) else other[name] == value, name


def test_second_derivatives_are_right_or_raise(world: int) -> None:
    whole = penalised(None, world)
    every = [results["penalised"] for results in found(world)]
    for name, expected in whole.items():
        parts = [part.pop(name) for part in every]
        if isinstance(expected, str):  # SwAV and MSN rest on an operator without a second derivative
            assert all("second derivatives are not supported" in said for said in (expected, *parts)), name
            continue
        torch.testing.assert_close(torch.cat(parts), expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for part in every:
        for name, said in part.items():
            assert "second derivatives are not supported" in str(said), name


def test_rows_too_large_for_one_message_give_the_same_numbers(world: int) -> None:
    for results in found(world):
        small, large = results["large"]
        for name, values in small.items():
            torch.testing.assert_close(values, large[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_no_more_collectives_than_needed(world: int) -> None:
    for results in found(world):
        assert results["collectives"] == {
            "both ways": 3,
            "views": 3,
            "clusters, ids and bias": 3,
            "rows": 1,
            "more rows": 3,
            "rows again": 1,
        }


def test_compiled_functions_leave_the_loss_out_and_second_derivatives_raise(world: int) -> None:
    for results in found(world):
        assert results["compiled"]["equal"]
        assert "second derivatives are not supported" in results["compiled"]["second derivative"]


def test_a_nan_of_one_process_reaches_the_loss_of_all(world: int) -> None:
    """By exchanged rows, or by the number that a mean divides by."""
    for results in found(world):
        for name, loss in results["not_a_number"].items():
            assert loss.isnan(), name


def test_weights_of_a_mean_have_no_unit(world: int) -> None:
    x, y = (torch.randn(4 * world, 3, generator=generator(seed)) for seed in (0, 1))
    weights = torch.cat([torch.linspace(1, 2, 4, dtype=torch.float64) * 10.0**rank for rank in range(world)])
    expected = cluster_infonce(x.double(), contrasts=y.double(), weights=weights)
    got = torch.stack([results["light_weights"] for results in found(world)]).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def dies(rank: int, world: int) -> None:
    z = torch.randn(4, 2, 3, requires_grad=True)
    loss = cluster_infonce(z, gather="ring" if world == 2 else True)
    if rank == 1:
        os._exit(3)
    loss.backward()


def test_a_process_that_dies_ends_the_others(world: int) -> None:
    start = time.monotonic()
    _, errors = spread(dies, world, seconds=10)
    survivors = [rank for rank in range(world) if rank != 1]
    assert sorted(errors) == survivors
    assert all(name == "RuntimeError" or "Error" in name for name, _ in errors.values()), errors
    assert "Hanging" not in {name for name, _ in errors.values()}, time.monotonic() - start


@pytest.mark.parametrize("gather", MODES)
def test_alone_it_does_nothing(gather: Any, tmp_path: Any) -> None:
    """Without a process group, and in a group of one."""
    z = torch.randn(6, 2, 4)
    loss = cluster_infonce(z)
    assert torch.equal(cluster_infonce(z, gather=gather), loss)
    assert fastcl.distributed.gather_rows(z).data_ptr() == z.data_ptr()
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert torch.equal(cluster_infonce(z, gather=gather), loss)
        assert torch.equal(fastcl.distributed.gather_rows(z), z)
    finally:
        dist.destroy_process_group()
