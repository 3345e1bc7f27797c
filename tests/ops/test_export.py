"""`torch.export` with a dynamic number of rows: the exported program computes other batches too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import fastcl

PROTOTYPES = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Calls(nn.Module):
    """A model that owns the loss; torch 2.6 exports no module that its model does not own."""

    def __init__(self, loss: nn.Module, call: Call) -> None:
        super().__init__()
        self.loss, self.call = loss, call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call(self.loss, x, y)


def plainly(loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = loss(x, y)
    return found


def drawn(n: int, kind: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 2, 4, generator=g) if kind == "views" else torch.randn(n, 4, generator=g)
    return x, torch.randn(n, 4, generator=g) if kind == "rows" else torch.randint(0, 3, (n,), generator=g)


LOSSES: dict[str, tuple[nn.Module, str, Call]] = {
    "ClusterInfoNCE": (fastcl.ClusterInfoNCE(), "labels", plainly),
    "of views": (fastcl.ClusterInfoNCE(reduction="none"), "views", plainly),
    "of pairs": (fastcl.ClusterInfoNCE(form="pairs"), "labels", plainly),
    "weighted": (fastcl.ClusterInfoNCE(), "labels", lambda m, x, y: m(x, y, weights=x[:, 0].abs())),
    "statistics": (fastcl.ClusterInfoNCE(), "labels", lambda m, x, y: m(x, y, return_stats=True)[1].entropy),
    "soft clusters": (fastcl.ClusterInfoNCE(), "rows", lambda m, x, y: m(x, assignments=y.softmax(1))),
    "ClipLoss": (fastcl.ClipLoss(), "rows", lambda m, x, y: m(x, y, 9.0)),
    "SigLipLoss": (fastcl.SigLipLoss(), "rows", lambda m, x, y: m(x, y, 9.0, -9.0)),
    "NTXentLoss": (fastcl.NTXentLoss(), "rows", plainly),
    "PairContrastiveLoss": (fastcl.PairContrastiveLoss(), "labels", plainly),
    "MultiSimilarityLoss": (fastcl.MultiSimilarityLoss(), "labels", plainly),
    "HardNegativeLoss": (fastcl.HardNegativeLoss(0.5, 0.1, 1.0), "views", plainly),
    "HypersphereLoss": (fastcl.HypersphereLoss(), "rows", plainly),
    "KoLeoLoss": (fastcl.KoLeoLoss(), "rows", lambda m, x, _: m(x)),
    "ArcFaceLoss": (fastcl.ArcFaceLoss(3, 4), "labels", plainly),
    "ProtoNCELoss": (fastcl.ProtoNCELoss(), "labels", lambda m, x, y: m(x, y, PROTOTYPES, torch.ones(5))),
    "SwAVLoss": (fastcl.SwAVLoss(), "rows", lambda m, x, y: m([x, y])),
    "PMSNLoss": (fastcl.PMSNLoss(), "rows", lambda m, x, y: m(x, y, PROTOTYPES)),
    "sinkhorn": (nn.Identity(), "rows", lambda _m, x, _: fastcl.sinkhorn(x).assignments),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_dynamic_number_of_rows(name) -> None:
    loss, kind, call = LOSSES[name]
    module, rows = Calls(loss, call), Dim("rows", min=2, max=4096)
    program = export(module, drawn(8, kind), dynamic_shapes={"x": {0: rows}, "y": {0: rows}}, strict=False).module()
    for n in (8, 24, 33):
        inputs = drawn(n, kind)
        torch.testing.assert_close(program(*inputs), module(*inputs))
