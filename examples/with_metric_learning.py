"""pytorch-metric-learning's trainer and its CrossBatchMemory with fastcl's losses."""

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.trainers import MetricLossOnly
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import fastcl
from fastcl.metric_learning import MetricLearningLoss, SupConLoss


class Queued(torch.nn.Module):
    """Wang et al.'s cross-batch memory on our queue: CrossBatchMemory stores N x M pairs, this stores none."""

    def __init__(self, temperature: float, dim: int, size: int) -> None:
        super().__init__()
        self.queue = fastcl.MemoryQueue(size, dim, clusters=True, ids=True)
        self.criterion, self.count = fastcl.ClusterInfoNCE(temperature), 0

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, indices_tuple: None = None) -> torch.Tensor:
        ids = torch.arange(self.count, self.count + len(labels))  # a row does not meet its own copy
        self.count += len(labels)
        self.queue.enqueue(embeddings, labels, ids)
        return self.criterion(embeddings, labels, contrasts=self.queue, ids=ids)


LOSSES = {
    "batch": lambda: SupConLoss(0.1),
    "memory": lambda: CrossBatchMemory(SupConLoss(0.1), 32, memory_size=1024),
    "queue": lambda: Queued(0.1, 32, 1024),
    "sigmoid": lambda: MetricLearningLoss(fastcl.SigmoidLoss(0.1, -10.0)),
}


def main(name: str = "batch", loss: torch.nn.Module | None = None, epochs: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    losses: list[float] = []
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))
    trainer = MetricLossOnly(
        models={"trunk": encoder},
        optimizers={"trunk_optimizer": torch.optim.AdamW(encoder.parameters(), lr=3e-3)},
        batch_size=256,
        loss_funcs={"metric_loss": LOSSES[name]() if loss is None else loss},
        dataset=TensorDataset(images, torch.tensor(digits.target)),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    trainer.end_of_iteration_hook = lambda trainer: losses.append(float(trainer.losses["metric_loss"].detach()))
    trainer.train(num_epochs=epochs)
    print(f"loss {losses[0]:.3f}, at the end {losses[-1]:.3f}")
    return encoder


if __name__ == "__main__":
    main()
