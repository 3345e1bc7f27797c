"""Functions with the calls of solo-learn's `solo.losses`, for its methods: replace the import."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import fastcl


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1, gather: bool = True) -> Tensor:
    """Theirs is L_in without 1 / |P|: the same gradient, and the same value with one positive for each row."""
    return fastcl.ClusterInfoNCE(temperature, form="inside", gather=gather)(z, indexes)


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """Theirs does not normalise: the method does. Their queue is [D, K]."""
    return fastcl.MoCoLoss(temperature, normalize=False)(query, key, queue.T)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2, gather: bool = True) -> Tensor:
    """The keys have no gradient, and the loss is multiplied by 2 T."""
    return 2 * temperature * fastcl.ClusterInfoNCE(temperature, gather=gather)(query, contrasts=key.detach())


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    return fastcl.ClusterInfoNCE(temperature)(nn, contrasts=p)


def main(steps: int = 30) -> float:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    for step in range(steps):
        batch = torch.randperm(len(images))[:256]
        views = images[batch].repeat(2, 1)  # [2 N, D]: all first views, then all second ones
        loss = simclr_loss_func(encoder(views + 0.1 * torch.randn_like(views)), indexes=batch.repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
