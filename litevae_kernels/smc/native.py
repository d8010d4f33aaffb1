"""Weight modulation in the compiled core: C++ on the CPU, CUDA C++ on a GPU.

Both fill tensors that the caller allocated, and take any strides.
"""

import torch
from torch import Tensor

from litevae_kernels.backend import core
from litevae_kernels.tensors import native_view


def scratch_elements(filters: int, channels: int) -> int:
    """Elements of scratch memory, of the norm's dtype, that the backward pass of a CUDA call needs."""
    return filters * channels + filters


def forward(
    weight: Tensor, scale: Tensor, gain: Tensor | None, modulated: Tensor, norm: Tensor, eps: float
) -> None:
    """Fills `modulated` (C_out, C_in / groups, K_h, K_w) and `norm` (C_out)."""
    assert core is not None
    views = [native_view(t) for t in (weight, scale, gain, modulated, norm)]
    if weight.device.type == "cpu":
        core.modulate_weight_cpu(*views, eps, torch.get_num_threads())
        return
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        core.modulate_weight_cuda(*views, eps, weight.device.index, stream)


def backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    norm: Tensor,
    grad_weight: Tensor,
    grad_scale: Tensor,
    grad_gain: Tensor | None,
    eps: float,
) -> None:
    """Fills the gradients; `grad_gain` is None where `gain` is."""
    assert core is not None
    tensors = (grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain)
    views = [native_view(t) for t in tensors]
    if weight.device.type == "cpu":
        core.modulate_weight_backward_cpu(*views, eps, torch.get_num_threads())
        return
    with torch.cuda.device(weight.device):
        # From torch's allocator, which knows streams and graph capture; free to go when the kernels are queued.
        scratch = torch.empty(scratch_elements(*weight.shape[:2]), dtype=norm.dtype, device=weight.device)
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        core.modulate_weight_backward_cuda(*views, eps, scratch.data_ptr(), weight.device.index, stream)
