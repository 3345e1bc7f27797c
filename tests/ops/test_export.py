"""`torch.export` with a dynamic number of rows: the exported program computes other batches too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import fastcl

PROTOTYPES = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


class Calls(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


def drawn(n: int, kind: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 2, 4, generator=g) if kind == "views" else torch.randn(n, 4, generator=g)
    return x, torch.randn(n, 4, generator=g) if kind == "rows" else torch.randint(0, 3, (n,), generator=g)


LOSSES = {
    "ClusterInfoNCE": (fastcl.ClusterInfoNCE(), "labels"),
    "of views": (fastcl.ClusterInfoNCE(reduction="none"), "views"),
    "of pairs": (fastcl.ClusterInfoNCE(form="pairs"), "labels"),
    "weighted": (lambda x, y: fastcl.ClusterInfoNCE()(x, y, weights=x[:, 0].abs()), "labels"),
    "statistics": (lambda x, y: fastcl.ClusterInfoNCE()(x, y, return_stats=True)[1].entropy, "labels"),
    "soft clusters": (lambda x, y: fastcl.ClusterInfoNCE()(x, assignments=y.softmax(1)), "rows"),
    "ClipLoss": (lambda x, y: fastcl.ClipLoss()(x, y, 9.0), "rows"),
    "SigLipLoss": (lambda x, y: fastcl.SigLipLoss()(x, y, 9.0, -9.0), "rows"),
    "NTXentLoss": (fastcl.NTXentLoss(), "rows"),
    "PairContrastiveLoss": (fastcl.PairContrastiveLoss(), "labels"),
    "MultiSimilarityLoss": (fastcl.MultiSimilarityLoss(), "labels"),
    "HardNegativeLoss": (fastcl.HardNegativeLoss(0.5, 0.1, 1.0), "views"),
    "HypersphereLoss": (fastcl.HypersphereLoss(), "rows"),
    "KoLeoLoss": (lambda x, _: fastcl.KoLeoLoss()(x), "rows"),
    "ArcFaceLoss": (fastcl.ArcFaceLoss(3, 4), "labels"),
    "ProtoNCELoss": (lambda x, y: fastcl.ProtoNCELoss()(x, y, PROTOTYPES, torch.ones(5)), "labels"),
    "SwAVLoss": (lambda x, y: fastcl.SwAVLoss()([x, y]), "rows"),
    "PMSNLoss": (lambda x, y: fastcl.PMSNLoss()(x, y, PROTOTYPES), "rows"),
    "sinkhorn": (lambda x, _: fastcl.sinkhorn(x).assignments, "rows"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_dynamic_number_of_rows(name) -> None:
    loss, kind = LOSSES[name]
    module, rows = Calls(loss), Dim("rows", min=2, max=4096)
    program = export(module, drawn(8, kind), dynamic_shapes={"x": {0: rows}, "y": {0: rows}}, strict=False).module()
    for n in (8, 24, 33):
        inputs = drawn(n, kind)
        torch.testing.assert_close(program(*inputs), module(*inputs))
