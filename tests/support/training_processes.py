"""Two steps of every method of the trainer, by one process or by several that share the batches."""

from typing import Any

import torch
from torch import Tensor

from fastcl.train.methods import METHODS, kind_of
from fastcl.train.methods.clustered import SCAN, Clustered
from fastcl.train.methods.contrastive import PIRL, ClusterPrediction
from fastcl.train.methods.method import Method
from fastcl.train.methods.prototypes import PrototypeMethod
from fastcl.train.processes import Processes

SHAPE, IMAGES, BATCH = torch.Size((1, 8, 8)), 12, 7
CASES = {name: (name, "labels" if METHODS[name].needs_clusters else None) for name in METHODS}
CASES |= {"clinfonce sinkhorn": ("clinfonce", "sinkhorn"), "moco tags": ("moco", "tags")}


def built(method: str, clusters: str | None) -> Method:
    torch.manual_seed(0)
    kind = kind_of(method, clusters)
    options: dict[str, Any] = {}
    if issubclass(kind, ClusterPrediction):
        options["classes"] = 3
    if issubclass(kind, (Clustered, SCAN, PIRL)):
        options["images"] = IMAGES
    if issubclass(kind, (Clustered, SCAN)):
        options["n_clusters"] = 2
    if issubclass(kind, PrototypeMethod):
        options["masses"] = torch.tensor([0.5, 0.25, 0.25])
    if clusters == "tags":
        options["tags"] = 4
    made = kind(SHAPE, 0.2, **options)
    if isinstance(made, (Clustered, SCAN)):
        made.renew(torch.randn(IMAGES, 128), seed=0)
    return made


def stepped(method: str, clusters: str | None, processes: Processes) -> dict[str, Any]:
    """The losses of both steps, and the state after them."""
    made = built(method, clusters)
    processes.gathering(made)
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    g = torch.Generator().manual_seed(1)
    losses = []
    for step in range(2):
        views, chosen = torch.rand(IMAGES, 2, *SHAPE, generator=g), torch.randperm(IMAGES, generator=g)[:BATCH]
        mine = torch.from_numpy(processes.share(chosen.numpy()))
        ids: Tensor | None = None
        if clusters == "labels":
            ids = mine % 3
        if clusters == "tags":
            ids = torch.stack([mine % k == 0 for k in range(2, 6)], 1)
        torch.manual_seed(step)
        loss = made(views[mine], ids, mine)
        optimiser.zero_grad()
        loss.backward()
        processes.average(made.parameters())
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)  # the methods' gradients differ in size
        optimiser.step()
        losses.append(processes.mean(loss))
    return {"losses": losses, "state": made.state_dict()}


def everything(rank: int, world: int) -> dict[str, Any]:
    return {name: stepped(*case, Processes(rank, world)) for name, case in CASES.items()}
