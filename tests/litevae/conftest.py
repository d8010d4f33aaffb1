import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine make tiny runs a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
