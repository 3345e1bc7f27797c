"""torch's tracers and transforms get a right result, or an error that says what is not supported."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastcl
from fastcl.functional import cluster_infonce
from tests.project.test_fuzz import tensors_in
from tests.support.fuzzing import TARGETS
from tests.support.strategies import generator

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit",  # deprecated
    "ignore::torch.jit.TracerWarning",  # from comparisons of shapes
    "ignore:.*performance drop",  # from vmap over an operator
)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(0))


FUNCTIONS: dict[str, Any] = {
    "mean loss": lambda z: cluster_infonce(z),  # make_fx would trace a function's defaults as arguments
    "loss": lambda z: cluster_infonce(z, reduction="none"),
    "stats": lambda z: fastcl.contrastive_stats(z[:, 0], normalize_anchors=True).lse_all,
    "loss of assignments": lambda z: cluster_infonce(z, assignments=z[:, 0].exp()),
    "sinkhorn": lambda z: fastcl.sinkhorn(z[:, 0]).assignments,
    "sampled": lambda z: fastcl.sampled_similarity(z[:, 0], z[:, 1], torch.arange(10).reshape(5, 2) % 5),
    "topk": lambda z: fastcl.topk_similarity(z[:, 0], z[:, 1], 2)[0],
}
DIFFERENTIABLE = [name for name in FUNCTIONS if name != "topk"]


@pytest.mark.parametrize("name", ["mean loss", "loss", "stats"])
def test_jit_trace_says_that_it_is_not_supported(name) -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace is not supported, torch\.export"):
        torch.jit.trace(FUNCTIONS[name], (x(5, 2, 3),))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_torch_func_say_that_they_are_not_supported(name) -> None:
    def total(z: Tensor) -> Tensor:
        return FUNCTIONS[name](z).sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=r"^fastcl\..*not supported"):
            transform(total)(x(5, 2, 3))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_says_that_it_is_not_supported(name) -> None:
    z = x(5, 2, 3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"^fastcl\..*forward-mode"):
        FUNCTIONS[name](forward_ad.make_dual(z, z))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name) -> None:
    z = x(3, 5, 2, 3)
    got = torch.func.vmap(FUNCTIONS[name])(z)
    torch.testing.assert_close(got, torch.stack([FUNCTIONS[name](part) for part in z]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_make_fx(name) -> None:
    traced = make_fx(FUNCTIONS[name])(x(5, 2, 3))
    z = x(5, 2, 3) * 2
    torch.testing.assert_close(traced(z), FUNCTIONS[name](z))


def test_symbolic_trace_names_an_argument() -> None:
    with pytest.raises(TypeError, match=r"^z0: expected a tensor, got Proxy"):
        torch.fx.symbolic_trace(fastcl.NTXentLoss())


def test_functional_call() -> None:
    module = fastcl.ClusterInfoNCE(torch.nn.Parameter(torch.tensor(0.3)))
    got = torch.func.functional_call(module, {"temperature": torch.tensor(0.2)}, (x(5, 2, 3),))
    assert torch.equal(got, cluster_infonce(x(5, 2, 3), temperature=0.2))


def on_meta(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(on_meta, argument))
    return argument.to("meta") if isinstance(argument, (Tensor, fastcl.MemoryQueue)) else argument


def has_bank(argument: Any) -> bool:  # which of its rows are filled depends on values
    return isinstance(argument, fastcl.MemoryBank) or (isinstance(argument, list) and any(map(has_bank, argument)))


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if "self" not in target.examples[0]])
def test_meta_tensors_give_shapes(name) -> None:
    for example in TARGETS[name].examples:
        if any(map(has_bank, example.values())) or name == "knn_predict":  # as does the number of classes
            continue
        expected = list(tensors_in(TARGETS[name].call(**copy.deepcopy(example))))
        got = list(tensors_in(TARGETS[name].call(**{key: on_meta(copy.deepcopy(v)) for key, v in example.items()})))
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
