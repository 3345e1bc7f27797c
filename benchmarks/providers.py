"""The measured providers: fastcl's backends, plain PyTorch and other libraries; and why some are missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import fastcl
from benchmarks import formulas
from benchmarks.cases import TEMPERATURE, Case, Inputs
from fastcl.ops.backends.choose import AVAILABLE, MISSING

Loss = Callable[[Inputs], Tensor]


class CannotPoseError(Exception):
    """The provider cannot compute the case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """`pose` returns the loss of a case or raises CannotPoseError. It must be picklable for the memory's process.

    package: the package whose version is recorded in the rows.
    """

    name: str
    pose: Callable[[Case], Loss]
    package: str = "torch"

    @property
    def is_fastcl(self) -> bool:
        return self.package == "fastcl"


EAGER, COMPILED, CHUNKED = "eager", "torch.compile", "checkpointed"
LINEAR_CROSS_ENTROPY = "linear_cross_entropy"
# Backends that support only one kind of device.
_DEVICE_OF_BACKEND = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def providers(device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """The providers that can be measured on `device`, and the reasons for those that cannot."""
    found = []
    missing = {f"fastcl {name}": reason for name, reason in MISSING.items()}
    for backend in AVAILABLE:
        needed = _DEVICE_OF_BACKEND.get(backend, device.type)
        if backend == "reference":
            continue  # the specification, which is the same as eager
        if needed == device.type:
            found.append(Provider(f"fastcl {backend}", partial(_fastcl, backend), "fastcl"))
        else:
            missing[f"fastcl {backend}"] = f"computes on {needed}"
    found += [
        Provider(EAGER, _eager),
        Provider(COMPILED, _compiled),
        Provider(CHUNKED, _checkpointed),
    ]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found.append(Provider(LINEAR_CROSS_ENTROPY, _linear_cross_entropy))
    else:
        missing[LINEAR_CROSS_ENTROPY] = f"torch {torch.__version__} has none in chunks"
    for name, module, pose in (
        ("pytorch-metric-learning", "pytorch_metric_learning.losses", _metric_learning),
        ("lightly", "lightly.loss.ntx_ent_loss", _lightly),
    ):
        reason = _why_not(module)
        if reason is None:
            found.append(Provider(name, pose, name))
        else:
            missing[name] = reason
    for name, package, module, pose in (
        ("Inf-CL", "inf_cl", "inf_cl", _inf_cl),
        ("cut-cross-entropy", "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy),
        ("Liger-Kernel", "liger-kernel", "liger_kernel.transformers", _liger),
    ):
        reason = "needs a GPU" if device.type == "cpu" else _why_not(module)
        if reason is None:
            found.append(Provider(name, pose, package))
        else:
            missing[name] = reason
    return found, missing


def _why_not(module: str) -> str | None:
    """The reason why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package can fail with any error
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _call(formula: Callable[..., Tensor], case: Case, **options: Any) -> Loss:
    """Calls a formula with the tensors of its case."""
    if case.loss == "self":
        return lambda i: formula(i.anchors, i.clusters, TEMPERATURE, **options)
    if case.loss == "two sets":
        return lambda i: formula(i.anchors, i.contrasts, TEMPERATURE, **options)
    return lambda i: formula(i.anchors, i.keys, i.queue, TEMPERATURE, **options)


def _fastcl(backend: str, case: Case) -> Loss:
    if case.loss == "self":
        clustered = fastcl.ClusterInfoNCE(TEMPERATURE)
        call: Loss = lambda i: clustered(i.anchors, i.clusters)  # noqa: E731
    elif case.loss == "two sets":
        symmetric = fastcl.ClusterInfoNCE(TEMPERATURE, symmetric=True)
        call = lambda i: symmetric(i.anchors, contrasts=i.contrasts)  # noqa: E731
    else:
        moco = fastcl.MoCoLoss(TEMPERATURE)
        call = lambda i: moco(i.anchors, i.keys, i.queue)  # noqa: E731

    def loss(inputs: Inputs) -> Tensor:
        with fastcl.use_backend(backend):
            return call(inputs)

    return loss


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "self": formulas.self_contrast,
    "two sets": formulas.two_sets,
    "queue": formulas.queue,
}
_CHUNKED: dict[str, Callable[..., Tensor]] = {
    "self": formulas.chunked_self_contrast,
    "two sets": formulas.chunked_two_sets,
    "queue": formulas.chunked_queue,
}


def _eager(case: Case) -> Loss:
    return _call(_PLAIN[case.loss], case)


def _compiled(case: Case) -> Loss:
    return _call(torch.compile(_PLAIN[case.loss], dynamic=False), case, product=case.dtype)


def _checkpointed(case: Case) -> Loss:
    if case.n <= formulas.block_rows(case.m):
        raise CannotPoseError("the whole case is one block")
    return _call(_CHUNKED[case.loss], case)


def _linear_cross_entropy(case: Case) -> Loss:
    if case.loss == "self":
        raise CannotPoseError("a row's own logit cannot be left out of its classes, nor can it have several positives")
    if case.loss == "queue":
        raise CannotPoseError("each anchor has its own class, its key")
    return _call(formulas.linear_cross_entropy_two_sets, case)


def _metric_learning(case: Case) -> Loss:
    if case.loss == "queue":
        raise CannotPoseError("keys would be negatives of the other anchors")
    from pytorch_metric_learning.losses import SupConLoss

    supcon = SupConLoss(temperature=TEMPERATURE)
    if case.loss == "self":
        return lambda i: supcon(i.anchors.float(), i.clusters)

    def two_sets(inputs: Inputs) -> Any:
        assert inputs.contrasts is not None
        x, y = inputs.anchors.float(), inputs.contrasts.float()
        ids = torch.arange(len(x), device=x.device)
        same = ids.clone()  # for the same tensor twice, it assumes a single set and drops the diagonal
        return (supcon(x, ids, ref_emb=y, ref_labels=same) + supcon(y, ids, ref_emb=x, ref_labels=same)) / 2

    return two_sets


def _lightly(case: Case) -> Loss:
    if case.loss == "queue":
        raise CannotPoseError("its memory bank enqueues the keys in the forward, so every call has a different queue")
    if case.loss == "two sets" or case.cluster_size != 2:
        raise CannotPoseError("NTXentLoss supports only two views of a batch")
    from lightly.loss.ntx_ent_loss import NTXentLoss

    ntxent = NTXentLoss(temperature=TEMPERATURE)

    def pairs(inputs: Inputs) -> Any:
        x = inputs.anchors.float()
        return ntxent(x[0::2], x[1::2])

    return pairs


# Peers for GPUs. Each is a loss of a classifier with the other set's rows as classes: two sets, one direction per call.


def _both_directions(case: Case, one_way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """The mean of both directions. `one_way` takes unit rows, the unit rows of the classes, and each row's class."""
    if case.loss == "self":
        raise CannotPoseError("a row's own logit cannot be left out of its classes, nor can it have several positives")
    if case.loss == "queue":
        raise CannotPoseError("each anchor has its own class, its key")

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.contrasts is not None
        x, y = (torch.nn.functional.normalize(rows, dim=1) for rows in (inputs.anchors, inputs.contrasts))
        target = torch.arange(len(x), device=x.device)
        return (one_way(x, y, target) + one_way(y, x, target)) / 2

    return loss


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    def one_way(x: Tensor, y: Tensor, target: Tensor) -> Any:
        return cal_flash_loss(x, y, labels=target, scale=1 / TEMPERATURE, head_dim=min(case.d, 256)).mean()

    return _both_directions(case, one_way)


def _cut_cross_entropy(case: Case) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def one_way(x: Tensor, y: Tensor, target: Tensor) -> Any:
        # Its filter drops gradients below a threshold, which with many classes would drop all of them.
        return linear_cross_entropy(x / TEMPERATURE, y, target, filter_eps=None)

    return _both_directions(case, one_way)


def _liger(case: Case) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()

    def one_way(x: Tensor, y: Tensor, target: Tensor) -> Any:
        return criterion(y, x / TEMPERATURE, target)

    return _both_directions(case, one_way)
