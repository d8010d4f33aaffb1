import pytest
import torch

from benchmarks.harness import Session
from litevae.environment import device_name
from litevae_kernels.allocator import keep_freed_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="also the grids and curves, which take hours on a CPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full(*devices): needs --full, on these devices (without any: on all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def left_out(item: pytest.Item) -> bool:
        return any(not mark.args or device in mark.args for mark in item.iter_markers("full"))

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(scope="session")
def session() -> Session:
    """The figures of this run; written to benchmarks/results/ after each benchmark."""
    keep_freed_memory()  # for all providers alike
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # these two, too
    torch.backends.cuda.matmul.allow_tf32 = True
    if torch.cuda.is_available():  # the workspace of matrix products, which stays, is no provider's own
        matrix = torch.ones(64, 64, device="cuda")
        matrix @ matrix
    return Session(device_name())


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No benchmark is compiled for dynamic shapes, or not at all, because of those before it."""
    torch._dynamo.reset()
