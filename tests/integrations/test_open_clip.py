"""open_clip: our losses in its own training loop, equal to its own."""

from types import SimpleNamespace

import pytest
import torch

import fastcl
from tests.support.integrations import example, package, same_training

open_clip = package("open_clip")
train = package("open_clip_train.train")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_training_epoch(accum_freq) -> None:
    main = example("with_open_clip").main
    # Adam would divide the gradient of the keys' bias, which is rounding, by itself.
    ours, theirs = (main(1, loss, accum_freq, torch.optim.SGD) for loss in (fastcl.ClipLoss(), open_clip.ClipLoss()))
    same_training(ours, theirs, 1e-6)


class WithStats(fastcl.ClipLoss):
    """Keeps statistics beside the losses, which open_clip sums."""

    def forward(self, *arguments, **named):
        losses, self.stats = super().forward(*arguments, return_stats=True, **named)
        return losses


def test_statistics_do_not_lie_among_the_losses() -> None:
    main, loss = example("with_open_clip").main, WithStats()
    same_training(main(1, loss), main(1, fastcl.ClipLoss()), 0)
    assert 0 <= loss.stats.scalars("clip/")["clip/top1"] <= 1


def test_what_create_loss_passes_is_refused_in_words() -> None:
    args = SimpleNamespace(
        distill=False, model="ViT", siglip=False, local_loss=True, gather_with_grad=True, rank=0, world_size=2,
        horovod=False, loss_dist_impl=None,
    )  # fmt: skip
    theirs = open_clip.create_loss(args)
    assert isinstance(theirs, open_clip.ClipLoss)
    with pytest.raises(TypeError, match="gather=True"):
        fastcl.ClipLoss(local_loss=theirs.local_loss, gather_with_grad=theirs.gather_with_grad)
    with pytest.raises(TypeError, match="gather=True"):
        fastcl.SigLipLoss(rank=0, world_size=2)


def test_siglip_with_its_model() -> None:
    torch.manual_seed(0)
    module = example("with_open_clip")
    model = module.make_model()
    model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    images, texts = next(iter(module.make_data(32)["train"].dataloader))
    results = []
    for loss in (fastcl.SigLipLoss(), package("open_clip.loss").SigLipLoss()):
        value = loss(**model(images, texts), output_dict=True)["contrastive_loss"]
        results.append(
            (value.detach(), *torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad]))
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
