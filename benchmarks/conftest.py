from collections.abc import Iterator

import pytest
import torch

from benchmarks.harness import Session, device_name
from litevae_kernels.allocator import keep_freed_memory


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """The figures of this run; written to benchmarks/results/ at its end."""
    keep_freed_memory()  # for all providers alike
    torch.manual_seed(0)
    session = Session(device_name())
    yield session
    if session.results:
        print(f"\nresults: {session.save()}")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No benchmark is compiled for dynamic shapes, or not at all, because of those before it."""
    torch._dynamo.reset()
