"""Hugging Face accelerate: outputs come back in float32, and the line of the example keeps bfloat16 rows."""

import pytest
import torch

import fastcl
from tests.support.integrations import example, package

accelerate = package("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_bfloat16_rows_come_back_as_float32_and_cast_back_without_a_loss() -> None:
    torch.manual_seed(0)
    encoder, x, labels = torch.nn.Linear(16, 8), torch.randn(32, 16), torch.arange(32) // 2
    with torch.autocast("cpu", torch.bfloat16):
        expected = encoder(x)
    assert expected.dtype == torch.bfloat16
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(encoder)
    rows = prepared(x)
    assert rows.dtype == torch.float32
    assert torch.equal(rows.bfloat16(), expected)
    assert torch.equal(rows.bfloat16().float(), rows)
    criterion, results = fastcl.SupConLoss(0.1), []
    for one in (rows.bfloat16(), expected):
        loss = criterion(one, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(encoder.parameters()))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_example_learns(precision, capsys) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    assert example("with_accelerate").main(25, precision) < 4.8
    assert ("torch.bfloat16" in capsys.readouterr().out) == (precision == "bf16")
    accelerate.state.AcceleratorState._reset_state(True)
