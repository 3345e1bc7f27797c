import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

import fastcl
from fastcl.kernels import ops

# The same examples on every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, print_blob=False)
settings.register_profile("explore", deadline=None, database=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

BACKENDS = tuple(ops.BACKENDS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend."""
    with fastcl.use_backend(request.param):
        yield request.param
