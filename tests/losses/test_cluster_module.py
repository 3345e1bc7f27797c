"""ClusterInfoNCE as a module: parameters, state, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fastcl
from fastcl.functional import cluster_infonce as library_loss
from fastcl.losses.options import LossOptions
from tests.support.oracle import cluster_infonce
from tests.support.strategies import generator, loss_problem


def test_module_equals_function(backend) -> None:
    problem = loss_problem(contrasts="paired", symmetric=True, weights=True, bias=True, ids=True, positives=True)
    arguments = problem.arguments()
    options = {name: arguments.pop(name) for name in ("temperature", *LossOptions._fields) if name in arguments}
    changed = options | {"form": "inside", "denominator": "negatives", "margin": 0.1, "reduction": "sum"}
    for choice in (options, changed):
        module = fastcl.ClusterInfoNCE(**choice)
        assert torch.equal(module(**arguments), library_loss(**arguments, **choice))


def test_defaults() -> None:
    z = torch.randn(6, 2, 3, generator=generator(0))
    expected = library_loss(
        z, temperature=0.1, form="outside", denominator="all", margin=0.0, normalize=True, reduction="mean"
    )
    assert torch.equal(fastcl.ClusterInfoNCE()(z), expected)
    assert torch.equal(library_loss(z), expected)


def test_temperature_of_the_call_wins(backend) -> None:
    z = torch.randn(6, 2, 3, generator=generator(0))
    module = fastcl.ClusterInfoNCE(0.1)
    assert torch.equal(module(z, temperature=0.5), library_loss(z, temperature=0.5))
    assert torch.equal(module(z), library_loss(z, temperature=0.1))


def test_temperature_that_is_a_parameter_is_registered_and_learned(backend) -> None:
    z = torch.randn(6, 2, 3, generator=generator(0))
    module = fastcl.ClusterInfoNCE(nn.Parameter(torch.tensor(0.5)))
    assert dict(module.named_parameters()).keys() == {"temperature"}
    assert module.state_dict().keys() == {"temperature"}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    before = module(z)
    before.backward()
    eager = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    cluster_infonce(z, temperature=eager).backward()
    torch.testing.assert_close(module.temperature.grad.double(), eager.grad, rtol=1e-4, atol=1e-6)
    optimizer.step()
    assert module.temperature.item() != 0.5
    assert module(z) < before


def test_state_dict_round_trip() -> None:
    module = fastcl.ClusterInfoNCE(nn.Parameter(torch.tensor(0.5)))
    other = fastcl.ClusterInfoNCE(nn.Parameter(torch.tensor(0.1)))
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == 0.5
    assert not fastcl.ClusterInfoNCE(0.1).state_dict()
    assert not list(fastcl.ClusterInfoNCE(0.1).parameters())


def test_parameter_under_module_to() -> None:
    module = fastcl.ClusterInfoNCE(nn.Parameter(torch.tensor(0.5))).double()
    assert module.temperature.dtype == torch.float64
    z = torch.randn(6, 2, 3, generator=generator(0))
    assert module(z).dtype == torch.float32
    assert module(z.double()).dtype == torch.float64


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize(
    "module",
    [
        fastcl.ClusterInfoNCE(nn.Parameter(torch.tensor(0.5)), form="inside", margin=0.1),
        fastcl.ClusterInfoNCE(0.2, denominator="negatives", reduction="none"),
        fastcl.SupConLoss(),
    ],
)
def test_modules_can_be_copied_and_pickled(module, how) -> None:
    z = torch.randn(6, 2, 3, generator=generator(0))
    copied = how(module)
    assert type(copied) is type(module)
    assert torch.equal(copied(z), module(z))
    assert repr(copied) == repr(module)
    for mine, theirs in zip(copied.parameters(), module.parameters(), strict=True):
        assert mine is not theirs


def test_repr_tells_the_options() -> None:
    text = repr(fastcl.ClusterInfoNCE(0.25, form="inside", denominator="negatives", margin=0.5, symmetric=True))
    for part in ("ClusterInfoNCE", "temperature=0.25", "form='inside'", "denominator='negatives'", "margin=0.5"):
        assert part in text
    assert "symmetric=True" in text
    assert "0.5" in repr(fastcl.ClusterInfoNCE(nn.Parameter(torch.tensor(0.5))))


# Training lowers the loss


def test_gradient_descent_separates_clusters(backend) -> None:
    g = generator(0)
    clusters = torch.arange(24) % 4
    x = torch.randn(24, 8, generator=g).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=2.0)
    losses = []
    for _ in range(60):
        loss = library_loss(x, clusters, temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    u = nn.functional.normalize(x.detach(), dim=1)
    s = u @ u.T
    same = clusters[:, None] == clusters
    assert s[same].min() > s[~same].max()


LEARNED = (
    fastcl.ClusterInfoNCE, fastcl.NTXentLoss, fastcl.MoCoLoss, fastcl.HardNegativeLoss, fastcl.DebiasedLoss,
    fastcl.SampledNCELoss,
)  # fmt: skip


@pytest.mark.parametrize("loss", LEARNED)
def test_repr_reads_no_values_that_are_not_there(loss) -> None:
    """The repr of models without memory, or under tracing."""
    with torch.device("meta"):
        module = loss(nn.Parameter(torch.tensor(0.1)))
    assert "temperature=meta (learned)" in repr(module)
    with FakeTensorMode() as mode:
        for temperature in (torch.rand(()) + 1, mode.from_tensor(torch.ones(1))):
            assert "temperature=FakeTensor" in repr(loss(temperature))
        assert "temperature=FakeTensor (learned)" in repr(loss(nn.Parameter(torch.rand(1))))
    assert "temperature=0.25," in repr(loss(torch.tensor([0.25])))
    assert "temperature=0.25 (learned)," in repr(loss(nn.Parameter(torch.tensor(0.25, dtype=torch.bfloat16))))
