import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Limits PyTorch to one thread; on a busy machine, several would slow tiny runs down a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
