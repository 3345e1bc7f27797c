"""Backend ``cuda`` on a device under NVIDIA's checkers. `test_gpu.py` has the tests of all backends on a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcl.ops.backends import choose, cuda_runtime

HERE = "cuda" in choose.AVAILABLE and not cuda_runtime.kernels().emulated
SANITIZER = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not HERE, reason="backend cuda: " + choose.MISSING.get("cuda", "emulated")),
    pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer"),
]

# Small odd shapes: rows that fit in shared memory and streamed rows; one or both directions, ids, bias, scales,
# a queue.
STATISTICS = """
import torch, fastcl
device = "cuda"
want = ("lse_all", "lse_pos", "lse_neg", "sum_pos")
with fastcl.use_backend("cuda"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, m, d, scale in ((133, None, 33, 5.0), (133, 141, 33, 300.0), (5, 70, 3000, 5.0)):
            g = torch.Generator().manual_seed(0)
            x = torch.randn(n, d, generator=g).to(device, dtype).requires_grad_()
            arguments = {"anchor_clusters": torch.arange(n, device=device) // 3}
            if m is not None:
                arguments |= {
                    "contrasts": torch.randn(m, d, generator=g).to(device, dtype).requires_grad_(),
                    "contrast_clusters": torch.arange(m, device=device) // 2,
                    "anchor_ids": torch.arange(n, device=device) % 7,
                    "contrast_ids": torch.arange(m, device=device) % 5,
                    "contrast_bias": torch.randn(m, generator=g).to(device).requires_grad_(),
                    "normalize_contrasts": True,
                    "both": True,
                }
            scales = torch.tensor([scale, 1.0], device=device, requires_grad=True)
            s = fastcl.contrastive_stats(x, **arguments, logit_scale=scales, normalize_anchors=True, want=want)
            sides = [s] if m is None else [s, s.reverse]
            fields = [f for side in sides for f in (side.lse_all, side.sum_pos)]
            sum(torch.where(f.isfinite(), f, 0).sum() for f in fields).backward()
            queue = torch.randn(141, d, generator=g).to(device, dtype)
            s = fastcl.contrastive_stats(x, queue, normalize_anchors=True, logit_scale=scale)
            s.lse_all.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
print("done")
"""


# Rows for one warp, for several, and longer ones; scores that stay on the chip; top-k lists that are sorted repeatedly.
SINKHORN_AND_TOPK = """
import torch, fastcl
device = "cuda"
with fastcl.use_backend("cuda"):
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, k in ((37, 5), (131, 513), (5, 8193)):
            scores = torch.randn(2, n, k, generator=g).to(device, dtype).requires_grad_()
            for tol in (None, 1e-2):
                fastcl.sinkhorn(scores, n_iters=3, tol=tol).assignments.square().sum().backward()
        for n, m, d, k in ((70, 333, 17, 5), (17, 700, 40, 200)):
            rows = [torch.randn(size, d, generator=g).to(device, dtype) for size in (n, m)]
            ids = [torch.arange(size, device=device) % 7 for size in (n, m)]
            fastcl.topk_similarity(*rows, k, query_ids=ids[0], key_ids=ids[1])
    if device == "cuda":
        torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("program", [STATISTICS, SINKHORN_AND_TOPK], ids=["statistics", "sinkhorn_and_topk"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_kernels_under_the_sanitizer(tool, program) -> None:
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "done" in done.stdout
