"""All contestants compute the same numbers, and the page compares them with the loop."""

import torch

from benchmarks import matryoshka
from benchmarks.measure import Samples


def test_contestants_compute_the_same_numbers() -> None:
    steps = matryoshka.steps(37, (3, 200, 520), True)
    expected = steps[matryoshka.LOOP_CHUNKED]()
    for name in (matryoshka.LOOP, matryoshka.SWEEP):
        for right, value in zip(expected, steps[name](), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5, msg=name)


def test_the_page_compares_with_the_loop() -> None:
    seconds = {matryoshka.LOOP: [0.03, 0.03], matryoshka.SWEEP: [0.02, 0.02]}
    samples = Samples(seconds, dict.fromkeys(seconds, 1))
    text = matryoshka.page([((8, (2, 4), False), samples)], "a processor", 2)
    assert "## 8 rows, dims 2, 4, one direction" in text
    assert "1.50 times the products of 4 numbers." in text
    assert "| loop, cpu | 30.0 ms | 1.00x |" in text
    assert "| one sweep, chunked | 20.0 ms | 1.50x |" in text
