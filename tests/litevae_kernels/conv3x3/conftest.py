"""Fixtures that the tests of the 3x3 convolution share."""

import pytest
import torch

from litevae_kernels.arithmetic import current_isa
from litevae_kernels.conv3x3.dispatch import why_not

SERVES_BFLOAT16 = current_isa() == "avx512bf16" and why_not(torch.bfloat16, "avx512bf16") is None


@pytest.fixture
def needs_kernel() -> None:
    """Skips a test where the kernels that multiply in bfloat16 do not serve the CPU."""
    if not SERVES_BFLOAT16:
        pytest.skip("the kernels that multiply in bfloat16 do not serve this CPU")
