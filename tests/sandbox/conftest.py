from collections.abc import Iterator

import pytest

from rlhf_dist.sandbox import Limits, Sandbox
from rlhf_dist.sandbox.isolation import tried

LIMITS = Limits(
    wall_s=5.0,
    cpu_s=1.0,
    memory_bytes=256 << 20,
    processes=8,
    output_bytes=1 << 18,
    scratch_bytes=1 << 20,
    scratch_files=64,
)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """The best isolation that this machine has."""
    with Sandbox(LIMITS, warm=2) as made:
        if made.refusal:
            pytest.skip(made.refusal)
        yield made


@pytest.fixture(scope="session", params=["bwrap", "unshare"])
def walls(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Each isolation that this machine has."""
    reason = tried(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with Sandbox(LIMITS, isolation=request.param, warm=2) as made:
        yield made
