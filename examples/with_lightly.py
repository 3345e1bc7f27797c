"""lightly's SimCLR tutorial with fastcl's loss, and its MoCo memory as a queue."""

import torch
from lightly.models.modules import SimCLRProjectionHead
from sklearn.datasets import load_digits

import fastcl


class SimCLR(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU())
        self.projection_head = SimCLRProjectionHead(128, 128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))


def main(steps: int = 30, criterion: torch.nn.Module | None = None, queue_size: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16
    model = SimCLR()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    if criterion is None:  # lightly.loss.NTXentLoss(0.1), or with memory_bank_size=(queue_size, 32)
        criterion = fastcl.MoCoLoss(0.1) if queue_size else fastcl.NTXentLoss(0.1)  # gather=True is gather_distributed
    queue = fastcl.MemoryQueue(queue_size, 32) if queue_size else None
    for step in range(steps):
        batch = images[torch.randperm(len(images))[:256]]
        x0, x1 = (batch + 0.1 * torch.randn_like(batch) for _ in range(2))
        z0, z1 = model(x0), model(x1)
        if queue is None:
            loss = criterion(z0, z1)
        else:
            loss = criterion(z0, z1, queue)
            queue.enqueue(z1)  # lightly's loss does this in its forward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    main()
