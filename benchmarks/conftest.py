import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.instruction_sets import settings_of_rivals

# oneDNN reads its variable when litevae_kernels asks for its dtypes, so this comes before the other imports.
os.environ.update(settings_of_rivals())

import pytest
import torch

from benchmarks.session import Session
from litevae.environment import device_name
from litevae_kernels.allocator import keep_freed_memory
from litevae_kernels.backend import core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="also run all shapes, grids and curves, which take hours on a CPU"
    )
    parser.addoption(
        "--results", type=Path, metavar="FOLDER", help="folder of the results; default: results/"
    )
    parser.addoption(
        "--dry-run", action="store_true", help="rehearse benchmarks/gpu on a CPU, with tiny images"
    )


LEFT_OUT = pytest.StashKey[list[str]]()  # benchmarks that this run leaves out without --full
SESSION = pytest.StashKey[Session]()
TESTS = pytest.StashKey[set[str]]()  # all benchmarks; empty if only some were named


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any("::" in argument for argument in config.args)
    config.stash[TESTS] = set() if named else {item.nodeid for item in items}
    config.stash[LEFT_OUT] = []
    if config.getoption("--full"):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def left_out(item: pytest.Item) -> bool:
        return any(not mark.args or device in mark.args for mark in item.iter_markers("full"))

    deselected = [item for item in items if left_out(item)]
    counts = Counter(item.nodeid.rpartition("/")[2].partition("[")[0] for item in deselected)
    config.stash[LEFT_OUT] += [f"{name} ({count})" for name, count in counts.items()]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if not left_out(item)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if SESSION in config.stash:
        for result in config.stash[SESSION].results:
            for line in result.verdicts():
                terminalreporter.write_line(line)
    if left_out := config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(f"Left out without --full: {', '.join(left_out)}")


def machine() -> str:
    """Returns the GPU, or the CPU with the instruction set in use: each set has its own file of results."""
    if torch.cuda.is_available() or core is None:
        return device_name()
    return f"{device_name()}, {core.isa()}"


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The figures of this run, written to benchmarks/results/ after each benchmark."""
    keep_freed_memory()  # the same for all providers
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # these two as well
    torch.backends.cuda.matmul.allow_tf32 = True
    if (
        torch.cuda.is_available()
    ):  # the workspace of matrix products stays allocated and belongs to no provider
        matrix = torch.ones(64, 64, device="cuda")
        matrix @ matrix
    dry_run = request.config.getoption("--dry-run")
    request.config.stash[SESSION] = Session(
        f"{device_name()}, dry run" if dry_run else machine(),
        request.config.getoption("--results"),
        dry_run,
        request.config.stash[TESTS],
    )
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def wanted(request: pytest.FixtureRequest, device: str) -> Callable[[str], bool]:
    """Returns a function that decides whether to measure what its argument names: on a CPU, only with --full."""

    def decide(what: str) -> bool:
        if device != "cpu" or request.config.getoption("--full"):
            return True
        request.config.stash[LEFT_OUT].append(what)
        return False

    return decide


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Keeps earlier benchmarks from making the compiler use dynamic shapes or give up."""
    torch._dynamo.reset()
