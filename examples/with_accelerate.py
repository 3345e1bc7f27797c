"""SupCon with Hugging Face accelerate in bfloat16 mixed precision, with bfloat16 rows in the loss."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastcl


def main(steps: int = 40, mixed_precision: str = "bf16") -> float:
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=256, shuffle=True)
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)
    criterion = fastcl.SupConLoss(temperature=0.1, gather=True)  # all processes' rows

    step = 0
    while step < steps:
        for batch, labels in loader:
            views = batch[:, None] + 0.1 * torch.randn(len(batch), 2, 64, device=batch.device)
            rows = encoder(views)  # accelerate returns float32, whatever the model computed in
            if accelerator.mixed_precision == "bf16":
                rows = rows.bfloat16()  # the numbers that the model computed: nothing is rounded again
            loss = criterion(rows, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                accelerator.print(f"step {step:3d}  loss {loss.item():.3f}  rows {rows.dtype}")
            step += 1
            if step == steps:
                break
    return loss.item()


if __name__ == "__main__":
    main()
