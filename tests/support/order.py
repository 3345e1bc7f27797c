"""Which files several processes begin with: a long one that comes last keeps one busy while the others wait."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
# Those that take longest, the longest first.
LONGEST = (
    "project/test_packaging.py",
    "train/test_train.py",
    "backends/test_native.py",
    "losses/test_cluster_left_out.py",
    "backends/test_triton_compiled.py",
    "train/test_train_compare.py",
    "ops/test_library.py",
    "distributed/test_distributed.py",
    "ops/contrastive/test_stats.py",
    "losses/test_cluster.py",
    "ops/contrastive/test_cuda.py",
    "ops/sinkhorn/test_sinkhorn_op.py",
)
_PLACES = {TESTS / name: place for place, name in enumerate(LONGEST)}


def place(path: Path) -> int:
    """All others come after them, in the order in which they are found."""
    return _PLACES.get(path, len(LONGEST))
