import pytest
import torch


@pytest.fixture(scope="session")
def pair():
    """Returns a function that makes two float64 tensors, uniform in [-1, 1]."""

    def make(shape):
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in "ab")

    return make
