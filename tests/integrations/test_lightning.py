"""PyTorch Lightning: the example trains as a plain loop does, and logs the statistics."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from tests.support.integrations import example, package, same_training

lightning = package("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_the_trainer_trains_as_a_plain_loop() -> None:
    module = example("with_lightning")
    trained = module.main(steps=3, enable_progress_bar=False)

    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=256, shuffle=True)
    model = module.SupCon()
    optimizer = model.configure_optimizers()
    for _, (batch, labels) in zip(range(3), loader, strict=False):
        views = batch[:, None] + 0.1 * torch.randn(len(batch), 2, 64)
        loss, stats = model.criterion(model.encoder(views), labels, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same_training(trained, model, 1e-6)
    logged = trained.trainer.callback_metrics
    assert logged["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    for name, value in stats.scalars("train/").items():
        assert logged[name].item() == pytest.approx(value, rel=1e-6)


def test_the_state_of_a_loss_is_in_a_checkpoint(tmp_path) -> None:
    """A learned temperature, which the optimizer of the example's module also has."""
    import fastcl

    module = example("with_lightning")

    class Learned(module.SupCon):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = fastcl.ClusterInfoNCE(torch.nn.Parameter(torch.tensor(0.2)))

    module_data = load_digits()
    rows = TensorDataset(
        torch.tensor(module_data.images, dtype=torch.float32).flatten(1), torch.tensor(module_data.target)
    )
    model = Learned()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows, batch_size=128))
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    loaded = Learned.load_from_checkpoint(tmp_path / "state.ckpt")
    assert loaded.criterion.temperature.item() == model.criterion.temperature.item() != pytest.approx(0.2, abs=1e-6)
