from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Tiny layers gain nothing from threads, and wait long for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """Constructor arguments of a LiteVAE that runs in milliseconds."""
    return {
        "extractor_channels": 8,
        "extractor_multipliers": (1, 2),
        "aggregator_channels": 8,
        "aggregator_multipliers": (1, 3),
        "encoder_num_groups": 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "num_groups": 4,
    }
