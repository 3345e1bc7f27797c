"""CLIP on the upper and lower halves of scikit-learn's digits, on one or more processes:

    torchrun --nproc-per-node 2 examples/clip_torchrun.py

Without torchrun it runs on one process and gives the same numbers up to rounding.
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn

import fastcl


class TwoTowers(nn.Module):
    """Includes the loss, so that DistributedDataParallel also averages the gradient of the learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = (nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(2))
        temperature = nn.Parameter(torch.tensor(0.1))
        self.loss = fastcl.ClusterInfoNCE(temperature, symmetric=True, gather="ring")  # or gather=True

    def forward(self, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        return self.loss(self.upper(upper), contrasts=self.lower(lower))  # both [rows of this process, 32]


def train(steps: int, rank: int, size: int) -> float:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16
    model = towers = TwoTowers()
    if size > 1:
        model = nn.parallel.DistributedDataParallel(towers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = images[torch.randperm(len(images))[:500]]  # the same on every process; each takes its own rows below
        upper, lower = batch.tensor_split(size)[rank].split(32, dim=1)
        loss = model(upper, lower)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if size > 1:  # each process returns its share; the mean is the loss of all 500
            distributed.all_reduce(loss := loss.detach() / size)
        if step % 20 == 0 and rank == 0:
            temperature = towers.loss.temperature.item()
            print(f"step {step:3d}  loss {loss.item():.4f}  temperature {temperature:.4f}", flush=True)
    return loss.item()


def main(steps: int = 60) -> float:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        distributed.init_process_group("gloo")
    loss = train(steps, rank, size)
    # The model is gone by now. If it outlived the process group, PyTorch might hang: DistributedDataParallel would free
    # the group while it holds Python's lock, and wait for a thread of the group that waits for the lock.
    if size > 1:
        distributed.barrier()  # no process may exit while another still receives from it
        distributed.destroy_process_group()
    return loss


if __name__ == "__main__":
    main()
