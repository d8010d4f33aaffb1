"""The Haar transform in the compiled core: C++ on the CPU, CUDA C++ on a GPU.

Both fill tensors that the caller allocated, and take any strides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litevae_kernels.backend import core
from litevae_kernels.haar.reference import MODES, level_sizes
from litevae_kernels.tensors import native_view

# Levels that one CUDA kernel computes; between kernels the LL waits in scratch memory.
_LEVELS_PER_PASS = 3


def scratch_elements(planes: int, height: int, width: int, levels: int) -> int:
    """Float32 (float64 for float64) elements of scratch memory that a CUDA call needs."""
    between = level_sizes(height, width, levels)[_LEVELS_PER_PASS:levels:_LEVELS_PER_PASS]
    return planes * sum(h * w for h, w in between)


def _call(
    name: str, image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    assert core is not None
    views = [native_view(x) for x in (image, *coeffs)]
    arguments = (views[0], views[1:], levels, MODES.index(mode), 0.5 * scale, stacked)
    if image.device.type == "cpu":
        getattr(core, f"{name}_cpu")(*arguments, torch.get_num_threads())
        return
    with torch.cuda.device(image.device):
        # From torch's allocator, which knows streams and graph capture; free to go when the kernels are queued.
        wide = torch.float64 in (image.dtype, coeffs[0].dtype)
        scratch = torch.empty(
            scratch_elements(image.shape[0] * image.shape[1], image.shape[2], image.shape[3], levels),
            dtype=torch.float64 if wide else torch.float32,
            device=image.device,
        )
        stream = torch.cuda.current_stream(image.device).cuda_stream
        getattr(core, f"{name}_cuda")(*arguments, scratch.data_ptr(), image.device.index, stream)


def analysis(
    image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    """Fills `coeffs` from `image`."""
    _call("haar_analysis", image, coeffs, levels, mode, scale, stacked)


def synthesis(
    image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    """Fills `image` from `coeffs`."""
    _call("haar_synthesis", image, coeffs, levels, mode, scale, stacked)
