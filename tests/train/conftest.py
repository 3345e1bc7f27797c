from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_probes() -> Iterator[None]:
    """Probes with few labels draw them once, in all tests of a file."""
    from fastcl.train import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DRAWS", 1)
        yield
