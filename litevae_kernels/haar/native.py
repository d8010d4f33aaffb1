"""The Haar transform in the compiled core: C++ on the CPU, CUDA C++ on a GPU.

Both functions fill tensors that the caller allocated, and take any strides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litevae_kernels.backend import core
from litevae_kernels.haar.shapes import MODES
from litevae_kernels.tensors import current_stream, device_guard, native_view, scratch_memory


def _call(
    name: str, image: Tensor, coeffs: Sequence[Tensor], levels: int, mode: str, scale: float, stacked: bool
) -> None:
    assert core is not None
    image_view, *coeff_views = [native_view(x) for x in (image, *coeffs)]
    arguments = (image_view, coeff_views, levels, MODES.index(mode), 0.5 * scale, stacked)
    if image.is_cpu:
        getattr(core, f"{name}_cpu")(*arguments, torch.get_num_threads())
        return
    with device_guard(image.device):
        scratch = scratch_memory(core.haar_scratch_bytes(image_view, coeff_views[0], levels), image.device)
        stream = current_stream(image.device)
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
