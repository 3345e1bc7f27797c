"""The methods of the trainer. A method is a subclass of `Method` and a line in `METHODS`."""

from fastcl.train import OptionError
from fastcl.train.methods.clustered import PCL, SCAN, DeepCluster
from fastcl.train.methods.contrastive import ASCL, NNCLR, PIRL, ClInfoNCE, ClusterPrediction, MoCo, SimCLR, SupCon
from fastcl.train.methods.method import Method
from fastcl.train.methods.prototypes import DINO, MSN, PMSN, SinkhornClInfoNCE, SwAV
from fastcl.train.methods.views import BYOL, WMSE, BarlowTwins, LDReg, SimSiam, VICReg

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR, "clinfonce": ClInfoNCE, "supcon": SupCon, "cluster-ce": ClusterPrediction,
    "moco": MoCo, "nnclr": NNCLR, "swav": SwAV, "msn": MSN, "pmsn": PMSN, "dino": DINO,
    "ascl": ASCL, "pirl": PIRL, "ldreg": LDReg, "deepcluster": DeepCluster, "pcl": PCL, "scan": SCAN,
    "vicreg": VICReg, "barlow": BarlowTwins, "wmse": WMSE, "simsiam": SimSiam, "byol": BYOL,
}  # fmt: skip


def kind_of(method: str, clusters: str | None) -> type[Method]:
    """The class that --method trains with these --clusters."""
    if clusters == "sinkhorn":
        if METHODS[method] is not ClInfoNCE:
            raise OptionError(f"--clusters sinkhorn needs --method clinfonce; got --method {method}")
        return SinkhornClInfoNCE
    return METHODS[method]
